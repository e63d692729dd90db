"""Options of the up-sampled losses, binary and focal losses, and the confusion in Triton, against F.interpolate in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F

import spcl_fast as sf
from spcl_fast.backends.labels import BAD_PROBABILITY, label_flag

kernels = pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if DEVICE.type == "cpu" and (trouble := kernels.interpreter_trouble()):
    pytest.skip(trouble, allow_module_level=True)
# up by a whole and by a broken ratio, down, one node, wider than one tile of cells
SIZES = [((3, 5), (12, 20)), ((3, 4), (13, 17)), ((7, 5), (3, 2)), ((1, 1), (4, 4)), ((2, 35), (3, 70))]


def problem(low, high, num_classes=4, batch=2, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    logits = (scale * torch.randn(batch, num_classes, *low, generator=generator)).to(dtype)
    labels = torch.randint(0, num_classes, (batch, *high), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    weights = {
        "class_weight": torch.rand(num_classes, generator=generator) + 0.1,
        "pixel_weight": torch.rand(batch, *high, generator=generator),
    }
    return logits, labels, weights


def upsampled(logits, size, align_corners, temperature=1.0):
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners) / temperature


def softmax_formula(logits, labels, class_weight, pixel_weight, *, temperature, align_corners, reduction="mean", denominator=None,
                    label_smoothing=0.0, size=None):  # fmt: skip
    """torch's own cross-entropy of torch's own up-sampling; the mean's denominator as the contract has it."""
    wide = lambda t: t.to(logits.dtype)  # noqa: E731
    soft = labels.is_floating_point()
    z = upsampled(logits, size or labels.shape[-2:], align_corners, temperature)
    target = upsampled(wide(labels), z.shape[2:], align_corners) if soft else labels
    loss = F.cross_entropy(
        z, target, wide(class_weight), reduction="none", label_smoothing=label_smoothing, **({} if soft else {"ignore_index": 255})
    )  # fmt: skip
    labelled = target.sum(1) != 0 if soft else labels != 255
    counted = labelled.to(logits.dtype) if soft else wide(class_weight)[labels.where(labelled, 0)] * labelled
    loss = loss.where(labelled, 0) * wide(pixel_weight)
    if reduction == "none":
        return loss
    return loss.sum() / (1 if reduction == "sum" else counted.sum() if denominator is None else wide(denominator))


def binary_formula(
    logits,
    labels,
    class_weight,
    pixel_weight,
    *,
    align_corners,
    gamma,
    temperature=1.0,
    reduction="mean",
    denominator=None,
):
    wide = lambda t: t.to(logits.dtype)  # noqa: E731
    z = upsampled(logits, labels.shape[-2:], align_corners, temperature)
    labelled = labels != 255
    one_hot = F.one_hot(labels.where(labelled, 0), z.shape[1]).permute(0, 3, 1, 2).to(z.dtype)
    own = z * (2 * one_hot - 1)
    loss = -((-own).sigmoid() ** gamma) * F.logsigmoid(own) * wide(class_weight)[:, None, None]
    loss = loss.sum(1).where(labelled, 0) * wide(pixel_weight)
    if reduction == "none":
        return loss
    return loss.sum() / (1 if reduction == "sum" else labelled.sum() if denominator is None else wide(denominator))


def check(function, formula, logits, labels, weights, **settings):
    """At most twice the error of the same formula run eagerly in float32."""
    incoming = torch.randn(settings.get("size", labels.shape[-2:]), generator=torch.Generator().manual_seed(3))

    def differentiated(function, logits, **more):
        leaf = logits.detach().clone().requires_grad_()
        loss = function(leaf, **more)
        (grad,) = torch.autograd.grad((loss * incoming.to(loss)).sum(), leaf)
        return loss.detach(), grad

    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in (settings | weights).items()}
    got = differentiated(lambda leaf: function(leaf, labels.to(DEVICE), backend="triton", **moved), logits.to(DEVICE))
    eager = differentiated(lambda leaf: formula(leaf, labels, **weights, **settings), logits.float())
    truth = differentiated(lambda leaf: formula(leaf, labels, **weights, **settings), logits.double())
    for g, e, t in zip(got, eager, truth, strict=True):
        slack = 16 if g.dtype == torch.float32 else 2
        oracle.assert_as_accurate(g.cpu(), e.to(g.dtype), t, slack=slack)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_smoothing_of_every_size_ratio(low, high, align_corners):
    check(
        sf.upsampled_cross_entropy, softmax_formula, *problem(low, high),
        label_smoothing=0.1, align_corners=align_corners, temperature=1.8,
    )  # fmt: skip


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("grid", [(3, 4), (2, 5), (13, 17)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_probabilities_on_any_grid(grid, align_corners, label_smoothing):
    logits, _, weights = problem((3, 4), (13, 17))
    labels = torch.randn(2, 4, *grid, generator=torch.Generator().manual_seed(2)).mul(2).softmax(1)
    labels[0, :, 0] = 0
    check(
        sf.upsampled_cross_entropy, softmax_formula, logits, labels, weights, label_smoothing=label_smoothing,
        align_corners=align_corners, temperature=1.8, size=(13, 17),
    )  # fmt: skip


@pytest.mark.parametrize("gamma", [0.0, 2.0, 0.5])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_binary_and_focal_of_every_size_ratio(low, high, gamma):
    logits, labels, weights = problem(low, high)
    check(sf.upsampled_binary_cross_entropy, binary_formula, logits, labels, weights, gamma=gamma, align_corners=False)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["smoothing", "probabilities", "binary", "plain"])
def test_reductions_and_a_denominator(kind, reduction):
    logits, labels, weights = problem((2, 3), (9, 11))
    settings = {"align_corners": True, "reduction": reduction}
    if reduction == "mean":
        settings["denominator"] = torch.tensor(50.0)
    if kind == "binary":
        check(sf.upsampled_binary_cross_entropy, binary_formula, logits, labels, weights, gamma=1.5, **settings)
        return
    if kind == "probabilities":
        labels = torch.randn(2, 4, 2, 3).softmax(1)
        settings["size"] = (9, 11)
    smoothing = 0.1 if kind == "smoothing" else 0.0
    check(
        sf.upsampled_cross_entropy, softmax_formula, logits, labels, weights, temperature=0.7, label_smoothing=smoothing, **settings
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_floats(dtype):
    logits, labels, weights = problem((2, 3), (9, 11), dtype=dtype)
    check(
        sf.upsampled_cross_entropy, softmax_formula, logits, labels, weights, label_smoothing=0.1, align_corners=True, temperature=1.0
    )  # fmt: skip


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min, -1e30])
def test_a_class_that_is_masked_out_takes_no_part_and_the_others_stay_finite(lowest):
    logits, labels, weights = problem((3, 4), (9, 11))
    logits[:, 2] = lowest
    labels[labels == 2] = 1
    few, kept = (
        logits[:, [0, 1, 3]],
        {"class_weight": weights["class_weight"][[0, 1, 3]], "pixel_weight": weights["pixel_weight"]},
    )
    leaf = logits.to(DEVICE).requires_grad_()
    on_device = {k: v.to(DEVICE) for k, v in weights.items()}
    loss = sf.upsampled_cross_entropy(leaf, labels.to(DEVICE), temperature=0.5, backend="triton", **on_device)
    loss.backward()
    small = few.double().requires_grad_()
    truth = softmax_formula(small, torch.where(labels == 3, 2, labels), **kept, temperature=0.5, align_corners=True)
    truth.backward()
    torch.testing.assert_close(loss.double().cpu(), truth.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad[:, [0, 1, 3]].double().cpu(), small.grad, rtol=1e-4, atol=1e-7)
    assert torch.all(leaf.grad[:, 2] == 0)
    predicted = sf.upsampled_prediction(logits.to(DEVICE), (9, 11), backend="triton")
    assert predicted.confidence.isfinite().all() and not (predicted.labels == 2).any()


