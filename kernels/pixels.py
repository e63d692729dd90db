"""What every kernel does for its pixels: read the class, read the weights, find the addresses; and the launcher's side of the same.

A label is read in place, in its own dtype and at its own size, compared as int64 and never used as an index before it is known to be in
[0, K). A bad label raises the device flag (an integer maximum: the order cannot be seen) and turns the caller's loss into NaN.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.labels import label_flag
from . import launch as settings


@triton.jit
def nearest(i, scale, size):
    """The index that F.interpolate(mode="nearest") reads for `i`. A grid of the labels' own size is read as it is: float32 does not hold
    every index beyond 2**24, which the rows of an [N, D] matrix may pass."""
    return tl.minimum(tl.where(scale == 1.0, i, (i.to(tl.float32) * scale).to(tl.int32)), size - 1)


@triton.jit
def read_class(
    label_ptr, flag_ptr, b, n, mask_n, w, H, W, scale_h, scale_w, stride_b, stride_h, stride_w, ignore_index, K
):
    """Class of each pixel n of image b (-1: none), and whether its label is bad."""
    i = n // w
    j = nearest(n - i * w, scale_w, W)
    i = nearest(i, scale_h, H)
    offs = b * stride_b + i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w
    return classify(tl.load(label_ptr + offs, mask=mask_n, other=0), flag_ptr, mask_n, ignore_index, K)


@triton.jit
def classify(value, flag_ptr, mask, ignore_index, K):
    """value: labels of any integer dtype. -> class int32 (-1: none), bad."""
    if (value.dtype == tl.int64) | (value.dtype == tl.uint64) | (value.dtype == tl.uint32):
        value = value.to(tl.int64)
    else:
        value = value.to(tl.int32)
    labelled = mask & (value != ignore_index)
    inside = (value >= 0) & (value < K)
    bad = labelled & (inside == 0)
    if tl.max(tl.ravel(bad.to(tl.int32)), 0) > 0:
        worst = tl.where(bad, value.to(tl.int64), -9223372036854775807)
        tl.atomic_max(flag_ptr, tl.max(tl.ravel(worst), 0))
    return tl.where(labelled & inside, value, -1).to(tl.int32), bad


@triton.jit
def class_and_pixel_weight(class_weight_ptr, pixel_weight_ptr, cls, pixel):
    """-> class weight (0 where no class: it counts in the mean), pixel weight. pixel: index into the contiguous weights."""
    labelled = cls >= 0
    class_weight = labelled.to(tl.float32)
    if class_weight_ptr is not None:
        class_weight = tl.load(class_weight_ptr + tl.maximum(cls, 0), mask=labelled, other=0.0)
    pixel_weight = labelled.to(tl.float32)
    if pixel_weight_ptr is not None:
        pixel_weight = tl.load(pixel_weight_ptr + pixel, mask=labelled, other=0.0)
    return class_weight, pixel_weight


@triton.jit
def pixel_offset(n, w, stride_h, stride_w, FLAT: tl.constexpr):
    """Element offset of pixel n of an image. FLAT: rows follow each other, so that neighbours are seen as such and loads get wide."""
    if FLAT:
        return n.to(tl.int64) * stride_w
    i = n // w
    return i.to(tl.int64) * stride_h + (n - i * w).to(tl.int64) * stride_w


@triton.jit
def finish_kernel(partial_ptr, loss_ptr, denominator_ptr, T, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program: partial [2, T] (losses, weights) -> loss, denominator; in a fixed order, in float64. Moves 8 T bytes."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    weight = tl.zeros([BLOCK], tl.float64)
    for start in range(0, T, BLOCK):
        mask = start + offs < T
        total += tl.load(partial_ptr + start + offs, mask=mask, other=0.0).to(tl.float64)
        if MEAN:
            weight += tl.load(partial_ptr + T + start + offs, mask=mask, other=0.0).to(tl.float64)
    loss = tl.sum(total, 0)
    denominator = loss * 0 + 1  # NaN stays NaN: a bad label poisons the gradient of a sum, too
    if MEAN:
        denominator = tl.sum(weight, 0)
        loss = tl.where(denominator == 0, 0.0, loss / tl.where(denominator == 0, 1.0, denominator))
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(denominator_ptr, denominator.to(tl.float32))


INTERPRETED = not isinstance(finish_kernel, triton.JITFunction)


def interpreter_trouble() -> str | None:
    """Why Triton's interpreter does not work with what is installed, or None. Compiled kernels are not concerned."""
    import numpy

    if _version(triton.__version__) >= (3, 7) or _version(numpy.__version__) < (2, 4):
        return None
    return (
        f"the interpreter of Triton {triton.__version__} fails with numpy {numpy.__version__} (any from 2.4 on): "
        "take triton>=3.7 or numpy<2.4, or run on a GPU"
    )


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def architecture(tensor: Tensor) -> str:
    return "interpreter" if INTERPRETED else settings.architecture(tensor.device.index)


def on_device_of(tensor: Tensor):
    """Triton launches on the current device; switch to the tensor's only where it is another one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device.index)
    return contextlib.nullcontext()


def precision(dtype: torch.dtype) -> str:
    """IEEE float32 dots unless the user allows TF32 by torch.set_float32_matmul_precision."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def is_flat(tensor: Tensor) -> bool:
    """Whether pixel (i, j) lies at (i * w + j) * stride_w."""
    return tensor.shape[2] == 1 or tensor.stride(2) == tensor.shape[3] * tensor.stride(3)


def layout(features: Tensor) -> str:
    return "channels" if features.stride(1) == 1 and features.stride(3) != 1 else "pixels"


def label_arguments(labels: Tensor, height: int, width: int, ignore_index: int) -> tuple:
    """The label's part of a kernel's arguments, from `w` on: sizes, nearest scales (float32 arithmetic), strides, ignore_index."""
    size_h, size_w = labels.shape[1:]
    return (
        width,
        size_h,
        size_w,
        _nearest_scale(size_h, height),
        _nearest_scale(size_w, width),
        *labels.stride(),
        ignore_index,
    )


@functools.lru_cache(maxsize=4096)
def _nearest_scale(size: int, out: int) -> float:
    return float(torch.tensor(size, dtype=torch.float32) / out)


def flag(tensor: Tensor) -> Tensor:
    """[] int64 on the tensor's device, read by `check_labels`."""
    return label_flag(tensor.device)
