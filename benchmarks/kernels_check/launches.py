"""What `triton_kernels` compiles: the ops launched on "meta" tensors of the quoted shapes, plain and with each option, and recorded."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from spcl_fast.backends.contract import (
    Balance,
    Contrast,
    Logits,
    Moments,
    Saved,
    Teacher,
    UpsampledClasses,
    UpsampledLoss,
    Wanted,
)
from spcl_fast.kernels import balance, pixels
from spcl_fast.kernels import class_moments as moments
from spcl_fast.kernels import prototype_logits as logits
from spcl_fast.kernels import upsampled_confusion as confusion
from spcl_fast.kernels import upsampled_cross_entropy as upsample
from spcl_fast.kernels import upsampled_prediction as prediction
from spcl_fast.kernels.prototype_contrastive_loss import contrast, pool, prototypes

from ..shapes import CONTRAST, UPSAMPLED

_MODULES = (pixels, contrast, pool, prototypes, moments, upsample, prediction, confusion, balance, logits)
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
SHAPES = {name: CONTRAST[name] for name in "ABCD"}
CASES = {name: UPSAMPLED[name] for name in ("U1", "U2", "U3")}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel with the specialisation that a launch would give it; a path is where a value lies among the arguments and operands."""

    name: str
    kernel: object
    signature: tuple[tuple[str, object], ...]
    constants: tuple[tuple[tuple[int, ...], object], ...]
    attributes: tuple[tuple[tuple[int, ...], str], ...]  # paths of what is divisible by 16
    options: tuple[tuple[str, int], ...]
    grid: tuple[int, ...] = dataclasses.field(compare=False)
    fields: tuple[tuple[str, tuple[str, ...]], ...] = dataclasses.field(compare=False)  # of what is a NamedTuple

    @property
    def dtype(self) -> str:
        names = dict(self.signature)
        for operand in ("features", "logits", "labels", "partial_ptr"):
            kind = names.get(operand, "")
            if isinstance(kind, tuple):
                kind = next((part for part in kind if str(part).startswith("*")), "")
            if kind.startswith("*"):
                return kind.lstrip("*")
        return ""

    def constant(self, name: str) -> object:
        """Value of a constexpr parameter; None where the kernel has none of this name."""
        names = [key for key, _ in self.signature]
        return dict(self.constants).get((names.index(name),)) if name in names else None


class _Recorder:
    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append(describe(self.kernel, grid, args, kwargs))


def describe(kernel, grid, args, kwargs) -> Launch:
    """The specialisation that Triton's launcher chooses for these arguments: its own binder is asked. Meta tensors count as aligned."""
    options = tuple((k, v) for k, v in kwargs.items() if k in _OPTIONS)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, specialization, _ = binder(*args, **{k: v for k, v in kwargs.items() if k not in _OPTIONS})
    kinds = [kind for kind, _ in specialization]
    constants = {path: _at(list(values.values()), path) for path, kind in _leaves(kinds) if kind == "constexpr"}
    attributes = [None if kind == "constexpr" else attribute for kind, attribute in specialization]
    name = kernel.__name__.removesuffix("_kernel")
    return Launch(
        name, kernel, tuple(zip(values, kinds, strict=True)), tuple(constants.items()),
        tuple((path, text) for path, text in _leaves(attributes) if isinstance(text, str) and text), options, tuple(grid),
        tuple((name, value._fields) for name, value in values.items() if isinstance(value, tuple)),
    )  # fmt: skip


def _leaves(values, path=()) -> Iterator[tuple[tuple[int, ...], object]]:
    for index, value in enumerate(values):
        if isinstance(value, tuple):
            yield from _leaves(value, (*path, index))
        else:
            yield (*path, index), value


def _at(values, path: tuple[int, ...]):
    for index in path:
        values = values[index]
    return values


@contextlib.contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """Launches within the context are recorded instead of done, with the settings of `arch`."""
    launches: list[Launch] = []
    saved = []
    for module in _MODULES:
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                saved.append((module, name, value))
                setattr(module, name, _Recorder(value, launches))
            elif name == "architecture":
                saved.append((module, name, value))
                setattr(module, name, lambda tensor: arch)
    try:
        yield launches
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


