"""compat.sepico: names, defaults and results of BIT-DA/SePiCo, whose quirks are written out here as formulas over the labelled pixels."""

from __future__ import annotations

import inspect
import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F

from spcl_fast.compat import sepico

B, A, H, W, C, M, SCALE = 2, 16, 6, 8, 5, 4, 4
FEAT = F.normalize(torch.randn(B, A, H, W, generator=torch.Generator().manual_seed(0)), dim=1)
MEAN = F.normalize(torch.randn(C, A, generator=torch.Generator().manual_seed(1)), dim=1)
COVARIANCE = torch.rand(C, A, generator=torch.Generator().manual_seed(2)) / A
BANK = [
    deque(
        F.normalize(torch.randn(M - k % 2, A, generator=torch.Generator().manual_seed(3 + k)), dim=1).split(1), maxlen=M
    )
    for k in range(C)
]
WEIGHTS = [0.3, 1.0, 2.5, 0.7, 1.4]
GIVEN = {"mean": MEAN, "covariance": COVARIANCE, "bank": BANK, "ratio": 0.8}


def mask(seed=4):
    generator = torch.Generator().manual_seed(seed)
    fine = (
        torch.randint(0, C, (B, 1, H, W), generator=generator).repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)
    )
    return fine.where(torch.rand(fine.shape, generator=generator) > 0.12, 255)


def pixels(feat, use_avg_pool=True):
    """Labelled rows [N, A] and their labels [N]."""
    labels = mask()[:, 0, ::SCALE, ::SCALE]
    if use_avg_pool:
        one_hot = F.one_hot(mask()[:, 0].where(mask()[:, 0] != 255, C), C + 1).permute(0, 3, 1, 2).float()
        share, found = F.avg_pool2d(one_hot, SCALE).max(1)
        labels = found.where((share >= 0.75) & (found != C), 255)
    keep = labels.flatten() != 255
    return feat.permute(0, 2, 3, 1).reshape(-1, A)[keep], labels.flatten()[keep]


def terms(kind, x, y, temperature, class_weight):
    """[N] in the authors' order."""
    dtype, weight = x.dtype, 1 if class_weight is None else torch.tensor(class_weight, dtype=x.dtype)[y]
    s = x @ MEAN.to(dtype).t() / temperature
    if kind == "proto":
        return weight * F.cross_entropy(s, y, reduction="none")
    if kind == "dist":
        v = 0.5 * 0.8 * x.square() @ COVARIANCE.to(dtype).t() / temperature**2
        return weight * F.cross_entropy(s + v, y, reduction="none") + v.gather(1, y[:, None])[:, 0]
    rows = [torch.cat(list(bank)).to(dtype) for bank in BANK]
    found = []
    for k in range(C):
        own = (x[y == k] @ rows[k].t() / temperature).exp()
        others = sum((x[y == k] @ rows[c].t() / temperature).mean(1).exp() for c in range(C) if c != k)
        found.append(-(own / (own + others[:, None])).log().mean(1))
    return torch.cat(found)


def plain(
    kind, feat, temperature=1.0, class_weight=None, reduction="mean", weight=None, avg_factor=None, reg=0.0, pool=True
):
    x, y = pixels(feat, pool)
    loss = terms(kind, x, y, temperature, class_weight)
    loss = loss if weight is None else loss * weight
    if reduction == "mean":
        loss = loss.mean() if avg_factor is None else loss.sum() / avg_factor
    elif reduction == "sum":
        loss = loss.sum()
    z = MEAN.to(x.dtype) @ x.mean(0) / temperature
    return loss + reg * z.softmax(0).log().sum() / (C * math.log(C)) if reg else loss


FLAGS = {"proto": {}, "dist": {"use_dist": True}, "bank": {"use_bank": True}}


def check(kind, call: dict | None = None, formula: dict | None = None, **options):
    criterion = sepico.ContrastiveLoss(num_classes=C, **FLAGS[kind], **options)
    ours, theirs = FEAT.clone().requires_grad_(), FEAT.double().requires_grad_()
    got = criterion(ours, mask(), **GIVEN, **(call or {}))
    true = plain(kind, theirs, **(formula or {}))
    assert got.shape == true.shape
    incoming = torch.linspace(1, 2, true.numel(), dtype=torch.float64).view(true.shape)
    got.backward(incoming.float())
    true.backward(incoming)
    torch.testing.assert_close(got.double(), true, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-6 * theirs.grad.abs().max().item())


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("kind", FLAGS)
def test_each_loss_with_and_without_its_regulariser(kind, temperature):
    check(kind, formula={"temperature": temperature}, contrast_temp=temperature)
    reg = {"use_reg": True, "reg_relative_weight": 0.7}
    check(kind, formula={"temperature": temperature, "reg": 0.7}, contrast_temp=temperature, **reg)
    check(kind, formula={"temperature": temperature}, contrast_temp=temperature, reg_relative_weight=0.7)


@pytest.mark.parametrize("kind", ["proto", "dist"])
def test_class_weights_leave_the_denominator_alone_and_the_variance_term_of_dist(kind):
    check(kind, formula={"class_weight": WEIGHTS}, contrast_temp=1.0, class_weight=WEIGHTS)


def test_class_weights_are_taken_and_not_used_by_bank():
    check("bank", contrast_temp=1.0, class_weight=WEIGHTS)


@pytest.mark.parametrize("kind", FLAGS)
def test_weights_and_losses_without_reduction_are_those_of_the_labelled_pixels_in_the_authors_order(kind):
    count = len(pixels(FEAT)[1])
    weight = torch.rand(count, generator=torch.Generator().manual_seed(9))
    check(kind, {"weight": weight}, {"weight": weight.double()}, contrast_temp=1.0)
    check(
        kind, {"weight": weight}, {"weight": weight.double(), "reduction": "none"}, contrast_temp=1.0, reduction="none"
    )
    check(kind, {"reduction_override": "sum"}, {"reduction": "sum"}, contrast_temp=1.0)
    check(kind, {"avg_factor": 17.0}, {"avg_factor": 17.0}, contrast_temp=1.0)


