"""What every kernel does for its pixels: read the class, read the weights, find the addresses; and what launchers ask of the machine.

A label is read in place, in its own dtype and at its own size, compared as int64 and never used as an index before it is known to be in
[0, K). A bad label raises the device flag (an integer maximum: the order cannot be seen) and turns the caller's loss into NaN.
"""

from __future__ import annotations

import contextlib
import importlib.metadata

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit
def tile_of(size, BLOCK_N: tl.constexpr):
    """The program's tile of pixels -> image, pixels [BLOCK_N], and which of them exist. 64-bit: the last image's offset may pass 2**31."""
    tiles = tl.cdiv(size.P, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    return b, n, n < size.P


@triton.jit
def nearest(i, scale, size):
    """The index that F.interpolate(mode="nearest") reads for `i`. A grid of the labels' own size is read as it is: float32 does not hold
    every index beyond 2**24, which the rows of an [N, D] matrix may pass."""
    return tl.minimum(tl.where(scale == 1.0, i, (i.to(tl.float32) * scale).to(tl.int32)), size - 1)


@triton.jit
def read_class(labels, b, n, mask_n, size):
    """Class of each pixel n of image b (-1: none), and whether its label is bad."""
    i = n // size.w
    j = nearest(n - i * size.w, labels.scale_w, labels.width)
    i = nearest(i, labels.scale_h, labels.height)
    offs = b * labels.stride_b + i.to(tl.int64) * labels.stride_h + j.to(tl.int64) * labels.stride_w
    return classify(tl.load(labels.ptr + offs, mask=mask_n, other=0), labels, mask_n, size.K)


@triton.jit
def classify(value, labels, mask, K):
    """value: labels of any integer dtype. -> class int32 (-1: none), bad."""
    huge = (
        value.dtype == tl.uint64
    )  # and then negative as int64: the flag holds no such value, but the one below BAD_PROBABILITY
    if (value.dtype == tl.int64) | (value.dtype == tl.uint64) | (value.dtype == tl.uint32):
        value = value.to(tl.int64)
    else:
        value = value.to(tl.int32)
    labelled = mask & (value != labels.ignore_index)
    inside = (value >= 0) & (value < K)
    bad = labelled & (inside == 0)
    if tl.max(tl.ravel(bad.to(tl.int32)), 0) > 0:
        worst = value.to(tl.int64)
        if huge:
            worst = tl.where(worst < 0, 9223372036854775806, worst)
        worst = tl.where(bad, worst, -9223372036854775807)
        tl.atomic_max(labels.flag, tl.max(tl.ravel(worst), 0))
    return tl.where(labelled & inside, value, -1).to(tl.int32), bad


@triton.jit
def read_weights(weights, cls, pixel):
    """-> class weight (0 where no class: it counts in the mean), pixel weight. pixel: index into the contiguous weights."""
    labelled = cls >= 0
    class_weight = labelled.to(tl.float32)
    if weights.class_ptr is not None:
        class_weight = tl.load(weights.class_ptr + tl.maximum(cls, 0), mask=labelled, other=0.0)
    pixel_weight = labelled.to(tl.float32)
    if weights.pixel_ptr is not None:
        pixel_weight = tl.load(weights.pixel_ptr + pixel, mask=labelled, other=0.0)
    return class_weight, pixel_weight


@triton.jit
def softplus(z):
    """log(1 + exp(z)), small values with all their digits: log(1 + e) = log(u) e / (u - 1) with u = 1 + e rounded."""
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    return tl.maximum(z, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def pixel_offset(place, n, w):
    """Element offset of pixel n of an image of a Map."""
    if place.stride_h is None:
        offset = n.to(tl.int64) * place.stride_w
    else:
        i = n // w
        offset = i.to(tl.int64) * place.stride_h + (n - i * w).to(tl.int64) * place.stride_w
    return offset


@triton.jit
def finish_kernel(partial_ptr, given_ptr, loss_ptr, denominator_ptr, T, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program: partial [2, T] (losses, weights) -> loss, denominator; in a fixed order, in float64. Moves 8 T bytes.
    given_ptr []: a denominator that is there already."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    weight = tl.zeros([BLOCK], tl.float64)
    for start in range(0, T, BLOCK):
        mask = start + offs < T
        total += tl.load(partial_ptr + start + offs, mask=mask, other=0.0).to(tl.float64)
        weight += tl.load(partial_ptr + T + start + offs, mask=mask, other=0.0).to(tl.float64)
    loss = tl.sum(total, 0)
    denominator = tl.sum(
        weight, 0
    )  # NaN where there is a bad label, which poisons the gradient of a sum, too; not a loss of 0 * inf
    if not MEAN:
        denominator = tl.where(denominator == denominator, 1.0, denominator)
    if MEAN:
        if given_ptr is not None:
            denominator = tl.where(denominator == denominator, 1.0, denominator) * tl.load(given_ptr).to(tl.float64)
        loss = tl.where(denominator == 0, 0.0, loss / tl.where(denominator == 0, 1.0, denominator))
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(denominator_ptr, denominator.to(tl.float32))


INTERPRETED = not isinstance(finish_kernel, triton.JITFunction)


def interpreter_trouble() -> str | None:
    """Why Triton's interpreter does not work with what is installed, or None. Compiled kernels are not concerned."""
    numpy = importlib.metadata.version("numpy")
    if _version(triton.__version__) >= (3, 7) or _version(numpy) < (2, 4):
        return None
    return (
        f"the interpreter of Triton {triton.__version__} fails with numpy {numpy} (any from 2.4 on): "
        "take triton>=3.7 or numpy<2.4, or run on a GPU"
    )


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def architecture(tensor: Tensor) -> str:
    return "interpreter" if INTERPRETED else launch.architecture(tensor.device.index)


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


def layout(features: Tensor) -> str:
    return "channels" if features.stride(1) == 1 and features.stride(3) != 1 else "pixels"


def reduce_partial(
    partial: Tensor, loss: Tensor, denominator: Tensor, reduction: str, given: Tensor | None = None
) -> None:
    """partial [2, programs] of losses and weights -> loss [] and what it was divided by [], float32."""
    block = 128 if INTERPRETED else 1024
    finish_kernel[(1,)](partial, given, loss, denominator, partial.shape[1], reduction == "mean", BLOCK=block)
