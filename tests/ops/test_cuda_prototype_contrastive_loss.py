"""prototype_contrastive_loss in CUDA C++: the kernels' own source, run by the emulator on the CPU, against the float64 oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from cuda_emulator import build, emulated
from problems import check_ops

import spcl_fast as sf
from spcl_fast import backends
from spcl_fast.backends.contract import Ask, Contrast, Wanted
from spcl_fast.backends.labels import label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
OP = "prototype_contrastive_loss"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NO_BAD_LABEL = torch.iinfo(torch.int64).min


@pytest.fixture(scope="module")
def built():
    return emulated.Backend(OP)


@pytest.fixture
def cuda(built):
    """backend="cuda" runs the emulated kernels; torch.empty_like hands out NaN, so that an element of dx that is forgotten stays NaN."""
    with built.taken():
        yield built


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    real = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda *a, **k: t.fill_(torch.nan) if (t := real(*a, **k)).is_floating_point() else t
    )


def problem(shape=(2, 33, 5, 9), num_classes=5, size=(11, 13), dtype=torch.float32, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator).to(dtype)
    labels = torch.randint(0, num_classes, (shape[0], *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    prototypes = torch.nn.functional.normalize(torch.randn(num_classes, shape[1], generator=generator), dim=1)
    return features, labels, prototypes


def value_and_gradients(function, features, labels, prototypes, weight=None, **settings):
    features = features.detach().requires_grad_()
    prototypes = prototypes.detach().requires_grad_()
    loss = function(features, labels, prototypes, **settings)
    return loss.detach(), *torch.autograd.grad(
        loss if weight is None else (loss * weight).sum(), (features, prototypes)
    )


def run(*inputs, **settings):
    return value_and_gradients(sf.prototype_contrastive_loss, *inputs, backend="cuda", **settings)


def check(features, labels, prototypes, weight=None, **settings):
    """At most twice the error of the same formula run eagerly in the features' dtype; what is not in that dtype still has its products."""
    got = run(features, labels, prototypes, weight, **settings)
    eager = value_and_gradients(oracle.contrast, features, labels, prototypes, weight, dtype=features.dtype, **settings)
    truth = value_and_gradients(oracle.contrast, features.double(), labels, prototypes.double(), weight, **settings)
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=4 * torch.finfo(features.dtype).eps / torch.finfo(g.dtype).eps)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients_are_as_accurate_as_eager(cuda, dtype, temperature):
    check(*problem(dtype=dtype), temperature=temperature)


# Whole tiles of 64 pixels and ragged ones, 16-byte rows, rows on words and rows in the middle of words; D at, below and beyond a chunk;
# each number of warps that share the classes and the channels out; logits saved and formed again.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_classes"),
    [
        ((1, 7, 3, 11), 1),
        ((2, 64, 8, 16), 2),
        ((1, 65, 9, 9), 19),
        ((2, 530, 5, 13), 19),
        ((1, 257, 3, 22), 21),
        ((1, 100, 8, 8), 33),
        ((1, 544, 1, 65), 70),
        ((1, 40, 5, 13), 150),
        ((1, 608, 2, 31), 150),
        ((1, 24, 3, 5), 240),
    ],
)
def test_every_way_of_cutting_the_problem(cuda, shape, num_classes, dtype):
    check(*problem(shape, num_classes, shape[2:], dtype), temperature=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_enter_value_and_gradient_but_pixel_weight_not_the_denominator(cuda, reduction, normalize, dtype):
    features, labels, prototypes = problem(dtype=dtype)
    class_weight = torch.tensor([0.2, 1, 3, 0, 1.5])
    pixel_weight = torch.rand(2, 9, 5).transpose(1, 2)  # any strides
    weight = torch.randn(2, 5, 9) if reduction == "none" else None
    check(
        features, labels, prototypes, weight, temperature=0.3, reduction=reduction, normalize=normalize,
        class_weight=class_weight, pixel_weight=pixel_weight,
    )  # fmt: skip


def test_expanded_gradient_of_a_map(cuda):
    features, labels, prototypes = problem()
    features.requires_grad_()
    loss = sf.prototype_contrastive_loss(
        features, labels, prototypes, temperature=0.3, reduction="none", backend="cuda"
    )
    (got,) = torch.autograd.grad(loss, features, torch.tensor(0.5).expand_as(loss))
    expected = (
        value_and_gradients(oracle.contrast, features.double(), labels, prototypes, temperature=0.3, reduction="sum")[1]
        / 2
    )
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "rows", "misaligned", "every other image"])
def test_any_layout_is_read_and_kept(cuda, layout, dtype):
    features, labels, prototypes = problem(size=(5, 9), dtype=dtype)
    expected = run(features, labels, prototypes, temperature=0.2)
    features, labels = oracle.laid_out(features, labels, layout)
    got = run(features, labels, prototypes, temperature=0.2)
    if layout in ("channels_last", "transposed"):
        assert got[1].stride() == features.stride()
    grad = got[1].view(2, 5, 9, 33).permute(0, 3, 1, 2) if layout == "rows" else got[1]
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(grad, expected[1])
    torch.testing.assert_close(got[2], expected[2], rtol=1e-4, atol=1e-6)  # other tiles: other sums


