"""How prototype_contrastive_loss runs: same bits, gradients alone and between backends, traced, under autocast, with a loss scale."""

from __future__ import annotations

import oracle
import pytest
import torch
from on_backends import (
    ALL,
    GPU,
    ON_CPU,
    asked,
    assert_same_bits,
    check_ops,
    home,
    on_each_backend,
    on_each_dtype,
    poison,
    run,
    usable,
    why_not,
)  # fmt: skip
from problems import CONTRAST, OPTIONS, named, problem, unless_slow
from torch.utils._python_dispatch import TorchDispatchMode

import spcl_fast as sf
from spcl_fast import backends
from spcl_fast.backends.contract import Contrast, Wanted
from spcl_fast.backends.labels import nearest_index

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EVERY = usable(CONTRAST, among=ALL)
LEAVES = ("features", "prototypes")
SOME = named(
    OPTIONS, "plain", "all per image", "variances, bias and temperature", "probabilities, weights, smoothing", "smoothing, weights",
    "pooled, weights, bias, temperature", "margin, weights, temperature", "sigmoid, weights, bias, temperature", "all but variances",
    "teacher, bias, weights",
)  # fmt: skip


def plain(p, **more) -> dict:
    return {"features": p.features, "labels": p.labels, "prototypes": p.prototypes, "temperature": 0.3} | more


def differentiated(backend, given: dict, leaves=LEAVES, **more):
    return run(sf.prototype_contrastive_loss, given, leaves, backend, **more)


# ---- the same bits ---------------------------------------------------------------------------------------------------------

SIZES = {  # pixels and classes that several threads or blocks share; classes kept, computed again, in blocks
    "reference": [((2, 48, 61, 67), 19)],
    "cpu": [((2, 48, 61, 67), 19), ((2, 200, 53, 61), 19), ((2, 200, 53, 61), 150)],
    "cuda": [((2, 33, 5, 13), 5), ((1, 70, 9, 9), 40), ((1, 530, 5, 13), 19), ((1, 37, 3, 5), 330)],
    "triton": [((2, 33, 3, 7), 5)],
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("backend", "dtype"), on_each_dtype(CONTRAST))
def test_same_bits_for_any_number_of_threads(backend, dtype, reduction):
    for shape, num_classes in SIZES.get(backend, SIZES["reference"]):
        given = plain(problem(shape, num_classes, dtype=dtype), reduction=reduction)
        given["labels"][:, 10:20] = 255  # whole panels without a label
        assert_same_bits(backend, lambda given=given: differentiated(backend, given))


@pytest.mark.parametrize(
    ("backend", "case", "num_classes"),
    [
        pytest.param(*row.values, num_classes, id=f"{row.id}-{num_classes}")
        for row in unless_slow(on_each_backend(CONTRAST, OPTIONS), slow=("reference",))
        for num_classes in (19, 330)
        if num_classes == 19 or (row.values[0] == "cuda" and row.values[1] in SOME)
        if row.values[0] != "triton"  # its interpreter has one order
    ],
)
def test_an_option_gives_the_same_bits_for_any_number_of_threads(backend, case, num_classes):
    p = problem((2, 37, 3, 9) if backend == "cuda" else (3, 40, 11, 37), num_classes)
    assert_same_bits(backend, lambda: differentiated(backend, case.given(p), case.leaves))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_for_any_number_of_threads_in_float64(reduction):
    given = plain(problem((1, 8, 200, 200), dtype=torch.float64), reduction=reduction)
    before = torch.get_num_threads()
    assert_same_bits("reference", lambda: differentiated("reference", given))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("backend", "dtype"), on_each_dtype(CONTRAST))
def test_every_element_of_every_output_is_written(backend, dtype, monkeypatch):
    given = plain(problem((2, 33, 3, 5), dtype=dtype))
    expected = differentiated(backend, given)
    poison(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(expected, differentiated(backend, given), strict=True))


# ---- gradients alone, and exchanged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "case"), on_each_backend(CONTRAST, SOME))
def test_a_gradient_alone_is_what_it_is_among_all(backend, case):
    p = problem((2, 20, 3, 5), 7) if backend == "triton" else problem((1, 160, 5, 13), 19)
    given = case.given(p)
    together = differentiated(backend, given, case.leaves)
    for index, leaf in enumerate(case.leaves, 1):
        alone, expected = differentiated(backend, given, (leaf,))[1], together[index]
        if backend in ON_CPU:
            assert (alone - expected).abs().max() <= 1e-6 * expected.abs().max()
        else:
            assert torch.equal(alone, expected)


@pytest.mark.parametrize("dim", [20, 520])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_forward_here_and_backward_elsewhere_fit_together(backend, dim):
    """One contract: saves of one backend are read by the other, so a wrong half can be found by exchange."""
    if backend not in EVERY:
        pytest.skip(str(why_not(backend, asked(CONTRAST))))
    p = problem((1, dim, 3, 5))
    tensors = [t.to(home(backend)) for t in (p.features, p.labels, p.prototypes)]
    contrast, wanted = Contrast(*tensors, None, None, None, 0.2, True, 255, "mean"), Wanted(True, True)
    reference, here = backends.module("reference"), backends.module(backend)
    grads = []
    for first, second in ((here, reference), (reference, here), (reference, reference)):
        _, saved = first.contrast_forward(contrast, wanted)
        one = torch.ones((), device=home(backend))
        grads.append(second.contrast_backward(one, contrast, saved, wanted)[:2])
    for pair in grads[:2]:
        for got, expected in zip(pair, grads[2], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", EVERY)
def test_expanded_gradient_of_a_map(backend):
    given = plain(problem((2, 33, 5, 9)), reduction="none")
    got = differentiated(backend, given, incoming=torch.tensor(0.5).expand(2, 5, 9))[1]
    expected = run(oracle.contrast, given | {"reduction": "sum"}, LEAVES, incoming=torch.ones(()))[1] / 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("backend", "dtype"), on_each_dtype(CONTRAST))
