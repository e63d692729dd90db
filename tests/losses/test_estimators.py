"""ProtoEstimator and MeanBank against one pass over everything that they have seen."""

from __future__ import annotations

from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spcl_fast.estimators import MeanBank, ProtoEstimator

K, D = 5, 8


def batch(seed: int, pixels=60, absent: int | None = None, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(pixels, D, generator=generator) + shift
    labels = torch.randint(0, K, (pixels,), generator=generator)
    labels[:5] = 255
    if absent is not None:
        labels[labels == absent] = 255
    return x, labels


BATCHES = [batch(0, absent=3), batch(1, pixels=7), batch(2, absent=1), batch(3)]


def statistics(batches, normalize):
    x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    x = (F.normalize(x, dim=1) if normalize else x).double()
    rows = [x[labels == k] for k in range(K)]
    return torch.stack([r.mean(0) for r in rows]), torch.stack([r.var(0, unbiased=False) for r in rows])


@pytest.mark.parametrize("normalize", [True, False])
def test_batches_merge_into_the_statistics_of_all_pixels(normalize):
    estimator = ProtoEstimator(K, D, normalize=normalize)
    for x, labels in BATCHES:
        estimator.update_(x, labels)
    mean, variance = statistics(BATCHES, normalize)
    torch.testing.assert_close(estimator.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(estimator.variance, variance, rtol=1e-5, atol=1e-6)
    counts = torch.cat([labels for _, labels in BATCHES])
    assert estimator.amount.tolist() == [(counts == k).sum().item() for k in range(K)]


def test_parts_of_a_batch_are_that_batch():
    whole, parts = ProtoEstimator(K, D), ProtoEstimator(K, D)
    x, labels = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    whole.update_(x, labels)
    parts.update_in_parts_(iter(BATCHES))
    for name in ("mean", "variance", "amount"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-6, atol=1e-7)


def test_an_absent_class_keeps_its_statistics_bit_for_bit():
    estimator = ProtoEstimator(K, D)
    estimator.update_(*batch(0))
    mean, variance = estimator.mean, estimator.variance
    estimator.update_(*batch(1, absent=2))
    assert torch.equal(estimator.mean[2], mean[2]) and torch.equal(estimator.variance[2], variance[2])
    assert not torch.equal(estimator.mean[1], mean[1])


def test_a_class_of_infinite_features_and_one_of_too_few_pixels_are_absent():
    estimator = ProtoEstimator(K, D, normalize=False, min_pixels=3)
    estimator.update_(*batch(0))
    before = estimator.mean
    x, labels = torch.randn(6, D), torch.tensor([0, 0, 0, 1, 1, 1])
    x[4] = torch.inf
    estimator.update_(x, labels)
    assert torch.equal(estimator.mean[1], before[1]) and not torch.equal(estimator.mean[0], before[0])
    now = estimator.mean
    estimator.update_(x[:2], labels[:2])
    assert torch.equal(estimator.mean, now)


def test_a_mean_goes_on_moving_after_as_many_pixels_as_float32_can_count():
    estimator = ProtoEstimator(1, 1, normalize=False).load_(
        torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([2.0**24])
    )
    for _ in range(3):
        estimator.update_(torch.ones(1, 1), torch.zeros(1, dtype=torch.long))
    assert estimator.amount.item() == 2**24 + 3
    assert estimator.mean.item() == pytest.approx(3 / (2**24 + 3), rel=1e-9)


def test_a_large_mean_leaves_the_variance_its_digits():
    x, labels = batch(5, pixels=4000, shift=10.0)
    estimator = ProtoEstimator(K, D, normalize=False).update_(x, labels)
    _, variance = statistics([(x, labels)], False)
    torch.testing.assert_close(estimator.variance, variance, rtol=1e-4, atol=0)


def test_a_recorded_loss_keeps_the_statistics_that_it_has_seen():
    estimator = ProtoEstimator(K, D).update_(*batch(0))
    x = torch.randn(4, D, requires_grad=True)
    loss = (x @ estimator.prototypes.t()).sum()
    before = estimator.prototypes.sum(0)
    estimator.update_(*batch(1))
    loss.backward()
    torch.testing.assert_close(x.grad, before.expand(4, D))


@pytest.mark.parametrize("make", [ProtoEstimator, MeanBank])
def test_half_of_a_module_around_it_and_a_state_dict_leave_the_digits(make):
    estimator = make(K, D).update_(*batch(0))
    other = make(K, D)
    other.load_state_dict(estimator.state_dict())
    state = {name: value.clone() for name, value in estimator.state_dict().items()}
    nn.Sequential(estimator).half()
    for name, value in state.items():
        assert torch.equal(getattr(estimator, name), value) and torch.equal(getattr(other, name), value)
        assert getattr(estimator, name).dtype == value.dtype


def test_the_bank_holds_the_last_means_of_each_class():
    bank, queues = MeanBank(K, D, 3), [deque(maxlen=3) for _ in range(K)]
    for x, labels in [*BATCHES, batch(9, absent=0), batch(10)]:
        bank.update_(x, labels)
        for k in range(K):
            if (labels == k).any():
                queues[k].append(F.normalize(x, dim=1)[labels == k].mean(0))
    for k in range(K):
        torch.testing.assert_close(bank.of_class(k), torch.stack(list(queues[k])))
    assert bank.is_there().all() and (bank.filled >= 3).all()


def test_a_bank_starts_from_prototypes_and_from_nothing():
    bank = MeanBank(K, D, 3)
    assert not bank.is_there().any()
    prototypes = torch.randn(K, D)
    bank.load_(prototypes)
    assert bank.is_there().sum(1).tolist() == [1] * K and torch.equal(bank.of_class(2), prototypes[2:3])


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="must be at least 1"):
        ProtoEstimator(0, D)
    with pytest.raises(ValueError, match=f"features must be .*{D}"):
        ProtoEstimator(K, D).update_(torch.randn(3, D + 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="expected variances"):
        ProtoEstimator(K, D).load_(torch.zeros(K, D), torch.zeros(K))
    with pytest.raises(ValueError, match="expected prototypes"):
        MeanBank(K, D).load_(torch.zeros(K, D + 1))
