"""prototype_contrastive_loss and class_moments in Triton: on the GPU, or in Triton's interpreter, against the float64 oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from problems import check_ops

import spcl_fast as sf
from spcl_fast import backends
from spcl_fast.backends.contract import Ask, Contrast, Wanted
from spcl_fast.backends.labels import label_flag

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

kernels = pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")
from spcl_fast.kernels.operands import Labels, Size  # noqa: E402
from spcl_fast.kernels.pixels import read_class  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on the NaN that some tests put in

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if DEVICE.type == "cpu" and (trouble := kernels.interpreter_trouble()):
    pytest.skip(trouble, allow_module_level=True)
DTYPES = [torch.float32, torch.float16] + (
    [torch.bfloat16] if DEVICE.type == "cuda" else []
)  # the interpreter multiplies bfloat16 wrongly


def problem(shape=(2, 33, 5, 9), num_classes=5, size=(11, 13), dtype=torch.float32, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    labels = torch.randint(0, num_classes, (shape[0], *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 100_000 if num_classes > 255 else 255
    prototypes = torch.nn.functional.normalize(torch.randn(num_classes, shape[1], generator=generator), dim=1)
    return features, labels.to(DEVICE), prototypes.to(DEVICE)


@triton.jit
def classes_kernel(labels, out_ptr, first, size, N: tl.constexpr):
    n = first + tl.arange(0, N)
    cls, _ = read_class(labels, 1, n, n >= 0, size)
    tl.store(out_ptr + tl.arange(0, N), cls)


def value_and_gradients(function, features, labels, prototypes, weight=None, **settings):
    features = features.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    prototypes = prototypes.detach().clone().requires_grad_()
    loss = function(features, labels, prototypes, **settings)
    (loss if weight is None else (loss * weight).sum()).backward()
    return loss.detach(), features.grad, prototypes.grad


def check(features, labels, prototypes, weight=None, **settings):
    """At most twice the error of the same formula run eagerly in the features' dtype."""
    ignore = {"ignore_index": settings.pop("ignore_index", 255)}
    got = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels, prototypes, weight, backend="triton", **settings, **ignore
    )
    on_cpu = [t.cpu() if isinstance(t, torch.Tensor) else t for t in (features, labels, prototypes, weight)]
    settings = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in settings.items()} | ignore
    eager = value_and_gradients(oracle.contrast, *on_cpu, dtype=features.dtype, **settings)
    on_cpu[0], on_cpu[2] = on_cpu[0].double(), on_cpu[2].double()
    truth = value_and_gradients(oracle.contrast, *on_cpu, **settings)
    for g, e, t in zip(got, eager, truth, strict=True):
        # what is not in the features' dtype (loss, dprototypes) still carries half-float products
        slack = 4 * torch.finfo(features.dtype).eps / torch.finfo(g.dtype).eps
        oracle.assert_as_accurate(g.cpu(), e, t, slack=slack)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients_are_as_accurate_as_eager(dtype, temperature):
    check(*problem(dtype=dtype), temperature=temperature)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_classes", [19, 40])
def test_large_logits_cost_no_accuracy(num_classes, normalize):
    """Neither features nor prototypes of unit length, and a low temperature: logsumexp is near 100, and its last bit 8e-6."""
    features, labels, prototypes = problem((1, 64, 5, 9), num_classes, (5, 9), ignored=0)
    check(features, labels, prototypes * 4, temperature=0.05, normalize=normalize)


# D above and below the resident limit, K above and below one tile: every kernel form, with edges that no block size divides.
@pytest.mark.parametrize(
    ("shape", "num_classes", "dtype"),
    [
        ((1, 20, 5, 7), 40, torch.float32),  # logits computed again, K and D in steps
        ((1, 161, 3, 7), 40, torch.float32),  # logits saved, K in steps
        ((1, 7, 3, 11), 1, torch.float32),
        ((1, 40, 5, 7), 70, torch.float16),  # resident, K streamed
        ((2, 530, 1, 5), 3, torch.float16),  # too deep to stay resident: logits saved, K in one tile
    ],
)
def test_every_form_of_the_kernels(shape, num_classes, dtype):
    check(*problem(shape, num_classes, shape[2:], dtype), temperature=0.3)


def test_half_floats_with_both_dimensions_large(monkeypatch):
    monkeypatch.setattr("spcl_fast.kernels.prototype_contrastive_loss.problem.RESIDENT_DIM", 16)
    check(*problem((1, 40, 3, 7), 70, (3, 7), torch.float16), temperature=0.3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_enter_value_and_gradient_but_pixel_weight_not_the_denominator(reduction, normalize):
    features, labels, prototypes = problem()
    class_weight = torch.tensor([0.2, 1, 3, 0, 1.5], device=DEVICE)
    pixel_weight = torch.rand(2, 9, 5, device=DEVICE).transpose(1, 2)  # any strides
    weight = torch.randn(2, 5, 9, device=DEVICE) if reduction == "none" else None
    check(
        features, labels, prototypes, weight, temperature=0.3, reduction=reduction, normalize=normalize,
        class_weight=class_weight, pixel_weight=pixel_weight,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "rows", "misaligned"])
