"""What prototype_contrastive_loss may have beyond labels and shared prototypes, in CUDA C++, run by the emulator, against float64.

Each option alone and all that go together; classes in one block of shared memory and in several; logits saved and formed again.
"""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import build, emulated
from torch import Tensor

import spcl_fast as sf
from spcl_fast import backends
from spcl_fast.backends.contract import Contrast, Wanted
from spcl_fast.backends.labels import BAD_PROBABILITY, label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
OP = "prototype_contrastive_loss"
NO_BAD_LABEL = torch.iinfo(torch.int64).min
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALL = Wanted(features=True, prototypes=True, bias=True, temperature=True)


@pytest.fixture(scope="module")
def built():
    return emulated.Backend(OP)


@pytest.fixture
def cuda(built, monkeypatch):
    """The emulated kernels; what torch.empty_like hands out is full of NaN."""
    real = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda *a, **k: t.fill_(torch.nan) if (t := real(*a, **k)).is_floating_point() else t
    )
    label_flag(torch.device("cpu")).fill_(NO_BAD_LABEL)
    with built.taken():
        yield backends.module("cuda")
    label_flag(torch.device("cpu")).fill_(NO_BAD_LABEL)


def problem(shape=(2, 33, 5, 9), num_classes=5, dtype=torch.float32, seed=0, ignored=0.2, **options) -> Contrast:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator).to(dtype)
    labels = torch.randint(0, num_classes, (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = -100
    prototypes = F.normalize(torch.randn(num_classes, shape[1], generator=generator), dim=1)
    plain = Contrast(features, labels, prototypes, None, None, None, 0.2, True, -100, "mean")
    return plain._replace(
        **{name: made(plain, generator) if callable(made) else made for name, made in options.items()}
    )


# How an option's tensors are made for a problem.
def weights(c: Contrast, generator) -> Tensor:
    return 0.5 + torch.rand(c.num_classes, generator=generator)


def shared_bias(c: Contrast, generator) -> Tensor:
    return torch.randn(c.num_classes, generator=generator)


def image_bias(c: Contrast, generator) -> Tensor:
    return torch.randn(len(c.features), c.num_classes, generator=generator)


def image_prototypes(c: Contrast, generator) -> Tensor:
    return F.normalize(torch.randn(len(c.features), *c.prototypes.shape, generator=generator), dim=2)


def probabilities(c: Contrast, generator) -> Tensor:
    """Some pixels certain, some without any."""
    b, _, h, w = c.features.shape
    soft = torch.randn(b, c.num_classes, h, w, generator=generator).mul(3).softmax(1)
    certain = F.one_hot(soft.argmax(1), c.num_classes).movedim(3, 1).float()
    kind = torch.rand(b, 1, h, w, generator=generator)
    return soft.where(kind < 0.6, certain).where(kind < 0.8, 0)


def pixel_weights(c: Contrast, generator) -> Tensor:
    return torch.rand(len(c.features), *c.features.shape[2:], generator=generator)


OPTIONS = {
    "bias": {"bias": shared_bias},
    "bias per image": {"bias": image_bias},
    "prototypes per image": {"prototypes": image_prototypes},
    "prototypes and bias per image": {"prototypes": image_prototypes, "bias": image_bias},
    "temperature": {"temperature": torch.tensor(0.3)},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing and weights": {"label_smoothing": 0.1, "class_weight": weights},
    "denominator": {"denominator": torch.tensor(37.0)},
    "margin": {"margin": 0.35},
    "probabilities": {"labels": probabilities},
    "probabilities, smoothing and weights": {"labels": probabilities, "label_smoothing": 0.2, "class_weight": weights},
    "sigmoid": {"loss": "sigmoid"},
    "sigmoid of probabilities with weights": {"loss": "sigmoid", "labels": probabilities, "class_weight": weights, "bias": shared_bias},
    "all with labels": {
        "prototypes": image_prototypes, "bias": image_bias, "temperature": torch.tensor(0.15), "label_smoothing": 0.1, "margin": 0.2,
        "class_weight": weights, "pixel_weight": pixel_weights, "denominator": torch.tensor(11.0),
    },
}  # fmt: skip


def transcribed(
    c: Contrast, dtype: torch.dtype, wanted: tuple[bool, ...] = ALL, grad: Tensor | None = None
) -> list[Tensor]:
    """Contrast's formula in `dtype` by autograd: loss and gradients of features, prototypes, bias and temperature."""
    leaf = lambda t: t.detach().to(dtype).requires_grad_()  # noqa: E731
    features, prototypes = leaf(c.features), leaf(c.prototypes)
    bias = leaf(torch.zeros(c.num_classes) if c.bias is None else c.bias)
    temperature = leaf(torch.as_tensor(c.temperature))
    classes, (batch, dim, h, w) = c.num_classes, features.shape
    x = features.flatten(2).mT
    unit = F.normalize(x, dim=2) if c.normalize else x
    z = unit @ prototypes.expand(batch, classes, dim).mT / temperature + bias.expand(batch, classes)[:, None]
    if c.labels.is_floating_point():
        target = c.labels.to(dtype).flatten(2).mT
        labelled, label = target.sum(2) != 0, None
    else:
        labelled = c.labels.flatten(1) != c.ignore_index
        label = c.labels.flatten(1).where(labelled, 0)
        target = F.one_hot(label, classes).to(dtype)
        z = z - target * c.margin / temperature
    weight = torch.ones(classes, dtype=dtype) if c.class_weight is None else c.class_weight.to(dtype)
    wanted_of = target * (1 - c.label_smoothing) + c.label_smoothing / classes
    if c.loss == "sigmoid":
        nll = (weight * F.binary_cross_entropy_with_logits(z, wanted_of, reduction="none")).sum(2)
    else:
        nll = -(weight * wanted_of * F.log_softmax(z, dim=2)).sum(2)
    nll = torch.where(labelled, nll, 0)
    counted = labelled.to(dtype)
    if label is not None and c.loss == "softmax":
        counted = counted * weight[label]
    if c.pixel_weight is not None:
        nll = nll * c.pixel_weight.flatten(1).to(dtype)
    if c.reduction == "none":
        loss = nll.view(batch, h, w)
    elif c.reduction == "sum":
        loss = nll.sum()
    else:
        loss = nll.sum() / (counted.sum() if c.denominator is None else c.denominator.to(dtype))
    loss.backward(torch.ones_like(loss) if grad is None else grad.to(dtype))
    return [loss.detach(), *(t.grad for t in (features, prototypes, bias, temperature))]


def run(cuda, c: Contrast, wanted: Wanted = ALL, grad: Tensor | None = None) -> list[Tensor]:
    if c.bias is None:
        wanted = wanted._replace(bias=False)
    loss, saved = cuda.contrast_forward(c, wanted)
    grad = torch.ones_like(loss) if grad is None else grad
    return [loss, *cuda.contrast_backward(grad, c, saved, wanted)]


def check(cuda, c: Contrast, grad: Tensor | None = None) -> None:
    """At most twice the error of the same formula in the features' dtype; what the kernels form in float32 has a few eps of that one."""
    got = run(cuda, c, grad=grad)
    eager, truth = transcribed(c, c.features.dtype, grad=grad), transcribed(c, torch.float64, grad=grad)
    for name, g, e, t in zip(("loss", *ALL._fields), got, eager, truth, strict=True):
        if name == "bias" and c.bias is None:
            continue
        slack = 4 * torch.finfo(c.features.dtype).eps / torch.finfo(g.dtype).eps
        try:
            oracle.assert_as_accurate(g, e, t, slack=slack)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_value_and_gradients_as_the_formula_says(cuda, name, dtype):
    check(cuda, problem(dtype=dtype, **OPTIONS[name]))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["all with labels", "probabilities, smoothing and weights", "sigmoid"])
def test_options_with_every_reduction(cuda, name, reduction):
    c = problem(**OPTIONS[name] | {"reduction": reduction, "denominator": None})
    check(cuda, c, torch.rand(2, 5, 9) if reduction == "none" else torch.tensor(3.0))


def error_at_large_logits(cuda) -> float:
    """Of the prototypes' gradient, relative; the logits are 65536 + k exactly, and float32 cannot hold their logsumexp."""
    k = torch.arange(5)
    features, labels = torch.full((1, 1, 1, 5), 65536.0), k.view(1, 1, 5)
    prototypes = (1 + k / 65536)[:, None]
    c = Contrast(features, labels, prototypes, None, None, None, 1.0, False, -100, "sum", bias=torch.zeros(5))
    got, truth = run(cuda, c)[2].double(), transcribed(c, torch.float64)[2]
    return ((got - truth).abs().max() / truth.abs().max()).item()


def test_logsumexp_of_large_logits_costs_the_gradient_no_accuracy(cuda):
    assert error_at_large_logits(cuda) < 1e-5


# ---- more classes than a block holds --------------------------------------------------------------------------------

MANY = [  # shape, classes: one block and a bit, whole blocks, several; channels in one slice and in two; logits saved
    ((2, 20, 3, 5), 241),
    ((1, 70, 5, 15), 480),
    ((1, 300, 2, 7), 512),
    ((1, 1204, 1, 9), 300),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "num_classes"), MANY)
