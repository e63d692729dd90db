"""Every option of prototype_contrastive_loss and prototype_logits in the C++ kernels, in value and all gradients, against float64."""

from __future__ import annotations

import formulas
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate

from spcl_fast.backends import cpu
from spcl_fast.backends.contract import Ask, Contrast, Logits, Teacher, Wanted

REASON = cpu.why_not(Ask("prototype_contrastive_loss", torch.device("cpu"), torch.float32, num_classes=2, dim=2))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ALL = Wanted(True, True, True, True)
SIZES = {"one block": ((2, 24, 7, 13), 5), "saved logits": ((1, 160, 5, 13), 19)}
TEMPERATURES = (0.05, 1.0, 100.0)
OWNERS = torch.tensor([3, 0, 1, 1, 2, 0, 3, 3, 3])  # class 4 has no row

OPTIONS = {
    "per-image prototypes": {"per_image": True},
    "bias and weights": {"bias": 1, "weights": True},
    "a bias per image": {"bias": 2},
    "a bias and prototypes per image": {"bias": 2, "per_image": True, "reduction": "none"},
    "smoothing": {"label_smoothing": 0.1, "weights": True},
    "smoothing as a map": {"label_smoothing": 0.3, "reduction": "none"},
    "smoothing summed": {"label_smoothing": 0.3, "reduction": "sum", "bias": 1},
    "denominator": {"denominator": torch.tensor(77.0)},
    "margin": {"margin": 0.2, "bias": 1},
    "variances": {"variances": True, "bias": 1, "weights": True},
    "variances per image": {"variances": True, "per_image": True},
    "no variance in the numerator": {"variances": True, "positive_variance": False, "weights": True, "margin": 0.1},
    "probabilities": {"probabilities": True, "weights": True},
    "probabilities smoothed": {"probabilities": True, "label_smoothing": 0.2, "bias": 2, "weights": True},
    "sigmoid": {"loss": "sigmoid", "bias": 1, "weights": True, "margin": 0.1},
    "sigmoid of probabilities": {"loss": "sigmoid", "probabilities": True, "label_smoothing": 0.1, "weights": True},
    "without normalisation": {"normalize": False, "bias": 1, "label_smoothing": 0.1},
    "pooled": {"rows_of": OWNERS, "bias": 1},
    "pooled per image": {"rows_of": OWNERS, "per_image": True, "bias": 2, "weights": True, "margin": 0.1},
    "pooled by maximum": {"rows_of": OWNERS, "pool": "max", "bias": 1},
    "pooled variances": {"rows_of": OWNERS, "pool": "max", "variances": True, "label_smoothing": 0.0},
    "teacher": {"teacher": True, "bias": 1, "weights": True},
    "teacher smoothed per image": {"teacher": True, "per_image": True, "label_smoothing": 0.1, "reduction": "none"},
    "bfloat16": {"bias": 1, "label_smoothing": 0.1, "dtype": torch.bfloat16},
}  # fmt: skip


