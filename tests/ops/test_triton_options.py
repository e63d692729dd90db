"""Every option of prototype_contrastive_loss in the Triton kernels, value and all gradients, against the formula in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F

from spcl_fast.backends.contract import Contrast, Saved, Teacher, Wanted
from spcl_fast.backends.labels import label_flag

pytest.importorskip("triton", reason="Triton is not installed")
kernels = pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")
from spcl_fast.kernels.prototype_contrastive_loss import contrast as launched  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on infinities that some tests put in

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if DEVICE.type == "cpu" and (trouble := kernels.interpreter_trouble()):
    pytest.skip(trouble, allow_module_level=True)
BAD = 7  # stands for the flag of a bad probability
ALL = Wanted(True, True, True, True)
# K in one block and in several; logits saved and computed again; float16: the resident tile
SIZES = [((2, 33, 3, 7), 5), ((1, 20, 3, 7), 40)]


def problem(shape, num_classes, dtype=torch.float32, **options) -> Contrast:
    generator = torch.Generator().manual_seed(0)
    batch, dim, height, width = shape
    rand = lambda *size: torch.rand(size, generator=generator)  # noqa: E731
    randn = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    features = randn(*shape).to(dtype)
    labels = torch.randint(0, num_classes, (batch, height, width), generator=generator)
    labels[rand(*labels.shape) < 0.2] = 255
    prototypes = F.normalize(randn(num_classes, dim), dim=1)
    if options.pop("per_image", False):
        prototypes = F.normalize(randn(batch, num_classes, dim), dim=2)
    classes = num_classes
    if (owner := options.pop("rows_of", None)) is not None:
        options |= {"prototype_class": torch.tensor(owner).repeat(-(-num_classes // len(owner)))[:num_classes]}
        classes = max(owner) + 1
        labels[labels != 255] %= classes
        options["classes"] = classes
    if options.pop("bias", False):
        options["bias"] = randn(*prototypes.shape[:-1])
    if options.pop("image_bias", False):
        options["bias"] = randn(batch, num_classes)
    variances = rand(*prototypes.shape) if options.pop("variances", False) else None
    if options.pop("probabilities", False):
        labels = (4 * randn(batch, num_classes, width, height)).softmax(1).mT  # any strides
        labels[:, :, 0, 1] = 0  # counts as unlabelled
    if options.pop("teacher", False):
        teacher = randn(batch, 12, height, width).to(dtype), F.normalize(randn(num_classes, 12), dim=1)
        u = -torch.einsum("kd,bdp->bkp", teacher[1], teacher[0].float().flatten(2)).div(0.5).logsumexp(1)
        labels = Teacher(teacher[0], teacher[1], 0.5, u, 0.1 * randn(num_classes))
    weights = options.pop("weights", True)
    class_weight = rand(classes) + 0.1 if weights else None
    pixel_weight = rand(batch, height, width) if weights else None
    temperature = options.pop("temperature", 0.3)
    settings = {"normalize": True, "reduction": "mean"} | options
    made = Contrast(
        features, labels, prototypes, class_weight, pixel_weight, variances, temperature, ignore_index=255, **settings
    )
    return moved(made)


def moved(struct):
    """The struct with its tensors, and those of its teacher, on the device under test."""
    parts = (moved(part) if isinstance(part, Teacher) else part for part in struct)
    return type(struct)(*(part.to(DEVICE) if isinstance(part, torch.Tensor) else part for part in parts))


def formula(c: Contrast, dtype=torch.float64):
    """The docstring of `Contrast`, word by word; -> loss and the leaves it is differentiable in."""
    wide = lambda t: None if t is None else t.detach().cpu().to(dtype)  # noqa: E731
    x, p, b, v = wide(c.features).requires_grad_(), wide(c.prototypes).requires_grad_(), wide(c.bias), wide(c.variances)
    tau = torch.as_tensor(c.temperature).detach().cpu().to(dtype).requires_grad_()
    if b is not None:
        b.requires_grad_()
    rows = x.flatten(2).mT  # [B, P, D]
    unit = F.normalize(rows, dim=2) if c.normalize else rows
    linear = unit @ p.mT / tau
    s = linear
    if v is not None:
        s = s + 0.5 * unit.square() @ v.mT / tau**2
    extra = 0 if b is None else (b[:, None] if b.dim() == 2 else b)
    s, linear = s + extra, linear + extra
    if c.prototype_class is not None:
        owner = c.prototype_class.cpu()
        pooled = [s[..., owner == k] for k in range(c.num_classes)]
        z = torch.stack([part.logsumexp(2) if c.pool == "logsumexp" else part.amax(2) for part in pooled], 2)
    else:
        z = s
    num_classes = z.shape[2]
    w = torch.ones(num_classes, dtype=dtype) if c.class_weight is None else wide(c.class_weight)
    if isinstance(c.labels, Teacher):
        teacher = c.labels
        f = wide(teacher.features).flatten(2).mT @ wide(teacher.prototypes).mT / teacher.temperature
        t = (f + wide(teacher.u)[:, :, None] + wide(teacher.v)).exp()
        labelled = torch.ones(t.shape[:2], dtype=torch.bool)
    elif c.labels.is_floating_point():
        t = wide(c.labels).flatten(2).mT
        labelled = t.sum(2) != 0
    else:
        labels = oracle.resized(c.labels.cpu(), *c.features.shape[2:]).flatten(1)
        labelled = labels != c.ignore_index
        t = F.one_hot(labels.where(labelled, 0), num_classes).to(dtype)
        z = z - t * c.margin / tau
        linear = linear - t * c.margin / tau if c.prototype_class is None else None
    q = w * ((1 - c.label_smoothing) * t + c.label_smoothing / num_classes)
    hard = isinstance(c.labels, torch.Tensor) and not c.labels.is_floating_point()
    counted = labelled.to(dtype)
    if c.loss == "sigmoid":
        loss = (w * F.softplus(z) - q * z).sum(2)
    else:
        loss = -(q * z.log_softmax(2)).sum(2)
        if not c.positive_variance and v is not None:
            loss = (t * w).sum(2) * (z.logsumexp(2) - (t * linear).sum(2))
        if hard:
            counted = (t * w).sum(2) * labelled
    loss = loss.where(labelled, 0)
    if c.pixel_weight is not None:
        loss = loss * wide(c.pixel_weight).flatten(1)
    if c.reduction == "none":
        loss = loss.view(c.pixel_weight.shape)
    else:
        loss = loss.sum()
        if c.reduction == "mean":
            loss = loss / (counted.sum() if c.denominator is None else wide(c.denominator))
    return loss, [x, p, b, tau]


def differentiated(loss, leaves, weight):
    total = loss if loss.dim() == 0 else (loss * weight.to(loss)).sum()
    grads = torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])
    grads = iter(grads)
    return [loss.detach(), *(None if leaf is None else next(grads) for leaf in leaves)]


def of_kernels(c: Contrast, weight, wanted=ALL):
    flag = label_flag(DEVICE)
    wanted = wanted._replace(bias=wanted.bias and c.bias is not None)
    loss, *saved = launched.contrast_forward(c, wanted, flag, BAD)
    saved = Saved(*saved, dfeatures=c.features.new_empty(0))
    grad = torch.ones((), device=DEVICE) if loss.dim() == 0 else weight
    return [loss, *launched.contrast_backward(grad, c, saved, wanted, flag, BAD)]


def check(c: Contrast, slack=4.0):
    """At most twice the error of the same formula run eagerly in the features' dtype."""
    weight = torch.randn(c.features.shape[0], *c.features.shape[2:], generator=torch.Generator().manual_seed(3))
    got = of_kernels(c, weight.to(DEVICE))
    truth = differentiated(*formula(c), weight)
    eager = differentiated(*formula(c, c.features.dtype), weight)
    for name, g, e, t in zip(("loss", "features", "prototypes", "bias", "temperature"), got, eager, truth, strict=True):
        if t is not None:
            # what is not in the features' dtype (loss, dprototypes) still carries half-float products
            wide = slack * torch.finfo(c.features.dtype).eps / torch.finfo(g.dtype).eps
            if name == "temperature":
                wide *= 8  # one sum over everything, whose terms cancel: its own size is not the scale of its rounding
            try:
                oracle.assert_as_accurate(g.cpu(), e, t, slack=wide)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


