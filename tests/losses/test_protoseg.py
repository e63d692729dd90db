"""ProtoSeg's losses, Sinkhorn assignment and prototype update against the paper's formulas written plainly, with loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transcription import TEMPERATURES, assert_equals

from spcl_fast import catalog
from spcl_fast.config.schema import AdaptConfig
from spcl_fast.estimators import PrototypeClusters
from spcl_fast.losses import ProtoSegLoss, pixel_prototype_contrast, pixel_prototype_distance, prototype_class_logits

K, M, D, GRID = 4, 3, 8, (2, 5, 7)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def features():
    return drawn(GRID[0], D, *GRID[1:])


def labels(high=K, ignored=255):
    found = torch.randint(0, high, GRID, generator=torch.Generator().manual_seed(1))
    found[:, 0, :3] = ignored
    return found


def unit_rows():
    return F.normalize(drawn(K * M, D, seed=2), dim=1)


def pixels_of(x):
    return x.movedim(1, -1).flatten(0, 2)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ppc_is_the_cross_entropy_over_all_rows(temperature, normalize):
    rows = labels(K * M, -1)

    def plain(x, p):
        x = F.normalize(pixels_of(x), dim=1) if normalize else pixels_of(x)
        return F.cross_entropy(x @ p.T / temperature, rows.flatten(), ignore_index=-1)

    def ours(x, p):
        return pixel_prototype_contrast(x, rows, p, temperature=temperature, normalize=normalize)

    assert_equals(ours, plain, x=features(), p=unit_rows())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("as_rows", [True, False])
def test_ppd_is_the_mean_squared_gap_of_the_own_row(normalize, as_rows):
    rows = labels(K * M, -1)

    def plain(x, p):
        x = F.normalize(pixels_of(x), dim=1) if normalize else pixels_of(x)
        kept = rows.flatten() != -1
        return (1 - (x[kept] * p[rows.flatten()[kept]]).sum(1)).square().mean()

    def ours(x, p):
        x, y = (pixels_of(x), rows.flatten()) if as_rows else (x, rows)
        return pixel_prototype_distance(x, y, p, normalize=normalize)

    assert_equals(ours, plain, x=features(), p=unit_rows())


def test_the_loss_is_the_weighted_sum():
    x, rows, p = features(), labels(K * M, -1), unit_rows()
    expected = 0.01 * pixel_prototype_contrast(x, rows, p) + 0.001 * pixel_prototype_distance(x, rows, p)
    torch.testing.assert_close(ProtoSegLoss()(x, rows, p), expected)


def test_labels_of_another_size_are_read_by_the_nearest_rule():
    big = torch.randint(0, K * M, (2, 11, 15), generator=torch.Generator().manual_seed(4))
    small = F.interpolate(big[:, None].double(), GRID[1:], mode="nearest")[:, 0].long()
    x, p = features(), unit_rows()
    assert torch.equal(pixel_prototype_distance(x, big, p), pixel_prototype_distance(x, small, p))


def test_blocks_do_not_change_the_distance(monkeypatch):
    x, rows, p = features().requires_grad_(), labels(K * M, -1), unit_rows()
    (whole,) = torch.autograd.grad(pixel_prototype_distance(x, rows, p), x)
    monkeypatch.setattr("spcl_fast.losses.similarity._BLOCK", 2 * D * GRID[2])
    (parts,) = torch.autograd.grad(pixel_prototype_distance(x, rows, p), x)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


def test_ignored_and_zero_pixels_keep_the_distance_and_its_gradient_finite():
    x, rows = features(), labels(K * M, -1)
    x[:, :, 0, 0], x[:, :, 1, 1] = torch.nan, 0
    x.requires_grad_()
    loss = pixel_prototype_distance(x, rows, unit_rows())
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and not x.grad[:, :, 0, 0].any()
    nothing = pixel_prototype_distance(x, torch.full(GRID, -1), unit_rows())
    assert nothing == 0 and not torch.autograd.grad(nothing, x)[0].any()


def test_a_row_that_is_not_there_is_named():
    rows = labels(K * M, -1)
    rows[1, 2, 3] = K * M
    with pytest.raises(ValueError, match=r"label 12 at pixel \(image 1, row 2, column 3\) is outside \[0, 12\)"):
        pixel_prototype_distance(features(), rows, unit_rows())
    with pytest.raises(ValueError, match=r"prototypes must be \[R, D\] with the features' D = 8, got shape \[12, 7\]"):
        pixel_prototype_distance(features(), labels(K * M, -1), unit_rows()[:, 1:])


def test_class_logits_are_the_best_row_of_each_class():
    assert_equals(
        lambda x, p: prototype_class_logits(x, p.view(K, M, D)),
        lambda x, p: torch.einsum("bdhw,kmd->bkmhw", F.normalize(x, dim=1), p.view(K, M, D)).amax(2),
        x=features(), p=unit_rows(),
    )  # fmt: skip


# ---- the clusters ----------------------------------------------------------------------------------------------------


def sinkhorn(scores, epsilon, iterations):
    """[n, M] of one class, as the paper has it, in float64."""
    plan = (scores.double() / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(0, keepdim=True) / plan.shape[1]
        plan = plan / plan.sum(1, keepdim=True) / plan.shape[0]
    return plan * plan.shape[0]


def stepped(prototypes, x, y, right, keep, epsilon=0.05, iterations=3):
    """rows of all pixels, prototypes after the step: the authors' loop over classes with the likeliest row instead of a sampled one."""
    rows, moved = torch.full_like(y, -1), prototypes.clone()
    for k in range(K):
        if not (y == k).any():
            continue
        own = x[y == k]
        index = sinkhorn(own @ prototypes[k].T, epsilon, iterations).argmax(1)
        rows[y == k] = k * M + index
        counted = F.one_hot(index, M).to(x.dtype) * right[y == k][:, None]
        is_there = counted.sum(0) > 0
        mean = F.normalize(counted.T @ own, dim=1)
        moved[k, is_there] = (keep * moved[k] + (1 - keep) * mean)[is_there]
    return rows, F.normalize(moved, dim=-1)


