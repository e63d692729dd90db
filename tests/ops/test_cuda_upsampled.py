"""upsampled_cross_entropy and upsampled_prediction in CUDA C++: the kernels' own source, run by the emulator on the CPU, against float64.

The emulated exponential makes all of the error that the PTX manual allows the GPU's.
"""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import build, emulated

import spcl_fast as sf
from spcl_fast import backends
from spcl_fast.backends.contract import UpsampledLoss
from spcl_fast.backends.labels import label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
OPS = ("upsampled_cross_entropy", "upsampled_prediction")
NO_BAD_LABEL = torch.iinfo(torch.int64).min
# 8x, 3.3x, 1x, 0.4x down, one node, one pixel, several tiles, several strips; lanes that share a cell, and cells of more pixels than
# lanes can share
SIZES = [
    ((3, 5), (24, 40)), ((7, 6), (23, 20)), ((3, 4), (3, 4)), ((10, 15), (4, 6)), ((1, 1), (8, 13)), ((4, 4), (1, 1)), ((2, 70), (8, 280)),
    ((20, 2), (80, 8)), ((2, 33), (5, 350)), ((2, 2), (3, 500)),
]  # fmt: skip


@pytest.fixture(scope="module")
def built():
    return emulated.Backend(*OPS)


@pytest.fixture
def cuda(built):
    """backend="cuda" runs the emulated kernels. What they allocate is full of NaN, with a page behind it that may not be touched."""
    flag = label_flag(torch.device("cpu"))
    flag.fill_(NO_BAD_LABEL)
    with built.taken():
        yield built
    flag.fill_(NO_BAD_LABEL)


def problem(low, high, num_classes=3, dtype=torch.float32, batch=1, scale=3.0, ignored=0.2):
    generator = torch.Generator().manual_seed(1)
    logits = (scale * torch.randn(batch, num_classes, *low, generator=generator)).to(dtype)
    labels = torch.randint(0, num_classes, (batch, *high), generator=generator)
    if high != (1, 1):
        labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    return logits, labels


def value_and_gradient(function, logits, labels, weight=None, **settings):
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(logits, labels, **settings)
    (loss if weight is None else (loss * weight).sum()).backward()
    return loss.detach(), logits.grad


def run(*inputs, **settings):
    return value_and_gradient(sf.upsampled_cross_entropy, *inputs, backend="cuda", **settings)


def check(logits, labels, weight=None, **settings):
    got = run(logits, labels, weight, **settings)
    eager = value_and_gradient(oracle.upsampled, logits, labels, weight, dtype=torch.float32, **settings)
    truth = value_and_gradient(oracle.upsampled, logits.double(), labels, weight, **settings)
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=16)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_every_size_ratio(cuda, low, high, align_corners):
    check(*problem(low, high), align_corners=align_corners, temperature=1.8)


@pytest.mark.parametrize("num_classes", [1, 2, 19, 150, 1000])
def test_any_number_of_classes(cuda, num_classes):
    low, high = ((2, 3), (5, 9)) if num_classes > 150 else ((4, 5), (15, 19))
    check(*problem(low, high, num_classes, batch=2))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_reductions_and_dtypes(cuda, reduction, dtype):
    logits, labels = problem((4, 5), (19, 21), dtype=dtype, batch=2)
    weights = {"class_weight": torch.tensor([0.2, 0, 1.5]), "pixel_weight": torch.rand(2, 21, 19).mT}
    check(logits, labels, torch.randn(2, 19, 21) if reduction == "none" else None, reduction=reduction, **weights)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
def test_any_temperature(cuda, temperature):
    check(*problem((5, 4), (18, 30)), temperature=temperature)


@pytest.mark.parametrize("high", [(8, 12), (24, 36), (3, 2)])
def test_logits_too_far_apart_for_a_geometric_sequence(cuda, high):
    """Neighbouring nodes hundreds apart: each pixel's own maximum must be found, and every exponential be its own."""
    check(*problem((2, 3), high, scale=300.0), temperature=0.5)
    logits, labels = problem((9, 3), (36, 12))  # wide in the first group of cells, narrow in the second
    logits[:, 1, 0] = 200.0
    check(logits, labels)


def test_certain_pixels_keep_their_small_loss(cuda):
    logits, labels = problem((3, 4), (12, 17))
    labels.fill_(1)
    logits[:, 1] += 17.0
    check(logits, labels)


