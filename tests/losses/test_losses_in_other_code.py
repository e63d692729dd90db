"""The losses of the family in other people's code: torch.func, autocast, float16 with a scaler; and one bad batch for every estimator."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp

from spcl_fast import estimators
from spcl_fast.estimators import MeanBank
from spcl_fast.losses import CAPIClustering, DINOLoss, LinearHead, SwAVLoss, info_nce, panet
from spcl_fast.losses.mean_feature import mean_feature
from spcl_fast.losses.pairs import pair_info_nce
from spcl_fast.losses.sepico import bank_cl, proto_reg
from spcl_fast.losses.similarity import labelled_similarity

K, D = 4, 8
DRAWN = torch.Generator().manual_seed(0)
MAP, ROWS = torch.randn(2, D, 5, 5, generator=DRAWN), torch.randn(12, D, generator=DRAWN)
LABELS, OF_ROWS = torch.randint(0, K, (2, 5, 5), generator=DRAWN), torch.randint(0, K, (12,), generator=DRAWN)
BANK = torch.randn(K, 3, D, generator=DRAWN)
PROTOTYPES, MASKS = torch.randn(K, D, generator=DRAWN), torch.rand(2, 2, 9, 9, generator=DRAWN)


def capi(x):
    torch.manual_seed(0)
    return CAPIClustering(D, 5)(x.view(3, 4, D).contiguous())[1]


DINO = DINOLoss(K, keep=1)  # the centre stays where it is


def dino(x):
    x = x / 10
    return DINO([x[:6], x[6:], x[:6]], [BANK[0].repeat(2, 1), BANK[1].repeat(2, 1)], PROTOTYPES, PROTOTYPES, 0.3)


def swav(x):
    x = x / 10
    return SwAVLoss(epsilon=0.5)([x[:6], x[6:], x[:6] * 2], PROTOTYPES)


def head(x):
    torch.manual_seed(0)
    return LinearHead(D, K, batch_norm=True)(x).square().mean()


LOSSES = {
    "masked_info_nce": (lambda x: info_nce.masked_info_nce(x, OF_ROWS, PROTOTYPES, torch.arange(K), temperature=0.3), ROWS),
    "pair_info_nce": (lambda x: pair_info_nce(x, OF_ROWS, temperature=0.3), ROWS),
    "bank_cl": (lambda x: bank_cl(x, LABELS, BANK, temperature=0.3), MAP),
    "mean_feature": (lambda x: mean_feature(x, LABELS).square().sum(), MAP),
    "proto_reg": (lambda x: proto_reg(x, LABELS, PROTOTYPES, temperature=0.3), MAP),
    "labelled_similarity": (lambda x: labelled_similarity(x, LABELS, PROTOTYPES)[0].square().sum(), MAP),
    "capi": (capi, ROWS),
    "dino": (dino, ROWS),
    "swav": (swav, ROWS),
    "masked_mean": (lambda x: panet.masked_mean(x, MASKS).square().sum(), MAP),
    "linear_head": (head, MAP),
}  # fmt: skip
OWN_GRADIENTS = [name for name in LOSSES if name not in ("masked_mean", "linear_head")]


def gradient(loss, values):
    leaf = values.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_first_derivatives_by_torch_func(name):
    loss, values = LOSSES[name]
    assert gradient(loss, values).norm() > 0
    torch.testing.assert_close(grad(loss)(values), gradient(loss, values))
    torch.testing.assert_close(grad(lambda x: loss(x) ** 2)(values), 2 * loss(values) * gradient(loss, values))


@pytest.mark.parametrize("name", [name for name in OWN_GRADIENTS if name != "capi"])  # which draws its weights here
def test_they_compile_in_one_graph(name):
    loss, values = LOSSES[name]
    torch._dynamo.reset()
    leaf = values.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf).backward()
    torch.testing.assert_close(leaf.grad, gradient(loss, values))


@pytest.mark.parametrize("name", OWN_GRADIENTS)
def test_forward_mode_is_refused_with_a_reason_instead_of_a_tangent_of_0(name):
    loss, values = LOSSES[name]
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        jvp(loss, (values,), (values,))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backward_inside", [False, True])
def test_a_loss_under_autocast_is_still_a_float32_loss(name, backward_inside):
    loss, values = LOSSES[name]
    leaf = values.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(leaf)
        if backward_inside and name in OWN_GRADIENTS:
            found.backward()
    if leaf.grad is None:
        found.backward()
    assert found.dtype == torch.float32 and torch.equal(found, loss(values))
    torch.testing.assert_close(leaf.grad, gradient(loss, values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pairs_of_half_floats_are_summed_in_float32(dtype):
    x, labels = torch.nn.functional.normalize(torch.randn(600, D, generator=DRAWN)).to(dtype), torch.arange(600) % 2
    found, exact = pair_info_nce(x, labels, temperature=0.05), pair_info_nce(x.double(), labels, temperature=0.05)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)  # 180 000 pairs: their sum is beyond float16
    assert gradient(lambda x: pair_info_nce(x, labels, temperature=0.05), x).dtype == dtype


def test_small_gradients_of_float16_survive_a_scaler():
    x = torch.randn(100, 200, D, generator=DRAWN).half()

    def scaled(x):
        torch.manual_seed(0)
        return CAPIClustering(D, 5)(x)[1] * 65536

    exact = gradient(scaled, x.float())
    small = (exact / 65536).abs() < 2e-6  # of those float16 has five bits or fewer
    error = (gradient(scaled, x).float() - exact)[small].norm() / exact[small].norm()
    assert small.float().mean() > 0.1 and error < 5e-3


MADE = {
    "PrototypeBank": lambda: estimators.PrototypeBank(K, D, normalize=False),
    "ProtoEstimator": lambda: estimators.ProtoEstimator(K, D),
    "MeanBank": lambda: MeanBank(K, D, 3),
    "ClassMemory": lambda: estimators.ClassMemory(K, D, 6),
    "PrototypeClusters": lambda: estimators.PrototypeClusters(K, D, 2, assignment="argmax"),
    "GaussianMixture": lambda: estimators.GaussianMixture(K, D, 2),
    "GaussianMixture with a memory": lambda: estimators.GaussianMixture(K, D, 2, memory=8),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 3e38])
def test_one_bad_batch_spoils_no_estimator(name, bad):
    torch.manual_seed(0)
    estimator, spoilt = MADE[name](), MAP.flip(0).clone()
    estimator.update_(MAP, LABELS)
    spoilt[0, 0, 0, 0] = bad
    spoilt[1, :, 2, 2] = bad
    estimator.update_(spoilt, LABELS)
    state = [value for value in estimator.state_dict().values() if value.is_floating_point()]
    assert state and all(value.isfinite().all() for value in state)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_one_bad_batch_leaves_a_teachers_centre_as_it_is(bad):
    centre, rows = estimators.TeacherCentre(K), ROWS.clone()
    before = centre.update_(ROWS, PROTOTYPES).centre
    rows[0, 0] = bad
    assert torch.equal(centre.update_(rows, PROTOTYPES).centre, before)
    assert not torch.equal(centre.update_(ROWS, PROTOTYPES).centre, before)


def test_pixels_that_are_not_finite_never_enter_a_memory():
    memory, x = estimators.ClassMemory(1, D, 4, max_samples=4), ROWS[:4].clone()
    x[1, 3] = torch.nan
    memory.update_(x, torch.zeros(4, dtype=torch.long))
    assert memory.written.tolist() == [3] and (memory.row_labels == 0).sum() == 3
