"""Losses on pseudo-labels: which pixels are in the sum, and which in the denominator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transcription import assert_equals

from spcl_fast.losses import self_training

B, K, H, W = 2, 5, 12, 14
LOGITS = torch.randn(B, K, 4, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, K, (B, H, W), generator=torch.Generator().manual_seed(1))
CONFIDENCE = torch.rand(B, H, W, generator=torch.Generator().manual_seed(2))
MIXED = LABELS.clone()
MIXED[:, -2:] = 255


def nll(logits, labels, align_corners):
    up = F.interpolate(logits, (H, W), mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(up, labels, ignore_index=255, reduction="none")


@pytest.mark.parametrize("align_corners", [False, True])
def test_quality_weighted_loss_divides_by_all_pixels(align_corners):
    weight = self_training.quality_weight(CONFIDENCE, threshold=0.6, ignore_top=2, ignore_bottom=1)
    weight[0, 5:, 3:] = 1  # pasted source
    assert_equals(
        lambda logits: self_training.quality_weighted_cross_entropy(logits, MIXED, weight, align_corners=align_corners),
        lambda logits: (nll(logits, MIXED, align_corners) * weight.to(logits.dtype)).mean(),
        logits=LOGITS,
    )


def test_quality_is_the_share_of_all_confident_pixels_and_0_where_rows_are_ignored():
    weight = self_training.quality_weight(CONFIDENCE, threshold=0.6, ignore_top=2, ignore_bottom=1)
    share = (CONFIDENCE >= 0.6).sum() / CONFIDENCE.numel()
    assert weight[:, 2:-1].eq(share).all() and not weight[:, :2].any() and not weight[:, -1].any()
    assert self_training.quality_weight(CONFIDENCE, threshold=0.6).eq(share).all()
    with pytest.raises(ValueError, match=r"confidence must be \[B, H, W\]"):
        self_training.quality_weight(CONFIDENCE[0])


@pytest.mark.parametrize("padded", [False, True])
def test_confident_loss_divides_by_all_pixels_that_are_no_padding(padded):
    ignored = torch.zeros_like(LABELS)
    ignored[:, :3] = 255

    def plain(logits):
        keep = (CONFIDENCE >= 0.7) & (ignored != 255) if padded else CONFIDENCE >= 0.7
        count = (ignored != 255).sum() if padded else LABELS.numel()
        return (nll(logits, LABELS, True) * keep).sum() / count

    given = (LABELS, CONFIDENCE, ignored) if padded else (LABELS, CONFIDENCE)
    assert_equals(
        lambda logits: self_training.confident_cross_entropy(logits, *given, threshold=0.7), plain, logits=LOGITS
    )


def test_nothing_but_padding_is_zero():
    padding = torch.full_like(LABELS, 255)
    assert self_training.confident_cross_entropy(LOGITS, LABELS, CONFIDENCE, padding) == 0
    assert self_training.quality_weighted_cross_entropy(LOGITS, padding) == 0
