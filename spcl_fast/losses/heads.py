"""LinearHead and CosineHead: a segmentation head is one op for its logits and one for its loss.

Source: the linear probe of DINOv2 and DINOv3 (BatchNorm and a 1x1 convolution on frozen features, arXiv 2304.07193 and 2508.10104), the
cosine classifier of Gidaris and Komodakis (arXiv 1804.09458) and CLIP's learnt scale (arXiv 2103.00020).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.dispatched import ignores_autocast


class _Head(nn.Module):
    """features -> logits on the features' grid, and the loss of their up-sampled form, which is never made."""

    weight: nn.Parameter  # [K, D]

    def __init__(self, dim: int, num_classes: int, *, batch_norm: bool, backend: str | None) -> None:
        super().__init__()
        if dim < 1 or num_classes < 1:
            raise ValueError(
                f"{type(self).__name__}: dim and num_classes must be at least 1, got {dim} and {num_classes}"
            )
        self.weight = nn.Parameter(torch.empty(num_classes, dim))
        self.bn = nn.BatchNorm2d(dim) if batch_norm else None
        self.backend = backend

    def loss(self, features: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """upsampled_cross_entropy of this head's logits; options are those of that op. features [B, D, h, w], labels [B, H, W]."""
        options.setdefault("backend", self.backend)
        return ops.upsampled_cross_entropy(self(features), labels, **options)

    def _check(self, features: Tensor) -> None:
        if features.dim() not in (2, 4) or features.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"{type(self).__name__}: features must be [B, {self.weight.shape[1]}, h, w] or [N, {self.weight.shape[1]}], "
                f"got shape {list(features.shape)}"
            )

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, num_classes={self.weight.shape[0]}"


class LinearHead(_Head):
    """z_k = <BatchNorm(x), weight_k> + bias_k: a 1x1 convolution, with `batch_norm` a BatchNorm before it.

    forward(features [B, D, h, w] or [N, D], any floating dtype but float64 off the reference backend) -> logits [B, K, h, w] float32.
    loss(features, labels [B, H, W], **options of upsampled_cross_entropy) -> [].
    weight [K, D], bias [K] and bn.* are the names of a convolution (its weight has two more dimensions of 1) and of nn.BatchNorm2d.
    BatchNorm's statistics are those of this process, not of all ranks.

    Memory: the logits, and per channel a mean and a variance. BatchNorm is folded into weight and bias, so the normalised features are
    never there; where the features are frozen, nothing else of their size is there, either.
    Source: the linear segmentation head of DINOv2, arXiv 2304.07193.
    """

    def __init__(
        self, dim: int, num_classes: int, *, bias: bool = True, batch_norm: bool = False, backend: str | None = None
    ) -> None:
        super().__init__(dim, num_classes, batch_norm=batch_norm, backend=backend)
        self.bias = nn.Parameter(torch.zeros(num_classes)) if bias else None
        nn.init.normal_(self.weight, std=0.01)  # as mmsegmentation's conv_seg

    @ignores_autocast
    def forward(self, features: Tensor) -> Tensor:
        self._check(features)
        weight, bias = self.weight, self.bias
        if self.bn is not None:
            scale, shift = _affine_of(self.bn, features)
            bias = weight @ shift if bias is None else bias + weight @ shift
            weight = weight * scale
        return ops.prototype_logits(features, weight, temperature=1.0, normalize=False, bias=bias, backend=self.backend)

    @torch.no_grad()
    def as_convolution(self) -> tuple[Tensor, Tensor]:
        """Weight [K, D, 1, 1] and bias [K] of the 1x1 convolution that this head is in eval mode, with BatchNorm's running statistics."""
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        if self.bn is not None:
            assert self.bn.running_mean is not None and self.bn.running_var is not None
            scale = (self.bn.running_var + self.bn.eps).rsqrt() * self.bn.weight
            shift = self.bn.bias - self.bn.running_mean * scale
            weight, bias = weight * scale, weight @ shift if bias is None else bias + weight @ shift
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return weight[:, :, None, None].clone(), bias.clone()


class CosineHead(_Head):
    """z_k = scale * cos(x, weight_k), with `batch_norm` of BatchNorm(x).

    scale        the initial one; learnt through its logarithm (`log_scale`, as CLIP's logit_scale) unless `learn_scale` is False.
    forward(features [B, D, h, w] or [N, D]) -> [B, K, h, w] or [N, K], and loss, as in `LinearHead`.
    A feature of norm 0 has cosine 0 to every class.
    Memory: the logits; with `batch_norm` the normalised features, too, because a length cannot be folded into a weight.
    Source: Gidaris and Komodakis, arXiv 1804.09458; CLIP, arXiv 2103.00020.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        scale: float = 10.0,
        learn_scale: bool = True,
        batch_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_classes, batch_norm=batch_norm, backend=backend)
        if not scale > 0 or not math.isfinite(scale):
            raise ValueError(f"CosineHead: scale must be a finite number above 0, got {scale}")
        log_scale = torch.tensor(math.log(scale))
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        self._check(features)
        if self.bn is not None:
            features = self.bn(features if features.dim() == 4 else features[:, :, None, None]).view(features.shape)
        weight = nn.functional.normalize(self.weight, dim=1)
        return ops.prototype_logits(features, weight, temperature=(-self.log_scale).exp(), backend=self.backend)


def _affine_of(bn: nn.BatchNorm2d, features: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [D] with which bn(x) = scale x + shift on this batch; in training the running statistics move, as bn's own do."""
    if bn.training or bn.running_mean is None or bn.running_var is None:
        axes = (0, 2, 3) if features.dim() == 4 else (0,)
        count = features.numel() // features.shape[1]
        if count < 2:
            raise ValueError(
                "LinearHead: BatchNorm needs more than one pixel in training; call .eval() or give a larger batch"
            )
        values = features if features.dtype == torch.float64 else features.float()
        variance, mean = torch.var_mean(values, axes, correction=0)
        _move_statistics(bn, mean.detach(), variance.detach() * (count / (count - 1)))
    else:
        mean, variance = bn.running_mean, bn.running_var
    scale = (variance + bn.eps).rsqrt() * bn.weight
    return scale, bn.bias - mean * scale


@torch.no_grad()
def _move_statistics(bn: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    if bn.running_mean is None or bn.running_var is None or bn.num_batches_tracked is None:
        return
    bn.num_batches_tracked += 1
    if bn.momentum is None:
        share = 1 / bn.num_batches_tracked.to(mean.dtype)
        bn.running_mean += share * (mean - bn.running_mean)
        bn.running_var += share * (variance - bn.running_var)
    else:
        bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), bn.momentum)
        bn.running_var.lerp_(variance.to(bn.running_var.dtype), bn.momentum)
