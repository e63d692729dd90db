"""The distance to a frozen encoder's features: which cells count, the mean, the gradient."""

from __future__ import annotations

import pytest
import torch
from transcription import assert_equals

from spcl_fast.losses import feature_distance
from spcl_fast.losses.feature_distance import counted_cells

K, SCALE = 4, 4
FEATURES = torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(0))
ANCHORS = torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(1))
CLASSES = torch.randint(0, K + 1, (2, 3, 5), generator=torch.Generator().manual_seed(2))
CLASSES[CLASSES == K] = 255
LABELS = CLASSES.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
COUNTED = torch.tensor([True, False, True, False])


def plain(features):
    """DAFormer's masked_feat_dist, in words: the norms of the differences, of the cells of the counted classes, their mean."""
    norms = [
        (features[b, :, i, j] - ANCHORS[b, :, i, j].to(features)).square().sum().sqrt()
        for b in range(2)
        for i in range(3)
        for j in range(5)
        if CLASSES[b, i, j] in (0, 2)
    ]
    return torch.stack(norms).mean()


def test_the_mean_distance_of_the_counted_classes_and_its_gradient():
    assert_equals(
        lambda features: feature_distance(features, ANCHORS, LABELS, counted=COUNTED), plain, features=FEATURES
    )


def test_a_cell_counts_where_three_quarters_of_it_are_one_class():
    labels = torch.zeros(1, 4, 12, dtype=torch.uint8)
    labels[0, :, :2] = 1  # the first cell is half and half
    labels[0, :1, 4:8] = 1  # the second three quarters
    labels[0, :, 8:] = 2
    found = counted_cells(labels, (1, 3), counted=torch.tensor([True, True, False]))
    assert found.tolist() == [[[False, True, False]]]


def test_cells_that_are_not_whole_do_not_count():
    labels = torch.zeros(1, 9, 14, dtype=torch.int64)  # at stride 4: 3 x 4 cells
    found = counted_cells(labels, (3, 4), counted=COUNTED)
    assert found[0].tolist() == [[True] * 3 + [False]] * 2 + [[False] * 4]


def test_no_counted_cell_gives_0_and_no_gradient():
    features = FEATURES.clone().requires_grad_()
    loss = feature_distance(features, ANCHORS, torch.full_like(LABELS, 255), counted=COUNTED)
    loss.backward()
    assert loss == 0 and not features.grad.any()


def test_equal_features_and_uncounted_nan_have_a_gradient_of_0():
    features = ANCHORS.clone()
    hidden = ~counted_cells(LABELS, (3, 5), counted=COUNTED)
    features.permute(0, 2, 3, 1)[hidden] = float("nan")
    features.requires_grad_()
    loss = feature_distance(features, ANCHORS, LABELS, counted=COUNTED)
    loss.backward()
    assert loss == 0 and not features.grad.any()


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="of one shape"):
        feature_distance(FEATURES, ANCHORS[:, :3], LABELS, counted=COUNTED)
    with pytest.raises(ValueError, match=r"counted must be bool \[K\]"):
        feature_distance(FEATURES, ANCHORS, LABELS, counted=COUNTED.long())
    with pytest.raises(ValueError, match="2 images of features, but 1 of labels"):
        feature_distance(FEATURES, ANCHORS, LABELS[:1], counted=COUNTED)
