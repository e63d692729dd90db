"""What the body of a net gives its head."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from .base import SegmentationModel


class EncoderMap:
    """The last map that the head of a net is given in a forward inside `with`; of a net without a head its features.

    Made before the net is compiled: torch.compile does not look for hooks that came later.
    """

    def __init__(self, model: SegmentationModel) -> None:
        self._open, self._map = False, None
        if model.head is None:
            model.feature_extractor.register_forward_hook(self._after)
        else:
            model.feature_extractor.get_submodule(model.head).register_forward_pre_hook(self._before)

    def __enter__(self) -> EncoderMap:
        self._open = True
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open, self._map = False, None

    def take(self) -> Tensor:
        """[B, C, h, w] of the last forward; once, as it keeps that forward's graph alive."""
        found, self._map = self._map, None
        if found is None:
            raise RuntimeError("no forward of the net went through its head")
        return found

    def _before(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        if self._open:
            self._map = given[-1][-1] if isinstance(given[-1], (list, tuple)) else given[-1]

    def _after(self, module: nn.Module, given: tuple[Any, ...], features: Tensor) -> None:
        if self._open:
            self._map = features
