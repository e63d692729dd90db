"""BatchNorm with fixed statistics, and a convolution followed by it as one convolution.

The released code freezes the backbone's BatchNorm in every stage but the last: statistics and affine parameters are constants there. A
constant scale and shift per channel is linear, so it is folded into the weights of the convolution before it: no feature-sized pass and
nothing saved for it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ConfigError


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm in evaluation mode whose four tensors are buffers: nothing in it learns or moves.

    Its state dict has the keys of `nn.BatchNorm2d` without `num_batches_tracked`, and loads one with it: a checkpoint goes both ways.
    It is no subclass of BatchNorm on purpose: `SyncBatchNorm.convert_sync_batchnorm` must leave it alone.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """Scale and shift [C] such that the layer is x * scale + shift."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        scale, shift = self.scale_shift()
        return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def batch_norm(channels: int, *, frozen: bool, eps: float) -> nn.Module:
    return FrozenBatchNorm2d(channels, eps) if frozen else nn.BatchNorm2d(channels, eps)


@contextlib.contextmanager
def enough_pixels(stage: str) -> Iterator[None]:
    """Turn torch's refusal to take statistics of a single value per channel into a ConfigError that names what to change."""
    try:
        yield
    except ValueError as error:
        if not re.match(r"Expected more than 1 (value per channel|spatial element) when training", str(error)):
            raise
        raise ConfigError(
            f"{stage}: a layer of trained BatchNorm gets one value per channel: the images of the batch are too small or too few for it. "
            f"Raise the crop ({stage}.augment.crop) or the size of the images, raise {stage}.batch_size, or keep BatchNorm fixed "
            "(freeze_bn true)."
        ) from error


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)); with a frozen norm one convolution with scaled weights, differentiable in `conv.weight` and `x`.

    Saves two passes over the output. The scaled weights are made again in the backward: only `x` and the weights themselves are kept.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    pad = getattr(conv, "pad", None)
    x, padding = (x, conv.padding) if pad is None else pad(x)
    return _ScaledConv.apply(x, conv.weight, *norm.scale_shift(), conv.stride, padding, conv.dilation, conv.groups)


class _ScaledConv(torch.autograd.Function):
    """conv(x, weight * scale) + shift in the dtype of x; scale and shift are constants.

    Autograd on the formula would keep the scaled weights, and under autocast their cast, until the backward: 4 or 2 bytes a weight.
    """

    @staticmethod
    def forward(x, weight, scale, shift, stride, padding, dilation, groups):
        return F.conv2d(x, _scaled(weight, scale, x.dtype), shift.to(x.dtype), stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, scale, _, *ctx.geometry = inputs
        ctx.save_for_backward(x, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, weight, scale), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.geometry
        wanted = [*ctx.needs_input_grad[:2], False]
        scaled = _scaled(weight, scale, x.dtype)
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            grad, x, scaled, None, stride, padding, dilation, False, [0] * len(stride), groups, wanted
        )
        if dweight is not None:
            dweight = dweight.to(weight.dtype).mul_(scale.view(-1, 1, 1, 1))
        return dx, dweight, None, None, None, None, None, None


def _scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * scale.view(-1, 1, 1, 1)).to(dtype)


def init_convs(module: nn.Module) -> None:
    """Variance-keeping weights for a net that starts from nothing: normal, fan-in (fan-out of a depthwise convolution would be off by its
    groups).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