# Every input ends where its memory ends: what is read beyond is an error. Rows that begin in the middle of a word, too.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_classes"), [((2, 33, 5, 9), 5), ((1, 64, 8, 8), 19), ((1, 35, 3, 22), 40), ((1, 520, 1, 13), 3)]
)
def test_nothing_is_read_outside_of_the_tensors(cuda, shape, num_classes, dtype):
    memory = build.Guarded(cuda.handle)
    features, labels, prototypes = problem(shape, num_classes, (7, 3), dtype)
    expected = run(features, labels, prototypes, temperature=0.2)
    width = features.element_size()
    for layout in (torch.contiguous_format, torch.channels_last):
        guarded = memory.copy(features.contiguous(memory_format=layout), alignment=width)
        near = memory.copy(labels.to(torch.uint8), alignment=1), memory.copy(prototypes.to(dtype), alignment=width)
        got = run(guarded, *near, temperature=0.2)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(
                g, e.to(g.dtype)
            )  # the prototypes are of the features' dtype here, and so is their gradient
        del guarded, near, got
    memory.close()


@pytest.mark.parametrize(
    "dtype", [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
def test_labels_of_every_integer_dtype_are_read_in_place(cuda, dtype):
    features, labels, prototypes = problem((1, 5, 3, 5), size=(7, 4))
    labels = torch.where(labels == 255, 100, labels)
    expected = oracle.contrast(features, labels, prototypes, temperature=0.5, ignore_index=100)
    got = sf.prototype_contrastive_loss(
        features, labels.to(dtype), prototypes, temperature=0.5, ignore_index=100, backend="cuda"
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (3, 40), (113, 71)])
def test_labels_of_any_size_follow_the_nearest_rule(cuda, size):
    features, labels, prototypes = problem((1, 4, 7, 9), size=size)
    got = sf.prototype_contrastive_loss(features, labels, prototypes, temperature=1.0, reduction="none", backend="cuda")
    expected = oracle.contrast(features, labels, prototypes, temperature=1.0, reduction="none")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero_not_nan_even_for_nan_features(cuda, reduction, dtype):
    features, labels, prototypes = problem((1, 20, 3, 5), size=(3, 5), dtype=dtype)
    loss, dfeatures, dprototypes = run(
        features.fill_(torch.nan), labels.fill_(255), prototypes, torch.ones(()), temperature=0.1, reduction=reduction
    )
    assert torch.all(loss == 0) and torch.all(dfeatures == 0) and torch.all(dprototypes == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [20, 520])
def test_non_finite_and_zero_features(cuda, dim, dtype):
    features, labels, prototypes = problem((2, dim, 3, 5), size=(3, 5), ignored=0, dtype=dtype)
    features[0, :, 0, 0] = 0
    labels[0, 1, 1] = 255
    features[0, 3, 1, 1] = torch.nan  # an ignored pixel may hold anything
    loss, grad, dprototypes = run(features, labels, prototypes, temperature=1.0)
    assert loss.isfinite() and dprototypes.isfinite().all() and torch.all(grad[0, :, 1, 1] == 0)
    wide = (features.float(), labels, prototypes)
    reference = value_and_gradients(sf.prototype_contrastive_loss, *wide, temperature=1.0, backend="reference")
    # the gradient at 0 is 1e12 times the others': its own scale, and beyond float16
    for where in (1, *([(0, slice(None), 0, 0)] if dtype != torch.float16 else [])):
        assert (grad.float() - reference[1])[where].abs().max() <= 2e-2 * reference[1][where].abs().max()
    for bad in (torch.nan, torch.inf):
        features[1, 3, 2, 2] = bad
        loss, grad, _ = run(features, labels, prototypes, temperature=1.0)
        assert (
            loss.isnan()
            and grad[1, :, 2, 2].isnan().all()
            and grad[0].isfinite().sum() == grad[0, :, 0, 0].isfinite().sum() + dim * 14
        )


@pytest.mark.parametrize(
    ("value", "dtype"), [(5, torch.uint8), (-1, torch.int8), (2**40 + 1, torch.int64), (-(2**40), torch.int64)]
)
def test_label_beyond_classes_never_indexes_memory_but_raises_the_flag(cuda, value, dtype):
    features, labels, prototypes = problem((1, 20, 3, 5), size=(3, 5))
    labels = labels.where(labels != 255, 100).to(dtype)
    flag = label_flag(features.device)
    flag.fill_(NO_BAD_LABEL)
    settings = {"temperature": 1.0, "ignore_index": 100, "class_weight": torch.ones(5)}
    assert run(features, labels, prototypes, **settings)[0].isfinite()
    assert flag == NO_BAD_LABEL
    labels[0, 1, 2] = value
    loss, grad, _ = run(features, labels, prototypes, **settings)
    assert loss.isnan() and grad[0, :, 1, 2].isnan().all() and flag == value
    assert torch.all(grad[(labels == 100)[:, None].expand_as(grad)] == 0)
    loss = run(features, labels, prototypes, torch.ones(()), **settings, reduction="none")[0]
    assert loss.isnan().sum() == 1 and loss[0, 1, 2].isnan()
    flag.fill_(NO_BAD_LABEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "num_classes"), [((2, 33, 5, 13), 5), ((1, 70, 9, 9), 40), ((1, 530, 5, 13), 19)])
