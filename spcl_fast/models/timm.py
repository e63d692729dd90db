"""Any net of timm that gives maps: `model.name timm/NAME`.

Nets with maps of several strides give those from the chosen one on. Nets with one stride, such as ViTs, give the last one, after their
last norm; images are resized to whole patches. Mean and standard deviation are those of the net's pretrained weights.

Source: Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from .base import NetSettings, SegmentationModel
from .foreign import MapOf, chosen, foreign_net, library, made, on_meta

TIMM = "timm/"


def timm_net(num_classes: int, settings: NetSettings) -> SegmentationModel:
    """Raises ConfigError for a name that timm does not have, a net without maps, weights that cannot be had, and without timm."""
    timm, name = library("timm", settings.name), settings.name.removeprefix(TIMM)
    known = not name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if known and not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ConfigError(f"model.name: timm has no net {name!r}{f', did you mean {near[0]!r}?' if near else ''}")
    maps = _maps_of(timm, name)
    taken = chosen(maps, settings.stride, settings.name)
    of_one_stride = len({one.stride for one in maps}) == 1
    options = {} if of_one_stride else {"features_only": True, "out_indices": tuple(one.index for one in taken)}

    def build() -> nn.Module:
        net = _created(timm, name, pretrained=settings.pretrained, **options)
        return _LastMap(net) if of_one_stride else net

    body: Any = made(build)
    about = (body.net if of_one_stride else body).pretrained_cfg
    cell = taken[0].stride if of_one_stride else 1
    return foreign_net(body, taken, num_classes, settings, mean=about["mean"], std=about["std"], cell=cell)


class _LastMap(nn.Module):
    """The map after the last block and the last norm of a net of one stride."""

    net: Any  # of timm: the type of a Module's attributes says only Tensor or Module

    def __init__(self, net: Any) -> None:
        super().__init__()
        net.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
        self.net = net

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.net.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)


def _maps_of(timm: Any, name: str) -> list[MapOf]:
    try:
        info: Any = on_meta(lambda: _created(timm, name, pretrained=False, features_only=True)).feature_info
    except (RuntimeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"model.name: timm's {name} gives no maps ({_first_line(error)}): take another net."
        ) from error
    found = zip(info.out_indices, info.reduction(), info.channels(), strict=True)
    return [MapOf(index, stride, channels) for index, stride, channels in found]


def _created(timm: Any, name: str, *, pretrained: bool, **options: Any) -> Any:
    """ViTs take images of any size where they are asked to, and other nets do not know the word."""
    try:
        try:
            return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **options)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            raise
        raise ConfigError(
            f"model.pretrained: the weights of timm's {name} cannot be had: {_first_line(error)}. They are looked for in timm's "
            f"cache, then on its hub: fetch them where there is a network "
            f"(python -c \"import timm; timm.create_model('{name}', pretrained=True)\"), or leave model.pretrained out."
        ) from error


def _first_line(error: Exception) -> str:
    text = inspect.cleandoc(str(error))
    return text.splitlines()[0] if text else type(error).__name__
