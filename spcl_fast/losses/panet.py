"""PANet (Wang et al., arXiv 1908.06391): few-shot segmentation by prototypes of the support, and back.

    prototype = sum of up(f) mask / (sum of mask + 1e-5)      up: bilinear, to the mask's size
    logit_k   = 20 cos(x, prototype_k)

The sum over up-sampled features is a sum over the small map with weights: the mask brought down by the transpose of `up`. The up-sampled
features, 64 times the features at stride 8, are never there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops.dispatched import ignores_autocast

_EPS = 1e-5  # of the authors' denominators


@ignores_autocast
def masked_mean(features: Tensor, masks: Tensor) -> Tensor:
    """features [B, D, h, w], masks [B, K, H, W] (any weights, constants) -> [B, K, D]. Differentiable in features.

    The bilinear rule is that of F.interpolate(align_corners=False). Memory: masks of the small size. Source: PANet, arXiv 1908.06391.
    """
    if features.dim() != 4 or masks.dim() != 4 or len(features) != len(masks):
        raise ValueError(
            f"masked_mean: features must be [B, D, h, w] and masks [B, K, H, W], got {list(features.shape)} and {list(masks.shape)}"
        )
    masks = masks.detach().to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    down, across = (
        _bilinear(small, large, masks) for small, large in zip(features.shape[2:], masks.shape[2:], strict=True)
    )
    weights = down @ masks @ across.t()  # [B, K, h, w]
    sums = torch.einsum("bkp,bdp->bkd", weights.flatten(2), features.flatten(2).to(masks.dtype))
    return sums / (masks.sum((2, 3))[..., None] + _EPS)


def _bilinear(small: int, large: int, like: Tensor) -> Tensor:
    """[small, large]: the transpose of F.interpolate from `small` to `large` values."""
    unit = torch.eye(small, device=like.device, dtype=like.dtype)
    return F.interpolate(unit[None], size=large, mode="linear", align_corners=False)[0]


def panet_prototypes(support: Tensor, fore_mask: Tensor, back_mask: Tensor) -> Tensor:
    """support [ways, shots, D, h, w], masks [ways, shots, H, W] -> [1 + ways, D], the background first, each a mean over shots.

    Source: PANet, arXiv 1908.06391, by masked average pooling of the up-sampled features (`masked_mean`).
    """
    ways, shots = support.shape[:2]
    masks = torch.stack([back_mask, fore_mask], 2).flatten(0, 1)
    means = masked_mean(support.flatten(0, 1), masks).view(ways, shots, 2, -1).mean(1)
    return torch.cat([means[:, 0].mean(0, keepdim=True), means[:, 1]])


def panet_logits(features: Tensor, prototypes: Tensor, *, scale: float = 20.0, backend: str | None = None) -> Tensor:
    """scale cos(x, prototype_k): features [B, D, h, w], prototypes [K, D] or [B, K, D] -> [B, K, h, w]. A prototype of 0 gives 0.

    Source: PANet, arXiv 1908.06391 (scale 20).
    """
    return ops.prototype_logits(features, F.normalize(prototypes, dim=-1), temperature=1 / scale, backend=backend)


def panet_loss(logits: Tensor, labels: Tensor, *, backend: str | None = None) -> Tensor:
    """Cross-entropy of the logits up-sampled (align_corners=False) to labels [B, H, W]; 255 is ignored; mean over labelled pixels.

    logits [B, K, h, w] -> []. Source: PANet, arXiv 1908.06391.
    """
    return ops.upsampled_cross_entropy(logits, labels, align_corners=False, backend=backend)


@ignores_autocast
def panet_alignment_loss(
    query: Tensor, logits: Tensor, support: Tensor, fore_mask: Tensor, back_mask: Tensor, *, scale: float = 20.0
) -> Tensor:
    """The support segmented by prototypes of the query's own prediction. query [N, D, h, w], logits [N, 1 + ways, h, w] of it, support
    [ways, shots, D, h, w], masks [ways, shots, H, W] of 0 and 1 -> [].

    A way that is predicted nowhere adds nothing; a pixel in neither mask is ignored. No host sync. Source: PANet, arXiv 1908.06391,
    `FewShotSeg.alignLoss`.
    """
    ways, shots = support.shape[:2]
    predicted = (
        F.one_hot(logits.argmax(1), 1 + ways)
        .movedim(-1, 1)
        .to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    )
    counts = predicted.sum((0, 2, 3))
    sums = torch.einsum("nkp,ndp->kd", predicted.flatten(2), query.flatten(2).to(predicted.dtype))
    prototypes = sums / (counts[:, None] + _EPS)
    labels = torch.where(back_mask == 1, 0, torch.where(fore_mask == 1, 1, 255))
    total = sums.new_zeros(())
    for way in range(ways):
        pair = torch.stack([prototypes[0], prototypes[way + 1]])
        z = panet_logits(support[way], pair, scale=scale)
        for shot in range(shots):
            loss = panet_loss(z[shot : shot + 1], labels[way, shot : shot + 1])
            total = total + torch.where(counts[way + 1] > 0, loss, 0) / (shots * ways)
    return total