def problem(shape, num_classes, temperature=0.3, seed=0, dtype=torch.float32, **options) -> Contrast:
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.rand(size, generator=generator)  # noqa: E731
    randn = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    batch, dim, height, width = shape
    owners = options.pop("rows_of", None)
    classes, rows = num_classes, num_classes
    if owners is not None:
        classes, rows = 5, len(owners)
        options |= {"prototype_class": owners, "classes": classes}
    labels = torch.randint(0, classes if owners is None else 4, (batch, 2 * height, 2 * width), generator=generator)
    labels[rand(*labels.shape) < 0.2] = 255
    prototypes = 0.7 * F.normalize(randn(*((batch,) if options.pop("per_image", False) else ()), rows, dim), dim=-1)
    variances = rand(*prototypes.shape) * 2 * temperature**2 if options.pop("variances", False) else None
    if bias := options.pop("bias", 0):
        options["bias"] = randn(*((batch,) if bias == 2 else ()), rows)
    if options.pop("probabilities", False):
        labels = (3 * randn(batch, classes, width, height)).softmax(1).mT  # not contiguous
        labels[:, :, 0, :5] = 0  # no label
    if options.pop("teacher", False):
        f, q = F.normalize(randn(batch, 12, height, width), dim=1), F.normalize(randn(classes, 12), dim=1)
        u = -(torch.einsum("bdhw,kd->bkhw", f, q) / 0.2).flatten(2).logsumexp(1)
        labels = Teacher(f, q, 0.2, u + 0.1, 0.3 * randn(classes))
    weights = options.pop("weights", False)
    return Contrast(
        randn(*shape).to(dtype), labels, prototypes, rand(classes) + 0.5 if weights else None,
        rand(batch, height, width) if weights else None, variances, temperature, options.pop("normalize", True), 255,
        options.pop("reduction", "mean"), **options,
    )  # fmt: skip


def incoming(c: Contrast) -> torch.Tensor:
    return (
        torch.linspace(-1, 2, c.features[:, 0].numel()).view_as(c.features[:, 0])
        if c.reduction == "none"
        else torch.tensor(1.7)
    )


def computed(c: Contrast, wanted: Wanted = ALL) -> tuple[torch.Tensor, ...]:
    wanted = wanted._replace(bias=wanted.bias and c.bias is not None)
    loss, saved = cpu.contrast_forward(c, wanted)
    like = cpu.saved_like(c, wanted)
    assert saved.lse.dtype == like.lse and bool(saved.logits.numel()) == like.logits
    return loss, *cpu.contrast_backward(incoming(c), c, saved, wanted)


