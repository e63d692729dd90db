"""Segmentation losses on pseudo-labels, each with its method's weights and denominator; the up-sampled logits are never there.

DAFormer (arXiv 2111.14887), MIC (2212.01322), VFM-UDA and VFM-UDA++ (2406.09896, 2503.10685), UniMatch (2208.09910).
"""

from __future__ import annotations

from torch import Tensor

from ..ops import upsampled_cross_entropy


def quality_weight(
    confidence: Tensor,  # [B, H, W]: the teacher's largest probability
    *,
    threshold: float = 0.968,
    ignore_top: int = 0,
    ignore_bottom: int = 0,
) -> Tensor:  # [B, H, W] float32
    """Every pixel has the share of ALL the batch's pixels whose confidence is at least `threshold`; 0 in the first and last rows.

    confidence [B, H, W], the teacher's largest probability -> [B, H, W] float32.
    No host sync (the authors' code waits twice). With class mix, the pasted source pixels get 1 afterwards.
    Source: DAFormer, arXiv 2111.14887, of DACS; its Cityscapes settings ignore 15 rows at the top and 120 at the bottom.
    """
    if not confidence.dim() == 3 or min(ignore_top, ignore_bottom) < 0:
        raise ValueError(
            f"quality_weight: confidence must be [B, H, W] and the ignored rows at least 0, got shape {list(confidence.shape)}, "
            f"{ignore_top} and {ignore_bottom}"
        )
    weight = (confidence >= threshold).float().mean().expand(confidence.shape).clone()
    weight[:, :ignore_top] = 0
    weight[:, confidence.shape[1] - ignore_bottom :] = 0
    return weight


def quality_weighted_cross_entropy(
    logits: Tensor,  # [B, K, h, w]
    labels: Tensor,  # [B, H, W], integer
    pixel_weight: Tensor | None = None,  # [B, H, W]
    *,
    class_weight: Tensor | None = None,  # [K]
    align_corners: bool = False,
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:  # []
    """sum over pixels of weight * -log softmax(z)_y / number of ALL pixels,   z the logits up-sampled bilinearly.

    logits [B, K, h, w], labels [B, H, W] integer, pixel_weight [B, H, W], class_weight [K] -> [].
    The loss of mixed images in DAFormer, of masked ones in MIC, of both in VFM-UDA(++): ignored pixels and weights of 0 stay in the
    denominator, so a batch of poor pseudo-labels weighs less. Without pixel_weight it is mmsegmentation's default mean.
    `upsampled_cross_entropy(denominator="all")`; raises and allocates as that. Source: DAFormer, arXiv 2111.14887; MIC, arXiv 2212.01322.
    """
    return upsampled_cross_entropy(
        logits, labels, pixel_weight=pixel_weight, class_weight=class_weight, denominator="all", align_corners=align_corners,
        ignore_index=ignore_index, backend=backend,
    )  # fmt: skip


def confident_cross_entropy(
    logits: Tensor,  # [B, K, h, w]
    labels: Tensor,  # [B, H, W], integer: the teacher's argmax
    confidence: Tensor,  # [B, H, W]
    ignored: Tensor | None = None,  # [B, H, W], integer: `ignore_index` where the image is padding
    *,
    threshold: float = 0.95,
    align_corners: bool = True,
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:  # []
    """Sum of -log softmax(z)_y over pixels whose confidence is at least `threshold`, over the number of ALL pixels that are no padding.

    logits [B, K, h, w]; labels, the teacher's argmax, confidence and ignored (`ignore_index` where padded) [B, H, W] -> [].
    One of UniMatch's three terms; its loss is (labelled + 1/4 strong_1 + 1/4 strong_2 + 1/2 perturbed features) / 2. Nothing but padding:
    0, where the authors' code has NaN. `upsampled_cross_entropy` with a denominator; no host sync. Source: UniMatch, arXiv 2208.09910.
    """
    inside = labels != ignore_index if ignored is None else (ignored != ignore_index) & (labels != ignore_index)
    counted = (inside if ignored is None else ignored != ignore_index).sum().clamp_min(1).float()
    return upsampled_cross_entropy(
        logits, labels.where(inside, ignore_index), pixel_weight=(confidence >= threshold).float(), denominator=counted,
        align_corners=align_corners, ignore_index=ignore_index, backend=backend,
    )  # fmt: skip