LABEL_DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
]


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_labels_of_any_integer_dtype_and_layout(cuda, dtype):
    logits, labels = problem((3, 4), (13, 17), batch=2)
    ignore_index = 100 if dtype == torch.int8 else 255
    labels[labels == 255] = ignore_index
    expected = run(logits, labels, ignore_index=ignore_index)
    turned = labels.to(dtype).mT.contiguous().mT
    for layout in (logits.contiguous(memory_format=torch.channels_last), logits.mT.contiguous().mT):
        got = run(layout, turned, ignore_index=ignore_index)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero_not_nan(cuda, reduction):
    logits, labels = problem((3, 4), (11, 14), batch=2)
    logits[0, 0, 0, 0] = torch.nan
    loss, grad = run(logits, labels.fill_(255), torch.ones(()), reduction=reduction)
    assert torch.all(loss == 0) and torch.all(grad == 0)


@pytest.mark.parametrize("value", [3, -1, 2**33])
def test_label_beyond_classes_never_indexes_memory_but_raises_the_flag(cuda, value):
    logits, labels = problem((3, 4), (11, 14), batch=2)
    labels[1, 2, 3] = value
    flag = label_flag(torch.device("cpu"))
    loss, grad = run(logits, labels)
    assert loss.isnan() and grad.isnan().any() and flag == value
    for reduction in ("mean", "sum", "none"):  # the forward alone
        flag.fill_(NO_BAD_LABEL)
        loss = sf.upsampled_cross_entropy(logits, labels, reduction=reduction, backend="cuda")
        assert loss.isnan().sum() == 1 and flag == value
        assert reduction != "none" or loss[1, 2, 3].isnan()


def test_nan_in_nan_out_but_not_through_ignored_pixels(cuda):
    logits, labels = problem((3, 3), (9, 9), batch=2)
    labels[0] = 255
    labels[1] = 1
    logits[0, 2, 1, 1] = torch.nan
    loss, grad = run(logits, labels)
    assert loss.isfinite() and grad.isfinite().all()
    labels[0] = 0
    assert sf.upsampled_cross_entropy(logits, labels, backend="cuda").isnan()
    per_pixel = sf.upsampled_cross_entropy(logits, labels, reduction="none", backend="cuda")
    assert per_pixel[0].isnan().any() and per_pixel[1].isfinite().all()


def test_no_image_at_all(cuda):
    loss, grad = run(torch.zeros(0, 3, 4, 5), torch.zeros(0, 8, 9, dtype=torch.long))
    assert loss == 0 and grad.shape == (0, 3, 4, 5)
    assert sf.upsampled_prediction(torch.zeros(0, 3, 4, 5), (8, 9), backend="cuda").labels.shape == (0, 8, 9)


def everything(logits, labels):
    prediction = sf.upsampled_prediction(logits, labels.shape[1:], backend="cuda")
    return (
        *run(logits, labels),
        sf.upsampled_cross_entropy(logits, labels, reduction="none", backend="cuda"),
        *prediction,
    )


def test_same_bits_in_any_order_of_threads(built):
    logits, labels = problem((9, 34), (40, 140), 6)
    results = []
    for order in build.ORDERS:
        with built.taken(order):
            results.append(everything(logits, labels))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_images_more_than_2_to_the_31_elements_apart(cuda):
    logits, labels = problem((3, 4), (11, 14), batch=2)
    expected = everything(logits, labels)
    far_logits = (
        torch.empty(2**31 + 64).as_strided(logits.shape, (2**31, *logits.stride()[1:])).copy_(logits)
    )  # pages never touched
    far_labels = (
        torch.empty(2**31 + 256, dtype=torch.uint8)
        .as_strided(labels.shape, (2**31, *labels.stride()[1:]))
        .copy_(labels)
    )
    sums = sf.upsampled_cross_entropy(far_logits, far_labels, backend="cuda")
    assert torch.equal(sums, expected[0])
    assert torch.equal(sf.upsampled_prediction(far_logits, (11, 14), backend="cuda").confidence, expected[-1])


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("low", "high"), [*SIZES, ((1, 2), (2, 900))])
def test_prediction_is_argmax_and_confidence(cuda, low, high, align_corners):
    for scale in (3.0, 300.0):
        logits, _ = problem(low, high, batch=2, scale=scale)
        got = sf.upsampled_prediction(logits, high, temperature=1.3, align_corners=align_corners, backend="cuda")
        top = (F.interpolate(logits.double(), high, mode="bilinear", align_corners=align_corners) / 1.3).softmax(1)
        torch.testing.assert_close(got.confidence.double(), top.amax(1), rtol=2e-4 if scale > 3 else 1e-5, atol=1e-6)
        margin = top.topk(2, 1).values
        clear = margin[:, 0] - margin[:, 1] > 1e-5
        assert torch.equal(got.labels.long()[clear], top.argmax(1)[clear]) and clear.float().mean() > 0.99