OPTIONS = {
    "bias": {"bias": True},
    "image_bias": {"image_bias": True},
    "per_image_prototypes": {"per_image": True},
    "per_image_prototypes_and_bias": {"per_image": True, "bias": True},
    "tensor_temperature": {"temperature": torch.tensor(0.4)},
    "denominator": {"denominator": torch.tensor(17.0)},
    "margin": {"margin": 0.2},
    "margin_and_tensor_temperature": {"margin": 0.2, "temperature": torch.tensor(0.4)},
    "variances": {"variances": True},
    "variances_and_bias": {"variances": True, "bias": True, "temperature": torch.tensor(0.5)},
    "per_image_variances": {"variances": True, "per_image": True},
    "no_positive_variance": {"variances": True, "positive_variance": False},
    "no_positive_variance_with_margin": {"variances": True, "positive_variance": False, "margin": 0.1},
    "label_smoothing": {"label_smoothing": 0.1},
    "label_smoothing_and_margin": {"label_smoothing": 0.1, "margin": 0.2},
    "label_smoothing_without_weights": {"label_smoothing": 0.1, "weights": False},
    "sigmoid": {"loss": "sigmoid"},
    "sigmoid_with_bias_and_smoothing": {"loss": "sigmoid", "bias": True, "label_smoothing": 0.2},
    "probabilities": {"probabilities": True},
    "probabilities_with_smoothing": {"probabilities": True, "label_smoothing": 0.1, "bias": True},
    "probabilities_and_sigmoid": {"probabilities": True, "loss": "sigmoid"},
    "probabilities_with_variances": {"probabilities": True, "variances": True},
    "teacher": {"teacher": True},
    "teacher_with_weights_and_bias": {"teacher": True, "bias": True},
    "rows_logsumexp": {"rows_of": [0, 2, 1, 0]},
    "rows_max": {"rows_of": [0, 2, 1, 0], "pool": "max"},
    "rows_max_with_variances_and_bias": {"rows_of": [1, 0, 2], "pool": "max", "variances": True, "bias": True},
    "rows_logsumexp_with_smoothing": {"rows_of": [1, 0, 2], "label_smoothing": 0.1, "per_image": True},
    "rows_and_sigmoid": {"rows_of": [1, 0, 2], "loss": "sigmoid"},
}


