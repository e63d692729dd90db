"""Any `nn.Module` by where it is defined: `model.name my_package.my_module:MyNet`.

The protocol: `MyNet` is a class or function, called without arguments, or with `num_classes` where it takes one. It returns an `nn.Module`
with

* `features(images)`, or, without such a method, a forward, that takes [B, 3, H, W] and returns one tensor [B, D, h, w];
* integers `stride` (pixels of the image per pixel of the features) and `channels` (D);
* optionally `mean` and `std`, three numbers each, of RGB in [0, 1] (default: ImageNet's; (0, 0, 0) and (1, 1, 1) leave images as they are),
  and `head`, the name of the submodule that learns at the head's rate.

The classifier, a 1x1 convolution to the classes, is put on top. A `SegmentationModel` that is returned is taken as it is, with its own.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError
from .base import NetSettings, SegmentationModel
from .foreign import freeze_norms, made
from .wrap import wrap_model

PROTOCOL = "docs/settings.md, 'A net of your own', has what it must have"


def net_by_path(num_classes: int, settings: NetSettings) -> SegmentationModel:
    """Raises ConfigError where there is no such module or name in it, or where what it makes does not keep to the protocol."""
    build = _found(settings.name)
    wanted = {"num_classes": num_classes} if _takes(build, "num_classes") else {}
    try:
        module = made(lambda: build(**wanted))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model.name {settings.name}: calling it {'with num_classes' if wanted else 'without arguments'} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model.name {settings.name} gives a {type(module).__name__}, expected an nn.Module ({PROTOCOL})"
        )
    if not isinstance(module, SegmentationModel):
        module = wrap_model(module, num_classes)
    if module.num_classes != num_classes:
        raise ConfigError(
            f"model.name {settings.name} predicts {module.num_classes} classes, and the data has {num_classes}: take "
            "num_classes as an argument"
        )
    module.name = settings.name
    if settings.freeze_bn:
        freeze_norms(module)
    return module


def _found(name: str) -> Callable[..., Any]:
    """The object at MODULE:NAME; the working directory is looked into, too."""
    path, _, attribute = name.rpartition(":")
    here = str(Path.cwd())
    try:
        sys.path.insert(0, here)
        try:
            module = importlib.import_module(path)
        finally:
            sys.path.remove(here)
    except Exception as error:
        raise ConfigError(
            f"model.name {name}: the module {path!r} does not import: {type(error).__name__}: {error}. It is looked for in the working "
            "directory and where Python finds its packages."
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        what = "has no" if found is None else "has, and it is no class or function, a"
        raise ConfigError(f"model.name {name}: {path} {what} {attribute!r} ({PROTOCOL})")
    return found


def _takes(build: Callable[..., Any], parameter: str) -> bool:
    try:
        return parameter in inspect.signature(build).parameters
    except (TypeError, ValueError):
        return False
