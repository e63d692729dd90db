"""What the losses of up-sampled logits make of pixels without a label, bad labels, masked classes, and arguments that do not fit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from on_backends import ALL, NO_BAD_LABEL, ON_CPU, ON_GPU, call, check, flag, on_each_backend, run, usable
from problems import BINARY, CROSS, PREDICTION, UPSAMPLED_OPTIONS, problem, unless_slow

import spcl_fast as sf
from spcl_fast.backends.labels import BAD_PROBABILITY

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EVERY = usable(CROSS, among=ALL)
OPTIONS = [row for op in (CROSS, BINARY) for row in on_each_backend(op, [o for o in UPSAMPLED_OPTIONS if o.op == op])]
EACH_OP = [pytest.param(name, op, id=f"{op}-{name}") for op in (CROSS, BINARY) for name in usable(op, among=ALL)]


def differentiated(backend, op=CROSS, incoming=None, **given):
    return run(getattr(sf, op), given, ("logits",), backend, incoming=incoming)


def loss_of(backend, **given):
    return call(sf.upsampled_cross_entropy, backend, **given)


# ---- no label --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "case"), unless_slow(OPTIONS))
def test_nothing_labelled_is_a_loss_and_gradient_of_exactly_0_even_for_nan_logits(backend, case):
    p = problem((2, 1, 3, 4), 4, (10, 13)) if backend != "triton" else problem((2, 1, 2, 3), 4, (5, 6))
    p.logits[0, 0, 0, 0] = torch.nan
    nothing = p._replace(labels=torch.full_like(p.labels, 255), nodes=torch.zeros_like(p.nodes))
    plain = case.given(nothing)
    for reduction in (
        ("mean", "sum", "none")
        if backend != "triton" and "denominator" not in plain
        else (plain.get("reduction", "mean"),)
    ):
        given = plain | {"reduction": reduction}
        for part in run(getattr(sf, case.op), given, ("logits",), backend):
            assert (part == 0).all()


@pytest.mark.parametrize("backend", EVERY)
def test_nan_in_nan_out_but_not_through_ignored_pixels(backend):
    p = problem((2, 1, 3, 3), 3, (9, 9), ignored=0)
    p.labels[0], p.labels[1] = 255, 1
    p.logits[0, 2, 1, 1] = torch.nan
    loss, grad = differentiated(backend, logits=p.logits, labels=p.labels)
    assert loss.isfinite() and grad.isfinite().all()
    p.labels[0] = 0
    assert loss_of(backend, logits=p.logits, labels=p.labels).isnan()
    per_pixel = loss_of(backend, logits=p.logits, labels=p.labels, reduction="none")
    assert per_pixel[0].isnan().any() and per_pixel[1].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", EVERY)
def test_an_ignored_pixel_may_lie_on_nan_among_labelled_neighbours(backend, value):
    p = problem((1, 1, 9, 40), 7, (9, 20))
    p.labels[0, 0, 3] = 255
    given = {
        "logits": p.logits,
        "labels": p.labels,
        "align_corners": False,
    }  # halved across: nodes 6 and 7 are read by pixel 3 alone
    clean = differentiated(backend, **given)
    p.logits[0, 2, 0, 6] = value
    loss, gradient = differentiated(backend, **given)
    torch.testing.assert_close([loss, gradient], clean)
    assert torch.all(gradient[0, :, 0, 6:8] == 0)


@pytest.mark.parametrize(("backend", "op"), EACH_OP)
def test_no_image_at_all(backend, op):
    given = {"logits": torch.zeros(0, 3, 4, 5), "labels": torch.zeros(0, 8, 9, dtype=torch.long)}
    loss, grad = differentiated(backend, op, **given)
    assert loss == 0 and grad.shape == (0, 3, 4, 5)


@pytest.mark.parametrize("backend", usable(CROSS, "probabilities", among=ALL))
def test_no_image_with_probabilities(backend):
    given = {"logits": torch.zeros(0, 3, 4, 5), "labels": torch.zeros(0, 3, 4, 5), "size": (8, 9)}
    loss, grad = differentiated(backend, **given)
    assert loss == 0 and grad.shape == (0, 3, 4, 5)


@pytest.mark.parametrize("backend", EVERY)
def test_one_class_alone_costs_exactly_nothing(backend):
    p = problem((1, 1, 3, 5), 1, (12, 20))
    loss, grad = differentiated(backend, logits=p.logits, labels=p.labels, temperature=0.7)
    assert loss == 0 and torch.all(grad == 0)


# ---- bad labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [9, -3, 77])
@pytest.mark.parametrize("backend", usable(CROSS))
def test_a_bad_label_is_named_with_its_first_pixel_at_any_stride(backend, value):
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    labels[1, 12, 6], labels[1, 12, 7], labels[1, 13, 0] = value, -3, 78
    turned = labels.transpose(1, 2).contiguous().transpose(1, 2)
    for strided in (labels, turned, labels.to(torch.int8), *([labels.to(torch.uint64)] if value > 0 else [])):
        with pytest.raises(ValueError, match=rf"label {value} at pixel \(image 1, row 12, column 6\)"):
            loss_of(backend, logits=torch.zeros(2, 5, 4, 4), labels=strided)


@pytest.mark.parametrize("backend", [name for name in usable(CROSS) if name == "cpu"])
def test_a_label_beyond_int64_is_not_taken_for_an_ignore_index_of_minus_1(backend):
    largest = torch.full((2, 16, 16), 2**64 - 1, dtype=torch.uint64)
    with pytest.raises(ValueError, match=r"label -1 at pixel|label 18446744073709551615 at pixel"):
        loss_of(backend, logits=torch.zeros(2, 5, 4, 4), labels=largest, ignore_index=-1)


@pytest.mark.parametrize("value", [3, -1, 2**33])
@pytest.mark.parametrize("backend", usable(CROSS, among=ON_GPU))
@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_upsampled_label_beyond_classes_never_indexes_memory_but_raises_the_flag(backend, value):
    p, raised = problem((2, 1, 3, 4), 3, (11, 14)), flag(backend)
    p.labels[1, 2, 3] = value
    raised.fill_(NO_BAD_LABEL)
    loss, grad = differentiated(backend, logits=p.logits, labels=p.labels)
    assert loss.isnan() and grad.isnan().any() and raised == value
    for reduction in ("mean", "sum", "none"):  # the forward alone
        raised.fill_(NO_BAD_LABEL)
        loss = loss_of(backend, logits=p.logits, labels=p.labels, reduction=reduction)
        assert loss.isnan().sum() == 1 and raised == value
        assert reduction != "none" or loss[1, 2, 3].isnan()
    raised.fill_(NO_BAD_LABEL)
    given = {"logits": p.logits, "labels": p.labels, "denominator": torch.tensor(9.0)}
    assert loss_of(backend, **given).isnan()
    raised.fill_(NO_BAD_LABEL)


@pytest.mark.parametrize("bad", [-0.5, torch.nan, torch.inf])
@pytest.mark.parametrize("backend", usable(CROSS, "probabilities"))
def test_a_bad_probability_is_named_with_its_node(backend, bad):
    p = problem((2, 1, 9, 11), 7, (20, 30))
    p.nodes[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"of class 2 at pixel \(image 1, row 3, column 4\)"):
        loss_of(backend, logits=p.logits, labels=p.nodes, size=p.size)


@pytest.mark.parametrize("bad", [-0.1, torch.nan, torch.inf])
@pytest.mark.parametrize("backend", usable(CROSS, "probabilities", among=ON_GPU))
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_bad_probability_raises_the_flag_and_makes_the_loss_nan(backend, bad):
    p, raised = problem((2, 1, 3, 4), 4, (9, 11)), flag(backend)
    p.nodes[1, 2, 1, 1] = bad
    raised.fill_(NO_BAD_LABEL)
    assert loss_of(backend, logits=p.logits, labels=p.nodes, size=p.size).isnan() and raised == BAD_PROBABILITY
    raised.fill_(NO_BAD_LABEL)


# ---- masked classes --------------------------------------------------------------------------------------------------

MASKS = [-torch.inf, torch.finfo(torch.float32).min, -2.4e38, -1e30, -1e4]


GRIDS = [((5, 7), (5, 7)), ((5, 7), (21, 26)), ((2, 3), (8, 12)), ((2, 3), (3, 2)), ((9, 11), (20, 31))]


@pytest.mark.parametrize(
    ("backend", "op", "grid", "high", "low"),
    [
        (*row.values, grid, high, low)
        for row in EACH_OP
        for grid, high in GRIDS
        for low in MASKS
        if row.values[0] != "triton" or low == -torch.inf or grid == (2, 3) < high  # its interpreter is slow
    ],
)
def test_a_masked_class_takes_no_part_and_the_others_are_as_without_it(backend, op, grid, high, low):
    if backend in ON_GPU and grid == (9, 11):  # several panels of the C++ kernels; the others are slow
        grid, high = (3, 4), (9, 11)
    p = problem((2, 1, *grid), 4, high, seed=1)
    labels = p.labels.where(p.labels != 1, 2)
    others = torch.tensor([0, 2, 3])
    fewer = torch.where((labels > 1) & (labels != 255), labels - 1, labels)
    weight = torch.rand(4, generator=torch.Generator().manual_seed(0)) + 0.1
    for temperature in (1.0,) if backend == "triton" else (0.05, 1.0, 100.0):
        masked = {"logits": p.logits.index_fill(1, torch.tensor([1]), low), "labels": labels, "class_weight": weight}
        without = {"logits": p.logits[:, others], "labels": fewer, "class_weight": weight[others]}
        loss, gradient = differentiated(backend, op, **masked, temperature=temperature)
        rest = differentiated("reference", op, **without, temperature=temperature)
        torch.testing.assert_close(loss, rest[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient[:, others], rest[1], rtol=1e-4, atol=1e-7)
        limit = 1e-20 if temperature == 1 else 1e-12
        assert (gradient[:, 1].abs() <= (0 if low == -torch.inf or backend in ON_GPU else limit)).all()


@pytest.mark.parametrize("low", MASKS[:3])
@pytest.mark.parametrize("backend", usable(CROSS, "label_smoothing", among=ALL))
def test_a_masked_class_of_weight_0_costs_nothing_where_labels_are_smoothed(backend, low):
    p = problem((2, 1, 9, 11), 7, (20, 31)) if backend != "triton" else problem((2, 1, 3, 4), 7, (7, 9))
    p.logits[:, 6], weight = low, torch.ones(7)
    weight[6] = 0
    labels = p.labels.where(p.labels != 6, 255)
    given = {"labels": labels, "label_smoothing": 0.1}
    loss, gradient = differentiated(backend, logits=p.logits, class_weight=weight, incoming=torch.ones(()), **given)
    z = p.logits[:, :6].double().requires_grad_()
    up = F.interpolate(z, p.size, mode="bilinear", align_corners=True).movedim(1, 3)[labels != 255]
    target = F.one_hot(labels[labels != 255], 6) * 0.9 + 0.1 / 7
    expected = -(target * up.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[:, :6].double(), torch.autograd.grad(expected, z)[0], rtol=1e-4, atol=1e-8)
    assert (gradient[:, 6].abs() <= (0 if low == -torch.inf else 1e-12)).all()


@pytest.mark.parametrize("backend", EVERY)
def test_a_class_that_is_minus_infinity_at_some_nodes_is_so_only_where_they_count(backend):
    """At equal size nothing is mixed: as F.cross_entropy."""
    p = problem((2, 1, 5, 7), 4)
    p.logits[:, 3, ::2, 1::3] = -torch.inf
    labels = p.labels.where(p.labels != 3, 0)
    got = differentiated(backend, logits=p.logits, labels=labels)
    expected = run(F.cross_entropy, {"input": p.logits, "target": labels}, ("input",), ignore_index=255)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", EVERY)
def test_a_class_masked_in_some_cells_costs_the_others_nothing(backend):
    p = problem((1, 1, 5, 3), 4, (20, 12))
    p.logits[:, 2, :2] = -torch.inf
    p.labels[:, :10] = p.labels[:, :10].where(p.labels[:, :10] != 2, 0)  # the pixels that those nodes reach
    loss, gradient = differentiated(backend, logits=p.logits, labels=p.labels)
    assert loss.isfinite() and gradient.isfinite().all() and torch.all(gradient[:, 2, 0] == 0)


@pytest.mark.parametrize("backend", EVERY)
def test_a_label_whose_class_is_masked_costs_infinity(backend):
    p = problem((1, 1, 2, 3), 4, (8, 12), ignored=0)
    p.logits[:, 1] = -torch.inf
    p.labels[0, 0, 0], p.labels[0, 0, 1] = 1, 0
    loss = loss_of(backend, logits=p.logits, labels=p.labels, reduction="none")
    assert torch.equal(loss.isinf(), p.labels == 1)


# CUDA's kernels put a finite mask in the place of a logit whose product with log2(e) is no float
@pytest.mark.parametrize(
    ("backend", "low"),
    [(name, low) for name in EVERY for low in MASKS[:3] if name != "cuda" or low == -torch.inf],
)
def test_a_label_of_a_masked_class_costs_what_it_does_in_torch(backend, low):
    p = problem((2, 1, 9, 11), 7)
    p.logits[:, 6] = low
    labels = p.labels.where(p.labels != 6, 255)
    labels[1, 2, 3] = 6  # one alone: the sum of two is infinite in torch
    loss, gradient = differentiated(backend, logits=p.logits, labels=labels)
    expected = run(F.cross_entropy, {"input": p.logits, "target": labels}, ("input",), ignore_index=255)
    assert loss == expected[0] or torch.allclose(loss, expected[0], rtol=1e-6)
    assert torch.allclose(gradient, expected[1], atol=1e-8)


@pytest.mark.parametrize("level", [-3e38, -1e20, 0.0])
@pytest.mark.parametrize("backend", [name for name in EVERY if name in ("cpu", "triton")])
def test_logits_as_low_as_floats_go_give_a_finite_loss(backend, level):
    given = {"logits": torch.full((1, 3, 2, 2), level), "labels": torch.zeros(1, 4, 4, dtype=torch.long)}
    torch.testing.assert_close(loss_of(backend, **given), torch.tensor(3.0).log())


# ---- denominators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [(3, 5), (2, 40)])
@pytest.mark.parametrize("backend", usable(CROSS, "denominator", among=ALL))
def test_a_given_denominator_divides_value_and_gradient_and_0_makes_them_0(backend, low):
    p = problem((2, 1, *low), 3, (24, 80) if backend != "triton" else (9, 40))
    given = {"logits": p.logits, "labels": p.labels, "class_weight": torch.tensor([0.2, 1.0, 1.5])}
    summed = differentiated(backend, **given, reduction="sum")
    for number in (4000.0, 1.0, 0.0):
        got = differentiated(backend, **given, denominator=torch.tensor(number))
        for g, s in zip(got, summed, strict=True):
            torch.testing.assert_close(g, s / number if number else torch.zeros_like(s), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("backend", usable(CROSS, "denominator", among=ALL))
def test_labels_that_all_weigh_nothing_are_loss_0_unless_a_denominator_is_given(backend, smoothing):
    """torch divides 0 by 0. With smoothing the other classes have a loss, and "all" divides it."""
    if smoothing and backend not in usable(CROSS, "denominator", "label_smoothing", among=ALL):
        pytest.skip("this backend has no label smoothing")
    p = problem((2, 1, 3, 5), 3, (9, 11), ignored=0.0)
    labels, weight = p.labels.clamp_max(1), torch.tensor([0.0, 0.0, 0.5])
    given = {"logits": p.logits, "labels": labels, "class_weight": weight} | (
        {"label_smoothing": smoothing} if smoothing else {}
    )
    assert all((part == 0).all() for part in differentiated(backend, **given))
    logits = p.logits.double().requires_grad_()
    whole = F.interpolate(logits, p.size, mode="bilinear", align_corners=True)
    loss = F.cross_entropy(whole, labels, weight.double(), label_smoothing=smoothing, reduction="sum") / labels.numel()
    wanted = (loss, *torch.autograd.grad(loss, logits))
    summed = differentiated(backend, **given, denominator="all", incoming=torch.ones(()))
    for got, truth in zip(summed, wanted, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


# ---- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch, spcl_fast as sf
def step(low, high):
    logits = torch.zeros(1, 19, *low, requires_grad=True)
    labels = torch.zeros(1, *high, dtype=torch.uint8)
    sf.upsampled_cross_entropy(logits, labels, backend=sys.argv[1]).backward()
    sf.upsampled_prediction(logits.detach(), high, backend=sys.argv[1])
step((8, 16), (64, 128))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step((64, 128), (512, 1024))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


# Of one up-sampled map, 40 MB. Allowed: results and weights of the labels' size, strips of the reference, low-resolution gradients.
SHARE = {"reference": 0.75, "cpu": 0.25}


@pytest.mark.parametrize("backend", sorted(set(ON_CPU) & set(SHARE) & set(usable(CROSS)) & set(usable(PREDICTION))))
def test_no_up_sampled_map_is_ever_allocated(backend):
    peak_bytes = 1024 * int(
        subprocess.run([sys.executable, "-c", PEAK, backend], check=True, capture_output=True, text=True).stdout
    )
    assert peak_bytes < SHARE[backend] * 4 * 19 * 512 * 1024


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"logits": torch.zeros(2, 5, 7)}, ValueError, r"logits must be \[B, K, h, w\]"),
    ({"labels": torch.zeros(1, 8, 8, dtype=torch.long)}, ValueError, "must hold as many images"),
    ({"labels": torch.zeros(2, 8, 8)}, TypeError, "integer dtype"),
    ({"pixel_weight": torch.zeros(2, 5, 7)}, ValueError, "the labels' shape"),
    ({"temperature": -1.0}, ValueError, "above 0, got -1.0"),
    ({"backend": "triton_"}, ValueError, "unknown backend"),
    ({"labels": torch.rand(2, 3, 5, 7)}, ValueError, "probabilities and must be"),
    ({"labels": -torch.rand(2, 4, 5, 7)}, ValueError, "probability -"),
    ({"labels": torch.rand(2, 4, 5, 7), "size": (0, 3)}, ValueError, "each at least 1"),
    ({"size": (9, 9)}, ValueError, "integer labels say the size"),
    ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\]"),
    ({"denominator": "all", "reduction": "sum"}, ValueError, "denominator=all and reduction='sum'"),
])  # fmt: skip
def test_upsampling_arguments_that_do_not_fit_are_refused_by_name(change, error, text):
    given = {"logits": torch.ones(2, 4, 5, 7), "labels": torch.zeros(2, 10, 14, dtype=torch.long)}
    with pytest.raises(error, match=text):
        sf.upsampled_cross_entropy(**given | change)
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        sf.upsampled_binary_cross_entropy(**given, gamma=-1.0)


@pytest.mark.parametrize("size", [(3, 1), (1, 7), (2, 3)])
@pytest.mark.parametrize("backend", usable(CROSS, among=ALL))
def test_cells_without_a_pixel_give_no_gradient_that_is_not_finite(backend, size):
    p = problem((1, 1, 3, 7), 5, size, ignored=0.0)
    given = {"logits": 12 * p.logits / p.logits.abs().max(), "labels": p.labels}
    for temperature in (0.5, 1.0):
        check(CROSS, given, ("logits",), backend, temperature=temperature, slack=16)