def test_same_bits_whatever_the_order_of_threads_and_blocks(built, shape, num_classes, dtype):
    inputs = problem(shape, num_classes, dtype=dtype)
    results = []
    for order in build.ORDERS:
        with built.taken(order):
            results.append(run(*inputs, temperature=0.1))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 2])
def test_offsets_beyond_32_bits(cuda, step, dtype):
    """A view that spans 3 x 2**30 elements of memory, of which a few pages are ever touched."""
    features, labels, prototypes = problem((2, 2, 3, 21), size=(3, 21), dtype=dtype)
    memory = torch.empty(3 * 2**30 + 63 * step, dtype=dtype)
    far = memory.as_strided(features.shape, (2**31, 2**30, 21 * step, step)).copy_(features)
    got, expected = (run(tensor, labels, prototypes, temperature=0.3) for tensor in (far, features))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (1, 8, 1, 1)])
def test_empty_batch_and_single_pixel(cuda, shape):
    features, labels, prototypes = problem(shape, size=shape[2:], ignored=0)
    loss, dfeatures, dprototypes = run(features, labels, prototypes, temperature=1.0)
    assert loss.isfinite() and dfeatures.shape == shape and dprototypes.isfinite().all() and (shape[0] > 0 or loss == 0)


@pytest.mark.parametrize("dim", [20, 520])
def test_forward_here_and_backward_elsewhere_fit_together(cuda, dim):
    """One contract: saves of one backend are read by the other, so a wrong half can be found by exchange."""
    features, labels, prototypes = problem((1, dim, 3, 5), size=(3, 5))
    reference, here = backends.module("reference"), backends.module("cuda")
    contrast, wanted = (
        Contrast(features, labels, prototypes, None, None, None, 0.2, True, 255, "mean"),
        Wanted(True, True),
    )
    grads = []
    for first, second in ((here, reference), (reference, here), (reference, reference)):
        _, saved = first.contrast_forward(contrast, wanted)
        grads.append(second.contrast_backward(torch.ones(()), contrast, saved, wanted)[:2])
    for pair in grads[:2]:
        for got, expected in zip(pair, grads[2], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_compile_and_opcheck(cuda):
    features, labels, prototypes = problem((1, 20, 3, 5), size=(3, 5), dtype=torch.bfloat16)
    leaf = features.clone().requires_grad_()
    check_ops(
        lambda: sf.prototype_contrastive_loss(leaf, labels, prototypes, temperature=0.1, backend="cuda").backward(),
        "test_schema", "test_faketensor", "test_autograd_registration",
    )  # fmt: skip

    def loss(features, labels, prototypes):
        return sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.1, backend="cuda")

    eager = value_and_gradients(loss, features, labels, prototypes)
    compiled = value_and_gradients(
        torch.compile(loss, fullgraph=True, backend="aot_eager"), features, labels, prototypes
    )
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_what_the_kernels_cannot_do_is_said_in_words(cuda):
    ask = Ask("prototype_contrastive_loss", torch.device("cpu"), torch.float32, 65536, 16)
    why_not = backends.module("cuda").why_not
    assert why_not(ask) is None
    assert "at most 65536 classes" in why_not(ask._replace(num_classes=65537))
    assert "no `prototype_class`, no `teacher`" in why_not(
        ask._replace(needs=frozenset({"teacher", "prototype_class", "bias"}))
    )
