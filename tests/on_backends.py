"""The backends that a test can run on this machine, and how an op is run and compared on them.

A test takes `backend` from `usable` or `on_each_backend`. Without a GPU "triton" runs in its interpreter and "cuda" in the emulator
of tests/cuda_emulator (a fixture of conftest.py sees to it); where there is one, both get their tensors moved to it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import oracle
import pytest
import torch
from cuda_emulator import emulated
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import spcl_fast as sf
from spcl_fast import backends, catalog
from spcl_fast.backends.contract import Ask
from spcl_fast.backends.labels import label_flag

ALL = catalog.names(catalog.BACKENDS)
ON_CPU = tuple(row.name for row in catalog.BACKENDS if "cpu" in row.devices)  # a bad label is a ValueError
ON_GPU = tuple(name for name in ALL if name not in ON_CPU)  # a bad label makes the loss NaN and raises the flag
GPU = torch.cuda.is_available()
NO_BAD_LABEL = torch.iinfo(torch.int64).min
# whose products of half floats are half-float products; the others compute in float32 whatever they read
HALF_PRODUCTS = ("triton", "cuda")


def home(backend: str | None) -> torch.device:
    """Where the tensors lie that a test gives to this backend."""
    on_gpu = GPU and backend in ON_GPU and not emulated.is_taken()
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def flag(backend: str) -> Tensor:
    """Holds the largest bad label since a test last filled it."""
    return label_flag(home(backend))


def asked(op: str, *needs: str, device: str | torch.device = "cpu", dtype=torch.float32, num_classes=5, dim=16) -> Ask:
    """What a test of `op` asks a backend for."""
    return Ask(op, torch.device(device), dtype, num_classes, dim, needs=frozenset(needs))


def why_not(backend: str, ask: Ask) -> str | None:
    """The backend's own answer, with "cuda" as the emulator runs it where there is no GPU."""
    with contextlib.nullcontext() if GPU else emulated.claimed():
        return backends.why_not(backend, ask._replace(device=home(backend)))


def usable(op: str, *needs: str, among: tuple[str, ...] = ON_CPU, **asking) -> list[str]:
    """The backends, of `among`, that can do `op` with these options on this machine."""
    return [name for name in among if why_not(name, asked(op, *needs, **asking)) is None]


def on_each_backend(op: str, cases: Sequence, among: tuple[str, ...] = ALL, **asking) -> list:
    """(backend, case) for every backend that can do it, with readable ids."""
    return [
        pytest.param(backend, case, id=f"{case.name}-{backend}")
        for case in cases
        for backend in usable(op, *case.needs, among=among, **asking)
    ]


def dtypes(backend: str) -> list[torch.dtype]:
    """float32 and the half floats that the backend multiplies rightly here: not bfloat16 in Triton's interpreter."""
    halves = [torch.float16] if backend == "triton" and not GPU else [torch.float16, torch.bfloat16]
    return [torch.float32, *halves]


def on_each_dtype(op: str, *needs: str, among: tuple[str, ...] = ALL) -> list:
    """(backend, dtype)"""
    return [
        pytest.param(backend, dtype, id=f"{str(dtype).removeprefix('torch.')}-{backend}")
        for backend in usable(op, *needs, among=among)
        for dtype in dtypes(backend)
        if why_not(backend, asked(op, *needs, dtype=dtype)) is None
    ]


# ---- running an op ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def given_to(backend: str | None, tree) -> Iterator:
    """The tensors where the backend wants them; in the emulator each ends where its memory ends, so that reading beyond is an error."""
    if backend == "cuda" and home(backend).type == "cpu":
        with emulated.guarded() as copy:
            yield pytree.tree_map_only(Tensor, copy, tree)
    else:
        yield pytree.tree_map_only(Tensor, lambda t: t.to(home(backend)), tree)


def on_cpu(tree):
    return pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), tree)


def call(function: Callable, backend: str | None = None, /, **given):
    """What the function gives for these arguments, on the CPU; with a backend it is asked for that one."""
    with given_to(backend, given) as given:
        if backend is not None:
            given["backend"] = backend
        return on_cpu(function(**given))


