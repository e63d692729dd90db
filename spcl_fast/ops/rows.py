"""Rows of prototypes and what goes with them: the checks that prototype_contrastive_loss and prototype_logits share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import checks
from .pixels import Pixels

POOLS = ("logsumexp", "max")


class Rows(NamedTuple):
    """As the caller gave them."""

    prototypes: Tensor
    variances: Tensor | None
    bias: Tensor | None
    prototype_class: Tensor | None
    pool: str
    num_classes: int | None


def check_rows(op: str, pixels: Pixels, rows: Rows) -> int:
    """-> K; 0 where only the values of prototype_class tell it and none may be read."""
    prototypes, features = rows.prototypes, pixels.features
    checks.check_float(op, "prototypes", prototypes, (2, 3), "[K, D] or, one set per image, [B, K, D]")
    if prototypes.shape[-1] != features.shape[1]:
        raise ValueError(
            f"{op}: prototypes must be [K, D] or [B, K, D] with the features' D = {features.shape[1]}, got {list(prototypes.shape)}"
        )
    if prototypes.shape[-2] == 0:
        raise ValueError(f"{op}: prototypes must have at least one row, got shape {list(prototypes.shape)}")
    if prototypes.dim() == 3:
        _check_per_image(op, "prototypes", prototypes, pixels)
    checks.check_constant(op, "variances", rows.variances, (tuple(prototypes.shape),), "the prototypes' shape")
    _check_bias(op, rows, pixels)
    checks.check_device(op, features, "features", prototypes=prototypes, variances=rows.variances, bias=rows.bias,
                        prototype_class=rows.prototype_class)  # fmt: skip
    return _check_classes(op, rows)


def _check_per_image(op: str, name: str, tensor: Tensor, pixels: Pixels) -> None:
    if len(pixels.grid) == 1:
        checks.refuse_together(
            op, f"{name} of shape {list(tensor.shape)}", "features [N, D]", "rows belong to no image"
        )
    if tensor.shape[0] != pixels.grid[0]:
        raise ValueError(
            f"{op}: {name} must hold one set for each of {pixels.grid[0]} images, got shape {list(tensor.shape)}"
            f"{_several_per_class(name, tensor)}"
        )


def _several_per_class(name: str, tensor: Tensor) -> str:
    if name != "prototypes":
        return ""
    return f"; M rows for each of K classes are prototypes [K M, {tensor.shape[-1]}] with prototype_class [K M]"


def _check_bias(op: str, rows: Rows, pixels: Pixels) -> None:
    bias, count = rows.bias, rows.prototypes.shape[-2]
    if bias is None:
        return
    checks.check_float(op, "bias", bias, (1, 2), "[K] or, one per image, [B, K]")
    if bias.shape[-1] != count:
        raise ValueError(
            f"{op}: bias must have one value for each of the {count} rows of prototypes, got shape {list(bias.shape)}"
        )
    if bias.dim() == 2:
        _check_per_image(op, "bias", bias, pixels)


def _check_classes(op: str, rows: Rows) -> int:
    checks.check_choice(op, "pool", rows.pool, POOLS)
    count, classes, asked = rows.prototypes.shape[-2], rows.prototype_class, rows.num_classes
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise ValueError(f"{op}: num_classes must be an int of at least 1, got {asked!r}")
    if classes is None:
        if rows.pool != POOLS[0]:
            raise ValueError(f"{op}: pool={rows.pool!r} needs prototype_class, which says what is pooled")
        if asked is not None and asked != count:
            raise ValueError(
                f"{op}: num_classes={asked} needs prototype_class: without it the {count} rows are the classes"
            )
        return count
    checks.check_labels_tensor(op, classes, 1, "[M]", "prototype_class")
    if classes.shape[0] != count:
        raise ValueError(
            f"{op}: prototype_class must have one class for each of the {count} rows of prototypes, got shape {list(classes.shape)}"
        )
    if torch.compiler.is_compiling() or (asked is not None and checks.is_fake(classes)):
        return asked or 0
    found = _classes_in(op, classes)
    if asked is not None and found > asked:
        raise ValueError(f"{op}: num_classes={asked}, but prototype_class goes up to {found - 1}")
    return asked or found


_known = WeakTensorKeyDictionary()  # prototype_class -> (version, K)


def _classes_in(op: str, classes: Tensor) -> int:
    """prototype_class.max() + 1. On a GPU that waits once for each tensor, and again when it was changed in place."""
    version = 0 if classes.is_inference() else classes._version
    known = _known.get(classes)
    if known is None or known[0] != version:
        low, high = (int(value) for value in classes.long().aminmax())
        if low < 0:
            raise ValueError(f"{op}: prototype_class must be at least 0, got {low}")
        _known[classes] = known = (version, high + 1)
    return known[1]