def by_autograd(c: Contrast, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    leaves = [c.features, c.prototypes, c.bias, torch.tensor(c.temperature)]
    leaves = [None if leaf is None else leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
    features, prototypes, bias, temperature = leaves
    variances = None if c.variances is None else c.variances.to(dtype)
    c = c._replace(features=features, prototypes=prototypes, bias=bias, temperature=temperature, variances=variances)
    loss = formulas.contrast(c, dtype)
    (loss * incoming(c).to(dtype)).sum().backward()
    return loss.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_as_accurate_as_eager_in_value_and_gradients(option, size, temperature):
    c = problem(*SIZES[size], temperature, **OPTIONS[option])
    got, eager, truth = computed(c), by_autograd(c, torch.float32), by_autograd(c, torch.float64)
    for g, e, t in list(zip(got, eager, truth, strict=True))[:4]:
        if t is not None:
            assert_as_accurate(g, e.to(g.dtype), t)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("option", ["margin", "variances", "probabilities smoothed", "sigmoid", "pooled", "teacher"])
def test_the_temperature_s_gradient_is_as_accurate_as_eager(option, temperature):
    """One number's error is luck: the root of the mean square over ten draws is compared."""
    errors = {torch.float32: 0.0, None: 0.0}
    scale = 0.0
    for seed in range(10):
        c = problem(*SIZES["one block"], temperature, seed, **OPTIONS[option])
        truth = by_autograd(c, torch.float64)[4]
        errors[None] += (computed(c)[4].double() - truth).square().item()
        errors[torch.float32] += (by_autograd(c, torch.float32)[4].double() - truth).square().item()
        scale = max(scale, truth.abs().item())
    assert errors[None] ** 0.5 <= 2 * errors[torch.float32] ** 0.5 + 4 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("option", OPTIONS)
def test_one_gradient_alone_is_what_it_is_with_the_others(option):
    c = problem(*SIZES["saved logits"], **OPTIONS[option])
    together = computed(c)
    for index, name in enumerate(Wanted._fields):
        if name == "bias" and c.bias is None:
            continue
        alone, expected = computed(c, Wanted(**{name: True}))[1 + index], together[1 + index]
        assert (alone - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_gives_the_same_bits_for_any_number_of_threads(option):
    c = problem((3, 40, 11, 37), 19, **OPTIONS[option])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(computed(c))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("option", [o for o in OPTIONS if "teacher" not in o])
def test_nothing_labelled_is_a_loss_and_gradients_of_exactly_0(option):
    c = problem(*SIZES["one block"], **OPTIONS[option])
    nothing = torch.zeros_like(c.labels) if c.labels.is_floating_point() else torch.full_like(c.labels, 255)
    features = torch.where(torch.rand(c.features.shape) < 0.1, torch.nan, c.features)  # an ignored NaN goes nowhere
    c = c._replace(labels=nothing, features=features.to(c.features.dtype))
    for value in computed(c):
        assert (value == 0).all()


@pytest.mark.parametrize("option", ["bias and weights", "smoothing", "probabilities", "sigmoid", "pooled", "variances"])
def test_an_ignored_pixel_that_is_not_finite_changes_nothing(option):
    c = problem(*SIZES["one block"], **OPTIONS[option])
    if c.labels.is_floating_point():
        ignored = c.labels.sum(1) == 0
    else:
        ignored = (formulas.hard_labels(c) == 255).view_as(c.features[:, 0])
    spoiled = c._replace(features=c.features.masked_fill(ignored[:, None], torch.nan))
    for clean, value in zip(computed(c), computed(spoiled), strict=True):
        assert torch.equal(clean, value)


@pytest.mark.parametrize("bad", [-0.1, torch.nan, torch.inf])
def test_a_probability_that_is_none_is_reported_with_its_pixel(bad):
    c = problem(*SIZES["one block"], probabilities=True)
    c.labels[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"probability .* of class 2 at pixel \(image 1, row 3, column 4\)"):
        computed(c)


def test_a_bad_label_is_reported_with_options_and_streamed():
    for c in (problem(*SIZES["one block"], bias=1), problem((1, 8, 7, 13), 4200, bias=1)):
        c.labels[0, 2, 6] = 4200
        with pytest.raises(ValueError, match=r"label 4200 at pixel \(image 0, row 2, column 6\)"):
            computed(c)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_class_with_a_bias_of_minus_infinity_is_as_if_it_were_not_there(kind):
    c = problem(*SIZES["one block"], bias=1, loss=kind)
    c.labels[c.labels == 4] = 255
    c.bias[4] = -torch.inf
    without = c._replace(prototypes=c.prototypes[:4], bias=c.bias[:4])
    masked, shorter = computed(c), computed(without)
    assert masked[0] == shorter[0]
    assert torch.allclose(masked[1], shorter[1], rtol=0, atol=1e-6 * shorter[1].abs().max().item())
    assert (masked[2][4] == 0).all() and masked[3][4] == 0 and torch.allclose(masked[4], shorter[4], rtol=1e-6)


def test_a_masked_class_that_no_probability_aims_at_costs_nothing():
    c = problem(*SIZES["one block"], bias=1, probabilities=True)
    c.labels[:, 4] = 0
    c.bias[4] = -torch.inf
    without = c._replace(prototypes=c.prototypes[:4], bias=c.bias[:4], labels=c.labels[:, :4])
    masked, shorter = computed(c), computed(without)
    assert torch.allclose(masked[0], shorter[0], rtol=1e-6) and masked[3][4] == 0
    assert torch.allclose(masked[1], shorter[1], rtol=0, atol=1e-6 * shorter[1].abs().max().item())


def test_of_equal_rows_the_lowest_takes_the_gradient_of_the_maximum():
    c = problem(*SIZES["one block"], rows_of=torch.tensor([0, 1, 0, 1, 2, 3]), pool="max")
    c.prototypes[2] = c.prototypes[0]
    dprototypes = computed(c)[2]
    assert (dprototypes[2] == 0).all() and (dprototypes[0] != 0).any()


def test_labels_of_a_class_without_a_row_cost_infinity():
    c = problem(*SIZES["one block"], rows_of=OWNERS)
    c.labels[0, 0, 0] = 4
    assert computed(c)[0] == torch.inf


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("option", ["bias", "smoothing", "per image", "teacher", "margin"])
def test_streamed_classes_are_as_accurate_as_eager(option, reduction):
    options = {
        "bias": {"bias": 1, "weights": True}, "smoothing": {"label_smoothing": 0.1, "bias": 2}, "per image": {"per_image": True},
        "teacher": {"teacher": True, "weights": True}, "margin": {"margin": 0.3, "normalize": False},
    }[option]  # fmt: skip
    c = problem((2, 70, 5, 14), 4100, 0.1, **options, reduction=reduction)
    assert cpu.saved_like(c, ALL).lse == torch.float64
    got, eager, truth = computed(c), by_autograd(c, torch.float32), by_autograd(c, torch.float64)
    for g, e, t in list(zip(got, eager, truth, strict=True))[:4]:
        if t is not None:
            assert_as_accurate(g, e, t)
    assert abs(got[4] - truth[4]) <= 2e-5 * abs(truth[4])


def test_streaming_and_tiles_agree():
    c = problem((1, 40, 9, 20), 4096, 0.07, bias=1, weights=True)
    more = c._replace(  # one class more, of probability 0, and the classes are streamed
        prototypes=torch.cat([c.prototypes, torch.zeros(1, 40)]), bias=torch.cat([c.bias, torch.tensor([-torch.inf])]),
        class_weight=torch.cat([c.class_weight, torch.zeros(1)]),
    )  # fmt: skip
    assert cpu.saved_like(more, ALL).lse != cpu.saved_like(c, ALL).lse
    for index, (tiled, streamed) in enumerate(zip(computed(c), computed(more), strict=True)):
        streamed = streamed[:4096] if index in (2, 3) else streamed
        assert torch.allclose(tiled, streamed, rtol=1e-4, atol=1e-6 * tiled.abs().max().item())


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    "option", ["plain", "bias", "variances", "pooled", "maximum", "per image", "without normalisation"]
)
def test_logits_are_as_accurate_as_eager_in_value_and_gradients(option, temperature):
    options = {
        "plain": {}, "bias": {"bias": 2}, "variances": {"variances": True}, "pooled": {"rows_of": OWNERS, "bias": 1},
        "maximum": {"rows_of": OWNERS, "pool": "max"}, "per image": {"per_image": True, "bias": 1},
        "without normalisation": {"normalize": False},
    }[option]  # fmt: skip
    c = problem(*SIZES["one block"], temperature, **options)
    fields = {name: getattr(c, name) for name in Logits._fields}
    weight = torch.randn(c.features.shape[0], *c.features.shape[2:], c.num_classes).movedim(3, 1)
    weight[:, 4] = 0  # the class without a row
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [c.features, c.prototypes, c.bias, torch.tensor(temperature)]
        leaves = [None if leaf is None else leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        names = ("features", "prototypes", "bias", "temperature")
        variances = None if c.variances is None else c.variances.to(dtype)
        z = formulas.logits(Logits(**fields | dict(zip(names, leaves, strict=True)) | {"variances": variances}), dtype)
        (z.where(z.isfinite(), 0) * weight.to(dtype)).sum().backward()
        results.append((z.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)))
    p = Logits(**fields)
    got = cpu.logits_forward(p), *cpu.logits_backward(weight, p, ALL._replace(bias=c.bias is not None))
    for g, e, t in list(zip(got, *results, strict=True))[:4]:
        if t is not None:
            finite = t.isfinite()
            assert (g[~finite] == t[~finite]).all()
            assert_as_accurate(g[finite], e[finite], t[finite])
    assert abs(got[4] - results[1][4]) <= 1e-5 * weight.abs().sum() / temperature**2
