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

from spcl_fast import backends
from spcl_fast.backends.contract import Ask, Contrast, Wanted
from spcl_fast.backends.labels import label_flag

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


def variances(c: Contrast, generator) -> Tensor:
    return torch.rand(c.prototypes.shape, generator=generator)


def image_variances(c: Contrast, generator) -> Tensor:
    return torch.rand(len(c.features), *c.prototypes.shape, generator=generator)


OPTIONS = {
    "variances": {"variances": variances},
    "variances, not of the label": {"variances": variances, "positive_variance": False, "class_weight": weights},
    "variances with the rest": {
        "prototypes": image_prototypes, "variances": image_variances, "bias": shared_bias, "temperature": torch.tensor(0.4),
        "label_smoothing": 0.1, "margin": 0.1,
    },
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
    square = torch.zeros_like(z)
    if c.variances is not None:
        square = unit.square() @ c.variances.to(dtype).expand(batch, classes, dim).mT / (2 * temperature**2)
        z = z + square
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
        nll = nll if c.positive_variance else nll + (weight * target * square).sum(2)
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


def check(cuda, c: Contrast, grad: Tensor | None = None, *others: Contrast) -> None:
    """At most twice the error of the same formula in the features' dtype; what the kernels form in float32 has a few eps of that one.

    others: more draws of the same kind. A temperature's gradient is one number, whose error in eager is luck: over several draws it is not.
    """
    temperatures: list[tuple[Tensor, ...]] = []
    for draw in (c, *others):
        got = run(cuda, draw, grad=grad)
        eager, truth = transcribed(draw, c.features.dtype, grad=grad), transcribed(draw, torch.float64, grad=grad)
        for name, *each in zip(("loss", *ALL._fields), got, eager, truth, strict=True):
            if name == "temperature":
                temperatures += [tuple(each)] * _is_offered(draw)
            elif name != "bias" or c.bias is not None:
                _check_one(c, name, *each)
    if temperatures:
        _check_one(c, "temperature", *(torch.stack(numbers) for numbers in zip(*temperatures, strict=True)))


def _is_offered(c: Contrast) -> bool:
    """Whether the backend takes the gradient of the temperature upon itself for such a problem."""
    needs = frozenset({"tensor_temperature", "dtemperature", *(("variances",) if c.variances is not None else ())})
    ask = Ask("prototype_contrastive_loss", torch.device("cpu"), torch.float32, c.num_classes, c.features.shape[1])
    return backends.module("cuda").why_not(ask._replace(needs=needs)) is None


def test_the_temperatures_gradient_with_variances_of_deep_features_is_refused_with_the_reason(cuda):
    ask = Ask("prototype_contrastive_loss", torch.device("cpu"), torch.float32, 19, 2048)
    why_not = backends.module("cuda").why_not
    assert why_not(ask._replace(needs=frozenset({"variances"}))) is None
    needs = frozenset({"variances", "tensor_temperature", "dtemperature"})
    assert "beyond 512 channels" in why_not(ask._replace(needs=needs))
    assert why_not(ask._replace(needs=needs, dim=512)) is None


def _check_one(c: Contrast, name: str, got: Tensor, eager: Tensor, truth: Tensor) -> None:
    slack = 4 * torch.finfo(c.features.dtype).eps / torch.finfo(got.dtype).eps
    try:
        oracle.assert_as_accurate(got, eager, truth, slack=slack)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_value_and_gradients_as_the_formula_says(cuda, name, dtype):
    if dtype == torch.float16 and "variances" in name:
        ask = Ask(OP, torch.device("cpu"), dtype, 5, 33, needs=frozenset({"variances"}))
        assert "no variances in float16" in cuda.why_not(ask)
        return
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "num_classes"), [((2, 37, 5, 13), 5), ((1, 37, 5, 13), 40), *MANY])
@pytest.mark.parametrize("name", ["variances", "variances, not of the label"])
def test_variances_of_any_number_of_classes_and_channels(cuda, name, shape, num_classes, dtype):
    draws = [problem(shape, num_classes, dtype, seed=seed, **OPTIONS[name]) for seed in range(3)]
    check(cuda, draws[0], None, *draws[1:])


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
