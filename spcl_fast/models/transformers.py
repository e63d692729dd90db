"""Any vision backbone of transformers: `model.name transformers/NAME`, NAME of its hub or a folder with config.json.

Taken are the maps of `AutoBackbone`, or, of a model without one such as SegFormer, those of its hidden states that are maps. Mean and
standard deviation are those of NAME's preprocessor_config.json.

Source: Wolf et al., Transformers, https://github.com/huggingface/transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import NetSettings, SegmentationModel
from .foreign import MapOf, chosen, foreign_net, library, made, on_meta, outside_of_fakes

HUB = "transformers/"
PREPROCESSOR = "preprocessor_config.json"
_PROBE = 224  # pixels of the image whose maps are measured, in whole patches


def transformers_net(num_classes: int, settings: NetSettings) -> SegmentationModel:
    """Raises ConfigError for a name without a config, a net without maps, weights that cannot be had, and without transformers."""
    transformers, name = library("transformers", settings.name), settings.name.removeprefix(HUB)
    config = _fetched(name, "its config", lambda: transformers.AutoConfig.from_pretrained(name))
    mean, std = _mean_and_std(transformers, name)

    def build(indices: Sequence[int] | None, *, pretrained: bool = False) -> _Maps:
        """With the maps of these indices, or with all."""
        backbone = type(config) in transformers.AutoBackbone._model_mapping
        if backbone:
            config.out_indices = list(range(len(config.stage_names)) if indices is None else indices)
        auto = transformers.AutoBackbone if backbone else transformers.AutoModel
        if not pretrained:
            return _Maps(auto.from_config(config), None if backbone else indices)
        # the class itself: AutoBackbone asks the hub for the name, even for a folder
        kind = auto._model_mapping[type(config)] if backbone else auto
        net = _fetched(name, "its weights", lambda: kind.from_pretrained(name, config=config))
        return _Maps(net, None if backbone else indices)

    maps = _maps_of(name, on_meta(lambda: build(None)))
    taken = chosen(maps, settings.stride, settings.name)
    body = made(lambda: build([one.index for one in taken], pretrained=settings.pretrained))
    cell = taken[0].stride if len({one.stride for one in maps}) == 1 else 1
    return foreign_net(body, taken, num_classes, settings, mean=mean, std=std, cell=cell)


class _Maps(nn.Module):
    """The maps of a model: a backbone's feature maps, or those of its hidden states that are maps; of all or of some indices."""

    net: Any  # of transformers: the type of a Module's attributes says only Tensor or Module

    def __init__(self, net: Any, indices: Sequence[int] | None) -> None:
        super().__init__()
        self.net, self.indices = net, indices

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.by_index(images)
        return [maps[index] for index in (sorted(maps) if self.indices is None else self.indices)]

    def by_index(self, images: Tensor) -> dict[int, Tensor]:
        if hasattr(self.net, "out_indices"):
            maps = self.net(images).feature_maps
            return dict(zip(self.net.out_indices, maps, strict=True))
        states = self.net(images, output_hidden_states=True).hidden_states or ()
        return {index: state for index, state in enumerate(states) if state.dim() == 4}


def _maps_of(name: str, body: _Maps) -> list[MapOf]:
    def measured() -> dict[int, Tensor]:
        with torch.no_grad(), torch.device("meta"):
            return body.eval().by_index(torch.empty(1, 3, _PROBE, _PROBE))

    try:
        maps = outside_of_fakes(measured)
    except Exception as error:  # whatever a model of text or sound says to an image
        raise ConfigError(
            f"model.name: transformers' {name} does not take an image: {type(error).__name__}: {error}"
        ) from error
    if not maps:
        raise ConfigError(
            f"model.name: transformers' {name} has no AutoBackbone, and none of its hidden states is a map [B, C, h, w]: take one that "
            "has, such as a ResNet, ConvNext, Swin, Dinov2, Dinov3 or SegFormer."
        )
    return [MapOf(index, round(_PROBE / one.shape[2]), one.shape[1]) for index, one in sorted(maps.items())]


def _mean_and_std(transformers: Any, name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Of the images that the net was trained on, as its preprocessor says; 0 and 1 where that leaves images as they are."""
    if Path(name).is_dir():
        path: str | None = os.path.join(name, PREPROCESSOR)
    else:
        path = _fetched(name, f"its {PREPROCESSOR}", lambda: transformers.utils.cached_file(name, PREPROCESSOR))
    try:
        with open(path or "", encoding="utf-8") as file:
            about = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name: {name} has no {PREPROCESSOR} that can be read ({error}), which says its image_mean and image_std. Write one: "
            '{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}'
        ) from None
    if about.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    found = [about.get(key) for key in ("image_mean", "image_std")]
    if not all(isinstance(each, list) and len(each) == 3 for each in found):
        raise ConfigError(f"model.name: {PREPROCESSOR} of {name} lacks image_mean and image_std, three numbers each")
    return found[0], found[1]


def _fetched(name: str, what: str, fetch: Callable[[], Any]) -> Any:
    try:
        return fetch()
    except Exception as error:  # no network, no such name, a broken file: the library raises many kinds
        text = str(error).strip() or type(error).__name__
        raise ConfigError(
            f"model.name: {what} of transformers' {name!r} cannot be had: {text.splitlines()[0]}. It is looked for in a folder of that "
            f'name, in the cache, then on the hub: fetch it where there is a network (hf download "{name}"), or give a folder.'
        ) from error