def _meta(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _features(shape, dtype, channels_last: bool) -> torch.Tensor:
    features = _meta(*shape[:4], dtype=dtype)
    return features.to(memory_format=torch.channels_last) if channels_last else features


def _contrast(
    shape, dtype, *, channels_last=False, labels=torch.uint8, weights=False, reduction="mean", normalize=True, prototypes=True
) -> None:  # fmt: skip
    batch, dim, height, width, num_classes = shape
    problem = Contrast(
        _features(shape, dtype, channels_last), _meta(batch, 2 * height, 2 * width, dtype=labels), _meta(num_classes, dim),
        _meta(num_classes) if weights else None, _meta(batch, height, width) if weights else None, None, 0.1, normalize, 255, reduction,
    )  # fmt: skip
    _forward_and_backward(problem, Wanted(features=True, prototypes=prototypes))


def _forward_and_backward(problem: Contrast, wanted: Wanted) -> None:
    flag = _meta(dtype=torch.int64)
    loss, *saved = contrast.contrast_forward(problem, wanted, flag, 0)
    contrast.contrast_backward(
        _meta(*loss.shape), problem, Saved(*saved, problem.features.new_empty(0)), wanted, flag, 0
    )


def _moments(shape, dtype, *, channels_last=False, squares=False) -> None:
    labels = _meta(shape[0], *shape[2:4], dtype=torch.uint8)
    problem = Moments(_features(shape, dtype, channels_last), labels, shape[4], True, 255, squares)
    moments.class_moments(problem, _meta(dtype=torch.int64))


def _upsampled(case, dtype, *, align_corners=True, reduction="mean", gradient=True, weights=False) -> None:
    (batch, num_classes, h, w), size = case
    logits = _meta(batch, num_classes, h, w, dtype=dtype)
    weight = (_meta(num_classes), _meta(batch, *size)) if weights else (None, None)
    loss = UpsampledLoss(logits, _meta(batch, *size, dtype=torch.uint8), *weight, 1.8, align_corners, 255, reduction)
    upsample.upsampled_cross_entropy(loss, gradient, _meta(dtype=torch.int64), 0)
    prediction.upsampled_prediction(UpsampledClasses(logits, size, align_corners, 255, 1.8, _meta(num_classes)))


def _contrast_option(dtype, **options) -> None:
    """One option, on a shape whose logits are saved and on one whose are not."""
    for shape in ((1, 2048, 64, 64, 19), (2, 256, 64, 64, 150)):
        batch, dim, height, width, num_classes = shape
        labels = _meta(batch, height, width, dtype=torch.uint8)
        if options.get("soft"):
            labels = _meta(batch, num_classes, height, width)
        if options.get("teacher"):
            teacher = _meta(batch, 384, height, width, dtype=dtype), _meta(num_classes, 384)
            labels = Teacher(*teacher, 0.1, _meta(batch, height * width), _meta(num_classes))
        images = (batch,) if options.get("per_image") else ()
        pooled = {}
        if "pool" in options:
            pooled = {"prototype_class": _meta(num_classes, dtype=torch.int64), "classes": 19, "pool": options["pool"]}
        problem = Contrast(
            _features(shape, dtype, False), labels, _meta(*images, num_classes, dim), None, None,
            _meta(num_classes, dim) if options.get("variances") else None, options.get("temperature", 0.1), True, 255, "mean",
            bias=_meta(*images, num_classes) if options.get("bias") else None, margin=options.get("margin", 0.0),
            positive_variance=options.get("positive_variance", True), label_smoothing=options.get("label_smoothing", 0.0),
            loss=options.get("loss", "softmax"), **pooled,
        )  # fmt: skip
        wanted = Wanted(True, True, bool(options.get("bias")), isinstance(problem.temperature, torch.Tensor))
        _forward_and_backward(problem, wanted)


Case = tuple[str, Callable[[], None]]  # what the launches of a call are called in the table


def _option_cases(dtype) -> Iterator[Case]:
    for name, options in {
        "bias": {"bias": True}, "bias per image": {"bias": True, "per_image": True}, "learned temperature": {"temperature": _meta()},
        "margin": {"margin": 0.1}, "variances": {"variances": True},
        "negative variances": {"variances": True, "positive_variance": False}, "label smoothing": {"label_smoothing": 0.1},
        "soft labels": {"soft": True}, "teacher": {"teacher": True}, "sigmoid": {"loss": "sigmoid"},
        "pool logsumexp": {"pool": "logsumexp"}, "pool max": {"pool": "max"},
    }.items():  # fmt: skip
        yield f"contrast {name}", lambda o=options: _contrast_option(dtype, **o)
    yield "logits", lambda: _logits(dtype)
    yield "balance", lambda: _balance(dtype)
    for name, case in CASES.items():
        yield f"upsampled {name} options", lambda c=case: _upsampled_option(c, dtype)


def _logits(dtype) -> None:
    shape = (2, 256, 64, 64, 150)
    problem = Logits(_features(shape, dtype, False), _meta(2, 150, 256), None, None, 0.07, True)
    logits.logits_forward(problem)
    logits.logits_backward(_meta(2, 150, 64, 64), problem, Wanted(True, True))


def _balance(dtype) -> None:
    problem = Balance(_meta(5000, 256, dtype=dtype), _meta(65536, 256), 0.1)
    balance.balance_rows(problem, _meta(65536))
    balance.balance_columns(problem, _meta(5000))


def _upsampled_option(case, dtype) -> None:
    (batch, num_classes, h, w), size = case
    map_, labels, flag = (
        _meta(batch, num_classes, h, w, dtype=dtype),
        _meta(batch, *size, dtype=torch.uint8),
        _meta(dtype=torch.int64),
    )
    plain = UpsampledLoss(map_, labels, None, None, 1.8, True, 255, "mean")
    upsample.upsampled_cross_entropy(plain._replace(label_smoothing=0.1), True, flag, 0)
    upsample.upsampled_cross_entropy(plain._replace(labels=_meta(*map_.shape), size=size), True, flag, 0)
    for gamma in (0.0, 2.0):
        upsample.upsampled_binary_cross_entropy(plain._replace(gamma=gamma), True, flag, 0)
    confusion.upsampled_confusion(UpsampledClasses(map_, size, True, 255, labels=labels), flag)


def cases(quick: bool, dtypes: tuple[torch.dtype, ...] = ()) -> Iterator[Case]:
    """Every op on the quoted shapes, in the dtypes and layouts the table knows; quick leaves out what compiles to much the same."""
    for dtype in dtypes or ((torch.float32, torch.bfloat16) if quick else DTYPES):
        for name, shape in SHAPES.items():
            yield f"contrast {name}", lambda s=shape, d=dtype: _contrast(s, d)
            yield f"moments {name}", lambda s=shape, d=dtype: _moments(s, d)
        for name, case in list(CASES.items())[: 1 if quick else None]:
            yield f"upsampled {name}", lambda c=case, d=dtype: _upsampled(c, d)
        # both D and K in steps
        yield "contrast D 2048 K 1900", lambda d=dtype: _contrast((1, 2048, 64, 64, 1900), d, prototypes=not quick)
        if not quick:
            yield from _more_cases(dtype)


def _more_cases(dtype) -> Iterator[Case]:
    yield from _option_cases(dtype)
    for name, shape in SHAPES.items():
        yield f"contrast {name} channels_last", lambda s=shape: _contrast(s, dtype, channels_last=True)
        yield f"moments {name} channels_last", lambda s=shape: _moments(s, dtype, channels_last=True)
    yield (
        "contrast B weights",
        lambda: _contrast(CONTRAST["B"], dtype, labels=torch.int64, weights=True, reduction="none", normalize=False),
    )
    yield "contrast K 100000", lambda: _contrast((2, 48, 33, 65, 100_000), dtype)
    yield "contrast K 64", lambda: _contrast((2, 64, 64, 64, 64), dtype)
    yield "moments K 100000", lambda: _moments((2, 48, 33, 65, 100_000), dtype)
    yield "moments B squares", lambda: _moments(CONTRAST["B"], dtype, squares=True)
    for name, case in CASES.items():
        yield f"upsampled {name} half pixels", lambda c=case: _upsampled(c, dtype, align_corners=False, weights=True)
        yield f"upsampled {name} loss map", lambda c=case: _upsampled(c, dtype, gradient=False, reduction="none")
    yield "upsampled smaller", lambda: _upsampled(((2, 19, 128, 128), (64, 48)), dtype)
