"""prototype_contrastive_loss in value and gradients, on every backend that runs here, against the formula in float64."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F
from layouts import LABEL_DTYPES, MORE_LAYOUTS, as_rows, laid_out
from on_backends import (
    ALL,
    ON_CPU,
    ON_GPU,
    asked,
    call,
    check,
    dtypes,
    on_each_backend,
    on_each_dtype,
    run,
    usable,
    why_not,
)
from problems import CONTRAST, KINDS, OPTIONS, named, problem, unless_slow
from shapes import SHAPES, Shape, on_each_shape

import spcl_fast as sf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
EVERY = usable(CONTRAST, among=ALL)
LEAVES = ("features", "prototypes")
EXACT = 16.0  # eps of a value's scale that an option may cost at most, however wrong eager is
# classes in one block and in several, logits saved and formed again; labels of the features' size and of twice that
FEW, FEW_PIXELS, STREAMED, BLOCKS, SAVED = (
    Shape("few classes", (2, 33, 5, 9), 5, too_slow=("triton",)),
    Shape("few classes and pixels", (2, 33, 3, 7), 5, too_slow=("reference", "cpu", "cuda")),
    Shape("many classes", (1, 20, 3, 7), 40),
    Shape("classes in blocks", (2, 37, 3, 5), 330, too_slow=("triton",)),
    Shape("saved logits", (1, 160, 5, 13), 19, (10, 26), too_slow=("triton", "reference")),
)


def agrees(backend: str, given: dict, leaves=LEAVES, **more) -> None:
    check(CONTRAST, given, leaves, backend, **more)


def plain(p, **more) -> dict:
    return {"features": p.features, "labels": p.labels, "prototypes": p.prototypes, "temperature": 0.3} | more


def value_of(backend: str, p, **more):
    return call(sf.prototype_contrastive_loss, backend, **plain(p, **more))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize(("backend", "dtype"), on_each_dtype(CONTRAST))
def test_value_and_gradients_are_as_accurate_as_eager(backend, dtype, temperature):
    agrees(backend, plain(problem((2, 33, 5, 9), 5, (11, 13), dtype), temperature=temperature))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "half floats"])
@pytest.mark.parametrize(("backend", "shape"), on_each_shape(CONTRAST))
def test_every_way_of_cutting_the_problem(backend, shape, half):
    for dtype in dtypes(backend)[1:] if half else [torch.float32]:
        agrees(backend, plain(shape.problem(dtype)))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_classes", [19, 40])
@pytest.mark.parametrize("backend", EVERY)
def test_large_logits_cost_no_accuracy(backend, num_classes, normalize):
    """Neither features nor prototypes of unit length, and a low temperature: logsumexp is near 100, and its last bit 8e-6."""
    p = problem((1, 64, 5, 9), num_classes, ignored=0)
    agrees(backend, plain(p, prototypes=4 * p.prototypes, temperature=0.05, normalize=normalize))


@pytest.mark.parametrize(("normalize", "reduction"), list(itertools.product([True, False], ["mean", "sum", "none"])))
@pytest.mark.parametrize(
    ("backend", "dtype"), [row for row in on_each_dtype(CONTRAST) if row.values[1] != torch.float16]
)
def test_weights_enter_value_and_gradient_but_pixel_weight_not_the_denominator(backend, dtype, normalize, reduction):
    p = problem((2, 33, 5, 9), 5, (11, 13), dtype)
    weights = {"class_weight": p.class_weight, "pixel_weight": p.pixel_weight}
    agrees(backend, plain(p, normalize=normalize, reduction=reduction, **weights))


# ---- options -----------------------------------------------------------------------------------------------------------

EACH = [
    pytest.param(*row.values, shape, id=f"{shape.name}-{row.id}")
    for shape in (FEW, FEW_PIXELS, STREAMED, BLOCKS, SAVED)
    for row in on_each_backend(CONTRAST, OPTIONS, num_classes=shape.num_classes, dim=shape.shape[1])
    if row.values[0] not in shape.too_slow
    if shape == FEW_PIXELS or row.values[0] != "triton" or row.values[1] in KINDS
]


@pytest.mark.parametrize(("backend", "case", "shape"), EACH)
def test_an_option_changes_value_and_gradients_as_the_formula_says(backend, case, shape):
    agrees(backend, case.given(shape.problem()), case.leaves, at_most=EXACT)


@pytest.mark.parametrize("temperature", [0.05, 100.0])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", [name for name in EVERY if name != "triton"])
def test_temperatures_and_features_as_they_are_with_classes_in_blocks(backend, temperature, normalize):
    agrees(backend, plain(problem((1, 24, 3, 7), 400), temperature=temperature, normalize=normalize))


@pytest.mark.parametrize("name", ["variances", "no positive variance, class weight"])
@pytest.mark.parametrize(
    ("backend", "shape"),
    on_each_shape(CONTRAST, "variances", "no_positive_variance", among=("reference", "cpu", "cuda")),
)
def test_variances_of_any_number_of_classes_and_channels(backend, shape, name):
    (case,) = named(OPTIONS, name)
    for dtype in (torch.float32, torch.bfloat16):
        if dtype in dtypes(backend):
            p = shape.problem(dtype)
            # up to 1, where their term is the larger one
            for factor in (1,) if backend != "cuda" else (1, 11) if dtype == torch.float32 else (11,):
                agrees(backend, case.given(p._replace(variances=factor * p.variances)), case.leaves)


SOME = named(
    OPTIONS, "all per image", "variances, bias and temperature", "variances with the rest", "probabilities, weights, smoothing",
    "smoothing, weights", "pooled, weights, bias, temperature", "margin, weights, temperature", "sigmoid, weights, bias, temperature",
)  # fmt: skip


REDUCED = (*SOME, *named(OPTIONS, "all but variances", "pooled by maximum", "variances", "sigmoid", "probabilities"))


@pytest.mark.parametrize(("reduction", "normalize"), [("mean", False), ("sum", True), ("none", False)])
@pytest.mark.parametrize(("backend", "case"), on_each_backend(CONTRAST, REDUCED))
def test_options_with_every_reduction_and_raw_features(backend, case, reduction, normalize):
    given = case.given(problem((2, 20, 3, 5), 7), normalize=normalize, reduction=reduction)
    if reduction != "mean":
        given.pop("denominator", None)
    agrees(backend, given, case.leaves)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize(("backend", "case"), on_each_backend(CONTRAST, SOME))
def test_no_temperature_costs_an_option_accuracy(backend, case, temperature):
    given = case.given(problem(temperature=temperature))
    given["temperature"] = given["temperature"] if "temperature" in case.leaves else temperature
    agrees(backend, given, case.leaves, at_most=64.0)  # the temperature's gradient is a sum whose terms nearly cancel


# the others read half floats and compute as they do with float32: one shape is enough
HALF = [row for row in unless_slow(EACH) if row.values[2] == FEW or row.values[0] in ("triton", "cuda")]


@pytest.mark.parametrize(("backend", "case", "shape"), HALF)
def test_options_of_half_floats(backend, case, shape):
    halves = [t for t in dtypes(backend)[1:] if why_not(backend, asked(CONTRAST, *case.needs, dtype=t)) is None]
    assert halves
    for dtype in halves:
        p = shape.problem(dtype, temperature=1.0)
        agrees(backend, case.given(p), case.leaves, at_most=EXACT)


def test_cuda_has_no_variances_in_float16_and_no_gradient_of_the_temperature_with_those_of_deep_features():
    ask = asked(CONTRAST, "variances")
    assert "no variances in float16" in why_not("cuda", ask._replace(dtype=torch.float16))
    assert why_not("cuda", ask._replace(dim=2048)) is None
    learned = ask._replace(needs=frozenset({"variances", "tensor_temperature", "dtemperature"}), dim=2048)
    assert "beyond 512 channels" in why_not("cuda", learned)
    assert why_not("cuda", learned._replace(dim=512)) is None


LEARNED = named(
    OPTIONS, "temperature", "margin, weights, temperature", "sigmoid, weights, bias, temperature", "variances with the rest",
    "variances, bias and temperature", "pooled, weights, bias, temperature", "all but variances",
)  # fmt: skip
DRAWN = [
    pytest.param(*row.values, shape, classes, id=f"{row.id}-{classes}")
    for row in on_each_backend(CONTRAST, LEARNED)
    if row.values[0] != "triton" or row.values[1] in LEARNED[:1] + LEARNED[4:5]
    for shape, classes in (
        [((2, 24, 7, 13), 5)] if row.values[0] in ON_CPU else [((1, 24, 3, 13), 5)] if row.values[0] == "triton"
        else [((1, 24, 3, 13), 5), ((2, 37, 3, 5), 330), ((1, 300, 2, 7), 512)]
    )
]  # fmt: skip


@pytest.mark.parametrize(("backend", "case", "shape", "num_classes"), DRAWN)
def test_the_gradient_of_the_temperature_is_as_accurate_as_eager_over_many_draws(backend, case, shape, num_classes):
    """One number's error is luck: the root of the mean square over ten draws is compared."""
    errors, scale, index = [0.0, 0.0], 0.0, 1 + case.leaves.index("temperature")
    for seed in range(10):
        given = case.given(problem(shape, num_classes, seed=seed))
        truth = run(oracle.contrast, given, case.leaves, leaf_dtype=torch.float64)[index]
        got = run(sf.prototype_contrastive_loss, given, case.leaves, backend)[index]
        eager = run(oracle.contrast, given, case.leaves, dtype=torch.float32)[index]
        errors = [sum_ + (one.double() - truth).square().item() for sum_, one in zip(errors, (got, eager), strict=True)]
        scale = max(scale, truth.abs().item())
    assert errors[0] ** 0.5 <= 2 * errors[1] ** 0.5 + 4 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case.name)