@pytest.mark.parametrize("level", [-3e38, -1e20, 0.0])
def test_logits_as_low_as_floats_go_give_a_finite_loss(level):
    logits, labels = (
        torch.full((1, 3, 2, 2), level, device=DEVICE),
        torch.zeros(1, 4, 4, dtype=torch.long, device=DEVICE),
    )
    loss = sf.upsampled_cross_entropy(logits, labels, backend="triton")
    torch.testing.assert_close(loss.cpu(), torch.tensor(3.0).log())


def test_one_class_alone_costs_exactly_nothing():
    logits, labels = problem((3, 5), (12, 20), num_classes=1)[:2]
    leaf = logits.to(DEVICE).requires_grad_()
    loss = sf.upsampled_cross_entropy(leaf, labels.to(DEVICE), temperature=0.7, backend="triton")
    loss.backward()
    assert loss == 0 and torch.all(leaf.grad == 0)


def test_a_bad_probability_raises_the_flag_and_poisons_the_loss():
    logits, _, _ = problem((3, 4), (9, 11))
    labels = torch.randn(2, 4, 3, 4).softmax(1)
    labels[1, 2, 1, 1] = -0.1
    flag = label_flag(DEVICE)
    flag.fill_(torch.iinfo(torch.int64).min)
    loss = sf.upsampled_cross_entropy(logits.to(DEVICE), labels.to(DEVICE), size=(9, 11), backend="triton")
    assert loss.isnan() and flag == BAD_PROBABILITY
    flag.fill_(torch.iinfo(torch.int64).min)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_confusion_counts_labels_by_argmax(low, high, align_corners):
    logits, labels, _ = problem(low, high, num_classes=5)
    got = sf.upsampled_confusion(
        logits.to(DEVICE), labels.to(DEVICE), align_corners=align_corners, backend="triton"
    ).cpu()
    scores = upsampled(logits.double(), high, align_corners)
    best = scores.topk(2, 1).values
    close = (best[:, 0] - best[:, 1] < 1e-5) & (labels != 255)
    pairs = (labels * 5 + scores.argmax(1))[labels != 255]
    expected = torch.bincount(pairs, minlength=25).view(5, 5)
    assert got.sum() == expected.sum() and (got - expected).abs().sum() <= 2 * close.sum()


def test_confusion_leaves_a_bad_label_out_and_raises_the_flag():
    logits, labels, _ = problem((3, 4), (9, 11))
    labels[0, 0, 0] = 77
    flag = label_flag(DEVICE)
    flag.fill_(torch.iinfo(torch.int64).min)
    got = sf.upsampled_confusion(logits.to(DEVICE), labels.to(DEVICE), backend="triton")
    assert got.sum() == ((labels != 255) & (labels != 77)).sum() and flag == 77
    flag.fill_(torch.iinfo(torch.int64).min)


def test_more_than_255_classes_are_predicted_as_int32_and_counted():
    logits, _, _ = problem((2, 3), (5, 7), num_classes=300, batch=1)
    got = sf.upsampled_prediction(logits.to(DEVICE), (5, 7), backend="triton")
    expected = upsampled(logits.double(), (5, 7), True).argmax(1)
    assert got.labels.dtype == torch.int32 and torch.equal(got.labels.long().cpu(), expected)
    counts = sf.upsampled_confusion(logits.to(DEVICE), expected.to(DEVICE), ignore_index=-1, backend="triton")
    assert counts.diagonal().sum() == 35 and counts.sum() == 35