def test_nearest_labels_without_average_pooling():
    check("dist", formula={"pool": False}, contrast_temp=1.0, use_avg_pool=False)


def test_a_list_of_features_is_summed_with_a_weight_each():
    criterion = sepico.ContrastiveLoss(num_classes=C, use_dist=True, loss_weight=[1.0, 0.5], contrast_temp=1.0)
    means, covariances = {0: MEAN, 1: MEAN.flip(0)}, {0: COVARIANCE, 1: COVARIANCE.flip(0)}
    got = criterion([FEAT, -FEAT], mask(), mean=means, covariance=covariances)
    one = sepico.ContrastiveLoss(num_classes=C, use_dist=True, contrast_temp=1.0)
    parts = [one(x, mask(), mean=means[i], covariance=covariances[i]) for i, x in enumerate((FEAT, -FEAT))]
    torch.testing.assert_close(got, parts[0] + 0.5 * parts[1])


def one_pass(batches):
    x = torch.cat([pixels(feat)[0] for feat in batches]).double()
    y = torch.cat([pixels(feat)[1] for feat in batches])
    mean = torch.stack([x[y == k].mean(0) for k in range(C)])
    return mean, torch.stack([x[y == k].var(0, unbiased=False) for k in range(C)]), torch.bincount(y, minlength=C)


def test_the_estimator_has_the_authors_statistics_and_bank(tmp_path):
    estimator = sepico.ProtoEstimator(A, C, 3, device="cpu")
    batches = [FEAT, FEAT.flip(2), -FEAT]
    for feat in batches[:2]:
        estimator.update_proto(*sepico.contrast_preparations(feat, mask(), True, 0.75, C, 255))
    estimator.update_map(batches[2], sepico.downscale_label_ratio(mask(), SCALE, 0.75, C)[:, 0])
    mean, covariance, amount = one_pass(batches)
    torch.testing.assert_close(estimator.Ave.double(), mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(estimator.CoVariance.double(), covariance, rtol=1e-4, atol=1e-7)
    assert estimator.Amount.tolist() == amount.tolist()
    for k, bank in enumerate(estimator.MemoryBank):
        own = [pixels(feat)[0][pixels(feat)[1] == k].mean(0) for feat in batches]
        torch.testing.assert_close(torch.cat(list(bank)), torch.stack(own))
    estimator.save_proto(str(tmp_path / "proto.pth"))
    again = sepico.ProtoEstimator(A, C, resume=str(tmp_path / "proto.pth"), device="cpu")
    torch.testing.assert_close(again.Ave, estimator.Ave)
    assert set(torch.load(tmp_path / "proto.pth", weights_only=True)) == {"CoVariance", "Ave", "Amount"}
    loss = sepico.ContrastiveLoss(num_classes=C, use_bank=True)(FEAT, mask(), bank=again.MemoryBank)
    assert loss.isfinite()


def test_a_fresh_bank_is_one_row_of_zeros_per_class_and_length_0_is_empty():
    bank = sepico.ProtoEstimator(A, C, device="cpu").MemoryBank
    assert len(bank) == C and all(len(rows) == 1 and not rows[0].any() for rows in bank)
    assert all(len(rows) == 0 for rows in sepico.ProtoEstimator(A, C, 0, device="cpu").MemoryBank)


@pytest.mark.parametrize("kind", FLAGS)
def test_a_batch_without_labels_is_zero_and_still_connected(kind):
    feat = FEAT.clone().requires_grad_()
    criterion = sepico.ContrastiveLoss(num_classes=C, use_reg=True, **FLAGS[kind])
    loss = criterion(feat, torch.full((B, 1, H * SCALE, W * SCALE), 255), **GIVEN)
    loss.backward()
    assert loss == 0 and not feat.grad.any()
    assert sepico.proto_reg(FEAT.movedim(1, -1).reshape(-1, A)[:0], MEAN, contrast_norm=1.0) == 0


def test_signatures_are_the_authors():
    def names(function):
        return list(inspect.signature(function).parameters)

    common = "contrast_temp use_avg_pool scale_min_ratio num_classes weight"
    tail = "reduction avg_factor reg_weight ignore_index kwargs"
    assert names(sepico.proto_contrastive) == f"feat mask mean index {common} class_weight {tail}".split()
    assert (
        names(sepico.dist_contrastive) == f"feat mask mean covariance ratio index {common} class_weight {tail}".split()
    )
    assert names(sepico.bank_contrastive) == f"feat mask bank mean index {common} {tail}".split()
    assert names(sepico.proto_reg) == ["feat", "mean", "contrast_temp", "contrast_norm", "kwargs"]
    assert names(sepico.ProtoEstimator)[:4] == ["dim", "class_num", "memory_length", "resume"]


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="num_classes is missing"):
        sepico.ContrastiveLoss()
    with pytest.raises(ValueError, match="covariance is missing"):
        sepico.ContrastiveLoss(num_classes=C, use_dist=True)(FEAT, mask(), mean=MEAN)
    with pytest.raises(ValueError, match=r"mean requires grad.*mean.detach\(\)"):
        sepico.ContrastiveLoss(num_classes=C)(FEAT, mask(), mean=MEAN.clone().requires_grad_())
    with pytest.raises(ValueError, match="pad the image"):
        sepico.ContrastiveLoss(num_classes=C)(FEAT, mask()[:, :, :-1], mean=MEAN)
