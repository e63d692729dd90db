"""prototype_contrastive_loss and its gradient in one pass of a cluster: the kernel's own source in the emulator, against the oracle."""

from __future__ import annotations

import contextlib

import oracle
import pytest
import torch
from cuda_emulator import build, emulated
from layouts import as_rows, laid_out
from on_backends import NO_BAD_LABEL, check_ops
from problems import CONTRAST, problem

import spcl_fast as sf
from spcl_fast.backends import cuda
from spcl_fast.backends.labels import label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def built():
    return emulated.Backend(CONTRAST)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    real = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda *a, **k: t.fill_(torch.nan) if (t := real(*a, **k)).is_floating_point() else t
    )


@contextlib.contextmanager
def taken(backend, order="forward"):
    with backend.taken(order), cuda.in_one_pass():
        yield


@pytest.fixture
def one_pass(built):
    with taken(built):
        yield built


def value_and_gradient(function, features, labels, prototypes, grad=1.0, **settings):
    features = features.detach().requires_grad_()
    loss = function(features, labels, prototypes, **settings)
    return loss.detach(), torch.autograd.grad(loss, features, torch.full_like(loss, grad))[0]


def run(*inputs, **settings):
    return value_and_gradient(sf.prototype_contrastive_loss, *inputs, backend="cuda", **settings)


def check(features, labels, prototypes, **settings):
    """At most twice the error of the same formula run eagerly in the features' dtype."""
    got = run(features, labels, prototypes, **settings)
    eager = value_and_gradient(oracle.contrast, features, labels, prototypes, dtype=features.dtype, **settings)
    truth = value_and_gradient(oracle.contrast, features.double(), labels, prototypes.double(), **settings)
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=4 * torch.finfo(features.dtype).eps / torch.finfo(g.dtype).eps)


# Clusters of 1, 2, 4 and 8 blocks, the last ones with fewer channels or none; aligned, odd and ragged rows; every number of warps a class.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_classes"),
    [
        ((2, 24, 5, 13), 1), ((1, 64, 8, 16), 19), ((1, 256, 9, 9), 32), ((1, 300, 3, 22), 21), ((2, 1030, 3, 5), 5),
        ((1, 2048, 7, 11), 19), ((1, 2048, 8, 8), 2), ((1, 4096, 3, 5), 21),
    ],
)  # fmt: skip
def test_value_and_gradient_are_as_accurate_as_eager(one_pass, shape, num_classes, dtype):
    check(*problem(shape, num_classes, dtype=dtype)[:3], temperature=0.3)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_every_temperature(one_pass, dtype, temperature):
    check(*problem((2, 600, 5, 9), size=(11, 13), dtype=dtype)[:3], temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_enter_value_and_gradient_but_pixel_weight_not_the_denominator(one_pass, reduction, normalize, dtype):
    features, labels, prototypes = problem((2, 600, 5, 9), size=(11, 13), dtype=dtype)[:3]
    weights = {"class_weight": torch.tensor([0.2, 1, 3, 0, 1.5]), "pixel_weight": torch.rand(2, 9, 5).transpose(1, 2)}
    check(features, labels, prototypes, temperature=0.3, reduction=reduction, normalize=normalize, **weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "cropped", "transposed", "rows", "misaligned"])
