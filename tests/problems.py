"""Problems, shapes and backends for the tests of the ops, each in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from spcl_fast import backends, catalog
from spcl_fast.backends.contract import Ask


def asked(op: str, *needs: str, device: str | torch.device = "cpu", dtype=torch.float32, num_classes=5, dim=16) -> Ask:
    """What a test of `op` asks a backend for."""
    return Ask(op, torch.device(device), dtype, num_classes, dim, needs=frozenset(needs))


ALL = catalog.names(
    catalog.BACKENDS
)  # on a CPU triton runs in its interpreter; cuda does not: tests/cuda_emulator runs it
ON_CPU = tuple(row.name for row in catalog.BACKENDS if "cpu" in row.devices)


def usable(op: str, *needs: str, among: tuple[str, ...] = ON_CPU) -> list[str]:
    """The backends, of `among`, that can do `op` with these options on this machine's CPU."""
    return [name for name in among if backends.why_not(name, asked(op, *needs)) is None]


# The options of prototype_contrastive_loss: a name, what a backend is asked for, and the settings with the problem's own tensors in them.
class Option(NamedTuple):
    name: str
    needs: tuple[str, ...]
    settings: Callable[[Options], dict]
    leaves: tuple[str, ...] = ("features", "prototypes")  # what a gradient is wanted for


class Options(NamedTuple):
    """Tensors for every option, of one problem of B images, D channels, K classes and M = K + 2 rows."""

    features: Tensor  # [B, D, h, w]
    labels: Tensor  # [B, h, w]
    prototypes: Tensor  # [K, D]
    per_image: Tensor  # [B, K, D]
    rows: Tensor  # [M, D]
    row_class: Tensor  # [M]
    variances: Tensor  # [K, D]
    bias: Tensor  # [K]
    bias_per_image: Tensor  # [B, K]
    bias_of_rows: Tensor  # [M]
    temperature: Tensor  # []
    probabilities: Tensor  # [B, K, h, w], some pixels without any
    class_weight: Tensor  # [K]
    pixel_weight: Tensor  # [B, h, w]


