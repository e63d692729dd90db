"""What prototype_contrastive_loss makes of unlabelled pixels, values that are not finite, bad labels, masked classes and empty batches."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from on_backends import ALL, NO_BAD_LABEL, ON_GPU, call, flag, on_each_backend, on_each_dtype, run, usable
from problems import CONTRAST, OPTIONS, named, problem, unless_slow

import spcl_fast as sf
from spcl_fast.backends.labels import BAD_PROBABILITY

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EVERY = usable(CONTRAST, among=ALL)
LEAVES = ("features", "prototypes")
# tiles with all classes; for CUDA classes in blocks, for the C++ kernels classes that are streamed
MANY = [(name, {"cpu": 4200, "cuda": 330}.get(name, 40)) for name in EVERY]
FEW_OR_MANY = [(name, 5) for name in EVERY] + MANY


def plain(p, **more) -> dict:
    return {"features": p.features, "labels": p.labels, "prototypes": p.prototypes, "temperature": 0.3} | more


def differentiated(backend, given: dict, leaves=LEAVES, **more):
    return run(sf.prototype_contrastive_loss, given, leaves, backend, **more)


def value_of(backend, **given):
    return call(sf.prototype_contrastive_loss, backend, **given)


# ---- no label ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("backend", "dtype"), on_each_dtype(CONTRAST))
@pytest.mark.parametrize("dim", [20, 600])
def test_all_ignored_is_zero_not_nan_even_for_nan_features(backend, reduction, dtype, dim):
    p = problem((1, dim, 3, 5), dtype=dtype, ignored=2)
    p.features.fill_(torch.nan)
    assert all(torch.all(part == 0) for part in differentiated(backend, plain(p, reduction=reduction)))


@pytest.mark.parametrize(
    ("backend", "case"), unless_slow(on_each_backend(CONTRAST, [o for o in OPTIONS if "teacher" not in o.needs]))
)
def test_nothing_labelled_gives_0_and_gradients_of_exactly_0_with_every_option(backend, case):
    p = problem((2, 16, 3, 5))
    p.features[0, 0, 0, 0] = torch.nan  # never looked at
    nothing = p._replace(labels=torch.full_like(p.labels, 255), probabilities=torch.zeros_like(p.probabilities))
    given = case.given(nothing)
    own = given.get("reduction", "mean")
    for reduction in ("mean", "sum", "none") if "denominator" not in given and backend != "triton" else (own,):
        for part in differentiated(backend, given | {"reduction": reduction}, case.leaves):
            assert (part == 0).all()


@pytest.mark.parametrize(
    ("backend", "case"), unless_slow(on_each_backend(CONTRAST, [o for o in OPTIONS if "teacher" not in o.needs]))
)
def test_an_ignored_pixel_that_is_not_finite_changes_nothing(backend, case):
    p = problem((2, 16, 3, 5), ignored=0.4)
    unlabelled = p.probabilities.sum(1) == 0 if "probabilities" in case.needs else p.labels == 255
    assert unlabelled.any() and not unlabelled.all()
    expected = differentiated(backend, case.given(p), case.leaves)
    spoiled = p._replace(features=p.features.masked_fill(unlabelled[:, None], torch.nan))
    got = differentiated(backend, case.given(spoiled), case.leaves)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("backend", "dtype", "dim"),
    [
        (*row.values, dim)
        for row in on_each_dtype(CONTRAST)
        for dim in (20, 520)
        if dim == 20 or row.values[0] != "triton"
    ],
)
def test_non_finite_and_zero_features(backend, dtype, dim):
    p = problem((2, dim, 3, 5), ignored=0, dtype=dtype)
    p.features[0, :, 0, 0] = 0
    p.labels[0, 1, 1] = 255
    p.features[0, 3, 1, 1] = torch.nan  # an ignored pixel may hold anything
    given = plain(p, temperature=1.0)
    loss, grad, dprototypes = differentiated(backend, given)
    assert loss.isfinite() and dprototypes.isfinite().all() and torch.all(grad[0, :, 1, 1] == 0)
    assert dtype == torch.float16 or grad.isfinite().all()
    expected = differentiated("reference", given | {"features": p.features.float()})[1]
    # the gradient at 0 is 1e12 times the others': its own scale, and beyond float16
    for where in (1, *([(0, slice(None), 0, 0)] if dtype != torch.float16 else [])):
        assert (grad.float() - expected)[where].abs().max() <= 2e-2 * expected[where].abs().max()
    for bad in (torch.nan, torch.inf):
        p.features[1, 3, 2, 2] = bad
        loss, grad, _ = differentiated(backend, given)
        assert loss.isnan() and grad[1, :, 2, 2].isnan().all()
        assert grad[0].isfinite().sum() == grad[0, :, 0, 0].isfinite().sum() + dim * 14


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize(
    ("backend", "num_classes"), [row for row in FEW_OR_MANY if row[0] in usable(CONTRAST, "probabilities", among=ALL)]
)
def test_nan_features_spoil_labelled_pixels_alone(backend, num_classes, kind):
    p = problem((2, 20, 3, 5), num_classes)
    labels = p.labels if kind == "labels" else p.probabilities
    p.features[0, 3, 1, 1] = torch.nan
    labels[0, ..., 1, 1] = 1
    given = plain(p, labels=labels, bias=p.bias, temperature=p.temperature)
    loss, dfeatures, *_ = differentiated(backend, given, (*LEAVES, "bias", "temperature"))
    assert loss.isnan() and dfeatures[0, :, 1, 1].isnan().all() and dfeatures[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (1, 8, 1, 1), (1, 1, 2, 3)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", EVERY)
def test_empty_batch_and_single_pixel(backend, shape, reduction):
    loss, dfeatures, dprototypes = differentiated(backend, plain(problem(shape, ignored=0), reduction=reduction))
    assert loss.isfinite().all() and dfeatures.shape == shape and dprototypes.isfinite().all()
    assert loss.shape == (() if reduction == "mean" else (shape[0], *shape[2:]))
    assert shape[0] > 0 or (not loss.any() and not dprototypes.any())


@pytest.mark.parametrize(
    ("backend", "case"),
    unless_slow(on_each_backend(CONTRAST, [o for o in OPTIONS if "teacher" not in o.needs and "map" not in o.name])),
)
def test_an_empty_batch_with_every_option(backend, case):
    p = problem()
    first = p._asdict() | {
        name: t[:0] for name, t in p._asdict().items() if name not in ("teacher", "size") and len(t.shape) > 2
    }
    empty = type(p)(**first | {name: getattr(p, name)[:0] for name in ("bias_per_image", "bias_of_rows_per_image")})
    value, dfeatures, *others = differentiated(backend, case.given(empty), case.leaves)
    assert value == 0 and dfeatures.shape == empty.features.shape and all((part == 0).all() for part in others)


@pytest.mark.parametrize("backend", usable(CONTRAST, "denominator", "bias", "label_smoothing", among=ALL))
def test_labels_that_all_weigh_nothing_are_loss_zero_unless_a_denominator_is_given(backend):
    """torch divides 0 by 0. With smoothing the other classes have a loss, and "all" divides it."""
    p = problem((1, 16, 5, 7), ignored=0.3)
    weight = p.class_weight.clone()
    weight[p.labels[p.labels != 255].unique()] = 0
    weight[4] = 0.5
    labels = p.labels.where((p.labels != 4) | (p.labels == 255), 255)
    for smoothing in (0.0, 0.2):
        given = plain(p, bias=p.bias, class_weight=weight, label_smoothing=smoothing) | {"labels": labels}
        leaves = ("features", "prototypes", "bias")
        assert all((part == 0).all() for part in differentiated(backend, given, leaves, incoming=torch.ones(())))
        divided = given | {"denominator": "all"}
        truth = run(oracle.contrast, divided, leaves, leaf_dtype=torch.float64, incoming=torch.ones(()))
        for got, wanted in zip(differentiated(backend, divided, leaves, incoming=torch.ones(())), truth, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
            assert (wanted != 0).any() == bool(smoothing)


@pytest.mark.parametrize("backend", usable(CONTRAST, "denominator", "bias", among=ALL))
def test_a_denominator_of_zero_is_loss_zero_and_gradient_zero(backend):
    p = problem((2, 20, 3, 5))
    given = plain(p, bias=p.bias, denominator=torch.tensor(0.0))
    assert all(torch.all(part == 0) for part in differentiated(backend, given, (*LEAVES, "bias")))


# ---- bad labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [5, -1, 254, 100000])
@pytest.mark.parametrize("backend", usable(CONTRAST))
def test_label_beyond_classes_is_named_with_its_first_pixel(backend, value):
    p = problem((2, 16, 7, 9))
    p.labels[1, 2, 3] = p.labels[1, 4, 4] = value
    for more in ({}, {"bias": p.bias}):
        with pytest.raises(
            ValueError, match=rf"label {value} at pixel \(image 1, row 2, column 3\) is outside \[0, 5\)"
        ):
            value_of(backend, **plain(p, **more))


@pytest.mark.parametrize(("backend", "num_classes"), [row for row in FEW_OR_MANY if row[0] not in ON_GPU])
def test_a_bad_label_of_a_larger_map_is_named_where_it_lies(backend, num_classes):
    p = problem((2, 8, 7, 9), num_classes, (14, 18), ignored=0)
    p.labels[1, 4, 6] = num_classes
    with pytest.raises(ValueError, match=rf"label {num_classes} at pixel \(image 1, row 4, column 6\)"):
        value_of(backend, **plain(p))


@pytest.mark.parametrize(
    ("value", "dtype"), [(5, torch.uint8), (-1, torch.int8), (2**40 + 1, torch.int64), (-(2**40), torch.int64)]
)
@pytest.mark.parametrize("options", [{}, {"bias": torch.ones(5)}], ids=["plain", "bias"])
@pytest.mark.parametrize("backend", usable(CONTRAST, among=ON_GPU))
@pytest.mark.usefixtures("as_on_a_gpu")
def test_label_beyond_classes_never_indexes_memory_but_raises_the_flag(backend, options, value, dtype):
    p, raised = problem((1, 20, 3, 5)), flag(backend)
    labels = p.labels.where(p.labels != 255, 100).to(dtype)
    given = plain(p, labels=labels, ignore_index=100, class_weight=torch.ones(5), **options)
    raised.fill_(NO_BAD_LABEL)
    assert value_of(backend, **given).isfinite() and raised == NO_BAD_LABEL
    labels[0, 1, 2] = value
    loss, grad, _ = differentiated(backend, given)
    assert loss.isnan() and grad[0, :, 1, 2].isnan().all() and raised == value
    assert torch.all(grad[(labels == 100)[:, None].expand_as(grad)] == 0)
    loss = differentiated(backend, given | {"reduction": "none"})[0]
    assert loss.isnan().sum() == 1 and loss[0, 1, 2].isnan()
    raised.fill_(NO_BAD_LABEL)


@pytest.mark.parametrize("bad", [-0.1, torch.nan, torch.inf])
@pytest.mark.parametrize("backend", usable(CONTRAST, "probabilities"))
def test_a_bad_probability_is_named_with_its_pixel(backend, bad):
    p = problem((2, 16, 7, 9))
    p.probabilities[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"probability .* of class 2 at pixel \(image 1, row 3, column 4\)"):
        value_of(backend, **plain(p, labels=p.probabilities))


@pytest.mark.parametrize("bad", [-0.1, torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("backend", "num_classes"),
    [row for row in FEW_OR_MANY if row[0] in usable(CONTRAST, "probabilities", among=ON_GPU)],
)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_bad_probability_makes_the_loss_nan_and_raises_the_flag(backend, num_classes, bad):
    p, raised = problem((2, 20, 3, 5), num_classes), flag(backend)
    given = plain(p, labels=p.probabilities)
    raised.fill_(NO_BAD_LABEL)
    assert value_of(backend, **given).isfinite() and raised == NO_BAD_LABEL
    p.probabilities[1, 3, 2, 3] = bad
    loss, dfeatures, *_ = differentiated(backend, given)
    assert loss.isnan() and dfeatures[1, :, 2, 3].isnan().all() and raised == BAD_PROBABILITY
    raised.fill_(NO_BAD_LABEL)


# ---- classes that are masked, or weigh nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("backend", "num_classes", "masked"),
    [
        (name, classes, masked)
        for name in usable(CONTRAST, "bias", "sigmoid", "dbias", "dtemperature", among=ALL)
        for classes, masked in ((5, 1), (40, 1), (40, 33), *([(330, 1)] if name != "triton" else []))
    ],
)
def test_a_class_with_a_bias_of_minus_infinity_is_as_if_it_were_not_there(backend, num_classes, masked, loss):
    p, masked = problem((2, 20, 3, 5), num_classes), [2] if masked == 1 else list(range(masked))  # or a first block
    others = torch.tensor([k for k in range(num_classes) if k not in masked])
    place = torch.zeros(num_classes, dtype=torch.long).index_copy(0, others, torch.arange(len(others)))
    labels = p.labels.where(torch.isin(p.labels, others) & (p.labels != 255), -100)
    bias, leaves = (
        torch.zeros(num_classes).index_fill(0, torch.tensor(masked), -torch.inf),
        (*LEAVES, "bias", "temperature"),
    )
    common = {"temperature": p.temperature, "loss": loss, "ignore_index": -100}
    got = differentiated(backend, plain(p, labels=labels, bias=bias, **common), leaves)
    fewer = place[labels.clamp_min(0)].where(labels != -100, -100)
    without = plain(p, labels=fewer, prototypes=p.prototypes[others], bias=bias[others], **common)
    expected = differentiated(backend, without, leaves)
    torch.testing.assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[2][others], expected[2], rtol=1e-5, atol=1e-7)
    assert torch.all(got[2][masked] == 0) and torch.all(got[3][masked] == 0)
    torch.testing.assert_close(got[4], expected[4], rtol=1e-5, atol=1e-6)
    truth = run(oracle.contrast, without, leaves, leaf_dtype=torch.float64)
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", usable(CONTRAST, "bias", "probabilities", among=ALL))
def test_a_masked_class_that_no_probability_aims_at_costs_nothing(backend):
    p = problem((2, 20, 3, 5))
    p.probabilities[:, 4] = 0
    bias = torch.tensor([0.5, -0.5, 1.0, 0.0, -torch.inf])
    got = differentiated(backend, plain(p, labels=p.probabilities, bias=bias), (*LEAVES, "bias"))
    without = plain(p, labels=p.probabilities[:, :4], bias=bias[:4], prototypes=p.prototypes[:4])
    expected = differentiated(backend, without, (*LEAVES, "bias"))
    torch.testing.assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-7)
    assert got[3][4] == 0


@pytest.mark.parametrize("backend", usable(CONTRAST, "prototype_class", among=ALL))
def test_of_rows_that_are_equal_the_lowest_has_the_gradient(backend):
    """Whole numbers, so that no backend can see a difference in their products."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-3, 4, (1, 8, 5, 7), generator=generator).float()
    twins = torch.randint(-2, 3, (5, 8), generator=generator).float().repeat(2, 1)
    labels = torch.randint(0, 5, (1, 5, 7), generator=generator)
    given = {"features": features, "labels": labels, "prototypes": twins, "temperature": 4.0, "normalize": False}
    given |= {"prototype_class": torch.arange(5).repeat(2), "pool": "max"}
    gradient = differentiated(backend, given)[2]
    assert (gradient[5:] == 0).all() and (gradient[:5] != 0).any(1).all()


