"""GMMSeg's densities, losses, assignment and EM step against the formulas written plainly, with loops and all differences there."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transcription import TEMPERATURES, assert_equals

from spcl_fast import catalog
from spcl_fast.config.schema import AdaptConfig
from spcl_fast.estimators import GaussianMixture
from spcl_fast.estimators.ring import enqueue_
from spcl_fast.losses import gmm_class_logits, gmm_component_contrast, gmm_loss

K, M, D, GRID = 4, 3, 8, (2, 5, 7)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def features():
    return drawn(GRID[0], D, *GRID[1:])


def labels(high=K, ignored=255):
    found = torch.randint(0, high, GRID, generator=torch.Generator().manual_seed(1))
    found[:, 0, :3] = ignored
    return found


MEANS = F.normalize(drawn(K, M, D, seed=2), dim=-1)
SCALES = torch.rand(K, M, D, generator=torch.Generator().manual_seed(3)) * 0.9 + 0.1


def pixels_of(x):
    return x.movedim(1, -1).flatten(0, 2)


def densities(x, normalize=True):
    """[N, K M] log densities of rows [N, D]."""
    x = F.normalize(x, dim=1) if normalize else x
    mean, scale = MEANS.flatten(0, 1).to(x.dtype), SCALES.flatten(0, 1).to(x.dtype)
    squares = ((x[:, None] - mean) / scale).square().sum(2)
    return -0.5 * (squares + D * math.log(2 * math.pi)) - scale.log().sum(1)


def written_mean(z, y, ignored):
    kept = y != ignored
    return (z[kept].logsumexp(1) - z[kept].gather(1, y[kept][:, None])[:, 0]).mean()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_class_logits_are_the_best_log_density(temperature, normalize):
    assert_equals(
        lambda x: gmm_class_logits(x, MEANS.to(x.dtype), SCALES.to(x.dtype), temperature=temperature, normalize=normalize),
        lambda x: (densities(pixels_of(x), normalize).view(*GRID, K, M).amax(-1) / temperature).movedim(-1, 1),
        x=features(), slack=256,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_loss_is_the_cross_entropy_of_the_best_component_of_each_class(temperature):
    y = labels()
    assert_equals(
        lambda x: gmm_loss(x, y, MEANS.to(x.dtype), SCALES.to(x.dtype), temperature=temperature),
        lambda x: written_mean(densities(pixels_of(x)).view(-1, K, M).amax(2) / temperature, y.flatten(), 255),
        x=features(), slack=256,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_component_contrast_is_the_cross_entropy_over_all_components(temperature):
    y = labels(K * M, -1)
    assert_equals(
        lambda x: gmm_component_contrast(x, y, MEANS.to(x.dtype), SCALES.to(x.dtype), temperature=temperature),
        lambda x: written_mean(densities(pixels_of(x)) / temperature, y.flatten(), -1),
        x=features(), slack=256,
    )  # fmt: skip


def rows_of(x, y):
    """The authors' loop: each class's densities by its largest one in absolute value, Sinkhorn, likeliest."""
    rows = torch.full_like(y, -1)
    for k in range(K):
        own = densities(x.double())[y == k].view(-1, K, M)[:, k]
        if not len(own):
            continue
        plan = (own / own.abs().max() / 0.05).exp()
        for _ in range(3):
            plan = plan / plan.sum(0, keepdim=True)
            plan = plan / plan.sum(1, keepdim=True)
        rows[y == k] = k * M + plan.argmax(1)
    return rows


def mixture(**settings):
    found = GaussianMixture(K, D, M, **settings)
    found.means.copy_(MEANS)
    found.scales.copy_(SCALES)
    return found


def test_components_are_assigned_as_in_the_loop_over_classes():
    y = labels(K - 1)
    assert torch.equal(mixture().assign(features(), y).flatten(), rows_of(pixels_of(features()), y.flatten()))


@pytest.mark.parametrize("predicted", [True, False])
def test_a_step_without_memory_fits_the_moments_of_each_component(predicted):
    found, x, y = mixture(keep=(0.7, 0.4)), features(), labels(K - 1)
    predictions = torch.randint(0, K, GRID, generator=torch.Generator().manual_seed(5))
    unit, flat = F.normalize(pixels_of(x), dim=1).double(), y.flatten()
    rows = rows_of(pixels_of(x), flat)
    assert torch.equal(found.update_(x, y, predictions if predicted else None).flatten(), rows)
    counted = rows if not predicted else rows.where(predictions.flatten() == flat, -1)
    mean, scale = MEANS.flatten(0, 1).double().clone(), SCALES.flatten(0, 1).double().clone()
    for row in counted[counted >= 0].unique():
        own = unit[counted == row]
        direction = F.normalize(own.sum(0), dim=0)
        variance = (own - direction).square().mean(0) + 1e-2
        mean[row] = 0.7 * mean[row] + 0.3 * direction
        scale[row] = 0.4 * scale[row] + 0.6 * variance.sqrt()
    torch.testing.assert_close(found.means.flatten(0, 1).double(), F.normalize(mean, dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scales.flatten(0, 1).double(), scale, rtol=1e-4, atol=1e-5)


def test_the_memory_takes_evenly_spaced_pixels_in_a_ring():
    memory, most = 6, 4
    queue = drawn(K * M, memory, D, seed=7)
    next_, expected, at = torch.tensor([0, 3, 5] * K), queue.clone(), [0, 3, 5] * K
    x, rows = features(), labels(K * M - 1, -1)  # the last row is absent
    flat, unit = rows.flatten(), F.normalize(pixels_of(x), dim=1)
    for _ in range(2):
        enqueue_(queue, next_, x, rows, most)
        for row in range(K * M):
            own = unit[flat == row]
            if len(own) > most:
                own = own[torch.linspace(0, len(own) - 1, most, dtype=torch.int64)]
            for value in own:
                expected[row, at[row]] = value
                at[row] = (at[row] + 1) % memory
    torch.testing.assert_close(queue, expected)
    assert next_.tolist() == at


@pytest.mark.parametrize("samples", [1, 2, 3, 20])
def test_samples_are_spaced_as_torch_linspace_has_them(samples):
    from spcl_fast.estimators.ring import _evenly_spaced

    counts = torch.arange(samples, 400)
    expected = [torch.linspace(0, count - 1, samples, dtype=torch.int64).tolist() for count in counts.tolist()]
    assert _evenly_spaced(counts, samples).tolist() == expected


def test_with_a_memory_the_classes_of_the_batch_are_refitted_every_few_updates():
    found = mixture(keep=(0.7, 0.0), memory=50, interval=2)
    before = found.queue.clone()
    found.update_(features(), labels(K - 1))
    first, assert_queue = found.scales.clone(), found.queue
    own = assert_queue[: (K - 1) * M]
    direction = F.normalize(own.sum(1), dim=1)
    expected = ((own - direction[:, None]).square().mean(1) + 1e-2).sqrt()
    torch.testing.assert_close(first.flatten(0, 1)[: (K - 1) * M], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(first[K - 1], SCALES[K - 1])  # absent
    assert not torch.equal(assert_queue, before)
    found.update_(features() + 1, labels(K - 1))
    assert torch.equal(found.scales, first)  # the second of two
    found.update_(features() + 1, labels(K - 1))
    assert not torch.equal(found.scales, first)


def test_a_resumed_mixture_refits_when_the_other_would():
    one, other = mixture(memory=9, interval=3), mixture(memory=9, interval=3)
    one.update_(features(), labels())
    other.load_state_dict(one.state_dict())
    for found in (one, other):
        for _ in range(3):
            found.update_(features(), labels())
    assert torch.equal(one.scales, other.scales) and other.updates == 4


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(
        ValueError, match="memory must be at least 0, max_samples and interval at least 1, got -1, 20 and 5"
    ):
        GaussianMixture(K, D, memory=-1)
    with pytest.raises(ValueError, match=r"keep must be two shares in \[0, 1\]"):
        GaussianMixture(K, D, keep=(0.5, 1.5))
    with pytest.raises(ValueError, match=r"features must be \[B, 8, h, w\] or \[N, 8\], got shape \[2, 5, 3, 3\]"):
        mixture().assign(torch.randn(2, 5, 3, 3), torch.zeros(2, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected prototypes \[4, 3, 8\] or \[4, 8\], got \[2, 8\]"):
        mixture().load_(drawn(2, D))


def test_adapt_takes_it_by_name():
    objective = catalog.load(catalog.find(catalog.LOSSES, "gmmseg").home)(K, D, AdaptConfig(contrast_temperature=1.0))
    objective.load_(drawn(K, D)).update_(features(), labels())
    x = features().requires_grad_()
    objective(x, labels()).backward()
    assert objective.prototypes.shape == (K, D) and x.grad.any()
    assert objective(x, torch.full(GRID, 255)) == 0


def test_means_without_a_dimension_of_components_and_predictions_of_another_size_are_refused_by_shape():
    x, y = features(), labels()
    with pytest.raises(ValueError, match=r"must be \[K, M, D\], M components for each of K classes, got \[12, 8\]"):
        gmm_loss(x, y, drawn(K * M, D), torch.ones(K * M, D))
    with pytest.raises(ValueError, match=r"got shapes \[4, 3, 8\] and \[4, 3, 1\]"):
        gmm_class_logits(x, drawn(K, M, D), torch.ones(K, M, 1))
    with pytest.raises(
        ValueError,
        match=r"GaussianMixture: predictions must have the features' grid \[2, 5, 7\], got shape \[2, 9, 9\]",
    ):
        GaussianMixture(K, D, components=M).update_(x, y, torch.zeros(2, 9, 9, dtype=torch.long))