def test_any_layout_is_read_and_kept(layout, dtype):
    features, labels, prototypes = problem(size=(5, 9), dtype=dtype)
    expected = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels, prototypes, temperature=0.2, backend="triton"
    )
    features, labels = oracle.laid_out(features, labels, layout)
    features = features.detach().requires_grad_()
    loss = sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.2, backend="triton")
    (grad,) = torch.autograd.grad(loss, features)
    if layout in ("channels_last", "transposed"):
        assert grad.stride() == features.stride()
    if layout == "rows":
        grad = grad.view(2, 5, 9, 33).permute(0, 3, 1, 2)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad, expected[1])


@pytest.mark.parametrize(
    "dtype", [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
def test_labels_of_every_integer_dtype_are_read_in_place(dtype):
    features, labels, prototypes = problem((1, 5, 3, 5), size=(7, 4))
    labels = torch.where(labels == 255, 100, labels)
    expected = oracle.contrast(features.cpu(), labels.cpu(), prototypes.cpu(), temperature=0.5, ignore_index=100)
    got = sf.prototype_contrastive_loss(
        features, labels.to(dtype), prototypes, temperature=0.5, ignore_index=100, backend="triton"
    )
    torch.testing.assert_close(got.double().cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (3, 40), (113, 71)])
def test_labels_of_any_size_follow_the_nearest_rule(size):
    features, labels, prototypes = problem((1, 4, 7, 9), size=size)
    got = sf.prototype_contrastive_loss(
        features, labels, prototypes, temperature=1.0, reduction="none", backend="triton"
    )
    expected = oracle.contrast(features.cpu(), labels.cpu(), prototypes.cpu(), temperature=1.0, reduction="none")
    torch.testing.assert_close(got.double().cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2**24 + 13])
def test_labels_of_the_features_own_grid_are_read_where_they_are_beyond_2_24(width):
    """float32 has no odd numbers there. The labels begin at pixel `first`: nothing large is allocated."""
    first, pixels = 2**24 - 3, 2**24 + 13
    labels = torch.arange(16, dtype=torch.uint8, device=DEVICE)
    classes = torch.empty(16, dtype=torch.int32, device=DEVICE)
    height = pixels // width
    own_grid = Labels(labels, label_flag(DEVICE), height, width, 1.0, 1.0, -first, 1, 1, 255)
    classes_kernel[(1,)](own_grid, classes, first, Size(pixels, width, 1, 19), 16)
    assert classes.tolist() == list(range(16))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero_not_nan_even_for_nan_features(reduction):
    features, labels, prototypes = problem((1, 20, 3, 5), size=(3, 5))
    features[:] = torch.nan
    loss, dfeatures, dprototypes = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels.fill_(255), prototypes, torch.ones((), device=DEVICE),
        temperature=0.1, reduction=reduction, backend="triton",
    )  # fmt: skip
    assert torch.all(loss == 0) and torch.all(dfeatures == 0) and torch.all(dprototypes == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_non_finite_and_zero_features(dtype):
    features, labels, prototypes = problem((2, 20, 3, 5), size=(3, 5), ignored=0, dtype=dtype)
    features[0, :, 0, 0] = 0
    labels[0, 1, 1] = 255
    features[0, 3, 1, 1] = torch.nan  # an ignored pixel may hold anything
    loss, grad, dprototypes = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels, prototypes, temperature=1.0, backend="triton"
    )
    assert loss.isfinite() and dprototypes.isfinite().all() and torch.all(grad[0, :, 1, 1] == 0)
    for bad in (torch.nan, torch.inf):
        features[1, 3, 2, 2] = bad
        assert sf.prototype_contrastive_loss(features, labels, prototypes, temperature=1.0, backend="triton").isnan()


