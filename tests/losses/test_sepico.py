"""SePiCo's losses against their formulas, written over one-hot masks as the paper has them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transcription import TEMPERATURES, assert_equals

from spcl_fast.losses import sepico
from spcl_fast.losses.mean_feature import mean_feature

B, D, H, W, K, M = 2, 12, 6, 9, 5, 7


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FEATURES = rand(B, D, H, W)
PROTOTYPES = F.normalize(rand(K, D, seed=1), dim=1)
VARIANCES = rand(K, D, seed=2).square() / D
ROWS = F.normalize(rand(K, M, D, seed=3), dim=2)
CLASS_WEIGHT, PIXEL_WEIGHT = rand(K, seed=4).abs() + 0.2, rand(B, H, W, seed=5).abs()
LABELS = torch.randint(0, K, (B, H, W), generator=torch.Generator().manual_seed(6))
LABELS[:, :2, :4] = 255
VALID = LABELS != 255
TARGET = LABELS.where(VALID, 0)


def unit(x, normalize):
    return F.normalize(x, dim=1) if normalize else x


def scores(x, rows):
    return torch.einsum("bdhw,kd->bkhw", x, rows.to(x.dtype))


def of_label(z):
    return z.gather(1, TARGET[:, None])[:, 0]


def averaged(nll, weighted):
    nll = nll.where(VALID, 0) * (PIXEL_WEIGHT.to(nll.dtype) if weighted else 1)
    return nll.sum() / VALID.sum()


def plain_dist(x, temperature, ratio, class_weight, normalize=True, weighted=False):
    x = unit(x, normalize)
    v = 0.5 * ratio * scores(x.square(), VARIANCES) / temperature**2
    z = scores(x, PROTOTYPES) / temperature + v
    weight = 1 if class_weight is None else class_weight.to(x.dtype)[TARGET]
    return averaged(weight * (z.logsumexp(1) - of_label(z)) + of_label(v), weighted)


def plain_bank(x, temperature, there):
    s = torch.einsum("bdhw,kmd->bkmhw", F.normalize(x, dim=1), ROWS.to(x.dtype)) / temperature
    means = torch.stack([s[:, k, there[k]].mean(1) if there[k].any() else s[:, k, 0] - torch.inf for k in range(K)], 1)
    nll = torch.zeros(B, H, W, dtype=x.dtype)
    for k in range(K):
        others = [c for c in range(K) if c != k]
        negatives = means[:, others].logsumexp(1, keepdim=True)
        terms = torch.logaddexp(s[:, k], negatives.expand_as(s[:, k])) - s[:, k]
        nll = torch.where(VALID & (k == LABELS), terms[:, there[k]].mean(1) if there[k].any() else 0, nll)
    return averaged(nll, False)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_proto_cl_averages_class_weights_over_pixels_not_over_weights(temperature):
    def plain(features):
        z = scores(unit(features, True), PROTOTYPES) / temperature
        return averaged(CLASS_WEIGHT.to(z.dtype)[TARGET] * (z.logsumexp(1) - of_label(z)), True)

    options = {"temperature": temperature, "class_weight": CLASS_WEIGHT, "pixel_weight": PIXEL_WEIGHT}
    assert_equals(lambda features: sepico.proto_cl(features, LABELS, PROTOTYPES, **options), plain, features=FEATURES)


@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["unweighted", "class weights"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dist_cl_weighs_the_softmax_part_alone(temperature, class_weight):
    options = {"temperature": temperature, "class_weight": class_weight, "ratio": 0.7, "pixel_weight": PIXEL_WEIGHT}
    assert_equals(
        lambda features: sepico.dist_cl(features, LABELS, PROTOTYPES, VARIANCES, **options),
        lambda features: plain_dist(features, temperature, 0.7, class_weight, weighted=True),
        features=FEATURES,
    )


def test_dist_cl_of_features_that_are_unit_already():
    options = {"temperature": 1.0, "normalize": False, "class_weight": CLASS_WEIGHT}
    assert_equals(
        lambda features: sepico.dist_cl(features, LABELS, PROTOTYPES, VARIANCES, **options),
        lambda features: plain_dist(features, 1.0, 1.0, CLASS_WEIGHT, normalize=False),
        features=FEATURES,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_bank_cl_counts_each_positive_against_the_mean_rows_of_the_others(temperature):
    there = torch.ones(K, M, dtype=torch.bool)
    there[1, 3:] = False  # not yet full
    assert_equals(
        lambda features: sepico.bank_cl(features, LABELS, ROWS, there, temperature=temperature),
        lambda features: plain_bank(features, temperature, there),
        features=FEATURES,
    )


def test_bank_cl_leaves_out_a_class_that_was_never_seen():
    there = torch.ones(K, M, dtype=torch.bool)
    there[2] = False
    assert_equals(
        lambda features: sepico.bank_cl(features, LABELS, ROWS, there, temperature=0.3),
        lambda features: plain_bank(features, 0.3, there),
        features=FEATURES,
    )


def test_bank_cl_in_more_tiles_than_fit_at_once(monkeypatch):
    from spcl_fast.losses import bank_contrast

    there = torch.ones(K, M, dtype=torch.bool)
    whole = sepico.bank_cl(FEATURES, LABELS, ROWS, there, temperature=0.3, reduction="none")
    monkeypatch.setattr(bank_contrast, "_TILE", 4)
    monkeypatch.setattr(bank_contrast, "_AT_ONCE", 8 * M)
    torch.testing.assert_close(sepico.bank_cl(FEATURES, LABELS, ROWS, there, temperature=0.3, reduction="none"), whole)
    rows = FEATURES.permute(0, 2, 3, 1).reshape(-1, D)
    flat = sepico.bank_cl(rows, LABELS.flatten(), ROWS, temperature=0.3, reduction="none")
    torch.testing.assert_close(flat.view(B, H, W), whole)


def test_bank_cl_of_features_that_are_unit_already():
    def plain(features):
        return plain_bank(features, 0.3, torch.ones(K, M, dtype=torch.bool))

    def ours(features):
        return sepico.bank_cl(F.normalize(features, dim=1), LABELS, ROWS, temperature=0.3, normalize=False)

    assert_equals(ours, plain, features=FEATURES)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("normalize", [True, False])
def test_proto_reg_is_of_the_mean_feature(temperature, normalize):
    def plain(features):
        rows = unit(features, normalize).movedim(1, -1)[VALID]
        z = PROTOTYPES.to(rows.dtype) @ rows.mean(0) / temperature
        return z.softmax(0).log().sum() / (K * math.log(K))

    options = {"temperature": temperature, "normalize": normalize}
    assert_equals(
        lambda features: sepico.proto_reg(features, LABELS, PROTOTYPES, **options), plain, features=FEATURES, slack=64
    )


LOSSES = {
    "proto": lambda x, y, **more: sepico.proto_cl(x, y, PROTOTYPES, class_weight=CLASS_WEIGHT, **more),
    "dist": lambda x, y, **more: sepico.dist_cl(x, y, PROTOTYPES, VARIANCES, class_weight=CLASS_WEIGHT, **more),
    "bank": lambda x, y, **more: sepico.bank_cl(x, y, ROWS, **more),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_nothing_labelled_is_zero_with_a_zero_gradient(loss):
    x = FEATURES.clone().requires_grad_()
    value = loss(x, torch.full_like(LABELS, 255)) + sepico.proto_reg(x, torch.full_like(LABELS, 255), PROTOTYPES) * 0
    value.backward()
    assert value == 0 and not x.grad.any()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_reductions_agree_and_labels_are_read_at_any_size(loss):
    large = LABELS.repeat_interleave(4, 1).repeat_interleave(4, 2)
    of_pixels = loss(FEATURES, LABELS, reduction="none")
    assert of_pixels.shape == LABELS.shape and not of_pixels[~VALID].any()
    torch.testing.assert_close(loss(FEATURES, large, reduction="none"), of_pixels)
    torch.testing.assert_close(loss(FEATURES, large), of_pixels.sum() / VALID.sum())
    torch.testing.assert_close(loss(FEATURES, LABELS, reduction="sum"), of_pixels.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_features_get_half_gradients_of_float32_losses(dtype):
    x = FEATURES.to(dtype).requires_grad_()
    loss = sepico.bank_cl(x, LABELS, ROWS, temperature=0.3) + sepico.proto_reg(x, LABELS, PROTOTYPES, temperature=0.3)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == dtype
    wide = x.detach().double().requires_grad_()
    (
        sepico.bank_cl(wide, LABELS, ROWS, temperature=0.3)
        + sepico.proto_reg(wide, LABELS, PROTOTYPES, temperature=0.3)
    ).backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=3e-2, atol=3e-4)


def test_a_mean_feature_of_zero_features_is_zero_with_the_gradient_of_normalize():
    x = torch.zeros(1, D, 2, 2, requires_grad=True)
    mean_feature(x, torch.zeros(1, 2, 2, dtype=torch.long)).sum().backward()
    own = torch.zeros(1, D, 2, 2, requires_grad=True)
    F.normalize(own, dim=1).mean((0, 2, 3)).sum().backward()
    torch.testing.assert_close(x.grad, own.grad)


def test_the_bank_loss_is_the_same_in_every_layout_of_memory():
    there = torch.ones(K, M, dtype=torch.bool)
    grads = []
    for x in (FEATURES.clone(), FEATURES.contiguous(memory_format=torch.channels_last)):
        x = x.requires_grad_()
        sepico.bank_cl(x, LABELS, ROWS, there).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"rows must be \[K, M, D\] with the features' D"):
        sepico.bank_cl(FEATURES, LABELS, ROWS[..., :3])
    with pytest.raises(ValueError, match="is_there must be bool"):
        sepico.bank_cl(FEATURES, LABELS, ROWS, torch.ones(K, 2))
    with pytest.raises(ValueError, match="temperature"):
        sepico.bank_cl(FEATURES, LABELS, ROWS, temperature=0.0)
