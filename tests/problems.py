"""The problems that the ops are tested with, the shapes and the options: each in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import spcl_fast as sf

CONTRAST, LOGITS, MOMENTS = "prototype_contrastive_loss", "prototype_logits", "class_moments"
CROSS, BINARY = "upsampled_cross_entropy", "upsampled_binary_cross_entropy"
PREDICTION, CONFUSION = "upsampled_prediction", "upsampled_confusion"


class Problem(NamedTuple):
    """Tensors for every op and every option, of one problem of B images, D channels, K classes and M = K + 2 rows."""

    features: Tensor  # [B, D, h, w]
    labels: Tensor  # [B, H, W], some of them 255
    prototypes: Tensor  # [K, D]
    per_image: Tensor  # [B, K, D]
    rows: Tensor  # [M, D]
    rows_per_image: Tensor  # [B, M, D]
    row_class: Tensor  # [M]
    variances: Tensor  # [K, D]
    variances_per_image: Tensor  # [B, K, D]
    variances_of_rows: Tensor  # [M, D]
    bias: Tensor  # [K]
    bias_per_image: Tensor  # [B, K]
    bias_of_rows: Tensor  # [M]
    bias_of_rows_per_image: Tensor  # [B, M]
    temperature: Tensor  # []
    probabilities: Tensor  # [B, K, h, w], some pixels certain, some without any
    class_weight: Tensor  # [K], one of them 0
    pixel_weight: Tensor  # [B, h, w]
    teacher: sf.TeacherTargets
    logits: Tensor  # [B, K, h, w], to be up-sampled
    nodes: Tensor  # [B, K, g, f]: probabilities to be up-sampled, the first row of the first image without any
    label_weight: Tensor  # [B, H, W]
    size: tuple[int, int]  # (H, W)


def problem(
    shape=(2, 16, 5, 7), num_classes=5, size=None, dtype=torch.float32, *, temperature=0.3, seed=0, ignored=0.2, patch=(1, 1), scale=3.0,
    grid=None,
) -> Problem:  # fmt: skip
    """shape: [B, D, h, w] of the features; size: (H, W) of the labels; grid: (g, f) of the probabilities to be up-sampled.

    patch: (rows, columns) of equal labels. scale: of the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, dim, height, width = shape
    rows, columns = size = size or (height, width)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def rand(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    def unit(*size: int) -> Tensor:
        return F.normalize(randn(*size), dim=-1)

    coarse = torch.randint(0, num_classes, (batch, -(-rows // patch[0]), -(-columns // patch[1])), generator=generator)
    labels = coarse.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[:, :rows, :columns].contiguous()
    labels[rand(batch, rows, columns) < ignored] = 255
    soft = (3 * randn(batch, num_classes, height, width)).softmax(1)
    certain = F.one_hot(soft.argmax(1), num_classes).movedim(3, 1).float()
    kind = rand(batch, 1, height, width)
    class_weight = rand(num_classes) + 0.1
    class_weight[3:4] = 0
    nodes = (2 * randn(batch, num_classes, *(grid or (height, width)))).softmax(1)
    nodes[:1, :, 0] = 0
    teacher = sf.TeacherTargets(F.normalize(randn(batch, 12, height, width), dim=1), unit(num_classes, 12), 0.2)
    scores = torch.einsum("bdhw,kd->bkhw", teacher.features, teacher.prototypes) / 0.2
    teacher = teacher._replace(u=0.1 - scores.logsumexp(1), v=0.3 * randn(num_classes))
    made = Problem(
        features=randn(*shape), labels=labels, prototypes=unit(num_classes, dim), per_image=unit(batch, num_classes, dim),
        rows=unit(num_classes + 2, dim), rows_per_image=unit(batch, num_classes + 2, dim),
        row_class=torch.cat([torch.arange(num_classes), torch.tensor([0, num_classes - 1])]),
        variances=rand(num_classes, dim) * temperature**2, variances_per_image=rand(batch, num_classes, dim) * temperature**2,
        variances_of_rows=rand(num_classes + 2, dim) * temperature**2, bias=randn(num_classes), bias_per_image=randn(batch, num_classes),
        bias_of_rows=randn(num_classes + 2), bias_of_rows_per_image=randn(batch, num_classes + 2), temperature=torch.tensor(temperature),
        probabilities=soft.where(kind < 0.6, certain).where(kind < 0.8, 0), class_weight=class_weight,
        pixel_weight=rand(batch, width, height).mT, teacher=teacher, logits=scale * randn(batch, num_classes, height, width), nodes=nodes,
        label_weight=rand(batch, columns, rows).mT, size=size,
    )  # fmt: skip
    return _as(made, dtype)


def _as(made: Problem, dtype: torch.dtype) -> Problem:
    """Features and logits in `dtype`, all else in float32 or, with float64, in that."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    floating = {
        name: t.to(wide) for name, t in made._asdict().items() if isinstance(t, Tensor) and t.is_floating_point()
    }
    teacher = sf.TeacherTargets(*(part.to(wide) if isinstance(part, Tensor) else part for part in made.teacher))
    return made._replace(**floating)._replace(
        features=made.features.to(dtype), logits=made.logits.to(dtype), teacher=teacher
    )


# ---- options ---------------------------------------------------------------------------------------------------------


# The options of prototype_contrastive_loss: a name, what a backend is asked for, and the settings with the problem's own tensors in them.
class Option(NamedTuple):
    name: str
    needs: tuple[str, ...]
    settings: Callable[[Problem], dict]
    leaves: tuple[str, ...] = ("features", "prototypes")  # what a gradient is wanted for
    op: str = CONTRAST

    def given(self, problem: Problem, **more) -> dict:
        """The arguments of the op."""
        if self.op in (CROSS, BINARY):
            plain = {"logits": problem.logits, "labels": problem.labels}
        else:
            plain = {
                "features": problem.features,
                "labels": problem.labels,
                "prototypes": problem.prototypes,
                "temperature": 0.3,
            }
        return plain | self.settings(problem) | more


_WEIGHTS = ("class_weight", "pixel_weight")


def _two_more(o: Problem) -> int:
    return len(o.prototypes) + 2


def _with(*names: str, **settings) -> Callable[[Problem], dict]:
    """Settings whose tensors are those of the problem, by name; `prototypes=...` and `labels=...` name other ones to be used."""

    def of(o: Problem, value):
        if isinstance(value, str) and value in Problem._fields:
            return getattr(o, value)
        return value(o) if callable(value) else value

    return lambda o: {name: getattr(o, name) for name in names} | {key: of(o, value) for key, value in settings.items()}


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
    Option("no positive variance, class weight", ("variances", "no_positive_variance"),
           _with("variances", "class_weight", positive_variance=False)),
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
    Option("pooled, classes without a row", ("prototype_class",),
           _with(prototypes="rows", prototype_class="row_class", num_classes=_two_more)),
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
    Option("bias, weights", ("bias", "dbias"), _with(*_WEIGHTS, "bias"), ("features", "prototypes", "bias")),
    Option("prototypes and bias per image, map", ("per_image_prototypes", "bias", "dbias"),
           _with(prototypes="per_image", bias="bias_per_image", reduction="none"), ("features", "prototypes", "bias")),
    Option("smoothing, map", ("label_smoothing",), _with(label_smoothing=0.3, reduction="none")),
    Option("smoothing, bias, sum", ("label_smoothing", "bias", "dbias"), _with("bias", label_smoothing=0.3, reduction="sum"),
           ("features", "prototypes", "bias")),
    Option("smoothing, bias, without normalisation", ("label_smoothing", "bias", "dbias"),
           _with("bias", label_smoothing=0.1, normalize=False), ("features", "prototypes", "bias")),
    Option("smoothing, margin, weights", ("label_smoothing", "margin"), _with(*_WEIGHTS, label_smoothing=0.1, margin=0.2)),
    Option("margin, bias", ("margin", "bias", "dbias"), _with("bias", margin=0.2), ("features", "prototypes", "bias")),
    Option("variances per image", ("variances", "per_image_prototypes"), _with(prototypes="per_image", variances="variances_per_image")),
    Option("variances, bias, weights", ("variances", "bias", "dbias"), _with("variances", "bias", *_WEIGHTS),
           ("features", "prototypes", "bias")),
    Option("variances with the rest", ("variances", "per_image_prototypes", "bias", "dbias", "tensor_temperature", "dtemperature",
           "label_smoothing", "margin"), _with("bias", "temperature", prototypes="per_image", variances="variances_per_image",
           label_smoothing=0.1, margin=0.1), ("features", "prototypes", "bias", "temperature")),
    Option("variances, probabilities", ("variances", "probabilities"), _with("variances", labels="probabilities")),
    Option("no positive variance, weights, margin", ("variances", "no_positive_variance", "margin"),
           _with("variances", *_WEIGHTS, positive_variance=False, margin=0.1)),
    Option("all but variances", ("per_image_prototypes", "bias", "dbias", "tensor_temperature", "dtemperature", "label_smoothing", "margin",
           "denominator"), _with(*_WEIGHTS, "temperature", prototypes="per_image", bias="bias_per_image", label_smoothing=0.1, margin=0.2,
           denominator=torch.tensor(11.0)), ("features", "prototypes", "bias", "temperature")),
    Option("probabilities, weights, smoothing, bias per image", ("probabilities", "label_smoothing", "bias", "dbias"),
           _with(*_WEIGHTS, labels="probabilities", label_smoothing=0.2, bias="bias_per_image"), ("features", "prototypes", "bias")),
    Option("sigmoid, bias, smoothing", ("sigmoid", "bias", "dbias", "label_smoothing"), _with("bias", loss="sigmoid", label_smoothing=0.2),
           ("features", "prototypes", "bias")),
    Option("sigmoid, bias, weights, margin", ("sigmoid", "bias", "dbias", "margin"), _with("bias", *_WEIGHTS, loss="sigmoid", margin=0.1),
           ("features", "prototypes", "bias")),
    Option("sigmoid, probabilities, weights, bias", ("sigmoid", "probabilities", "bias", "dbias"),
           _with("class_weight", "bias", labels="probabilities", loss="sigmoid"), ("features", "prototypes", "bias")),
    Option("sigmoid, probabilities, weights, smoothing", ("sigmoid", "probabilities", "label_smoothing"),
           _with(*_WEIGHTS, labels="probabilities", loss="sigmoid", label_smoothing=0.1)),
    Option("sigmoid, sum", ("sigmoid",), _with(loss="sigmoid", reduction="sum")),
    Option("pooled per image, weights, margin", ("prototype_class", "per_image_prototypes", "bias", "dbias", "margin"),
           _with(*_WEIGHTS, prototypes="rows_per_image", prototype_class="row_class", bias="bias_of_rows_per_image", margin=0.1),
           ("features", "prototypes", "bias")),
    Option("pooled per image, smoothing", ("prototype_class", "per_image_prototypes", "label_smoothing"),
           _with(prototypes="rows_per_image", prototype_class="row_class", label_smoothing=0.1)),
    Option("pooled by maximum, bias", ("prototype_class", "bias", "dbias"),
           _with(prototypes="rows", prototype_class="row_class", pool="max", bias="bias_of_rows"), ("features", "prototypes", "bias")),
    Option("pooled by maximum, variances, bias", ("prototype_class", "variances", "bias", "dbias"),
           _with(prototypes="rows", prototype_class="row_class", pool="max", bias="bias_of_rows", variances="variances_of_rows"),
           ("features", "prototypes", "bias")),
    Option("pooled, smoothing", ("prototype_class", "label_smoothing"),
           _with(prototypes="rows", prototype_class="row_class", label_smoothing=0.1)),
    Option("pooled, sigmoid", ("prototype_class", "sigmoid"), _with(prototypes="rows", prototype_class="row_class", loss="sigmoid")),
    Option("teacher", ("teacher",), _with(labels="teacher")),
    Option("teacher, bias, weights", ("teacher", "bias", "dbias"), _with(*_WEIGHTS, "bias", labels="teacher"),
           ("features", "prototypes", "bias")),
    Option("teacher, smoothing, per image, map", ("teacher", "per_image_prototypes", "label_smoothing"),
           _with(prototypes="per_image", labels="teacher", label_smoothing=0.1, reduction="none")),
)  # fmt: skip


def _upsampled_option(name: str, needs: tuple[str, ...], *names: str, op=CROSS, **settings) -> Option:
    weights = {"pixel_weight": "label_weight"} if "class_weight" in names else {}
    return Option(name, needs, _with(*names, **weights, **settings), ("logits",), op)


_SOFT = {"labels": "nodes", "size": "size"}
UPSAMPLED_OPTIONS = (
    _upsampled_option("plain", ()),
    _upsampled_option("weights, temperature", (), "class_weight", temperature=1.8),
    _upsampled_option("smoothing", ("label_smoothing",), label_smoothing=0.15),
    _upsampled_option("smoothing, weights, temperature", ("label_smoothing",), "class_weight", label_smoothing=0.15, temperature=1.8),
    _upsampled_option("smoothing, low temperature", ("label_smoothing",), label_smoothing=0.2, temperature=0.05),
    _upsampled_option("smoothing, sum", ("label_smoothing",), "class_weight", label_smoothing=0.1, temperature=0.7, reduction="sum"),
    _upsampled_option("smoothing, map", ("label_smoothing",), "class_weight", label_smoothing=0.1, reduction="none"),
    _upsampled_option("all pixels", ("denominator",), "class_weight", denominator="all"),
    _upsampled_option("a denominator", ("denominator",), denominator=torch.tensor(7.5)),
    _upsampled_option("a denominator, weights", ("denominator",), "class_weight", denominator=torch.tensor(50.0), temperature=0.7),
    _upsampled_option("probabilities", ("probabilities",), **_SOFT),
    _upsampled_option("probabilities, weights", ("probabilities",), "class_weight", temperature=1.8, **_SOFT),
    _upsampled_option("probabilities, weights, smoothing", ("probabilities", "label_smoothing"), "class_weight", label_smoothing=0.1,
                      temperature=1.3, **_SOFT),
    _upsampled_option("probabilities, map", ("probabilities",), reduction="none", **_SOFT),
    _upsampled_option("probabilities, weights, sum", ("probabilities",), "class_weight", reduction="sum", **_SOFT),
    _upsampled_option("probabilities, a denominator", ("probabilities", "denominator"), denominator=torch.tensor(50.0), **_SOFT),
    _upsampled_option("binary", (), op=BINARY),
    _upsampled_option("binary, weights, temperature", (), "class_weight", op=BINARY, temperature=1.8),
    _upsampled_option("binary, low temperature", (), op=BINARY, temperature=0.05),
    _upsampled_option("binary, all pixels", ("denominator",), op=BINARY, denominator="all"),
    _upsampled_option("binary, a denominator", ("denominator",), "class_weight", op=BINARY, denominator=torch.tensor(50.0)),
    _upsampled_option("binary, map", (), "class_weight", op=BINARY, reduction="none"),
    _upsampled_option("focal", ("focal",), op=BINARY, gamma=2.0),
    _upsampled_option("focal, weights", ("focal",), "class_weight", op=BINARY, gamma=2.0),
    _upsampled_option("focal below 1", ("focal",), "class_weight", op=BINARY, gamma=0.5),
    _upsampled_option("focal, low temperature", ("focal",), op=BINARY, gamma=1.0, temperature=0.1),
    _upsampled_option("focal, weights, sum", ("focal",), "class_weight", op=BINARY, gamma=1.5, reduction="sum"),
    _upsampled_option("focal, map", ("focal",), "class_weight", op=BINARY, gamma=1.5, reduction="none"),
)  # fmt: skip


def named(options: tuple[Option, ...], *names: str) -> tuple[Option, ...]:
    """Those of the options, in this order."""
    found = {option.name: option for option in options}
    return tuple(found[name] for name in names)


# one for each kind of kernel and of sum, for what is too slow to be asked of every option
UPSAMPLED_KINDS = named(
    UPSAMPLED_OPTIONS, "plain", "smoothing, weights, temperature", "probabilities, weights", "binary", "focal"
)
KINDS = UPSAMPLED_KINDS + named(
    OPTIONS, "bias", "prototypes per image", "all per image", "variances, bias and temperature", "no positive variance",
    "probabilities, weights, smoothing", "smoothing, weights", "pooled, weights, bias, temperature", "pooled by maximum",
    "margin, weights, temperature", "sigmoid, weights, bias, temperature", "teacher", "probabilities, map", "sigmoid, map",
)  # fmt: skip


def unless_slow(rows: list, slow: tuple[str, ...] = ("triton",)) -> list:
    """The rows of `on_each_backend`, of the backends whose interpreter is slow only those with an option of KINDS."""
    return [row for row in rows if row.values[0] not in slow or row.values[1] in KINDS]
