"""Bodies of other libraries as nets: which of their maps become features, their norms frozen, their sizes met.

A body is a module whose forward gives maps [B, C, h, w], the finest first. What its maps are like is found on the meta device, where
nothing is computed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError
from .base import NetSettings, SegmentationModel, linear_classifier
from .head import FusedHead, JoinedMaps

Module = TypeVar("Module", bound=nn.Module)
Made = TypeVar("Made")
WANTED_STRIDE = 8  # where nobody asks for another


class MapOf(NamedTuple):
    """One of a body's maps."""

    index: int  # as the library counts them
    stride: int
    channels: int


class ForeignFeatures(nn.Module):
    """A body of another library and a head on its maps.

    `cell` above 1: images are resized to the nearest multiple of so many pixels, because the body cuts them into patches of that size and
    would drop the rest. `frozen`: BatchNorm, of whatever subclass, keeps its statistics and affine parameters in training mode too.
    """

    def __init__(self, body: nn.Module, head: nn.Module, *, cell: int, frozen: bool) -> None:
        super().__init__()
        self.body, self.head, self.cell = body, head, cell
        if frozen:
            freeze_norms(body)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(*self.body(self.fitted(x)))

    def fitted(self, x: Tensor) -> Tensor:
        """The images at the nearest size that the body takes whole."""
        height, width = (max(1, (side + self.cell // 2) // self.cell) * self.cell for side in x.shape[-2:])
        # exported for any size there is no branch on the size
        if self.cell == 1 or (not torch.compiler.is_exporting() and (height, width) == tuple(x.shape[-2:])):
            return x
        return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def freeze_norms(module: nn.Module) -> None:
    """BatchNorm, of whatever subclass, keeps its statistics and affine parameters, in training mode too. Its keys stay as they are."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.eval().requires_grad_(False)
            norm.train = lambda mode=True, norm=norm: norm  # pyright: ignore[reportAttributeAccessIssue]  it stays in eval


def chosen(maps: Sequence[MapOf], stride: int | None, name: str) -> list[MapOf]:
    """The maps from the chosen stride on, the finest first, one for each stride. Raises ConfigError where there is none of that stride."""
    by_stride = {one.stride: one for one in sorted(maps, key=lambda one: (one.stride, one.index))}
    strides = sorted(by_stride)
    if stride is None:
        stride = next((each for each in strides if each >= WANTED_STRIDE), strides[-1])
    if stride not in by_stride:
        raise ConfigError(
            f"model.stride: got {stride}, and {name} has maps of stride {', '.join(map(str, strides))}: give one of these, or null."
        )
    return [by_stride[each] for each in strides if each >= stride]


def foreign_net(
    body: nn.Module,
    maps: Sequence[MapOf],
    num_classes: int,
    settings: NetSettings,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    cell: int = 1,
) -> SegmentationModel:
    """The body, a head on its maps and a 1x1 classifier as a net; without a feature_dim the maps themselves are the features."""
    widths = [one.channels for one in maps]
    dim = settings.feature_dim
    head = JoinedMaps() if dim is None else made(lambda: FusedHead(widths, dim))
    channels = sum(widths) if dim is None else dim
    return SegmentationModel(
        settings.name,
        ForeignFeatures(body, head, cell=cell, frozen=settings.freeze_bn),
        linear_classifier(channels, num_classes),
        stride=maps[0].stride,
        channels=channels,
        num_classes=num_classes,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        head="head",
    )


def on_meta(build: Callable[[], Module]) -> Module:
    """What `build` makes, without any memory and without moving torch's random numbers."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return outside_of_fakes(build)


def made(build: Callable[[], Module]) -> Module:
    """What `build` makes. Where tensors are fake, as in the memory plan, it is made on the meta device and its tensors become fake ones:
    these libraries look at values while they build.
    """
    from torch._guards import detect_fake_mode

    if detect_fake_mode() is None:
        return build()
    with torch.device("meta"):
        module = outside_of_fakes(build)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _like(buffer)
    return module


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def outside_of_fakes(build: Callable[[], Made]) -> Made:
    """What `build` gives where no tensor is fake, as within the memory plan all are."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return build()


def library(name: str, wanted_by: str) -> Any:
    """The library of that name, which is an extra of the package. Raises ConfigError that says how to get it, or why it does not import."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise ConfigError(
                f"model.name {wanted_by} needs '{name}', which is not installed: pip install \"spcl_fast[{name}]\" (or: pip install {name})"
            ) from None
        raise ConfigError(f"model.name {wanted_by}: '{name}' does not import: {error}") from error
    except Exception as error:  # such as a torchvision of another torch
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model.name {wanted_by}: '{name}' is installed and does not import: {reason}. `spcl-fast doctor` looks at the usual cause, a "
            "torchvision made for another torch."
        ) from error
