"""upsampled_prediction on every backend that runs here, against the softmax of F.interpolate in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS, laid_out
from on_backends import ALL, assert_same_bits, call, check_ops, home, on_each_dtype, poison, usable
from problems import CROSS, PREDICTION, problem
from shapes import SHAPES, Shape, on_each_shape

import spcl_fast as sf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EVERY = usable(PREDICTION, among=ALL)
MANY = usable(PREDICTION, "int32_labels", among=ALL)
SHAPES_OF_PREDICTION = (
    *(shape for shape in SHAPES[CROSS] if shape.num_classes < 255),
    Shape("one row of cells", (1, 3, 1, 2), 3, (2, 900), too_slow=("triton",)),
)


def predicted(backend: str, logits, size, **settings) -> sf.Prediction:
    return call(lambda **more: sf.upsampled_prediction(size=size, **more), backend, logits=logits, **settings)


@pytest.mark.parametrize(("backend", "shape"), on_each_shape(PREDICTION, shapes=SHAPES_OF_PREDICTION))
def test_prediction_is_argmax_and_confidence_of_the_up_sampled_softmax(backend, shape):
    for scale in (3.0, 300.0):
        logits = shape.problem(scale=scale).logits
        for settings in ({"align_corners": True, "temperature": 1.3}, {"align_corners": False, "temperature": 1.3}):
            got = predicted(backend, logits, shape.size, **settings)
            truth = oracle.prediction(logits, shape.size, **settings)
            assert got.labels.dtype == torch.uint8 and got.confidence.dtype == torch.float32
            # float32 has hundredths of 300 / 1.3 less
            rtol = 1e-5 if scale == 3.0 and backend != "triton" else 1e-4 if scale == 3.0 else 2e-4
            torch.testing.assert_close(got.confidence.double(), truth["confidence"], rtol=rtol, atol=1e-6)
            clear = truth["margin"] > 1e-5
            assert torch.equal(got.labels.long()[clear], truth["labels"][clear])
            assert clear.double().mean() > 0.99


@pytest.mark.parametrize(("backend", "dtype"), on_each_dtype(PREDICTION))
def test_a_prediction_below_its_threshold_is_ignored(backend, dtype):
    p = problem((2, 1, 3, 4), 5, (13, 17), dtype)
    free = predicted(backend, p.logits, p.size)
    expected = predicted("reference", p.logits.float(), p.size)
    torch.testing.assert_close(free.confidence, expected.confidence)
    thresholds = torch.tensor([0.5, 0.9, 0.0, 0.99, 0.7])
    got = predicted(backend, p.logits, p.size, thresholds=thresholds, ignore_index=200)
    below = free.confidence < thresholds[free.labels.long()]
    assert below.any() and not below.all()
    assert torch.equal(got.labels, torch.where(below, 200, free.labels))
    assert torch.equal(got.confidence, free.confidence)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", EVERY)
def test_logits_of_any_layout_are_predicted_in_place(backend, layout):
    p = problem((2, 1, 3, 4), 5, (13, 17))
    expected, got = (predicted(backend, logits, p.size) for logits in (p.logits, laid_out(p.logits, layout)))
    assert torch.equal(got.labels, expected.labels)
    if backend == "reference":  # F.interpolate of channels_last is another sum
        torch.testing.assert_close(got.confidence, expected.confidence)
    else:
        assert torch.equal(got.confidence, expected.confidence)


@pytest.mark.parametrize("backend", EVERY)
def test_predictions_have_the_same_bits_for_any_number_of_threads(backend):
    shape, size = ((2, 1, 41, 23), (123, 115)) if backend in ("cpu", "reference") else ((1, 1, 9, 34), (40, 140))
    p = problem(shape, 200 if backend in ("cpu", "reference") else 6, size)
    assert_same_bits(backend, lambda: predicted(backend, p.logits, p.size))


@pytest.mark.parametrize("backend", EVERY)
def test_every_label_and_confidence_is_written(backend, monkeypatch):
    p = problem((1, 1, 3, 33), 3, (7, 40))
    expected = predicted(backend, p.logits, p.size)
    poison(monkeypatch)
    assert all(map(torch.equal, expected, predicted(backend, p.logits, p.size)))


@pytest.mark.parametrize("num_classes", [3, 200])
@pytest.mark.parametrize("backend", EVERY)
def test_of_equal_logits_the_first_class_is_predicted(backend, num_classes):
    got = predicted(backend, torch.ones(1, num_classes, 2, 3), (7, 9))
    assert (got.labels == 0).all() and torch.allclose(got.confidence, torch.tensor(1 / num_classes))


@pytest.mark.parametrize("backend", EVERY)
def test_a_confidence_that_is_nan_reaches_no_threshold(backend):
    p = problem((2, 1, 5, 7), 4)
    p.logits[0, :, 2, 3] = torch.nan
    got = predicted(backend, p.logits, p.size, thresholds=torch.zeros(4))
    ignored = got.labels == 255
    assert ignored[0, 2, 3] and torch.equal(ignored, got.confidence.isnan())
    assert ignored.sum() <= 4  # at most the node's own cells
    one = problem((1, 1, 3, 4), 3, (13, 17))
    one.logits[0, 1, 0, 0] = torch.nan
    got = predicted(backend, one.logits, one.size, thresholds=torch.zeros(3), ignore_index=200)
    assert got.confidence.isnan().any() and torch.equal(got.labels == 200, got.confidence.isnan())


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min, -2.4e38, -1e30, -1e4])
@pytest.mark.parametrize("high", [(5, 7), (21, 26), (8, 12), (3, 2)])
@pytest.mark.parametrize("backend", EVERY)
def test_a_masked_class_is_never_predicted_and_the_others_are_as_without_it(backend, high, low):
    p = problem((2, 1, 5, 7), 4, high)
    others = torch.tensor([0, 2, 3])
    for temperature in (0.05, 1.0, 100.0):
        if low > -1e20 and temperature == 100.0:
            continue  # a probability of e**-100
        got = predicted(backend, p.logits.index_fill(1, torch.tensor([1]), low), high, temperature=temperature)
        kept = predicted("reference", p.logits[:, others], high, temperature=temperature)
        rounding = torch.finfo(torch.float32).eps * p.logits.abs().max().item() / temperature  # of the largest exponent
        torch.testing.assert_close(got.confidence, kept.confidence, rtol=1e-5 + rounding, atol=1e-6)
        same = got.labels.long() == others[kept.labels.long()]
        assert (got.labels != 1).all() and same.double().mean() > 0.99


@pytest.mark.parametrize(
    ("backend", "num_classes", "high"),
    [
        (backend, num_classes, high)
        for backend in MANY
        for num_classes in (255, 256, 300, 847)
        for high in ((4, 5), (9, 8), (13, 17), (40, 61))
        if backend != "triton" or (num_classes, high) in ((255, (4, 5)), (256, (9, 8)))  # its interpreter is slow
    ],
)
def test_more_classes_than_a_byte_can_say_are_predicted_as_int32(backend, num_classes, high):
    p = problem((2, 1, 4, 5), num_classes, high)
    truth = oracle.prediction(p.logits, high)
    middle = truth["confidence"].median().item()
    settings = {"thresholds": torch.full((num_classes,), middle), "ignore_index": 255 if num_classes < 256 else 100_000}
    got = predicted(backend, p.logits, high, **settings)
    assert got.labels.dtype == (torch.uint8 if num_classes < 256 else torch.int32)
    torch.testing.assert_close(got.confidence.double(), truth["confidence"], rtol=2e-5, atol=1e-6)
    clear = (truth["margin"] > 1e-5) & ((truth["confidence"] - middle).abs() > 1e-5)
    expected = truth["labels"].where(truth["confidence"] >= middle, settings["ignore_index"])
    assert torch.equal(got.labels.long()[clear], expected[clear]) and clear.double().mean() > 0.9
    assert (
        predicted(backend, p.logits, high, **settings | {"thresholds": torch.ones(num_classes)}).labels
        == settings["ignore_index"]
    ).any()


@pytest.mark.parametrize("backend", EVERY)
def test_no_image_has_no_prediction(backend):
    assert predicted(backend, torch.zeros(0, 3, 4, 5), (8, 9)).labels.shape == (0, 8, 9)


@pytest.mark.parametrize("backend", EVERY)
def test_prediction_opcheck_and_compile(backend):
    torch._dynamo.reset()
    logits = problem((2, 1, 3, 4), 4).logits.to(home(backend))

    def prediction(logits):
        return sf.upsampled_prediction(logits, (10, 13), backend=backend)

    check_ops(lambda: prediction(logits), "test_schema", "test_faketensor")
    compiled = torch.compile(prediction, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(logits), prediction(logits)))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"size": (0, 4)}, ValueError, "size must be"),
        ({"size": 8}, TypeError, r"size must be \(H, W\), got 8"),
        ({"size": (3.7, 3.2)}, TypeError, "in whole pixels, got"),
        ({"align_corners": None}, TypeError, "align_corners must be True or False, got None"),
        ({"ignore_index": 256}, ValueError, "uint8"),
        ({"thresholds": torch.ones(4)}, ValueError, "one threshold a class"),
        ({"thresholds": torch.ones(5), "ignore_index": 4}, ValueError, "ignore_index 4 is one of the 5 classes"),
    ],
)
def test_prediction_refuses_with_the_reason(settings, error, text):
    with pytest.raises(error, match=text):
        sf.upsampled_prediction(torch.zeros(1, 5, 2, 2), **({"size": (4, 4)} | settings))


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (3, 4)])
@pytest.mark.parametrize("size", [(4, 5), (7, 9), (9, 13), (2, 3)])
@pytest.mark.parametrize("backend", EVERY)
def test_a_nan_logit_is_the_largest_and_its_confidence_nan(backend, size, place):
    logits = problem((2, 1, 4, 5), 6).logits
    logits[0, 3:5, place[0], place[1]] = torch.nan
    for align_corners in (True, False):
        certain, reached = oracle.nan_pixels(logits, size, align_corners=align_corners)
        got = predicted(backend, logits, size, align_corners=align_corners)
        whole = F.interpolate(logits.nan_to_num(1e30), size, mode="bilinear", align_corners=align_corners)
        known = certain | ~reached
        assert torch.equal(got.labels.long()[known], whole.argmax(1)[known])
        assert torch.equal(got.confidence.isnan()[known], certain[known])
        ignored = predicted(backend, logits, size, align_corners=align_corners, thresholds=torch.zeros(6))
        assert (ignored.labels[certain] == 255).all()