def run(
    function: Callable, given: dict, leaves: Sequence[str], backend: str | None = None, *, leaf_dtype=None, incoming=None, **more
) -> list[Tensor]:  # fmt: skip
    """Value, and the gradient of each leaf for an incoming gradient (default: one that is none of 1s), on the CPU.

    leaf_dtype: what the leaves are turned to. more: arguments of the function that are not to be moved.
    """
    if backend is not None:
        more["backend"] = backend
    given = {
        name: value.detach().to(leaf_dtype or value.dtype) if name in leaves else value for name, value in given.items()
    }
    with given_to(backend, given) as given:
        wanted = {name: given.pop(name).detach().requires_grad_() for name in leaves}
        value = function(**wanted, **given, **more)
        if incoming is None:
            incoming = torch.linspace(0.5, 2, value.numel()).view(value.shape)
        grads = torch.autograd.grad(value, list(wanted.values()), incoming.to(value).expand_as(value))
        return on_cpu([value, *grads])


FORMULAS = {
    "prototype_contrastive_loss": oracle.contrast,
    "prototype_logits": oracle.class_logits,
    "upsampled_cross_entropy": oracle.upsampled,
    "upsampled_binary_cross_entropy": oracle.upsampled,
}


def check(op: str, given: dict, leaves: Sequence[str], backend: str, *, slack=4.0, at_most=None, **more) -> None:
    """At most twice the error of the same formula in eager PyTorch, both against float64, and a few eps of the scale.

    at_most: and no more than so many eps of their scale, however wrong eager is. Of a temperature, whose gradient is one sum that cancels,
    more is allowed.
    """
    formula, half = FORMULAS[op], given[leaves[0]].dtype
    if op == "upsampled_binary_cross_entropy":
        formula = functools.partial(formula, **{"gamma": 0.0} if "gamma" not in given else {})
    of_halves = backend in HALF_PRODUCTS and "prototypes" in given
    eager_dtype = half if of_halves else torch.float32
    got = run(getattr(sf, op), given, leaves, backend, **more)
    eager = run(formula, given, leaves, dtype=eager_dtype, **more)
    truth = run(formula, given, leaves, leaf_dtype=torch.float64, dtype=torch.float64, **more)
    for name, g, e, t in zip(("loss", *leaves), got, eager, truth, strict=True):
        # what is not in the features' dtype (loss, dprototypes) still carries half-float products
        ratio = max(1.0, torch.finfo(half).eps / torch.finfo(g.dtype).eps) if of_halves else 1.0
        try:
            oracle.assert_as_accurate(g, e, t, slack=ratio * (slack if name != "temperature" else 8 * slack))
            if at_most is not None:
                oracle.assert_as_accurate(
                    g, t, t, slack=at_most * max(ratio, torch.finfo(half).eps / torch.finfo(g.dtype).eps)
                )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# ---- the same bits ---------------------------------------------------------------------------------------------------


def assert_same_bits(backend: str, computed: Callable[[], Sequence[Tensor]]) -> None:
    """For any number of threads, and in whichever order the emulator's threads, blocks and clusters take turns."""
    results = [list(computed()) for _ in _schedules(backend)]
    assert len(results) > 1
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def _schedules(backend: str) -> Iterator[None]:
    if backend == "cuda" and not GPU:
        yield from emulated.in_each_order()
    elif backend in ON_GPU:
        yield from (None, None)
    else:
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                yield
        finally:
            torch.set_num_threads(before)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its like hand out NaN: an element that a kernel forgets stays NaN."""

    def poisoned(real: Callable) -> Callable:
        fill = lambda t: t.fill_(torch.nan if t.is_floating_point() else 77)  # noqa: E731
        return lambda *a, **k: fill(real(*a, **k))

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


# ---- tracing ---------------------------------------------------------------------------------------------------------


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spcl_fast":
            self.seen.append((func, pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args), kwargs or {}))
        return func(*args, **(kwargs or {}))


def check_ops(call: Callable[[], object], *tests: str, backend: str | None = None) -> None:
    """torch.library.opcheck of each op that `call` dispatches, with the arguments that it has there; all of its checks by default.

    Not those that give kernels for GPUs tensors without memory.
    """
    if backend in ON_GPU:
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    with _Calls() as calls:
        call()
    assert calls.seen, "nothing of ours was called"
    for op, args, kwargs in calls.seen:
        torch.library.opcheck(op, args, kwargs, **({"test_utils": tests} if tests else {}))