def test_the_reference_is_exact_in_float64(case):
    given = case.given(problem(dtype=torch.float64))
    got = run(sf.prototype_contrastive_loss, given, case.leaves, "reference")
    for g, t in zip(got, run(oracle.contrast, given, case.leaves), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "name", ["variances", "variances, bias and temperature", "pooled, weights, bias, temperature", "sigmoid, weights, bias, temperature"]
)  # fmt: skip
def test_gradcheck(name):
    (case,) = named(OPTIONS, name)
    given = case.given(problem((1, 3, 2, 2), 3, dtype=torch.float64))
    tensors = [given.pop(leaf).requires_grad_() for leaf in case.leaves]
    torch.autograd.gradcheck(
        lambda *values: sf.prototype_contrastive_loss(**dict(zip(case.leaves, values, strict=True)), **given), tensors
    )


# ---- layouts and labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*MORE_LAYOUTS, "rows", "expanded"])
@pytest.mark.parametrize(("backend", "dtype"), on_each_dtype(CONTRAST))
def test_any_layout_is_read_and_kept(backend, layout, dtype):
    for dim in (33,) if backend == "triton" else (33, 601):
        p = problem((2, dim, 5, 9), dtype=dtype)
        if layout == "expanded":
            p = p._replace(features=p.features[:1].expand_as(p.features))
        expected = run(
            sf.prototype_contrastive_loss, plain(p._replace(features=p.features.contiguous())), LEAVES, backend
        )
        if layout == "rows":
            q = p._replace(features=as_rows(p.features), labels=p.labels.flatten())
        else:
            q = p._replace(features=p.features if layout == "expanded" else laid_out(p.features, layout))
        got = run(sf.prototype_contrastive_loss, plain(q), LEAVES, backend)
        if layout in ("channels_last", "transposed"):
            assert got[1].stride() == q.features.stride()
        wanted = as_rows(expected[1]) if layout == "rows" else expected[1]
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1], wanted)
        # other tiles: other sums, of weights that half floats round another way
        atol = max(1e-6, torch.finfo(dtype).eps * expected[2].abs().max().item())
        torch.testing.assert_close(got[2], expected[2], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("layout", ["channels_last", "rows", "cropped", "transposed"])
@pytest.mark.parametrize(("backend", "case"), on_each_backend(CONTRAST, SOME))
def test_any_layout_is_read_with_options(backend, case, layout):
    p = problem()
    expected = run(sf.prototype_contrastive_loss, case.given(p), case.leaves, backend)
    if layout == "rows" and "per_image_prototypes" not in case.needs:  # a set for each image needs images
        q = p._replace(features=as_rows(p.features), labels=p.labels.flatten(), probabilities=as_rows(p.probabilities),
                       pixel_weight=p.pixel_weight.flatten())  # fmt: skip
    else:
        q = p._replace(features=laid_out(p.features, layout), probabilities=laid_out(p.probabilities, layout))
        layout = "image"
    got = run(sf.prototype_contrastive_loss, case.given(q), case.leaves, backend)
    torch.testing.assert_close(got[0], expected[0])
    wanted = as_rows(expected[1]) if layout == "rows" else expected[1]
    torch.testing.assert_close(got[1], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[2:], expected[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_classes", [5, 330])
@pytest.mark.parametrize("backend", usable(CONTRAST, "probabilities", among=ALL))
def test_probabilities_of_any_dtype_are_read(backend, num_classes):
    p = problem((1, 20, 3, 5), num_classes if backend != "triton" else min(num_classes, 40))
    for dtype in dtypes(backend):
        given = plain(p, labels=p.probabilities.to(dtype))
        agrees(backend, given)


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
@pytest.mark.parametrize("backend", EVERY)
def test_labels_of_every_integer_dtype_are_read_in_place(backend, dtype):
    p = problem((1, 5, 3, 5), size=(7, 4))
    labels = p.labels.where(p.labels != 255, 100)
    got = value_of(backend, p, labels=labels.to(dtype), ignore_index=100)
    expected = oracle.contrast(**plain(p, labels=labels), ignore_index=100)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(7, 9), (14, 18), (1, 1), (3, 40), (113, 71), (720, 1280)])
@pytest.mark.parametrize("backend", EVERY)
def test_labels_of_any_size_follow_the_nearest_rule_of_interpolate(backend, size):
    grid = (91, 161) if size[0] == 720 and backend not in ON_GPU else (7, 9)
    p = problem((1, 4, *grid), size=size)
    got = value_of(backend, p, temperature=1.0, reduction="none")
    expected = oracle.contrast(**plain(p, temperature=1.0), reduction="none")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ignore_index", [2, -100])
@pytest.mark.parametrize("backend", EVERY)
def test_ignore_index_may_be_a_class_or_negative(backend, ignore_index):
    p = problem((2, 16, 7, 9), ignored=0)
    expected = oracle.contrast(**plain(p), ignore_index=ignore_index)
    torch.testing.assert_close(value_of(backend, p, ignore_index=ignore_index).double(), expected, rtol=1e-5, atol=1e-6)


# ---- what PyTorch has, too -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("backend", usable(CONTRAST, "bias", "label_smoothing", "dbias", among=ALL))
def test_a_linear_head_is_linear_cross_entropy(backend, reduction, smoothing, weighted, soft):
    p = problem((1, 16, 1, 40))
    labels = as_rows(p.probabilities) + 1e-3 if soft else p.labels.flatten()
    labels = labels / labels.sum(1, keepdim=True) if soft else labels
    given = {"x": as_rows(p.features), "p": p.prototypes, "b": p.bias}
    common = {"reduction": reduction, "label_smoothing": smoothing} | ({} if soft else {"ignore_index": 255})

    def as_wide(x, tensor):
        return tensor.to(x.dtype) if tensor is not None and tensor.is_floating_point() else tensor

    def ours(x, p, b, y, w, backend=None):
        named = {"features": x, "labels": y, "prototypes": p, "bias": b, "class_weight": as_wide(x, w)}
        return sf.prototype_contrastive_loss(**named, temperature=1, normalize=False, backend=backend, **common)

    def cross_entropy(x, p, b, y, w, head=lambda x, p, b, y, w: F.cross_entropy(x @ p.T + b, y, weight=w, **common)):
        return head(x, p, b, as_wide(x, y), as_wide(x, w))

    given |= {"y": labels, "w": p.class_weight if weighted else None}
    truth, eager = (run(cross_entropy, given, "xpb", leaf_dtype=dtype) for dtype in (torch.float64, torch.float32))
    for g, e, t in zip(run(ours, given, "xpb", backend), eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=8)
    wide = given | {"y": labels.double() if soft else labels}
    exact = [run(ours, wide, "xpb", leaf_dtype=torch.float64)]
    if hasattr(F, "linear_cross_entropy"):
        theirs = lambda x, p, b, y, w: F.linear_cross_entropy(x, p, y, linear_bias=b, weight=w, **common)  # noqa: E731
        exact.append(run(cross_entropy, given, "xpb", leaf_dtype=torch.float64, head=theirs))
    for results in exact:
        for g, t in zip(results, truth, strict=True):
            torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-13)


