"""move_prototypes_: the moving average of the prototypes, in the pass that forms the class sums where the backend can."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Ask, Average, Moments
from . import checks, dispatched
from .pixels import labels_of, pixels_of

_OP = "move_prototypes_"


def move_prototypes_(
    prototypes: Tensor,  # [K, D] float32, contiguous, moved in place
    features: Tensor,  # [B, D, h, w] or [N, D]
    labels: Tensor,  # [B, H, W] or [N], any integer dtype
    *,
    keep: float,
    min_pixels: int = 1,
    decay_absent: bool = False,
    normalize: bool = True,
    ignore_index: int = 255,
    backend: str | None = None,
) -> None:
    """prototype_k <- keep * prototype_k + (1 - keep) * (mean (unit) feature of class k), as `PrototypeBank.update_` on one process.

    A class with fewer than `min_pixels` pixels, or whose sum is not finite, stays, or is multiplied by `keep` where `decay_absent`. No host
    sync. The cuda backend does it in the kernel that adds the partial sums (the features are read once, sums and counts are not written);
    elsewhere it is `class_moments` and `moved_prototypes`. Raises and allocates as `class_moments`.
    """
    pixels = pixels_of(_OP, features)
    values = labels_of(_OP, pixels, labels)
    checks.check_options(
        _OP, ignore_index=ignore_index, backend=backend, normalize=normalize, decay_absent=decay_absent
    )
    _check_prototypes(prototypes, features)
    small = "small" if backends.is_small(features.numel()) else ""
    line = dispatched.line(
        "normalize" if normalize else "", "decay" if decay_absent else "", small, f"@{backend}" if backend else ""
    )
    _run(prototypes, pixels.features.detach(), values, keep, min_pixels, ignore_index, line)


def _check_prototypes(prototypes: Tensor, features: Tensor) -> None:
    """Moved in place, so neither converted nor copied to where the features are."""
    checks.check_float(_OP, "prototypes", prototypes, (2,), "[K, D]")
    checks.check_device(_OP, features, "features", prototypes=prototypes)
    if prototypes.dtype != torch.float32 or not prototypes.is_contiguous():
        layout = "contiguous" if prototypes.is_contiguous() else "not contiguous"
        raise ValueError(f"{_OP}: prototypes must be contiguous and float32, got {prototypes.dtype}, {layout}")
    if prototypes.shape[1] != features.shape[1]:
        raise ValueError(
            f"{_OP}: prototypes and features must agree in their channels, got {list(prototypes.shape)} and {list(features.shape)}"
        )


@torch.library.custom_op("spcl_fast::move_prototypes_", mutates_args=("prototypes",))
def _move_prototypes(
    prototypes: Tensor, features: Tensor, labels: Tensor, keep: float, min_pixels: int, ignore_index: int, line: str
) -> None:
    words = dispatched.words(line)
    ask = Ask(
        "class_moments", features.device, features.dtype, prototypes.shape[0], prototypes.shape[1], "small" in words
    )
    moments = Moments(features, labels, len(prototypes), "normalize" in words, ignore_index)
    used = backends.choose(ask, dispatched.named_backend(line))
    used.move_prototypes(prototypes, moments, Average(keep, min_pixels, "decay" in words))


@_move_prototypes.register_fake
def _(prototypes, features, labels, keep, min_pixels, ignore_index, line):
    return None


_run = dispatched.direct(_move_prototypes, writes=(0,))


def moved_prototypes(
    prototypes: Tensor, sums: Tensor, counts: Tensor, *, keep: float, min_pixels: int, decay_absent: bool
) -> Tensor:
    """The moving average itself: prototypes and sums [K, D], counts [K] -> [K, D]."""
    return Average(keep, min_pixels, decay_absent).moved(prototypes, sums, counts)