def options(shape=(2, 16, 5, 7), num_classes=5, dtype=torch.float32, temperature=0.3, seed=0) -> Options:
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def rand(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    batch, dim, *grid = shape
    labels = torch.randint(0, num_classes, (batch, *grid), generator=generator)
    labels[rand(batch, *grid) < 0.2] = 255
    probabilities = rand(batch, num_classes, *grid).softmax(1) * (rand(batch, 1, *grid) > 0.2)
    unit = torch.nn.functional.normalize
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    row_class = torch.cat([torch.arange(num_classes), torch.tensor([0, num_classes - 1])])
    rows = unit(randn(num_classes + 2, dim), dim=1)
    small = (
        unit(randn(num_classes, dim), dim=1), unit(randn(batch, num_classes, dim), dim=2), rows, row_class,
        rand(num_classes, dim) * temperature**2, randn(num_classes), randn(batch, num_classes), randn(num_classes + 2),
        torch.tensor(temperature), probabilities, rand(num_classes) + 0.1, rand(batch, *grid),
    )  # fmt: skip
    small = tuple(tensor.to(wide) if tensor.is_floating_point() else tensor for tensor in small)
    return Options(randn(*shape).to(dtype), labels, *small)


_WEIGHTS = ("class_weight", "pixel_weight")


def _with(*names: str, **settings) -> Callable[[Options], dict]:
    """Settings whose tensors are those of the problem, by name; `prototypes=...` and `labels=...` name other ones to be used."""
    return lambda o: (
        {name: getattr(o, name) for name in names}
        | {
            key: getattr(o, value) if isinstance(value, str) and value in Options._fields else value
            for key, value in settings.items()
        }
    )


OPTIONS = (
    Option("plain", (), _with()),
    Option("bias", ("bias", "dbias"), _with("bias"), ("features", "prototypes", "bias")),
    Option("bias per image", ("bias", "dbias"), _with(bias="bias_per_image"), ("features", "prototypes", "bias")),
    Option("prototypes per image", ("per_image_prototypes",), _with(prototypes="per_image")),
    Option("all per image", ("per_image_prototypes", "bias", "dbias"), _with(*_WEIGHTS, prototypes="per_image", bias="bias_per_image"),
           ("features", "prototypes", "bias")),
    Option("temperature", ("tensor_temperature", "dtemperature"), _with("temperature"), ("features", "prototypes", "temperature")),
    Option("temperature, not learned", ("tensor_temperature",), _with("temperature", "class_weight")),
    Option("variances", ("variances",), _with("variances")),
    Option("variances, bias and temperature", ("variances", "bias", "dbias", "tensor_temperature", "dtemperature"),
           _with("variances", "bias", "temperature", *_WEIGHTS), ("features", "prototypes", "bias", "temperature")),
    Option("no positive variance", ("variances", "no_positive_variance"), _with("variances", *_WEIGHTS, positive_variance=False)),
    Option("no positive variance, margin", ("variances", "no_positive_variance", "margin", "tensor_temperature", "dtemperature"),
           _with("variances", "temperature", positive_variance=False, margin=0.2), ("features", "prototypes", "temperature")),
    Option("probabilities", ("probabilities",), _with(labels="probabilities")),
    Option("probabilities, weights, smoothing", ("probabilities", "label_smoothing"),
           _with(*_WEIGHTS, labels="probabilities", label_smoothing=0.1)),
    Option("probabilities, map", ("probabilities", "bias"), _with("bias", labels="probabilities", reduction="none")),
    Option("smoothing", ("label_smoothing",), _with(label_smoothing=0.2)),
    Option("smoothing, weights", ("label_smoothing",), _with(*_WEIGHTS, label_smoothing=0.2)),
    Option("smoothing, sum", ("label_smoothing",), _with("class_weight", label_smoothing=0.2, reduction="sum")),
    Option("pooled", ("prototype_class",), _with(prototypes="rows", prototype_class="row_class")),
    Option("pooled, weights, bias, temperature", ("prototype_class", "bias", "dbias", "tensor_temperature", "dtemperature"),
           _with(*_WEIGHTS, "temperature", prototypes="rows", prototype_class="row_class", bias="bias_of_rows"),
           ("features", "prototypes", "bias", "temperature")),
    Option("pooled by maximum", ("prototype_class",), _with(prototypes="rows", prototype_class="row_class", pool="max")),
    Option("pooled, margin", ("prototype_class", "margin", "label_smoothing"),
           _with(prototypes="rows", prototype_class="row_class", pool="max", margin=0.3, label_smoothing=0.1)),
    Option("pooled, a class without a row", ("prototype_class",), _with(prototypes="rows", prototype_class="row_class", num_classes=7)),
    Option("margin", ("margin",), _with(margin=0.35)),
    Option("margin, weights, temperature", ("margin", "tensor_temperature", "dtemperature"),
           _with(*_WEIGHTS, "temperature", margin=0.35, normalize=False), ("features", "prototypes", "temperature")),
    Option("all pixels", ("denominator",), _with(*_WEIGHTS, denominator="all")),
    Option("a denominator", ("denominator",), _with("class_weight", denominator=torch.tensor(3.5))),
    Option("sigmoid", ("sigmoid",), _with(loss="sigmoid")),
    Option("sigmoid, weights, bias, temperature", ("sigmoid", "bias", "dbias", "tensor_temperature", "dtemperature"),
           _with(*_WEIGHTS, "bias", "temperature", loss="sigmoid"), ("features", "prototypes", "bias", "temperature")),
    Option("sigmoid, probabilities", ("sigmoid", "probabilities"), _with(labels="probabilities", loss="sigmoid")),
    Option("sigmoid, map", ("sigmoid",), _with("class_weight", loss="sigmoid", reduction="none")),
)  # fmt: skip


def on_each_backend(op: str, cases: tuple[Option, ...]) -> list:
    """(backend, case) for every backend that can do it, with readable ids."""
    return [
        pytest.param(backend, case, id=f"{case.name}-{backend}")
        for case in cases
        for backend in usable(op, *case.needs, among=ALL)
    ]


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spcl_fast":
            self.seen.append((func, pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args), kwargs or {}))
        return func(*args, **(kwargs or {}))


def check_ops(call: Callable[[], object], *tests: str) -> None:
    """torch.library.opcheck of each op that `call` dispatches, with the arguments that it has there; all of its checks by default."""
    with _Calls() as calls:
        call()
    assert calls.seen, "nothing of ours was called"
    for op, args, kwargs in calls.seen:
        torch.library.opcheck(op, args, kwargs, **({"test_utils": tests} if tests else {}))
