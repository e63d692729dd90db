"""ProDA's and CPSL's weights, labels and losses against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transcription import assert_equals

from spcl_fast.losses import cpsl, proda

B, D, H, W, K = 2, 16, 5, 7, 6
FEATURES = torch.randn(B, D, H, W, generator=torch.Generator().manual_seed(0))
PROTOTYPES = torch.randn(K, D, generator=torch.Generator().manual_seed(1))
LOGITS = torch.randn(B, K, H, W, generator=torch.Generator().manual_seed(2))
LABELS = torch.randint(0, K, (B, 11, 16), generator=torch.Generator().manual_seed(3))
LABELS[:, :2] = 255


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 5.0])
def test_distance_weights_are_a_softmax_of_distances_that_are_not_squared(scale, dtype, tolerance):
    x, p = FEATURES.to(dtype), PROTOTYPES.to(dtype)
    distance = (x[:, None].double() - p.double()[None, :, :, None, None]).norm(dim=2)
    expected = (-scale * distance).softmax(1)
    got = proda.distance_weights(x, p, scale=scale)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    rows = proda.distance_weights(x.permute(0, 2, 3, 1).reshape(-1, D), p, scale=scale)
    torch.testing.assert_close(rows.view(B, H, W, K).movedim(-1, 1), got)


def test_a_feature_that_is_a_prototype_has_a_finite_weight():
    assert proda.distance_weights(PROTOTYPES, PROTOTYPES).isfinite().all()


def test_cosine_weights_are_a_softmax_of_cosines():
    cosine = torch.einsum("bdhw,kd->bkhw", F.normalize(FEATURES, dim=1), F.normalize(PROTOTYPES, dim=1))
    torch.testing.assert_close(
        cpsl.cosine_weights(FEATURES, PROTOTYPES), (cosine / 0.08).softmax(1), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_rectified_labels_are_the_argmax_of_weighted_probabilities_above_a_threshold(threshold):
    weights, soft = proda.distance_weights(FEATURES, PROTOTYPES), LOGITS.softmax(1)
    r = weights * soft
    share, expected = (r / r.sum(1, keepdim=True)).max(1)
    got = proda.rectified_labels(weights, soft, threshold=threshold)
    assert torch.equal(got, expected.where(share >= threshold, 255))
    assert proda.rectified_labels(weights, soft * 0).eq(255).all()
    with pytest.raises(ValueError, match="must have one shape"):
        proda.rectified_labels(weights, soft[:, :3])


def up(logits):
    return F.interpolate(logits, LABELS.shape[1:], mode="bilinear", align_corners=True)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.1, 1.0)])
def test_symmetric_cross_entropy_and_each_of_its_terms(alpha, beta):
    def plain(logits):
        keep = LABELS != 255
        p = up(logits).softmax(1)
        one_hot = F.one_hot(LABELS.where(keep, 0), K).permute(0, 3, 1, 2).to(p.dtype).clamp(1e-4, 1)
        reverse = -(p * one_hot.log()).sum(1)
        forward = F.cross_entropy(up(logits), LABELS, ignore_index=255)
        return alpha * forward + beta * reverse[keep].mean()

    assert_equals(
        lambda logits: proda.symmetric_cross_entropy(logits, LABELS, alpha=alpha, beta=beta),
        plain,
        logits=LOGITS,
        slack=64,
    )
    assert proda.symmetric_cross_entropy(LOGITS, torch.full_like(LABELS, 255)) == 0


def test_uniform_regularizer_is_the_mean_of_minus_log_p():
    assert_equals(
        lambda logits: proda.uniform_regularizer(logits, tuple(LABELS.shape[1:])), lambda logits: -up(logits).log_softmax(1).mean(),
        logits=LOGITS,
    )  # fmt: skip
    torch.testing.assert_close(proda.uniform_regularizer(LOGITS), -LOGITS.log_softmax(1).mean())


def transported(unit, p, share, epsilon=0.05, iterations=3):
    """Sinkhorn over the whole matrix, as CPSL writes it."""
    q = (unit.double() @ F.normalize(p.double(), dim=1).t() / epsilon).exp()
    for _ in range(iterations):
        q = q / q.sum(0) * share
        q = q / q.sum(1, keepdim=True)
    return q


SHARE = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.06, 0.04], dtype=torch.float64)


@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("share", [None, SHARE])
def test_self_labels_follow_the_class_distribution_and_their_loss_the_formula(share, with_queue):
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(4))
    queue = F.normalize(torch.randn(30, D, generator=torch.Generator().manual_seed(5)), dim=1) if with_queue else None
    uniform = torch.full((K,), 1 / K, dtype=torch.float64)

    def plain(features, prototypes):
        unit = F.normalize(x.double(), dim=1)
        seen = unit if queue is None else torch.cat([queue, unit])
        q = transported(seen, PROTOTYPES, uniform if share is None else share)[-len(x) :].to(features.dtype)
        z = F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).t() / 0.08
        return -(q * z.log_softmax(1)).sum(1).mean()

    def ours(features, prototypes):
        own, rows = (tensor.to(features.dtype) for tensor in (x, PROTOTYPES))
        targets = cpsl.self_labels(own, rows, class_share=share, queue=None if queue is None else queue.to(own.dtype))
        return cpsl.self_label_loss(features, prototypes, targets)

    assert_equals(ours, plain, features=x, prototypes=PROTOTYPES, slack=64)


def test_columns_of_the_self_labels_have_the_share_of_their_class():
    x = torch.randn(600, D, generator=torch.Generator().manual_seed(6))
    q = transported(F.normalize(x.double(), dim=1), PROTOTYPES, SHARE, epsilon=0.3, iterations=30)
    targets = cpsl.self_labels(x, PROTOTYPES, epsilon=0.3, iterations=30, class_share=SHARE)
    scores = targets.features @ targets.prototypes.t() / 0.3 + targets.u[:, None] + targets.v
    torch.testing.assert_close(scores.exp().double(), q, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores.exp().mean(0).double(), SHARE, rtol=2e-2, atol=1e-3)
    assert math.isclose(scores.exp().sum(1).mean().item(), 1, rel_tol=1e-4)


def test_a_share_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="class_share must have one share per prototype"):
        cpsl.self_labels(torch.randn(4, D), PROTOTYPES, class_share=SHARE[:3])