@pytest.mark.parametrize(
    ("value", "dtype"), [(5, torch.uint8), (-1, torch.int8), (2**40 + 1, torch.int64), (-(2**40), torch.int64)]
)
def test_label_beyond_classes_never_indexes_memory_but_raises_the_flag(value, dtype):
    features, labels, prototypes = problem((1, 20, 3, 5), size=(3, 5))
    labels = labels.where(labels != 255, 100).to(dtype)
    flag = label_flag(DEVICE)
    flag.fill_(torch.iinfo(torch.int64).min)
    settings = {
        "temperature": 1.0,
        "ignore_index": 100,
        "backend": "triton",
        "class_weight": torch.ones(5, device=DEVICE),
    }
    assert sf.prototype_contrastive_loss(features, labels, prototypes, **settings).isfinite()
    assert flag == torch.iinfo(torch.int64).min
    labels[0, 1, 2] = value
    loss, grad, _ = value_and_gradients(sf.prototype_contrastive_loss, features, labels, prototypes, **settings)
    assert loss.isnan() and grad[0, :, 1, 2].isnan().all() and flag == value
    assert torch.all(grad[(labels == 100)[:, None].expand_as(grad)] == 0)
    flag.fill_(torch.iinfo(torch.int64).min)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_element_of_every_output_is_written(dtype, monkeypatch):
    """torch.empty hands out NaN: an element a kernel forgets stays NaN."""
    real_empty, real_like, real_new = torch.empty, torch.empty_like, torch.Tensor.new_empty
    poison = lambda t: t.fill_(torch.nan) if t.is_floating_point() else t.fill_(77)  # noqa: E731
    features, labels, prototypes = problem((2, 33, 3, 5), size=(3, 5), dtype=dtype)
    expected = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels, prototypes, temperature=0.2, backend="triton"
    )
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(real_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(real_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(real_new(*a, **k)))
    got = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels, prototypes, temperature=0.2, backend="triton"
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_float16_gradients_survive_the_loss_scale():
    """At temperature 100 they are near 1e-10 before the incoming gradient: nothing may be rounded to float16 before it."""
    features, labels, prototypes = problem(dtype=torch.float16)
    weight = torch.full((), 2.0**24, device=DEVICE)
    _, grad, dprototypes = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels, prototypes, weight, temperature=100.0, backend="triton"
    )
    truth = value_and_gradients(
        oracle.contrast,
        features.double().cpu(),
        labels.cpu(),
        prototypes.double().cpu(),
        weight.double().cpu(),
        temperature=100.0,
    )
    for got, expected in ((grad, truth[1]), (dprototypes, truth[2])):
        assert (got.double().cpu() - expected).norm() < 3e-3 * expected.norm()
    tiny = value_and_gradients(
        sf.prototype_contrastive_loss,
        features,
        labels,
        prototypes,
        weight * 2.0**-60,
        temperature=1.0,
        backend="triton",
    )
    assert tiny[2].abs().max() > 0  # dprototypes are float32: far below float16's smallest number they are still there


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (1, 8, 1, 1)])
def test_empty_batch_and_single_pixel(shape):
    features, labels, prototypes = problem(shape, size=shape[2:], ignored=0)
    loss, dfeatures, dprototypes = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels, prototypes, temperature=1.0, backend="triton"
    )
    assert loss.isfinite() and dfeatures.shape == shape and dprototypes.isfinite().all() and (shape[0] > 0 or loss == 0)


def test_forward_here_and_backward_elsewhere_fit_together():
    """One contract: saves of one backend are read by the other, so a wrong half can be found by exchange."""
    features, labels, prototypes = problem((1, 20, 3, 5), size=(3, 5))
    reference, here = backends.module("reference"), backends.module("triton")
    contrast, wanted = (
        Contrast(features, labels, prototypes, None, None, None, 0.2, True, 255, "mean"),
        Wanted(True, True),
    )
    grads = []
    for first, second in ((here, reference), (reference, here), (reference, reference)):
        _, saved = first.contrast_forward(contrast, wanted)
        grads.append(second.contrast_backward(torch.ones((), device=DEVICE), contrast, saved, wanted)[:2])
    for pair in grads[:2]:
        for got, expected in zip(pair, grads[2], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compile_and_opcheck(dtype):
    features, labels, prototypes = problem((1, 20, 3, 5), size=(3, 5), dtype=dtype)
    leaf = features.clone().requires_grad_()
    check_ops(
        lambda: sf.prototype_contrastive_loss(leaf, labels, prototypes, temperature=0.1, backend="triton").backward(),
        "test_schema", "test_faketensor", "test_autograd_registration",
    )  # fmt: skip

    def loss(features, labels, prototypes):
        return sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.1, backend="triton")

    eager = value_and_gradients(loss, features, labels, prototypes)
    compiled = value_and_gradients(
        torch.compile(loss, fullgraph=True, backend="aot_eager"), features, labels, prototypes
    )
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_what_the_kernels_cannot_do_is_said_in_words():
    ask, why_not = Ask("class_moments", DEVICE, torch.float32, 5, 16), backends.module("triton").why_not
    contrast = ask._replace(op="prototype_contrastive_loss")
    assert why_not(contrast) is None
    assert "float64" in why_not(ask._replace(dtype=torch.float64))
    assert "`unheard_of`" in why_not(contrast._replace(needs=frozenset({"unheard_of"})))
    assert "meta" in why_not(ask._replace(device=torch.device("meta")))
    if DEVICE.type == "cpu":
        assert "bfloat16" in why_not(ask._replace(dtype=torch.bfloat16))