def test_classes_come_in_blocks(cuda, shape, num_classes, dtype):
    check(cuda, problem(shape, num_classes, dtype))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_with_classes_in_blocks(cuda, name):
    check(cuda, problem((2, 37, 3, 5), 330, **OPTIONS[name]))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.05, 100.0])
def test_temperatures_and_features_as_they_are_with_classes_in_blocks(cuda, temperature, normalize):
    check(cuda, problem((1, 24, 3, 7), 400, temperature=temperature, normalize=normalize))


def test_65536_classes(cuda):
    c = problem((1, 4, 1, 6), 65536, ignored=0)
    labels = torch.tensor([0, 255, 256, 40000, 65534, 65535]).view(1, 1, 6)
    check(cuda, c._replace(labels=labels))


@pytest.mark.parametrize("name", ["bias", "probabilities, smoothing and weights", "all with labels"])
@pytest.mark.parametrize("num_classes", [5, 90, 200, 330])
def test_a_device_with_little_shared_memory(built, cuda, name, num_classes):
    """99 KB a block: the weights of 200 classes do not fit, and come in blocks, too."""
    built.handle.emulator_shared_limit(99 << 10)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            check(cuda, problem((1, 70, 5, 9), num_classes, dtype, **OPTIONS[name]))
            check(cuda, problem((1, 70, 5, 9), num_classes, dtype))
    finally:
        built.handle.emulator_shared_limit(227 << 10)