@pytest.mark.parametrize(("shape", "num_classes"), SIZES, ids=["few_classes", "many_classes"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_value_and_every_gradient_are_as_accurate_as_eager(options, shape, num_classes):
    check(problem(shape, num_classes, **options))


@pytest.mark.parametrize(("reduction", "normalize"), [("mean", False), ("sum", True), ("none", False)])
@pytest.mark.parametrize("name", ["bias", "label_smoothing", "probabilities", "variances", "rows_max", "sigmoid"])
def test_reductions_and_raw_features(name, reduction, normalize):
    check(problem((2, 20, 3, 5), 7, reduction=reduction, normalize=normalize, **OPTIONS[name]))


# one of each kind of kernel: resident, tile, split, target, pool
@pytest.mark.parametrize(
    "name",
    [
        "bias",
        "per_image_prototypes",
        "variances",
        "no_positive_variance",
        "label_smoothing",
        "teacher",
        "sigmoid",
        "rows_max",
    ],
)
def test_half_floats(name):
    check(problem((2, 40, 3, 5), 36, torch.float16, **OPTIONS[name]))


@pytest.mark.parametrize("name", ["per_image_prototypes_and_bias", "variances_and_bias", "probabilities", "rows_max"])
def test_any_layout_is_read(name):
    c = problem((2, 20, 3, 5), 7, **OPTIONS[name])
    expected = of_kernels(c, None)
    for layout in ("channels_last", "sliced", "transposed"):
        features, labels = oracle.laid_out(c.features, c.labels, layout)
        for got, want in zip(of_kernels(c._replace(features=features, labels=labels), None), expected, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "name", ["bias", "label_smoothing", "sigmoid", "probabilities", "variances", "rows_logsumexp", "rows_max"]
)
def test_a_pixel_without_a_target_may_hold_anything_and_has_gradient_zero(name):
    c = problem((1, 20, 3, 5), 7, **OPTIONS[name])
    if c.labels.is_floating_point():
        c.labels[:, :, 1, 2] = 0
    else:
        c.labels[:, 1, 2] = 255
    c.features[:, 3, 1, 2] = torch.nan
    loss, dfeatures, *rest = of_kernels(c, None)
    assert loss.isfinite() and all(part.isfinite().all() for part in rest)
    assert torch.all(dfeatures[:, :, 1, 2] == 0) and dfeatures.isfinite().all()


def test_classes_with_a_bias_of_minus_infinity_are_left_out():
    """A whole first block of them, too: the maximum so far is -inf then."""
    c = problem((1, 20, 3, 5), 40, bias=True)
    c.labels[c.labels != 255] = 35
    c.bias[:33] = -torch.inf
    loss, dfeatures, dprototypes, dbias, dtemperature = of_kernels(c, None)
    few = c._replace(prototypes=c.prototypes[33:], bias=c.bias[33:], class_weight=c.class_weight[33:])
    few = few._replace(labels=torch.where(c.labels == 255, 255, 2))
    truth = differentiated(*formula(few), None)
    torch.testing.assert_close(loss.double().cpu(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dfeatures.double().cpu(), truth[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(dprototypes[33:].double().cpu(), truth[2], rtol=1e-4, atol=1e-7)
    assert torch.all(dprototypes[:33] == 0) and torch.all(dbias[:33] == 0) and dtemperature.isfinite()


@pytest.mark.parametrize("bad", [-0.25, torch.nan, torch.inf])
def test_a_bad_probability_raises_the_flag_and_poisons_the_loss(bad):
    c = problem((1, 20, 3, 5), 7, probabilities=True)
    flag = label_flag(DEVICE)
    flag.fill_(torch.iinfo(torch.int64).min)
    assert of_kernels(c, None)[0].isfinite() and flag == torch.iinfo(torch.int64).min
    c.labels[0, 2, 1, 3] = bad
    loss, dfeatures, *_ = of_kernels(c, None)
    assert loss.isnan() and dfeatures[0, :, 1, 3].isnan().all() and flag == BAD
    flag.fill_(torch.iinfo(torch.int64).min)


def test_the_lowest_of_equal_rows_takes_the_gradient_of_max():
    c = problem((1, 20, 3, 5), 6, rows_of=[0, 1, 0], pool="max")
    c.prototypes[2] = c.prototypes[0]
    c.prototypes[3] = c.prototypes[0]
    c.prototypes[5] = c.prototypes[0]
    dprototypes = of_kernels(c, None)[2]
    assert dprototypes[0].abs().max() > 0 and torch.all(dprototypes[[2, 3, 5]] == 0)


@pytest.mark.parametrize(
    "wanted", [Wanted(features=True), Wanted(prototypes=True), Wanted(bias=True), Wanted(temperature=True)]
)
def test_a_gradient_alone_is_what_it_is_among_all(wanted):
    c = problem((2, 20, 3, 5), 7, bias=True)
    alone, among = of_kernels(c, None, wanted)[1:], of_kernels(c, None)[1:]
    for part, whole, asked in zip(alone, among, wanted, strict=True):
        assert torch.equal(part, whole) if asked else part.numel() == 0
