"""The C++ backend over the space of its inputs: drawn shapes, layouts, dtypes, weights and settings against the float64 oracle."""

from __future__ import annotations

import os

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LABEL_DTYPES, LAYOUTS, laid_out
from on_backends import asked
from problems import problem

import spcl_fast as sf
from spcl_fast.backends import cpu

REASON = cpu.why_not(asked("class_moments"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
EXAMPLES = int(
    os.environ.get("SPCL_FAST_TEST_EXAMPLES", "200")
)  # the lower instruction sets run fewer, see test_cpu_levels.py


@st.composite
def problems(draw):
    """A drawn problem; pixel counts straddle the panel of 64, channel and class counts the blocks of 6, the chunks and the vectors."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, height, width = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    dim = draw(st.one_of(st.integers(1, 40), st.sampled_from([48, 63, 64, 65, 128, 130, 200])))
    num_classes = draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 60, 100])))
    size = draw(
        st.sampled_from(
            [(height, width), (2 * height, 2 * width), (1, 1), (height + 3, width + 5), (max(1, height // 2), width)]
        )
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    features = torch.randn(batch, dim, height, width, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 50.0]))
    labels = torch.randint(0, num_classes, (batch, *size), generator=generator)
    ignored = torch.rand(labels.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.95]))
    labels = labels.masked_fill(ignored, 120).to(draw(st.sampled_from(LABEL_DTYPES)))
    prototypes = torch.nn.functional.normalize(torch.randn(num_classes, dim, generator=generator), dim=1)
    weights = {
        "class_weight": torch.rand(num_classes, generator=generator) + 0.1 if draw(st.booleans()) else None,
        "pixel_weight": torch.rand(batch, height, width, generator=generator) if draw(st.booleans()) else None,
    }
    layout = draw(st.sampled_from(LAYOUTS))
    return laid_out(features.to(dtype), layout), labels, prototypes, weights, generator


def value_and_gradients(function, features, labels, prototypes, incoming, **arguments):
    features, prototypes = features.detach().requires_grad_(), prototypes.detach().requires_grad_()
    loss = function(features, labels, prototypes, **arguments)
    gradients = torch.autograd.grad((loss * incoming).sum(), (features, prototypes))
    return loss.detach(), *gradients


def scales(features, labels, prototypes, temperature, normalize) -> tuple[float, float]:
    """The size of what cancels in a pixel, at most, in float64: in its loss sum_k |w_k| |z_k| and a sum of exponentials that is at least 1;
    in its gradient sum_k |w_k| / (temperature |x|)."""
    rows = features.double().permute(0, 2, 3, 1).flatten(0, 2)
    labels = oracle.resized(labels, *features.shape[2:]).flatten()
    rows, labels = rows[labels != 120], labels[labels != 120]
    if not len(rows):
        return 0.0, 0.0
    norm = rows.norm(dim=1, keepdim=True).clamp_min(1e-12) if normalize else torch.ones(len(rows), 1)
    logits = rows / norm @ prototypes.double().T / temperature
    weight = logits.softmax(1)
    weight[torch.arange(len(rows)), labels] -= 1
    in_gradient = (weight.abs().sum(1) + 1e-8) / (norm[:, 0] * temperature)  # 1e-8: what float64 cannot tell from 1 - p
    return 1 + (weight * logits).abs().sum(1).max().item(), in_gradient.max().item()


def assert_accurate(got, eager, truth, scale_of_terms, temperature):
    """As the oracle's rule, plus two float32 roundings of terms that cancel: there a lucky eager result is no measure."""
    error, allowed = (got.double() - truth).abs().max(), (eager.double() - truth).abs().max()
    limit = (
        2 * allowed + 4 * torch.finfo(got.dtype).eps * truth.abs().max() + 2**-22 * scale_of_terms + 1e-14 / temperature
    )
    assert error <= limit, f"error {error:.3e} against float64; same-dtype eager has {allowed:.3e}, limit {limit:.3e}"


@settings(max_examples=EXAMPLES)
@given(
    drawn=problems(),
    temperature=st.sampled_from([0.05, 1.0, 100.0]),
    normalize=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_contrast_is_as_accurate_as_eager_wherever_its_inputs_lie(drawn, temperature, normalize, reduction):
    features, labels, prototypes, weights, generator = drawn
    if not normalize:  # norms of at most 1, so that logits stay where float32 resolves them
        features = features / features.float().norm(dim=1).max().to(features.dtype)
    arguments = {
        "temperature": temperature,
        "normalize": normalize,
        "reduction": reduction,
        "ignore_index": 120,
        **weights,
    }
    incoming = torch.rand(features[:, 0].shape if reduction == "none" else (), generator=generator)
    got = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels, prototypes, incoming, backend="cpu", **arguments
    )
    if (labels == 120).all():
        assert all(torch.all(g == 0) for g in got)
        return
    eager = value_and_gradients(
        oracle.contrast, features, labels, prototypes, incoming, dtype=torch.float32, **arguments
    )
    truth = value_and_gradients(oracle.contrast, features.double(), labels, prototypes.double(), incoming, **arguments)
    if truth[0].isnan().any():  # the nearest rule left no labelled pixel: 0 / 0 in the formula
        assert all(torch.all(g == 0) for g in got)
        return
    in_value, in_gradient = scales(features, labels, prototypes, temperature, normalize)
    if normalize and features.shape[1] == 1:
        in_gradient = (
            torch.inf
        )  # a unit feature of one channel is a constant: the true gradient is 0, all of it is rounding
    for g, e, t, terms in zip(got, eager, truth, (in_value, in_gradient, in_value / temperature), strict=True):
        assert_accurate(g, e, t, terms * incoming.abs().max().item(), temperature)


@settings(max_examples=EXAMPLES)
@given(drawn=problems(), normalize=st.booleans(), squares=st.booleans())
def test_moments_are_as_accurate_as_eager_wherever_their_inputs_lie(drawn, normalize, squares):
    features, labels, prototypes, _, _ = drawn
    num_classes = len(prototypes)
    arguments = {"normalize": normalize, "ignore_index": 120}
    got = sf.class_moments(features, labels, num_classes, squares=squares, backend="cpu", **arguments)
    eager = oracle.moments(features, labels, num_classes, dtype=torch.float32, **arguments)
    truth = oracle.moments(features, labels, num_classes, **arguments)
    terms = truth[2].abs().max().item() if normalize else 0  # unit features of opposite signs may cancel
    assert_accurate(got.sums, eager[0], truth[0], terms, 1)
    assert torch.equal(got.counts, truth[1])
    if squares:
        oracle.assert_as_accurate(got.squares, eager[2], truth[2])
    else:
        assert got.squares is None


# ---- up-sampled ------------------------------------------------------------------------------------------------------


@st.composite
def upsampled_problems(draw):
    """Node and pixel counts straddle vectors and the panel of 64, class counts the block of 32; ratios up and down, sizes of 1."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, width = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    height = draw(
        st.one_of(st.integers(1, 9), st.sampled_from([40, 67]))
    )  # a band is more than one cell from 17 or 33 on
    num_classes = draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 65, 100])))
    across = draw(
        st.sampled_from(
            [1, max(1, width // 3), max(1, width - 1), width, width + 1, 2 * width - 1, 4 * width, 8 * width + 3]
        )
    )
    down = draw(st.sampled_from([1, max(1, height // 3), height, height + 1, 3 * height, 4 * height + 1]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    logits = torch.randn(batch, num_classes, height, width, generator=generator) * draw(
        st.sampled_from([0.1, 3.0, 30.0, 300.0])
    )
    labels = torch.randint(0, num_classes, (batch, down, across), generator=generator)
    ignored = torch.rand(labels.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.95]))
    labels = labels.masked_fill(ignored, 120).to(draw(st.sampled_from(LABEL_DTYPES)))
    if draw(st.booleans()):  # strides that are not the labels' own size
        labels = labels.transpose(1, 2).contiguous().transpose(1, 2)
    weights = {
        "class_weight": torch.rand(num_classes, generator=generator) + 0.1 if draw(st.booleans()) else None,
        "pixel_weight": torch.rand(labels.shape, generator=generator) if draw(st.booleans()) else None,
    }
    settings = {"temperature": draw(st.sampled_from([0.3, 1.0, 1.8])), "align_corners": draw(st.booleans())}
    return laid_out(logits.to(dtype), draw(st.sampled_from(LAYOUTS))), labels, weights, settings, generator


@settings(max_examples=EXAMPLES)
@given(drawn=upsampled_problems(), reduction=st.sampled_from(["mean", "sum", "none"]))
def test_upsampled_loss_is_as_accurate_as_eager_wherever_its_inputs_lie(drawn, reduction):
    logits, labels, weights, arguments, generator = drawn
    arguments = arguments | weights | {"reduction": reduction, "ignore_index": 120}
    incoming = torch.rand(labels.shape if reduction == "none" else (), generator=generator)

    def value_and_gradient(function, logits, **more):
        logits = logits.detach().requires_grad_()
        loss = function(logits, labels, **arguments, **more)
        return loss.detach(), torch.autograd.grad((loss * incoming).sum(), logits)[0]

    got = value_and_gradient(sf.upsampled_cross_entropy, logits, backend="cpu")
    if (labels == 120).all():
        assert all(torch.all(g == 0) for g in got)
        return
    eager, truth = (
        value_and_gradient(oracle.upsampled, logits, dtype=torch.float32),
        value_and_gradient(oracle.upsampled, logits.double()),
    )
    largest = (
        logits.double().abs().max().item() / arguments["temperature"]
    )  # two roundings of a logit are what cancels in a pixel's loss
    pixels = (
        max(1, labels[0].numel() // logits[0, 0].numel()) if reduction != "mean" else 1
    )  # and what adds up in a node, at most about
    for g, e, t, terms in zip(
        got, eager, truth, (1 + largest, pixels * (1 + largest) / arguments["temperature"]), strict=True
    ):
        assert_accurate(g, e, t, terms, arguments["temperature"])


@settings(max_examples=EXAMPLES)
@given(drawn=upsampled_problems(), with_thresholds=st.booleans())
def test_upsampled_prediction_wherever_its_inputs_lie(drawn, with_thresholds):
    logits, labels, _, arguments, generator = drawn
    num_classes, size = logits.shape[1], labels.shape[1:]
    thresholds = torch.rand(num_classes, generator=generator) if with_thresholds else None
    got = sf.upsampled_prediction(logits, size, thresholds=thresholds, ignore_index=120, backend="cpu", **arguments)
    up = torch.nn.functional.interpolate(
        logits.double(), size, mode="bilinear", align_corners=arguments["align_corners"]
    )
    probability = (up / arguments["temperature"]).softmax(1)
    top, best = probability.max(1)
    rounding = 2**-22 * (1 + logits.double().abs().max().item() / arguments["temperature"])
    torch.testing.assert_close(got.confidence.double(), top, rtol=2 * rounding, atol=0)
    second = probability.topk(min(2, num_classes), 1).values[:, -1] if num_classes > 1 else torch.zeros_like(top)
    clear = top - second > 4 * rounding
    expected = best
    if thresholds is not None:
        clear &= (top - thresholds.double()[best]).abs() > 4 * rounding
        expected = best.masked_fill(top < thresholds.double()[best], 120)
    assert torch.equal(got.labels.long()[clear], expected[clear])


# ---- larger than a tile, a group, a chunk ---------------------------------------------------------------------------


def large_problem(shape=(2, 200, 53, 61), num_classes=19, dtype=torch.float32):
    p = problem(shape, num_classes, dtype=dtype, ignored=0.3)
    p.labels[:, 10:20] = 255  # whole panels without a label
    return p.features, p.labels, p.prototypes


def contrast(features, labels, prototypes, **arguments):
    incoming = (
        torch.rand(features[:, 0].shape, generator=torch.Generator().manual_seed(1))
        if arguments.get("reduction") == "none"
        else 1
    )
    return value_and_gradients(
        sf.prototype_contrastive_loss,
        features,
        labels,
        prototypes,
        incoming,
        temperature=0.1,
        backend="cpu",
        **arguments,
    )


def test_logits_are_kept_from_64_channels_on_with_avx2_and_from_128_on_with_other_levels(monkeypatch):
    for level, least in (("avx2", 64), ("avx512", 128), ("baseline", 128)):
        monkeypatch.setattr(cpu, "_level", lambda level=level: level)
        assert cpu.saves_logits(19, least) and not cpu.saves_logits(19, least - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_and_computed_ones_give_the_same_gradient(dtype, monkeypatch):
    inputs = large_problem(dtype=dtype)
    kept = contrast(*inputs)
    monkeypatch.setattr(cpu, "saves_logits", lambda num_classes, dim: False)
    assert all(torch.equal(a, b) for a, b in zip(kept, contrast(*inputs), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_of_a_reused_gradient_is_written(layout):
    features, labels, prototypes = large_problem(shape=(2, 203, 61, 67))
    features = laid_out(features, layout)
    first = contrast(features, labels, prototypes)[1]
    assert first.numel() * 4 > cpu._LARGE_BYTES
    expected = first.clone()
    address = first.data_ptr()
    first.fill_(torch.nan)
    del first
    again = contrast(features, labels, prototypes)[1]
    assert again.data_ptr() == address, "the pages of the freed gradient were not used again"
    assert torch.equal(again, expected)


def test_a_gradient_that_is_held_is_never_handed_out_again():
    inputs = large_problem(shape=(2, 203, 61, 67))
    held = [contrast(*inputs)[1] for _ in range(3)]
    views = [g[1:, :5] for g in held]
    copies = [v.clone() for v in views]
    del held
    inputs[0].mul_(-3)
    others = [contrast(*inputs)[1] for _ in range(6)]
    assert all(torch.equal(v, c) for v, c in zip(views, copies, strict=True))
    assert len({g.data_ptr() for g in others}) == 6


def test_a_float64_problem_or_a_tensor_on_a_gpu_is_refused_with_the_reason():
    moments = asked("class_moments")
    assert "reference backend takes float64" in cpu.why_not(moments._replace(dtype=torch.float64))
    assert "CPU tensors, not on cuda:0" in cpu.why_not(moments._replace(device=torch.device("cuda", 0)))
    assert "takes float64" in cpu.why_not(asked("upsampled_prediction", dtype=torch.float64))
    assert cpu.why_not(asked("upsampled_cross_entropy")) is None
    assert cpu.saves_logits(19, 200) and not cpu.saves_logits(150, 200)