# ---- what must not happen -------------------------------------------------------------------------------------------

GENERAL = {"bias": shared_bias, "temperature": torch.tensor(0.3)}


@pytest.mark.parametrize("num_classes", [5, 330])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [GENERAL, {"labels": lambda c, _: torch.zeros(2, c.num_classes, 3, 5)}])
def test_nothing_labelled_is_zero_even_for_nan_features(cuda, options, reduction, num_classes):
    c = problem((2, 20, 3, 5), num_classes, ignored=1.0, **options)._replace(reduction=reduction)
    c.features.fill_(torch.nan)
    assert all(torch.all(t == 0) for t in run(cuda, c))


@pytest.mark.parametrize("num_classes", [5, 330])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_nan_features_spoil_labelled_pixels_alone(cuda, kind, num_classes):
    c = problem((2, 20, 3, 5), num_classes, **GENERAL | ({"labels": probabilities} if kind == "probabilities" else {}))
    unlabelled = c.labels.sum(1) == 0 if kind == "probabilities" else c.labels == c.ignore_index
    assert unlabelled.any()
    expected = run(cuda, c)
    c.features.copy_(torch.where(unlabelled[:, None], torch.nan, c.features))
    got = run(cuda, c)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    c.features[0, 3, 1, 1] = torch.nan
    c.labels[0, ..., 1, 1] = 1
    loss, dfeatures, *_ = run(cuda, c)
    assert loss.isnan() and dfeatures[0, :, 1, 1].isnan().all() and dfeatures[1].isfinite().all()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_classes", [5, 330])
def test_a_class_with_a_bias_of_minus_infinity_has_no_probability_and_costs_nothing(cuda, num_classes, loss):
    c = problem((2, 20, 3, 5), num_classes, loss=loss)
    c.labels[c.labels == 2] = 0
    masked = torch.zeros(num_classes).index_fill(0, torch.tensor([2]), -torch.inf)
    others = torch.arange(num_classes) != 2
    got = run(cuda, c._replace(bias=masked))
    without = c._replace(
        prototypes=c.prototypes[others], bias=masked[others], labels=torch.where(c.labels > 2, c.labels - 1, c.labels)
    )
    expected = run(cuda, without)
    torch.testing.assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[2][others], expected[2], rtol=1e-5, atol=1e-7)
    assert torch.all(got[2][2] == 0) and got[3][2] == 0


@pytest.mark.parametrize("num_classes", [5, 330])
def test_a_bad_label_makes_the_loss_nan_and_raises_the_flag(cuda, num_classes):
    c, flag = problem((2, 20, 3, 5), num_classes, **GENERAL), label_flag(torch.device("cpu"))
    c.labels[1, 2, 3] = num_classes
    loss, dfeatures, *_ = run(cuda, c)
    assert loss.isnan() and dfeatures[1, :, 2, 3].isnan().all() and flag == num_classes