@pytest.mark.parametrize("epsilon", [0.05, 0.01, 1.0])
def test_assignment_and_update_are_those_of_the_loop_over_classes(epsilon, monkeypatch):
    clusters = PrototypeClusters(K, D, M, keep=0.7, assignment="argmax", epsilon=epsilon)
    x, y = features(), labels(K - 1)  # the last class is absent
    predictions = torch.randint(0, K - 1, GRID, generator=torch.Generator().manual_seed(3))
    flat, flat_y = F.normalize(pixels_of(x), dim=1), y.flatten()
    rows, moved = stepped(clusters.prototypes, flat, flat_y, predictions.flatten() == flat_y, 0.7, epsilon)
    monkeypatch.setattr("spcl_fast.estimators.assignment._BLOCK", 2 * K * M * GRID[2])  # more than one block per image
    assert torch.equal(clusters.assign(x, y).flatten(), rows)
    assert torch.equal(clusters.update_(x, y, predictions).flatten(), rows)
    torch.testing.assert_close(clusters.prototypes, moved, rtol=1e-5, atol=1e-6)


def test_pixels_of_a_class_are_shared_evenly_between_its_rows():
    clusters = PrototypeClusters(2, D, 4, iterations=50)
    rows = clusters.assign(drawn(4000, D), torch.arange(2).repeat(2000))
    counts = torch.bincount(rows, minlength=8)
    assert counts.min() > 350 and counts.max() < 650


def test_gumbel_samples_a_row_by_the_softmax_of_the_probabilities():
    """The authors pass probabilities as logits: even a certain pixel counts to its likeliest row in e / (e + M - 1) of the cases only."""
    from spcl_fast.estimators.clusters import sampled_index

    torch.manual_seed(0)
    certain = torch.zeros(1, 3, 100, 200)
    certain[:, 1] = 1.0
    share = torch.bincount(sampled_index(certain).flatten(), minlength=3) / 20000
    torch.testing.assert_close(share, torch.tensor([0.0, 1.0, 0.0]).softmax(0), atol=0.02, rtol=0)


def test_a_pixel_that_is_not_finite_gets_no_row_and_moves_nothing():
    clusters = PrototypeClusters(K, D, M, assignment="argmax")
    x, y = features(), labels()
    clean = clusters.assign(x, y.masked_fill(torch.arange(7) == 6, 255))
    x[:, :, :, 6] = torch.inf
    assert torch.equal(clusters.assign(x, y), clean)
    clusters.update_(x, y)
    assert clusters.prototypes.isfinite().all()


def test_prototypes_stay_float32_and_start_around_what_is_loaded():
    clusters = PrototypeClusters(K, D, M).half()
    assert clusters.prototypes.dtype == torch.float32
    start = drawn(K, D)
    near = F.cosine_similarity(clusters.load_(start).prototypes, start[:, None], dim=-1)
    assert near.min() > 0.98 and clusters.prototypes.std(1).min() > 0
    with pytest.raises(ValueError, match=r"expected prototypes \[4, 3, 8\] or \[4, 8\], got \[5, 8\]"):
        clusters.load_(drawn(5, D))
    with pytest.raises(ValueError, match="assignment must be 'gumbel' or 'argmax', got 'sinkhorn'"):
        PrototypeClusters(K, D, M, assignment="sinkhorn")


def test_adapt_takes_it_by_name():
    objective = catalog.load(catalog.find(catalog.LOSSES, "protoseg").home)(K, D, AdaptConfig(contrast_temperature=0.1))
    objective.load_(drawn(K, D)).update_(features(), labels())
    x = features().requires_grad_()
    objective(x, labels()).backward()
    assert objective.prototypes.shape == (K, D) and x.grad.any()
    assert objective(x, torch.full(GRID, 255)) == 0


def test_predictions_of_another_size_than_the_features_grid_are_refused_by_shape():
    clusters = PrototypeClusters(K, D, M)
    with pytest.raises(
        ValueError,
        match=r"PrototypeClusters: predictions must have the features' grid \[2, 5, 7\], got shape \[2, 9, 9\]",
    ):
        clusters.update_(features(), labels(), torch.zeros(2, 9, 9, dtype=torch.long))


def test_prototypes_per_class_given_to_a_loss_of_rows_are_refused_with_the_shape_to_use():
    with pytest.raises(ValueError, match=r"prototypes \[K M, 8\] with prototype_class \[K M\]"):
        pixel_prototype_contrast(features(), labels(K * M, -1), drawn(K, M, D))