def test_any_layout_is_read_and_kept(one_pass, layout, dtype):
    features, labels, prototypes = problem((2, 601, 5, 9), size=(5, 9), dtype=dtype)[:3]
    expected = run(features, labels, prototypes, temperature=0.2)
    rows = layout == "rows"
    features, labels = (as_rows(features), labels.flatten()) if rows else (laid_out(features, layout), labels)
    loss, grad = run(features, labels, prototypes, temperature=0.2)
    if layout in ("channels_last", "transposed"):
        assert grad.stride() == features.stride()
    grad = grad.view(2, 5, 9, 601).permute(0, 3, 1, 2) if layout == "rows" else grad
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "num_classes"), [((2, 70, 5, 13), 5), ((1, 1100, 9, 9), 19)])
def test_same_bits_whatever_the_order_of_threads_blocks_and_clusters(built, shape, num_classes, dtype):
    inputs = problem(shape, num_classes, (11, 13), dtype)[:3]
    results = []
    for order in build.ORDERS:
        with taken(built, order):
            results.append(run(*inputs, temperature=0.1))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_many_labels_are_counted_by_many_blocks(one_pass):
    features, labels, prototypes = problem((3, 4, 150, 111), 3, (150, 111))[:3]
    labels[1] = 255
    check(features, labels, prototypes, temperature=1.0, class_weight=torch.tensor([0.5, 1.0, 2.5]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored_is_zero_not_nan_whatever_the_features_and_the_incoming_gradient(one_pass, reduction, dtype):
    features, labels, prototypes = problem((1, 600, 3, 5), size=(3, 5), dtype=dtype)[:3]
    labels.fill_(255)
    for grad in (1.0, torch.inf):
        got = run(features.fill_(torch.nan), labels, prototypes, grad, temperature=0.1, reduction=reduction)
        assert all(torch.all(t == 0) for t in got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_and_zero_features(one_pass, dtype):
    features, labels, prototypes = problem((2, 600, 3, 5), size=(3, 5), ignored=0, dtype=dtype)[:3]
    features[0, :, 0, 0] = 0
    labels[0, 1, 1] = 255
    features[0, 3, 1, 1] = torch.nan  # an ignored pixel may hold anything
    loss, grad = run(features, labels, prototypes, temperature=1.0)
    assert loss.isfinite() and grad.isfinite().all() and torch.all(grad[0, :, 1, 1] == 0)
    wide = value_and_gradient(
        sf.prototype_contrastive_loss, features.float(), labels, prototypes, temperature=1.0, backend="reference"
    )[1]
    for where in (1, (0, slice(None), 0, 0)):  # the gradient at 0 is 1e12 times the others'
        assert (grad.float() - wide)[where].abs().max() <= 2e-2 * wide[where].abs().max()
    for bad in (torch.nan, torch.inf):
        features[1, 3, 2, 2] = bad
        loss, grad = run(features, labels, prototypes, temperature=1.0)
        assert loss.isnan() and grad[1, :, 2, 2].isnan().all() and grad[0].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_bad_label_makes_the_loss_nan_and_raises_the_flag(one_pass, reduction):
    features, labels, prototypes = problem((1, 600, 3, 5), size=(3, 5))[:3]
    labels[0, 1, 2] = 7
    flag = label_flag(features.device).fill_(NO_BAD_LABEL)
    loss, grad = run(features, labels, prototypes, temperature=1.0, reduction=reduction, class_weight=torch.ones(5))
    assert loss.isnan() and grad[0, :, 1, 2].isnan().all() and flag == 7
    assert torch.all(grad[(labels == 255)[:, None].expand_as(grad)] == 0)
    flag.fill_(NO_BAD_LABEL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [0.5, -3.7, 0.0, 65536.0])
def test_an_incoming_gradient_that_is_not_1_scales(one_pass, grad, dtype):
    inputs = problem((1, 33, 5, 9), size=(11, 13), dtype=dtype)[:3]
    expected = run(*inputs, temperature=0.2)[1].double() * grad
    torch.testing.assert_close(
        run(*inputs, grad, temperature=0.2)[1].double(), expected, rtol=torch.finfo(dtype).eps, atol=0
    )


def test_a_kept_graph_gives_the_same_again_and_the_first_gradient_stays(one_pass):
    features, labels, prototypes = problem((1, 33, 5, 9), size=(11, 13))[:3]
    loss = sf.prototype_contrastive_loss(features.requires_grad_(), labels, prototypes, temperature=0.2, backend="cuda")
    first = torch.autograd.grad(3 * loss, features, retain_graph=True)[0]
    before = first.clone()
    second = torch.autograd.grad(5 * loss, features)[0]
    assert torch.equal(first, before)
    torch.testing.assert_close(second, first * (5 / 3))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, features)


def test_a_second_derivative_is_refused_in_words(one_pass):
    features, labels, prototypes = problem((1, 33, 5, 9), size=(11, 13))[:3]
    loss = sf.prototype_contrastive_loss(features.requires_grad_(), labels, prototypes, temperature=0.2, backend="cuda")
    (grad,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_the_gradient_is_kept_in_the_features_stead_and_handed_out_without_a_copy(one_pass):
    features, labels, prototypes = problem((1, 33, 5, 9), size=(11, 13))[:3]
    leaf = features.requires_grad_()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        loss = sf.prototype_contrastive_loss(leaf * 1.0, labels, prototypes, temperature=0.2, backend="cuda")
    assert [t.shape for t in seen] == [features.shape]
    handed = []
    hook = loss.grad_fn.register_hook(lambda given, _: handed.append(given[0]))
    loss.backward()
    hook.remove()
    assert handed[0].data_ptr() == seen[0].data_ptr() and torch.equal(leaf.grad, handed[0])


def test_only_where_the_features_alone_need_a_reduced_gradient_and_it_fits(one_pass, monkeypatch):
    calls = []
    real = cuda.one_pass
    monkeypatch.setattr(cuda, "one_pass", lambda *a, **k: calls.append(1) or real(*a, **k))

    def taken(num_classes=5, dtype=torch.float32, dim=33, asks=(True, False), **settings):
        calls.clear()
        features, labels, prototypes = problem((1, dim, 3, 5), num_classes, (11, 13), dtype)[:3]
        inputs = features.requires_grad_(asks[0]), labels, prototypes.requires_grad_(asks[1])
        assert sf.prototype_contrastive_loss(*inputs, temperature=0.2, backend="cuda", **settings).isfinite().all()
        return bool(calls)

    assert taken() and taken(32) and taken(dtype=torch.bfloat16) and taken(dim=4096)
    assert not taken(33) and not taken(dtype=torch.float16) and not taken(dim=4097) and not taken(reduction="none")
    assert not taken(asks=(True, True)) and not taken(asks=(False, True)) and not taken(asks=(False, False))
    with torch.no_grad():
        assert not taken()
    with monkeypatch.context() as unasked:  # undone before in_one_pass ends: what it found is what it leaves
        unasked.setattr(cuda, "_one_pass_asked", False)
        assert not taken()


def test_empty_batch_and_single_pixel(one_pass):
    for shape in ((0, 8, 3, 3), (1, 8, 1, 1)):
        features, labels, prototypes = problem(shape, size=shape[2:], ignored=0)[:3]
        loss, grad = run(features, labels, prototypes, 2.0, temperature=1.0)
        assert loss.isfinite() and grad.shape == shape and grad.isfinite().all() and (shape[0] > 0 or loss == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_beyond_32_bits(one_pass, dtype):
    """A view that spans 3 x 2**30 elements of memory, of which a few pages are ever touched."""
    features, labels, prototypes = problem((2, 2, 3, 21), size=(3, 21), dtype=dtype)[:3]
    far = torch.empty(3 * 2**30 + 63, dtype=dtype).as_strided(features.shape, (2**31, 2**30, 21, 1)).copy_(features)
    got, expected = (run(tensor, labels, prototypes, temperature=0.3) for tensor in (far, features))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_compile_and_opcheck(one_pass):
    features, labels, prototypes = problem((1, 40, 3, 5), size=(3, 5), dtype=torch.bfloat16)[:3]
    leaf = features.clone().requires_grad_()
    check_ops(
        lambda: sf.prototype_contrastive_loss(leaf, labels, prototypes, temperature=0.1, backend="cuda").backward(),
        "test_schema", "test_faketensor",
    )  # fmt: skip

    def loss(features, labels, prototypes):
        return 3 * sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.1, backend="cuda")

    eager = value_and_gradient(loss, features, labels, prototypes)
    compiled = value_and_gradient(
        torch.compile(loss, fullgraph=True, backend="aot_eager"), features, labels, prototypes
    )
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