@pytest.mark.parametrize("bad", [-0.1, torch.nan, torch.inf])
@pytest.mark.parametrize("num_classes", [5, 330])
def test_a_bad_probability_makes_the_loss_nan_and_raises_the_flag(cuda, num_classes, bad):
    c, flag = problem((2, 20, 3, 5), num_classes, labels=probabilities), label_flag(torch.device("cpu"))
    assert run(cuda, c)[0].isfinite() and flag == NO_BAD_LABEL
    c.labels[1, 3, 2, 3] = bad
    loss, dfeatures, *_ = run(cuda, c)
    assert loss.isnan() and dfeatures[1, :, 2, 3].isnan().all() and flag == BAD_PROBABILITY


def test_a_denominator_of_zero_is_loss_zero_and_gradient_zero(cuda):
    assert all(torch.all(t == 0) for t in run(cuda, problem(bias=shared_bias, denominator=torch.tensor(0.0))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [5, 330])
def test_rows_of_any_layout_and_probabilities_of_any_layout(cuda, num_classes, dtype):
    c = problem((2, 37, 3, 21), num_classes, dtype, **OPTIONS["sigmoid of probabilities with weights"])
    check(cuda, c._replace(loss="softmax"))
    last = torch.channels_last
    mixed = c._replace(
        features=c.features.contiguous(memory_format=last), labels=c.labels.contiguous(memory_format=last)
    )
    check(cuda, mixed._replace(labels=mixed.labels.half()))


@pytest.mark.parametrize("name", ["all with labels", "probabilities, smoothing and weights"])
@pytest.mark.parametrize("num_classes", [19, 330])
def test_same_bits_whatever_the_order_of_threads_and_blocks(built, cuda, name, num_classes):
    c, results = problem((2, 70, 9, 9), num_classes, **OPTIONS[name]), []
    for order in build.ORDERS:
        with built.taken(order):
            results.append(run(cuda, c))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_an_empty_batch_has_no_loss_and_gradients_of_zero(cuda):
    c = problem((0, 20, 3, 5), bias=shared_bias)
    loss, dfeatures, dprototypes, dbias, dtemperature = run(cuda, c)
    assert loss == 0 and dfeatures.shape == c.features.shape and not dprototypes.any() and not dbias.any()
    assert dtemperature == 0


@pytest.mark.parametrize("alone", ALL._fields)
@pytest.mark.parametrize("num_classes", [5, 330])
def test_a_gradient_alone_is_the_same_as_with_the_others(cuda, alone, num_classes):
    c = problem((2, 70, 5, 9), num_classes, **OPTIONS["all with labels"])
    index = 1 + ALL._fields.index(alone)
    got = run(cuda, c, Wanted(**{alone: True}))
    assert torch.equal(got[index], run(cuda, c)[index])
    assert all(t.numel() == 0 for i, t in enumerate(got) if i not in (0, index))


# ---- through the public op ------------------------------------------------------------------------------------------


def public(c: Contrast, compiled: bool = False) -> list[Tensor]:
    leaves = [c.features, c.prototypes, c.bias, c.temperature]
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in leaves]
    names = (
        "class_weight",
        "pixel_weight",
        "normalize",
        "ignore_index",
        "reduction",
        "label_smoothing",
        "margin",
        "loss",
    )
    settings = {name: getattr(c, name) for name in names} | {"backend": "cuda"}
    denominator = "labelled" if c.denominator is None else c.denominator

    def loss(features, prototypes, bias, temperature):
        return sf.prototype_contrastive_loss(
            features, c.labels, prototypes, bias=bias, temperature=temperature, denominator=denominator, **settings
        )

    loss = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    value = loss(*leaves)
    given = [t for t in leaves if isinstance(t, Tensor)]
    return [value.detach(), *torch.autograd.grad(value, given)]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_public_op_gives_what_the_kernels_give(cuda, name):
    c = problem(**OPTIONS[name])
    given = [True, True, True, c.bias is not None, isinstance(c.temperature, Tensor)]
    expected = [t for t, wanted in zip(run(cuda, c), given, strict=True) if wanted]
    torch.testing.assert_close(public(c), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["all with labels", "probabilities, smoothing and weights"])
@pytest.mark.parametrize("num_classes", [5, 330])
def test_compiled_whole_and_the_same_bits(cuda, name, num_classes):
    c = problem((1, 20, 3, 5), num_classes, **OPTIONS[name])
    assert all(torch.equal(a, b) for a, b in zip(public(c), public(c, compiled=True), strict=True))
