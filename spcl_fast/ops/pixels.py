"""Features of any number of dimensions, and what belongs to their pixels, as the [B, D, h, w] that backends know."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..backends.contract import Teacher
from ..backends.labels import resize_nearest
from . import checks

LAYOUTS = "[B, D, h, w], [N, D], [B, D, L] or [B, D, T, h, w]"


class Pixels(NamedTuple):
    features: Tensor  # [B, D, h, w]
    grid: tuple[int, ...]  # of the features as given: (B, h, w), (N,), ...

    def map(self, values: Tensor) -> Tensor:
        """[B, h, w] as the caller's grid."""
        return values.view(self.grid)

    def channels(self, values: Tensor) -> Tensor:
        """[B, K, h, w] with the caller's grid: [B, K, ...] or [N, K]."""
        if len(self.grid) == 1:
            return values[0, :, :, 0].t()
        return values.view(values.shape[0], values.shape[1], *self.grid[1:])


def pixels_of(op: str, features: Tensor) -> Pixels:
    """A view wherever the strides allow one."""
    checks.check_float(op, "features", features, tuple(range(2, 10)), LAYOUTS)
    if features.shape[1] == 0:
        raise ValueError(f"{op}: features must have at least one channel, got shape {list(features.shape)}")
    if features.dim() == 2:
        return Pixels(features.t()[None, :, :, None], (features.shape[0],))
    return Pixels(_as_image(features), (features.shape[0], *features.shape[2:]))


def _as_image(values: Tensor) -> Tensor:
    """[B, C, ...] -> [B, C, h, w]."""
    if values.dim() == 4:
        return values
    return values[:, :, None] if values.dim() == 3 else values.flatten(2, -2)


def labels_of(op: str, pixels: Pixels, labels: Tensor) -> Tensor:
    """Integer labels as [B, H, W], of their own size where the features are images."""
    grid, given = pixels.grid, labels
    if len(grid) == 1:
        checks.check_labels_tensor(op, labels, 1, "[N] for features [N, D]")
    else:
        layout = "[B, H, W] for features [B, D, h, w]" if len(grid) == 3 else "one dimension less than the features"
        checks.check_labels_tensor(op, labels, len(grid), layout)
        if grid[0] and 0 in labels.shape[1:] and 0 not in grid[1:]:
            raise ValueError(f"{op}: labels must hold at least one pixel per image, got shape {list(labels.shape)}")
    _check_first(op, pixels, given, "labels")
    return map_of(pixels, checks.as_integers(labels))


def map_of(pixels: Pixels, values: Tensor) -> Tensor:
    """A value per pixel, of the features' grid or of the labels' size, as [B, H, W]."""
    dims = len(pixels.grid)
    if dims == 1:
        return values[None, :, None]
    if dims == 2:
        return values[:, None]
    return values if dims == 3 else resize_nearest(values, *pixels.grid[1:]).flatten(1, -2)


def probabilities_of(op: str, pixels: Pixels, labels: Tensor, num_classes: int) -> Tensor:
    """Soft labels [B, K, ...] or [N, K] on the features' grid, as [B, K, h, w]."""
    grid = pixels.grid
    expected = (grid[0], num_classes, *grid[1:])
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"{op}: labels of dtype {str(labels.dtype).removeprefix('torch.')} are probabilities and must have shape {list(expected)}, got "
            f"{list(labels.shape)}; class indices need an integer dtype"
        )
    checks.check_strided(op, "labels", labels)
    if labels.requires_grad:
        raise ValueError(f"{op}: labels require grad, but are constants of the loss; pass labels.detach()")
    checks.check_device(op, pixels.features, "features", labels=labels)
    return labels.t()[None, :, :, None] if len(grid) == 1 else _as_image(labels)


def teacher_of(op: str, pixels: Pixels, teacher: Teacher, num_classes: int) -> Teacher:
    """The teacher's features as [B, E, h, w], u as [B, P]."""
    features, prototypes, temperature, u, v = teacher
    of_teacher = pixels_of(op, features)
    if of_teacher.grid != pixels.grid:
        raise ValueError(
            f"{op}: the teacher's features must have the features' grid {list(pixels.grid)}, got {list(of_teacher.grid)}"
        )
    if len(prototypes) != num_classes:
        raise ValueError(
            f"{op}: the teacher must have the {num_classes} classes of the prototypes, got {len(prototypes)}"
        )
    checks.check_device(op, pixels.features, "features", **{"the teacher's features": features})
    batch, _, height, width = pixels.features.shape
    return Teacher(of_teacher.features, prototypes, temperature, u.reshape(batch, height * width), v)


def _check_first(op: str, pixels: Pixels, labels: Tensor, name: str) -> None:
    if labels.shape[0] != pixels.grid[0]:
        raise ValueError(
            f"{op}: features and {name} must agree in their first dimension, got {pixels.grid[0]} and {labels.shape[0]}"
        )
    checks.check_device(op, pixels.features, "features", **{name: labels})


def pixel_weight_of(op: str, pixels: Pixels, labels: object, weight: Tensor | None) -> Tensor | None:
    """[B, h, w] in the losses' dtype, from a weight of the features' grid or of the integer labels' shape."""
    if weight is None:
        return None
    shapes = [pixels.grid]
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        shapes.append(tuple(labels.shape))
    checks.check_constant(op, "pixel_weight", weight, tuple(shapes), "one weight per pixel")
    checks.check_device(op, pixels.features, "features", pixel_weight=weight)
    weight = map_of(pixels, weight)
    return resize_nearest(weight, *pixels.features.shape[2:]).to(checks.wide(pixels.features))