@pytest.mark.parametrize("backend", usable(CONTRAST, "prototype_class", among=ALL))
def test_labels_of_a_class_without_a_row_cost_infinity(backend):
    (case,) = named(OPTIONS, "pooled, classes without a row")
    p = problem((2, 20, 3, 5))
    p.labels[0, 0, 0] = 6
    assert value_of(backend, **case.given(p)) == torch.inf


@pytest.mark.parametrize("backend", usable(CONTRAST, "prototype_class", "label_smoothing", among=ALL))
@pytest.mark.parametrize(("reduction", "weight"), [("none", 0.7), ("sum", 0.7), ("sum", 0.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_class_without_a_row_has_infinite_loss_and_the_gradients_of_the_formula(
    backend, loss, smoothing, reduction, weight
):
    p = problem((1, 8, 3, 4), 3)
    p.labels[0, 1] = 1  # the class without a row
    given = plain(p, prototype_class=torch.tensor([0, 2, 2]), loss=loss, label_smoothing=smoothing, reduction=reduction)
    given |= {"temperature": p.temperature, "class_weight": torch.tensor([1.0, weight, 2.0])}
    value, *gradients = differentiated(backend, given, (*LEAVES, "temperature"))
    if reduction == "none":
        assert (value[p.labels == 1] == torch.inf).all() and not value.isnan().any()
    else:
        is_nan = weight == 0 and (loss == "sigmoid" or smoothing == 0)
        assert value.isnan() if is_nan else value.isinf() if weight else value.isfinite()
    expected = differentiated("reference", given, (*LEAVES, "temperature"))[1:]
    for got, right in zip(gradients, expected, strict=True):
        assert right.isfinite().all()
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "num_classes"),  # above what the C++ backend streams from
    [(name, classes) for name in EVERY for classes in (40, 5000) if classes == 40 or name != "triton"],
)
def test_a_label_of_class_weight_zero_does_not_make_the_gradients_of_a_large_head_nan(backend, num_classes):
    p = problem((7, 9, 1, 1), num_classes, ignored=0)
    given = {"features": p.features[:, :, 0, 0], "labels": p.labels[:, 0, 0], "prototypes": p.prototypes}
    weight = torch.rand(num_classes, generator=torch.Generator().manual_seed(0))
    weight[given["labels"][[0, 3]]] = 0
    more = {"temperature": 1.0, "normalize": False, "class_weight": weight, "ignore_index": -1}
    got = differentiated(backend, given | more)

    def cross_entropy(features, labels, prototypes):
        return F.cross_entropy(features @ prototypes.T, labels, weight=weight.double())

    expected = run(cross_entropy, given, LEAVES, leaf_dtype=torch.float64)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close([t.double() for t in got[1:]], expected[1:], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", usable(CONTRAST, "teacher", among=ALL))
def test_a_teacher_whose_only_class_weighs_nothing_gives_gradient_zero_and_not_nan(backend):
    p = problem((5, 4, 1, 1), 1)
    given = plain(p, labels=p.teacher, class_weight=torch.zeros(1))
    assert all((part == 0).all() for part in differentiated(backend, given))
