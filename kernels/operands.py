"""What kernels take: pointers and the numbers that belong to them, as NamedTuples, and how launchers make them of tensors.

A field that is None is a compile-time choice: the code that would use it is not there.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Map(NamedTuple):
    """[B, D, h, w] with any strides, in elements."""

    ptr: Tensor
    stride_b: int
    stride_d: int
    # None: pixel n of an image lies at n * stride_w, so that neighbours are seen as such and loads get wide
    stride_h: int | None
    stride_w: int


class Size(NamedTuple):
    """Of the problem: pixels of an image, width of its grid, channels, classes (or prototypes)."""

    P: int
    w: int
    D: int
    K: int


class Labels(NamedTuple):
    """[B, H, W] of any integer dtype and strides, read in place by the nearest rule; a bad label raises the flag."""

    ptr: Tensor
    flag: Tensor  # [] int64
    height: int
    width: int
    scale_h: float
    scale_w: float
    stride_b: int
    stride_h: int
    stride_w: int
    ignore_index: int


class Weights(NamedTuple):
    """Of a class [K] and of a pixel [B, P], float32 and contiguous."""

    class_ptr: Tensor | None
    pixel_ptr: Tensor | None


class Prototypes(NamedTuple):
    """[K, D] or [B, K, D] contiguous, and what makes a logit of a dot with them. Where they are not in the features' dtype, a kernel rounds
    what it has loaded to it; or, with `wide`, both meet in float32.

    Logit: <x^, P> / temperature + 1/2 <x^2, V> / temperature^2 + bias, and less margin / temperature at the label.
    """

    ptr: Tensor
    stride_b: int | None  # None: every image has the same ones
    inv_temperature: float
    temperature: Tensor | None  # [], read on the device instead of inv_temperature
    bias: Tensor | None  # [K] or [B, K] contiguous
    bias_b: int | None
    variances: Tensor | None  # as the prototypes lie, float32
    margin: float | None
    wide: int | None = None


class Probabilities(NamedTuple):
    """[B, K, h, w] with any strides."""

    ptr: Tensor
    stride_b: int
    stride_k: int
    stride_h: int
    stride_w: int
    flag: Tensor
    bad: int  # what a probability that is none leaves in the flag


class TeacherPointers(NamedTuple):
    """t_nk = exp(<f_n, Q_k> * inv_temperature + u_n + v_k)."""

    features: Map
    prototypes: Prototypes  # [K, E]
    dim: int
    u: Tensor  # [B, P], float64: its size is that of scores that may be in the thousands
    v: Tensor  # [K]


class Given(NamedTuple):
    """Gradients of the logits, [B, K, P] contiguous. A pixel's are weights * scale; `divide`: they are not yet divided by it."""

    ptr: Tensor
    divide: int | None


class Target(NamedTuple):
    """What a pixel's logits are compared with: one of the first four is there. t_k becomes keep * t_k + share (label smoothing)."""

    labels: Labels | None
    probabilities: Probabilities | None
    teacher: TeacherPointers | None
    given: Given | None
    keep: float
    share: float
    plain: int | None  # labels, softmax and no smoothing: weights p - [k = y]
    sigmoid: int | None
    mean_variance: int | None  # positive_variance=False: the label's own logit carries no variance term
    # [B, P], of the backward where the target is not plain: what dz of a pixel is multiplied by; 0 where there is nothing to compare with,
    # NaN where it is bad
    scale: Tensor | None = None
    mass: Tensor | None = None  # [B, P], with `scale`: the sum of the pixel's targets


class SavedPointers(NamedTuple):
    """What the forward leaves to the backward: lse and inv_norm [B, P], logits [B, K, P]."""

    lse: Tensor | None
    inv_norm: Tensor | None
    logits: Tensor | None


class LossPointers(NamedTuple):
    """Where the loss goes: a map [B, P], or partial sums of losses and class weights [2, programs]."""

    map_ptr: Tensor | None
    partial_ptr: Tensor | None


class Incoming(NamedTuple):
    """The incoming gradient, [] (strides 0) or [B, h, w], and what the sum was divided by."""

    ptr: Tensor
    stride_b: int
    stride_h: int
    stride_w: int
    denominator: Tensor


def feature_map(tensor: Tensor) -> Map:
    stride_b, stride_d, stride_h, stride_w = tensor.stride()
    flat = tensor.shape[2] == 1 or stride_h == tensor.shape[3] * stride_w
    return Map(tensor, stride_b, stride_d, None if flat else stride_h, stride_w)


def size_of(features: Tensor, num_classes: int) -> Size:
    _, dim, height, width = features.shape
    return Size(height * width, width, dim, num_classes)


def labels_at(labels: Tensor, flag: Tensor, height: int, width: int, ignore_index: int) -> Labels:
    """Labels of any size, read on a grid of height x width."""
    scales = (_nearest_scale(size, out) for size, out in zip(labels.shape[1:], (height, width), strict=True))
    return Labels(labels, flag, *labels.shape[1:], *scales, *labels.stride(), ignore_index)


@functools.lru_cache(maxsize=4096)
def _nearest_scale(size: int, out: int) -> float:
    """In float32 arithmetic, as F.interpolate has it."""
    return float(torch.tensor(size, dtype=torch.float32) / out)


def weights_of(class_weight: Tensor | None, pixel_weight: Tensor | None) -> Weights:
    return Weights(*(None if weight is None else weight.contiguous() for weight in (class_weight, pixel_weight)))


def incoming(grad_loss: Tensor, denominator: Tensor) -> Incoming:
    return Incoming(grad_loss, *(grad_loss.stride() if grad_loss.dim() else (0, 0, 0)), denominator)
