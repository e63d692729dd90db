"""Edges that a formula on paper covers and a kernel can lose: weights of zero and steep softmaxes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import usable

import spcl_fast as sf

# above the number of classes from which the C++ backend streams them
MANY = 5000


@pytest.mark.parametrize("backend", [name for name in usable("prototype_contrastive_loss") if name != "triton"])
def test_a_label_of_class_weight_zero_does_not_make_the_gradients_of_a_large_head_nan(backend):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 9, generator=generator)
    prototypes = torch.randn(MANY, 9, generator=generator)
    labels = torch.randint(0, MANY, (7,), generator=generator)
    weight = torch.rand(MANY, generator=generator)
    weight[labels[[0, 3]]] = 0
    truth = [features.double().requires_grad_(), prototypes.double().requires_grad_()]
    expected = F.cross_entropy(truth[0] @ truth[1].T, labels, weight=weight.double())
    got = [features.requires_grad_(), prototypes.requires_grad_()]
    loss = sf.prototype_contrastive_loss(
        *(got[0], labels, got[1]),
        temperature=1.0,
        normalize=False,
        class_weight=weight,
        ignore_index=-1,
        backend=backend,
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(loss, got), torch.autograd.grad(expected, truth), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [name for name in usable("prototype_contrastive_loss") if name != "triton"])
def test_a_teacher_whose_only_class_weighs_nothing_gives_gradient_zero_and_not_nan(backend):
    features, prototypes = torch.randn(5, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    targets = sf.TeacherTargets(torch.randn(5, 3), torch.randn(1, 3), 1.0)
    loss = sf.prototype_contrastive_loss(
        features, targets, prototypes, temperature=1.0, class_weight=torch.zeros(1), backend=backend
    )
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (features, prototypes)))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("backend", usable("upsampled_cross_entropy"))
def test_the_gradient_at_a_low_temperature_is_not_off_by_the_rounding_of_the_logsumexp(backend, smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(2, 7, 4, 5, generator=generator)
    labels = torch.randint(0, 7, (2, 4, 5), generator=generator)

    def gradient(dtype, loss_of):
        leaf = logits.to(dtype).requires_grad_()
        return torch.autograd.grad(loss_of(leaf), leaf)[0].double()

    def eager(leaf):
        return F.cross_entropy(leaf / 0.05, labels, reduction="sum", label_smoothing=smoothing)

    def ours(leaf):
        return sf.upsampled_cross_entropy(
            leaf, labels, temperature=0.05, reduction="sum", label_smoothing=smoothing, backend=backend
        )

    truth = gradient(torch.float64, eager)
    allowed = max(2 * (gradient(torch.float32, eager) - truth).abs().max(), 4e-7 * truth.abs().max())
    assert (gradient(torch.float32, ours) - truth).abs().max() <= allowed
