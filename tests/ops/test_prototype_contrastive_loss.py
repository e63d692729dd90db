"""prototype_contrastive_loss on every backend that runs on the CPU, against the float64 oracle."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from problems import check_ops, usable
from torch.utils._python_dispatch import TorchDispatchMode

import spcl_fast as sf
from spcl_fast.backends.labels import nearest_index

BACKENDS = usable("prototype_contrastive_loss")


def problem(shape=(2, 16, 7, 9), num_classes=5, size=(15, 23), dtype=torch.float32, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator).to(dtype)
    labels = torch.randint(0, num_classes, (shape[0], *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    prototypes = torch.randn(num_classes, shape[1], generator=generator)
    return features, labels, torch.nn.functional.normalize(prototypes, dim=1) * 0.7


def value_and_gradients(function, features, labels, prototypes, weight=None, **settings):
    features, prototypes = (
        features.detach().clone(memory_format=torch.preserve_format).requires_grad_(),
        prototypes.detach().clone().requires_grad_(),
    )
    loss = function(features, labels, prototypes, **settings)
    (loss if weight is None else (loss * weight).sum()).backward()
    return loss.detach(), features.grad, prototypes.grad


def check(backend, features, labels, prototypes, weight=None, **settings):
    got = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels, prototypes, weight, backend=backend, **settings
    )
    eager = value_and_gradients(oracle.contrast, features, labels, prototypes, weight, dtype=torch.float32, **settings)
    truth = value_and_gradients(oracle.contrast, features.double(), labels, prototypes.double(), weight, **settings)
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_are_as_accurate_as_eager(backend, temperature, dtype):
    check(backend, *problem(dtype=dtype), temperature=temperature)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_classes", [19, 40])
def test_large_logits_cost_no_accuracy(backend, num_classes, normalize):
    features, labels, prototypes = problem((1, 64, 5, 9), num_classes, (5, 9), ignored=0)
    check(backend, features, labels, prototypes * 6, temperature=0.05, normalize=normalize)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("normalize", "reduction"), list(itertools.product([True, False], ["mean", "sum", "none"])))
def test_weights_enter_value_and_gradient_but_pixel_weight_not_the_denominator(backend, normalize, reduction):
    features, labels, prototypes = problem()
    weights = {"class_weight": torch.tensor([0.2, 1, 3, 0, 1.5]), "pixel_weight": torch.rand(2, 7, 9)}
    weight = torch.rand(2, 7, 9) if reduction == "none" else None
    check(
        backend,
        features,
        labels,
        prototypes,
        weight,
        temperature=0.3,
        normalize=normalize,
        reduction=reduction,
        **weights,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "transposed", "rows", "expanded"])
def test_any_layout_gives_the_same_result(backend, layout):
    features, labels, prototypes = problem(size=(7, 9))
    expected = sf.prototype_contrastive_loss(
        features.double(), labels, prototypes.double(), temperature=0.2, backend="reference"
    )
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        wide = torch.full((2, 16, 9, 14), torch.nan)
        wide[:, :, 1:8, 2:11] = features
        features = wide[:, :, 1:8, 2:11]
    elif layout == "transposed":
        features = features.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "rows":
        features, labels = features.permute(0, 2, 3, 1).reshape(-1, 16), labels.flatten()
    elif layout == "expanded":
        features = features[:1].expand(2, -1, -1, -1)
        expected = sf.prototype_contrastive_loss(
            features.double(), labels, prototypes.double(), temperature=0.2, backend="reference"
        )
    features = features.detach().requires_grad_()
    loss = sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.2, backend=backend)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss, features)
    (truth,) = torch.autograd.grad(oracle.contrast(features, labels, prototypes, temperature=0.2), features)
    torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
)
def test_labels_of_every_integer_dtype_are_read_in_place(backend, dtype):
    features, labels, prototypes = problem()
    labels = torch.where(labels == 255, 100, labels)
    expected = oracle.contrast(features, labels, prototypes, temperature=0.5, ignore_index=100)
    got = sf.prototype_contrastive_loss(
        features, labels.to(dtype), prototypes, temperature=0.5, ignore_index=100, backend=backend
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(7, 9), (14, 18), (1, 1), (3, 40), (113, 71), (720, 1280)])
def test_labels_of_any_size_follow_the_nearest_rule_of_interpolate(backend, size):
    features, labels, prototypes = problem(shape=(1, 4, 91, 161) if size[0] == 720 else (1, 4, 7, 9), size=size)
    got = sf.prototype_contrastive_loss(
        features, labels, prototypes, temperature=1.0, reduction="none", backend=backend
    )
    torch.testing.assert_close(
        got.double(),
        oracle.contrast(features, labels, prototypes, temperature=1.0, reduction="none"),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero_not_nan(backend, reduction):
    features, labels, prototypes = problem()
    loss, dfeatures, dprototypes = value_and_gradients(
        sf.prototype_contrastive_loss,
        features,
        labels.fill_(255),
        prototypes,
        torch.ones(()),
        temperature=0.1,
        reduction=reduction,
        backend=backend,
    )
    assert torch.all(loss == 0) and torch.all(dfeatures == 0) and torch.all(dprototypes == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_and_zero_features(backend):
    features, labels, prototypes = problem(size=(7, 9), ignored=0)
    features[0, :, 0, 0] = 0
    loss, grad, _ = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels, prototypes, temperature=1.0, backend=backend
    )
    assert loss.isfinite() and grad.isfinite().all()
    labels[0, 1, 1] = 255
    features[0, 3, 1, 1] = torch.nan  # an ignored pixel may hold anything
    loss, grad, dprototypes = value_and_gradients(
        sf.prototype_contrastive_loss, features, labels, prototypes, temperature=1.0, backend=backend
    )
    assert loss.isfinite() and dprototypes.isfinite().all() and torch.all(grad[0, :, 1, 1] == 0)
    for bad in (torch.nan, torch.inf):
        features[1, 3, 2, 2] = bad
        assert sf.prototype_contrastive_loss(features, labels, prototypes, temperature=1.0, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [5, -1, 254, 100000])
def test_label_beyond_classes_is_named_with_its_first_pixel(backend, value):
    features, labels, prototypes = problem(size=(7, 9))
    labels[1, 2, 3] = labels[1, 4, 4] = value
    with pytest.raises(ValueError, match=rf"label {value} at pixel \(image 1, row 2, column 3\) is outside \[0, 5\)"):
        sf.prototype_contrastive_loss(features, labels, prototypes, temperature=1.0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_label_of_a_larger_map_is_named_where_it_lies(backend):
    features, labels, prototypes = problem(size=(14, 18), ignored=0)
    labels[1, 4, 6] = 77
    with pytest.raises(ValueError, match=r"label 77 at pixel \(image 1, row 4, column 6\)"):
        sf.prototype_contrastive_loss(features, labels, prototypes, temperature=1.0, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_for_any_number_of_threads_in_float64(reduction):
    features, labels, prototypes = problem((1, 8, 200, 200), size=(200, 200), dtype=torch.float64)
    weight = torch.rand(1, 200, 200, dtype=torch.float64) if reduction == "none" else None
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            settings = {"temperature": 0.1, "reduction": reduction}
            results.append(
                value_and_gradients(
                    sf.prototype_contrastive_loss, features, labels, prototypes.double(), weight, **settings
                )
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_the_nearest_rule_is_worked_out_where_the_labels_are():
    """A copy from the host would wait for the GPU, in every step."""

    class NoCopies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            assert out.device.type == "meta", f"{function} works on {out.device}"
            return out

    with NoCopies():
        assert nearest_index(720, 33, torch.device("meta")).shape == (33,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignore_index_may_be_a_class_or_negative(backend):
    features, labels, prototypes = problem(size=(7, 9), ignored=0)
    for ignore_index in (2, -100):
        got = sf.prototype_contrastive_loss(
            features, labels, prototypes, temperature=0.5, ignore_index=ignore_index, backend=backend
        )
        expected = oracle.contrast(features, labels, prototypes, temperature=0.5, ignore_index=ignore_index)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_for_any_number_of_threads(backend):
    features, labels, prototypes = problem(shape=(2, 48, 61, 67), num_classes=19, size=(61, 67))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(
                value_and_gradients(
                    sf.prototype_contrastive_loss, features, labels, prototypes, temperature=0.1, backend=backend
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_sized_loss_scale_reaches_the_gradient(backend):
    features, labels, prototypes = problem(dtype=torch.bfloat16)
    features.requires_grad_()
    (
        sf.prototype_contrastive_loss(features, labels, prototypes, temperature=100.0, backend=backend) * 2.0**16
    ).backward()
    exact = features.detach().double().requires_grad_()
    (oracle.contrast(exact, labels, prototypes, temperature=100.0) * 2.0**16).backward()
    torch.testing.assert_close(features.grad.double(), exact.grad, rtol=2e-2, atol=exact.grad.abs().max().item() * 2e-2)


@pytest.mark.parametrize("num_classes", [1, 2, 19, 150, 1900])
@pytest.mark.parametrize("backend", BACKENDS)
def test_from_one_class_to_many(backend, num_classes):
    check(backend, *problem(shape=(1, 33, 5, 13), num_classes=num_classes, size=(5, 13)), temperature=0.2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (1, 8, 1, 1), (1, 1, 2, 3)])
def test_empty_batch_and_single_pixel(backend, shape):
    features, labels, prototypes = problem(shape=shape, size=shape[2:], ignored=0)
    loss = sf.prototype_contrastive_loss(
        features.requires_grad_(), labels, prototypes, temperature=1.0, backend=backend
    )
    loss.backward()
    assert loss.isfinite() and features.grad.shape == shape and (shape[0] > 0 or loss == 0)
    features.grad = None
    each = sf.prototype_contrastive_loss(
        features, labels, prototypes, temperature=1.0, reduction="none", backend=backend
    )
    each.sum().backward()
    assert each.shape == (shape[0], *shape[2:]) and features.grad.shape == shape


def test_gradcheck_with_variances_in_float64():
    features, labels, prototypes = problem(shape=(1, 5, 3, 4), size=(3, 4))
    variances = torch.rand(5, 5).double()
    features, prototypes = features.double().requires_grad_(), prototypes.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, p: sf.prototype_contrastive_loss(f, labels, p, temperature=0.7, variances=variances),
        (features, prototypes),
    )
    torch.testing.assert_close(
        sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.7, variances=variances),
        oracle.contrast(features, labels, prototypes, temperature=0.7, variances=variances),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_compile_and_export(backend):
    features, labels, prototypes = problem()
    features.requires_grad_()
    prototypes.requires_grad_()
    check_ops(
        lambda: sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.1, backend=backend).backward()
    )

    def loss(features, labels, prototypes):
        return sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.1, backend=backend)

    eager = value_and_gradients(loss, features, labels, prototypes)
    compiled = value_and_gradients(
        torch.compile(loss, fullgraph=True, backend="aot_eager"), features, labels, prototypes
    )
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))

    class Module(torch.nn.Module):
        def forward(self, features, labels, prototypes):
            return loss(features, labels, prototypes)

    exported = torch.export.export(Module(), (features.detach(), labels, prototypes.detach()))
    assert torch.equal(exported.module()(features.detach(), labels, prototypes.detach()), eager[0])


def test_autocast_does_not_lower_the_loss():
    features, labels, prototypes = problem()
    expected = sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.05, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.05, backend="reference"), expected
        )