def test_there_is_a_shape_for_every_way_of_cutting_a_problem():
    assert len(SHAPES[CONTRAST]) > 15


@pytest.mark.parametrize("backend", usable(CONTRAST))
@pytest.mark.parametrize("soft", [False, True])
def test_the_small_loss_of_a_pixel_that_is_sure_has_its_digits(backend, soft):
    generator = torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(5, 32, generator=generator), dim=1)
    labels = torch.randint(0, 5, (64,), generator=generator)
    features = prototypes[labels] + 0.15 * torch.randn(64, 32, generator=generator)

    def error(dtype, loss):
        given = F.one_hot(labels, 5).to(dtype) if soft else labels
        return loss(features.to(dtype), given, prototypes.to(dtype))

    def eager(x, given, rows):
        return F.cross_entropy(F.normalize(x, dim=1) @ rows.T / 0.05, given, reduction="none")

    exact = error(torch.float64, eager)
    got = error(torch.float32, lambda *given: sf.prototype_contrastive_loss(
        *given, temperature=0.05, reduction="none", backend=backend))  # fmt: skip
    bound = 2 * (error(torch.float32, eager) - exact).abs().max()
    assert exact.max() < 1 and (got - exact).abs().max() <= bound


def test_a_sigmoid_of_large_logits_is_exact_in_float64():
    generator = torch.Generator().manual_seed(0)
    features, prototypes = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (6, 4))
    labels, logits = torch.arange(6) % 4, 9 * features @ prototypes.T
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 4).double(), reduction="none")
    assert logits.max() > 20
    got = sf.prototype_contrastive_loss(
        features, labels, prototypes, temperature=1 / 9, normalize=False, loss="sigmoid", reduction="none"
    )
    torch.testing.assert_close(got, expected.sum(1), rtol=1e-14, atol=0)
    up = sf.upsampled_binary_cross_entropy(logits[:, :, None, None], labels[:, None, None], reduction="none")
    torch.testing.assert_close(up.flatten(), expected.sum(1), rtol=1e-14, atol=0)