def test_prediction_of_equal_logits_is_the_first_class(cuda):
    got = sf.upsampled_prediction(torch.ones(1, 200, 2, 3), (7, 9), backend="cuda")
    assert (got.labels == 0).all() and torch.allclose(got.confidence, torch.tensor(1 / 200))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prediction_of_half_floats_and_with_thresholds(cuda, dtype):
    logits, _ = problem((3, 4), (13, 17), dtype=dtype, batch=2)
    plain = sf.upsampled_prediction(logits, (13, 17), backend="cuda")
    expected = sf.upsampled_prediction(logits.float(), (13, 17), backend="reference")
    torch.testing.assert_close(plain.confidence, expected.confidence)
    thresholds = torch.tensor([0.5, 0.9, 0.99])
    got = sf.upsampled_prediction(logits, (13, 17), thresholds=thresholds, ignore_index=200, backend="cuda")
    below = plain.confidence < thresholds[plain.labels.long()]
    assert below.any() and not below.all()
    assert torch.equal(got.labels, torch.where(below, 200, plain.labels)) and torch.equal(
        got.confidence, plain.confidence
    )


# ---- masked classes, many classes, denominators ---------------------------------------------------------------------

MASKS = [-torch.inf, -torch.finfo(torch.float32).max, -2.4e38, -1e30, -1e4]


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("low", MASKS)
@pytest.mark.parametrize("high", [(8, 12), (3, 2), (2, 3)])
def test_a_masked_class_has_no_probability_and_the_others_are_as_without_it(cuda, low, high, temperature):
    logits, labels = problem((2, 3), high, num_classes=4)
    labels[labels == 1] = 2
    masked = logits.index_fill(1, torch.tensor([1]), low)
    others = torch.tensor([0, 2, 3])
    loss, gradient = run(masked, labels, temperature=temperature)
    rest = run(
        logits[:, others], torch.where((labels > 1) & (labels != 255), labels - 1, labels), temperature=temperature
    )
    torch.testing.assert_close(loss, rest[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[:, others], rest[1], rtol=1e-4, atol=1e-7)
    assert torch.all(gradient[:, 1] == 0)
    predicted = sf.upsampled_prediction(masked, high, temperature=temperature, backend="cuda")
    without = sf.upsampled_prediction(logits[:, others], high, temperature=temperature, backend="cuda")
    assert torch.equal(predicted.labels.long(), others[without.labels.long()])
    torch.testing.assert_close(predicted.confidence, without.confidence, rtol=1e-5, atol=1e-6)


def test_a_class_masked_in_some_cells_costs_the_others_nothing(cuda):
    logits, labels = problem((5, 3), (20, 12), num_classes=4)
    logits[:, 2, :2] = -torch.inf
    labels[:, :9] = labels[:, :9].where(labels[:, :9] != 2, 0)
    loss, gradient = run(logits, labels)
    assert loss.isfinite() and gradient.isfinite().all() and torch.all(gradient[:, 2, 0] == 0)


def test_a_label_whose_class_is_masked_costs_infinity(cuda):
    logits, labels = problem((2, 3), (8, 12), num_classes=4, ignored=0)
    logits[:, 1] = -torch.inf
    labels[0, 0, 0], labels[0, 0, 1] = 1, 0
    loss = sf.upsampled_cross_entropy(logits, labels, reduction="none", backend="cuda")
    assert torch.equal(loss.isinf(), labels == 1)


def test_a_confidence_that_is_nan_is_below_every_threshold(cuda):
    logits, _ = problem((3, 4), (13, 17))
    logits[0, 1, 0, 0] = torch.nan
    got = sf.upsampled_prediction(logits, (13, 17), thresholds=torch.zeros(3), ignore_index=200, backend="cuda")
    assert got.confidence.isnan().any() and torch.equal(got.labels == 200, got.confidence.isnan())


@pytest.mark.parametrize("high", [(4, 5), (13, 17), (40, 61)])
@pytest.mark.parametrize(("num_classes", "kind"), [(255, torch.uint8), (256, torch.int32), (847, torch.int32)])
def test_more_classes_than_a_byte_can_say(cuda, num_classes, kind, high):
    logits, _ = problem((4, 5), high, num_classes=num_classes, batch=2)
    thresholds = torch.linspace(0, 0.9, num_classes)
    settings = {"thresholds": thresholds, "ignore_index": 255 if kind == torch.uint8 else 100_000}
    got = sf.upsampled_prediction(logits, high, **settings, backend="cuda")
    expected = sf.upsampled_prediction(logits, high, **settings, backend="reference")
    assert got.labels.dtype == kind and got.labels.max() > (254 if kind == torch.int32 else 0)
    assert (got.labels != expected.labels).float().mean() < 0.005  # two logits that are as good as equal
    torch.testing.assert_close(got.confidence, expected.confidence)


@pytest.mark.parametrize("low", [(3, 5), (2, 40)])
def test_a_given_denominator_divides_value_and_gradient(cuda, low):
    logits, labels = problem(low, (24, 80), batch=2)
    ask = UpsampledLoss(logits, labels, torch.tensor([0.2, 1.0, 1.5]), None, 1.0, True, 255, "mean")
    module, one = backends.module("cuda"), ask._replace(reduction="sum")
    summed = module.upsampled_cross_entropy(one, True)
    for number in (4000.0, 1.0, 0.0):
        got = module.upsampled_cross_entropy(ask._replace(denominator=torch.tensor(number)), True)
        for g, s in zip(got, summed, strict=True):
            torch.testing.assert_close(g, s / number if number else torch.zeros_like(s), rtol=1e-5, atol=1e-7)
    labels[0, 0, 0] = 7
    assert module.upsampled_cross_entropy(ask._replace(denominator=torch.tensor(9.0)), False)[0].isnan()


# ---- planted bugs: float32 and one window shape only, which builds in a ninth of the time -------------------------------------------

QUICK = (
    ("launch.h", "case kBFloat16: return call(__nv_bfloat16{});", ""),
    ("launch.h", "default: return call(__half{});", "default: return call(float{});"),
    ("upsampled_cross_entropy.cu", "return pixels <= 3 ?", "return true ?"),
    ("upsampled_cross_entropy.cu", "if (shape.columns == 5) return launch_shape<T, 5, 5>(task, a.logits.batch, stream);", ""),
    ("upsampled_cross_entropy.cu", "return launch_shape<T, 3, 8>(task, a.logits.batch, stream);", "return Status{};"),
)  # fmt: skip
BUGS = {
    "wrong halo": ("upsampled.h", "tile * (cells() - halo) - 1", "tile * (cells() - halo) - 1 + (tile > 0)"),
    "wrong corner weight": ("upsampled_cell.cuh", "const float upper = sum.all - lower", "const float upper = sum.all"),
    "missing ignore": ("pixels.cuh", "value == ignore_index) return kNoClass", "value == ignore_index) return 0"),
    "wrong batch offset": ("upsampled_cross_entropy.cu", "(shared.image * task.num_classes + k)", "(k)"),
    "label's own part forgotten": (
        "upsampled_cross_entropy.cuh",
        "code == k ? -place.value(n)",
        "code == k ? place.value(n)",
    ),
    "a mask is not raised": ("upsampled_cell.cuh", "x < task.lowest ? task.lowest : x", "x"),
    "second window overwrites the first": ("upsampled_cross_entropy.cu", "again || (i == 0", "(i == 0"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug):
    with emulated.Backend(*OPS, replace=(*QUICK, BUGS[bug])).taken(), pytest.raises(AssertionError):
        check(*problem((4, 35), (50, 74), batch=2))
        test_a_masked_class_has_no_probability_and_the_others_are_as_without_it(None, -torch.inf, (8, 12), 1.0)


def test_a_missing_barrier_shows_in_another_order():
    gathers = "    __syncthreads();\n    gather_nodes"
    broken = emulated.Backend(*OPS, replace=(*QUICK, ("upsampled_cross_entropy.cu", gathers, "    gather_nodes")))
    results = []
    for order in build.ORDERS:
        with broken.taken(order):
            results.append(run(*problem((9, 5), (36, 20)))[1])
    assert any(not torch.equal(results[0], other) for other in results[1:])


def test_a_block_that_walks_several_groups_of_rows_gives_the_same():
    """Maps of more than 1024 blocks; here of more than two."""
    inputs = problem((40, 34), (120, 70), batch=2)
    several = emulated.Backend(*OPS, replace=(*QUICK, ("upsampled.h", "enough = 512", "enough = 1")))
    with several.taken():
        check(*inputs)
