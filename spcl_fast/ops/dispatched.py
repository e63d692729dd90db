"""What goes through torch's dispatcher, so that an op is seen by torch.compile, torch.export, fake tensors and torch.func.

A struct of contract.py travels as lists of tensors and of numbers and one line of words, and is put together again inside the op.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

DIFFERENTIABLE_ONCE = (
    "is differentiable once: its gradient cannot be differentiated again (create_graph=True is not supported)"
)


def line(*words: str | None) -> str:
    """One line of the words that there are; "" stands for a choice that is not made."""
    return " ".join([word for word in words if word])


@functools.cache
def words(text: str) -> frozenset[str]:
    return frozenset(text.split(" "))


@functools.cache
def one_of(text: str, *choices: str) -> str:
    """The word of `choices` that the line holds, or the first."""
    return next((choice for choice in choices if choice in words(text)), choices[0])


@functools.cache
def named_backend(text: str) -> str:
    return next((word[1:] for word in words(text) if word.startswith("@")), "")


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which ask for gradients in their own ways."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def direct(op: CustomOpDef, writes: tuple[int, ...] = ()) -> Callable:
    """`op`, past the dispatcher where no mode, transform or tracer is active: saves 20 us per call, a few times per loss.

    The dispatcher is there for tracers, modes, transforms, profilers and kinds of tensors. It is called through torch.ops: torch 2.14 runs
    `op(...)` past the profiler where all arguments are tensors (findings/torch_profiler_misses_custom_op.sh). writes: places of the
    arguments that the op writes to; autograd is notified as the dispatcher would do it.
    """
    function, dispatched = op._init_fn, getattr(getattr(torch.ops, op._namespace), op._name)

    def call(*arguments):
        if _is_watched() or not _are_plain(arguments) or any(arguments[place].requires_grad for place in writes):
            return dispatched(*arguments)
        result = function(*arguments)
        for place in writes:
            if not arguments[place].is_inference():
                torch.autograd.graph.increment_version(arguments[place])
        return result

    return call


def _is_watched() -> bool:
    if torch.compiler.is_compiling():
        return True
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _are_plain(values: Sequence) -> bool:
    """Whether all tensors among them, and in lists among them, are PyTorch's own and hold values."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if value.is_meta:
                return False
        elif kind is list:
            if not _are_plain(value):
                return False
        elif isinstance(value, Tensor):
            return False
    return True


def once(op: Callable, name: str) -> Callable:
    """`op`, the gradient of `name`, whose result is refused with a reason where somebody differentiates it again."""

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(spec, *leaves):
            return op(*pytree.tree_unflatten(leaves, spec))

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(f"{name} {DIFFERENTIABLE_ONCE}")

    def call(*arguments):
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*arguments)
        leaves, spec = pytree.tree_flatten(arguments)  # what is in a list is not seen by autograd
        return Once.apply(spec, *leaves)

    return call


def recordable(cls: type) -> type[torch.autograd.Function]:
    """The class, whose `compute` and `keep` are one `forward`: what eager code and torch.compile take."""

    def forward(ctx, *inputs):
        output = cls.compute(*inputs)
        cls.keep(ctx, inputs, output)
        return output

    return type(
        cls.__name__,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)},
    )


def transformable(cls: type, op: str) -> type[torch.autograd.Function]:
    """The same for torch.func: vmap goes through it, forward mode is refused. torch.compile traces none that has a `jvp`, and PyTorch binds
    the arguments anew in each call of one that has `setup_context`, 20 us."""

    def jvp(ctx, *tangents):
        raise RuntimeError(
            f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad); use torch.func.grad, vjp or jacrev"
        )

    members = {
        "forward": staticmethod(cls.compute),
        "setup_context": staticmethod(cls.keep),
        "backward": staticmethod(cls.backward),
        "generate_vmap_rule": True,
        "jvp": staticmethod(jvp),
    }
    return type(cls.__name__, (torch.autograd.Function,), members)


def recorded_once(cls: type, name: str) -> Callable:
    """apply(*inputs), the first of them a tensor, of a class with `compute`, `keep` and `backward` in plain PyTorch: for eager code,
    torch.compile and torch.func, differentiable once, and in the dtypes that it asks for under autocast, too."""

    def backward(ctx, *grads):
        with _without_autocast(grads[0]):
            return cls.backward(ctx, *grads)

    members = {
        "compute": staticmethod(cls.compute),
        "keep": staticmethod(cls.keep),
        "backward": staticmethod(torch.autograd.function.once_differentiable(backward)),
    }
    whole = type(cls.__name__, (), members)
    recorded, transformed = recordable(whole), transformable(whole, name)

    def apply(*inputs):
        with _without_autocast(inputs[0]):
            return (transformed if is_transformed() else recorded).apply(*inputs)

    return apply


def ignores_autocast(function: Callable) -> Callable:
    """A decorator: what the function multiplies keeps the dtype that it asks for. One of its arguments is a tensor."""

    @functools.wraps(function)
    def call(*arguments, **named):
        with _without_autocast(next(value for value in arguments if isinstance(value, Tensor))):
            return function(*arguments, **named)

    return call


def _without_autocast(like: Tensor) -> contextlib.AbstractContextManager:
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def looped_over_batch(op: Callable) -> Callable:
    """A rule for torch.vmap: one call per sample. Per-sample gradients are right, and as slow as a loop."""

    def rule(info, in_dims, *args):
        def sample(index: int):
            return pytree.tree_map(
                lambda value, dim: value if dim is None else value.select(dim, index), args, in_dims_of_leaves
            )

        in_dims_of_leaves = tuple(
            [None] * len(arg) if isinstance(arg, list) and dim is None else dim
            for arg, dim in zip(args, in_dims, strict=True)
        )
        results = [op(*sample(index)) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return rule