def test_gradients_survive_the_loss_scale(backend, dtype):
    """At temperature 100 they are near 1e-10 before the incoming gradient: nothing may be rounded to float16 before it."""
    given = plain(problem((2, 33, 5, 9), size=(11, 13), dtype=dtype), temperature=100.0)
    scale = torch.tensor(2.0**24)
    _, grad, dprototypes = differentiated(backend, given, incoming=scale)
    truth = run(oracle.contrast, given, LEAVES, leaf_dtype=torch.float64, incoming=scale)
    limit = 3e-3 if dtype != torch.bfloat16 else 2e-2
    for got, expected in ((grad, truth[1]), (dprototypes, truth[2])):
        assert (got.double() - expected).norm() < limit * expected.norm()
    tiny = differentiated(backend, given | {"temperature": 1.0}, incoming=scale * 2.0**-60)
    assert tiny[2].abs().max() > 0  # dprototypes are float32: far below float16's smallest number they are still there


def test_a_temperature_that_is_a_parameter_of_a_model_learns():
    p, scale = problem(), torch.nn.Parameter(torch.tensor(1.0))
    optimizer, losses = torch.optim.SGD([scale], lr=0.1), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(sf.prototype_contrastive_loss(p.features, p.labels, p.prototypes, temperature=scale))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and scale != 1.0


# ---- tracing -------------------------------------------------------------------------------------------------------------

TRACED = named(
    OPTIONS, "plain", "all per image", "probabilities, weights, smoothing", "pooled, weights, bias, temperature", "all but variances"
)  # fmt: skip


@pytest.mark.parametrize(("backend", "case"), on_each_backend(CONTRAST, TRACED))
def test_opcheck_compile_and_export(backend, case):
    for dtype, num_classes in [(torch.float32, 5), *([(torch.bfloat16, 330)] if backend == "cuda" else [])]:
        _check_traced(backend, case, problem((1, 16, 3, 5), num_classes, dtype=dtype))


def _check_traced(backend, case, p) -> None:
    torch._dynamo.reset()
    rest = {
        key: value.to(home(backend)) if isinstance(value, torch.Tensor) else value
        for key, value in case.given(p).items()
    }
    leaves = {name: rest.pop(name).requires_grad_() for name in case.leaves}
    if case.name.startswith("pooled"):
        rest["num_classes"] = len(p.prototypes)

    def loss(**leaves):
        return sf.prototype_contrastive_loss(**leaves, **rest, backend=backend)

    check_ops(lambda: loss(**leaves).backward(), backend=backend)
    eager = torch.autograd.grad(loss(**leaves), leaves.values())
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(**leaves), leaves.values())
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))

    class Module(torch.nn.Module):
        def forward(self, **leaves):
            return loss(**leaves)

    constants = {name: leaf.detach() for name, leaf in leaves.items()}
    exported = torch.export.export(Module(), (), constants).module()
    assert torch.equal(exported(**constants), loss(**leaves))


@pytest.mark.parametrize("backend", usable(CONTRAST, "bias"))
def test_autocast_does_not_lower_the_loss(backend):
    p = problem()
    for more in ({}, {"bias": p.bias}):
        expected = sf.prototype_contrastive_loss(**plain(p, **more), backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = sf.prototype_contrastive_loss(**plain(p, **more), backend=backend)
        assert torch.equal(got, expected)


def test_the_nearest_rule_is_worked_out_where_the_labels_are():
    """A copy from the host would wait for the GPU, in every step."""

    class NoCopies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            assert out.device.type == "meta", f"{function} works on {out.device}"
            return out

    with NoCopies():
        assert nearest_index(720, 33, torch.device("meta")).shape == (33,)


# ---- what a backend does not do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [name for name in EVERY if name in ("cpu", "triton", "cuda")])
def test_a_backend_says_why_it_does_not_take_a_dtype_an_option_or_a_device(backend):
    assert why_not(backend, asked(CONTRAST)) is None
    assert "float64" in why_not(backend, asked(CONTRAST, dtype=torch.float64))
    assert "no `unheard_of`" in why_not(backend, asked(CONTRAST, "unheard_of"))
    elsewhere = {"cpu": "cuda:0", "triton": "meta", "cuda": "meta"}[backend]
    assert elsewhere.split(":")[0] in backends.why_not(backend, asked(CONTRAST, device=elsewhere))
    if backend == "triton" and not GPU:
        assert "bfloat16" in why_not(backend, asked(CONTRAST, dtype=torch.bfloat16))


def test_cuda_takes_65536_classes_and_says_so_of_more():
    assert why_not("cuda", asked(CONTRAST, num_classes=65536)) is None
    assert "at most 65536 classes" in why_not("cuda", asked(CONTRAST, num_classes=65537))


def test_a_backend_that_is_asked_for_by_name_and_lacks_something_is_an_error_and_another_one_does_the_work():
    ask = asked(CONTRAST, "bias", dtype=torch.float64)
    assert backends.pick(ask, None) == "reference"
    p = problem(dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'cpu' was asked for and cannot be used: .*float64"):
        sf.prototype_contrastive_loss(**plain(p, bias=p.bias), backend="cpu")
