"""ProDA (Zhang et al., arXiv 2101.10979): pseudo-labels rectified by the distances to prototypes, and the losses on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import checks, prototype_logits, upsampled_cross_entropy
from ..ops.pixels import pixels_of


@torch.no_grad()
def distance_weights(
    features: Tensor,  # [B, D, h, w] or [N, D]
    prototypes: Tensor,  # [K, D]
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:  # [B, K, h, w] or [N, K], float32 (float64 for float64 features)
    """softmax over k of  -scale |x - prototype_k|.  `scale` is what ProDA calls proto_temperature. A constant: no gradient.

    features [B, D, h, w] or [N, D]; prototypes [K, D] -> [B, K, h, w] or [N, K], float32.
    |x - p|^2 = |x|^2 - (2 <x, p> - |p|^2) is taken in float32, so a distance d is off by about 1e-7 |x|^2 / d.
    Raises ValueError or TypeError as `prototype_logits`. Memory: the [.., K] map, twice; the authors' code makes a map of the features'
    size per class. Source: ProDA, arXiv 2101.10979, eq. 5.
    """
    pixels = pixels_of("distance_weights", features)
    wide = checks.wide(features)
    prototypes = prototypes.to(wide)
    similarity = prototype_logits(
        features, prototypes, temperature=0.5, normalize=False, bias=-prototypes.square().sum(1), backend=backend
    )
    norm = pixels.map(torch.linalg.vector_norm(pixels.features, dim=1, dtype=wide)).unsqueeze(1)
    return (norm.square() - similarity).clamp_min_(0).sqrt_().mul_(-scale).softmax(1)


@torch.no_grad()
def cosine_weights(
    features: Tensor, prototypes: Tensor, *, temperature: float = 0.08, backend: str | None = None
) -> Tensor:
    """softmax over k of  cos(x, prototype_k) / temperature: CPSL's weights.

    features [B, D, h, w] or [N, D]; prototypes [K, D] -> [B, K, h, w] or [N, K], a constant. Source: CPSL, arXiv 2203.09744.
    """
    unit = torch.nn.functional.normalize(prototypes, dim=1)
    return prototype_logits(features, unit, temperature=temperature, backend=backend).softmax(1)


@torch.no_grad()
def rectified_labels(
    weights: Tensor,  # [B, K, h, w]
    probabilities: Tensor,  # [B, K, h, w]: soft pseudo-labels
    *,
    threshold: float = 0.0,
    ignore_index: int = 255,
) -> Tensor:  # [B, h, w] int64
    """argmax of r = weights * probabilities, made to sum to 1; `ignore_index` where the largest r is below `threshold`.

    weights and probabilities (soft pseudo-labels) [B, K, h, w] -> [B, h, w] int64.
    A pixel whose r are all 0 is ignored (the authors' code takes class 0). Source: ProDA, arXiv 2101.10979, eq. 4; CPSL does the same.
    """
    if weights.shape != probabilities.shape or weights.dim() < 2:
        raise ValueError(
            f"rectified_labels: weights and probabilities must have one shape [B, K, h, w], got {list(weights.shape)} and "
            f"{list(probabilities.shape)}"
        )
    product = weights * probabilities
    largest, labels = product.max(1)
    kept = (largest > 0) & (largest >= threshold * product.sum(1))
    return labels.where(kept, ignore_index)


_LOG_OF_NOTHING = -math.log(1e-4)  # what the authors take for -log of a label's 0


def symmetric_cross_entropy(
    logits: Tensor,  # [B, K, h, w]
    labels: Tensor,  # [B, H, W], integer
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    align_corners: bool = True,
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:  # []
    """alpha * mean of -log p_y + beta * mean of 9.21 (1 - p_y),   p the softmax of the logits, up-sampled bilinearly to the labels' size.

    logits [B, K, h, w], labels [B, H, W] integer -> [].
    The second term is cross-entropy with label and prediction exchanged and log 0 taken as log 1e-4. Means over labelled pixels; nothing
    labelled: 0. The authors clamp p at 1e-7, which changes the value by less than 1e-6 K; they ignore label 250.
    Memory: the map of -log p_y, [B, H, W]; the authors' code has softmax and one-hot at that size. Source: ProDA, arXiv 2101.10979; Wang et
    al., arXiv 1908.06112.
    """
    nll = upsampled_cross_entropy(
        logits, labels, reduction="none", align_corners=align_corners, ignore_index=ignore_index, backend=backend
    )
    labelled = labels != ignore_index
    reverse = _LOG_OF_NOTHING * -torch.expm1(-nll)  # an ignored pixel's nll is 0, and so is this
    return (alpha * nll + beta * reverse).sum() / labelled.sum().clamp_min(1)


def uniform_regularizer(
    logits: Tensor,  # [B, K, h, w]
    size: tuple[int, int] | None = None,
    *,
    align_corners: bool = True,
    backend: str | None = None,
) -> Tensor:  # []
    """mean over all pixels of  -1/K sum over k of log p_k  of the logits up-sampled to `size` (None: as they are): ProDA's MRKLD.

    logits [B, K, h, w] -> [].
    `upsampled_cross_entropy` with all of the label smoothed away; raises and allocates as that. Source: Zou et al., arXiv 1908.09822.
    """
    size = (logits.shape[2], logits.shape[3]) if size is None else size
    labels = torch.zeros((logits.shape[0], *size), dtype=torch.uint8, device=logits.device)
    return upsampled_cross_entropy(logits, labels, label_smoothing=1.0, align_corners=align_corners, backend=backend)
