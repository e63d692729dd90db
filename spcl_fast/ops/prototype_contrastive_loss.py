"""prototype_contrastive_loss: every labelled pixel is pulled to its class's prototype and pushed from the others."""

from __future__ import annotations

from torch import Tensor

from ..backends.contract import Contrast, Teacher
from . import checks
from .pixels import Pixels, labels_of, pixel_weight_of, pixels_of, probabilities_of, teacher_of
from .recorded_contrast import recorded
from .rows import Rows, check_rows
from .teacher import TeacherTargets

_OP = "prototype_contrastive_loss"
_LOSS_CHOICES = ("softmax", "sigmoid")


def prototype_contrastive_loss(
    features: Tensor,  # [B, D, h, w], [N, D], [B, D, L] or [B, D, T, h, w]
    labels: Tensor | TeacherTargets,  # [B, H, W] or [N], any integer dtype or bool; or floating [B, K, h, w] or [N, K]
    prototypes: Tensor,  # [K, D] or, one set per image, [B, K, D]; with prototype_class [M, D] or [B, M, D]
    *,
    temperature: float | Tensor,
    normalize: bool = True,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,  # [K]
    pixel_weight: Tensor | None = None,  # [B, h, w] or [B, H, W], or [N]
    variances: Tensor | None = None,  # the prototypes' shape
    reduction: str = "mean",
    backend: str | None = None,
    bias: Tensor | None = None,  # [K] or [B, K]
    label_smoothing: float = 0.0,
    prototype_class: Tensor | None = None,  # [M], any integer dtype
    pool: str = "logsumexp",
    num_classes: int | None = None,
    margin: float = 0.0,
    positive_variance: bool = True,
    denominator: str | Tensor = "labelled",
    loss: str = "softmax",
) -> Tensor:  # [] or, for reduction="none", [B, h, w] or [N]; float32 (float64 for float64 features)
    """Pull each labelled pixel to its class prototype and push it from the others.

        z_k = <u, prototype_k> / temperature + 1/2 <u^2, variances_k> / temperature^2 + bias_k,   u = x/|x|
        loss = mean over labelled pixels of  -log softmax(z)[label]

    Differentiable once, in `features`, `prototypes`, `bias` and `temperature`.

    features      [B, D, h, w], [N, D], [B, D, L] or [B, D, T, h, w]: float32, bfloat16, float16 (float64: reference backend); any strides,
                  no copy is made.
    labels        integers [B, H, W] of any size, or [N]: read at the features' pixels by the rule of F.interpolate(mode="nearest");
                  bool is 0 and 1.
                  Floating [B, K, h, w] or [N, K], on the features' grid: probabilities t, loss = -sum_k t_k log softmax(z)_k as in
                  F.cross_entropy. A pixel whose probabilities are all 0 is unlabelled. `TeacherTargets`: probabilities that are computed
                  and never stored.
    prototypes    [K, D], or [B, K, D] for one set per image (with prototype_class [M, D] or [B, M, D]); used as they are: they are not
                  normalised here. Next to half-float features GPU backends round them to the same dtype, as autocast does.
    temperature   a number, or a tensor of shape [] that may be learned; it is read where it is, without a host sync. Must be finite and
                  above 0: on the CPU ValueError, on a GPU a tensor's value is not looked at.
    normalize     False: the dot product with x itself.
    ignore_index  pixels with this label have loss 0 and gradient exactly 0. No class may be named so where labels are probabilities.
    class_weight  [K], as in F.cross_entropy: the mean divides by the summed class weights of the labelled pixels (by the number of labelled
                  pixels for probabilities and for loss="sigmoid").
    pixel_weight  of the features' grid, or of the integer labels' shape, then read by the nearest rule: multiplies a pixel's loss and
                  gradient and is not part of the mean's denominator.
    variances     of the prototypes' shape: the quadratic term of z; a constant.
    reduction     "mean" | "sum" | "none" (the map, 0 where ignored). Nothing labelled, or a mean whose denominator is 0 (all labels of
                  class weight 0): 0, and gradient 0, where F.cross_entropy has NaN.
    backend       "reference" | "cpu" | "triton" | "cuda"; None: the fastest usable one.
    bias          [K] or [B, K], with prototype_class [M] or [B, M]: added to the logit after the temperature: a linear head, log
                  priors, -1/2 |prototype|^2.
    label_smoothing  e: the target is (1 - e) t_k + e/K, as in F.cross_entropy, class weights included.
    prototype_class  [M]: class of each of M rows of prototypes; a class's z is its rows' z pooled by `pool`: "logsumexp" or "max" (of equal
                  rows the lowest has the gradient). K = prototype_class.max() + 1, or `num_classes` where that is more; a class without a
                  row has probability 0. On a GPU, `num_classes` saves a wait for the maximum (once per tensor).
    margin        m: the label's logit has <u, prototype_label> - m for its dot product (CosFace).
    positive_variance  False (with `variances`): the label's logit in the numerator has no variance term, loss = logsumexp(z) -
                  (<u, prototype_label> / temperature + bias_label): the DistCL loss of SePiCo.
    denominator   what "mean" divides by: "labelled" pixels, "all" pixels of the grid, or a tensor of shape [].
    loss          "sigmoid": sum over k of the binary cross-entropy of z_k with [k = label], weighted by class_weight.

    Raises ValueError or TypeError for shapes, dtypes, devices and settings that do not fit, and for options that mean nothing together,
    before any kernel runs; on the CPU ValueError for a label outside [0, K) that is not ignore_index and for a probability that is
    negative, NaN or infinite (on a GPU the loss is NaN and `check_labels` reports the label).
    Memory: the forward reads the features once and keeps 8 bytes per pixel, on a GPU 12 (+ 4 K where K <= D/4, if the backend finds that
    cheaper than computing them again); the backward reads them once more and writes the gradient, the only feature-sized allocation.
    In one pass (CUDA, only where asked for) the forward writes the gradient, too, and keeps it instead of the features.
    Source: Xie et al., arXiv 2111.12358, L_cl; `core/utils/loss.py` of the released code (temperature 100). docs/losses.md lists which
    options are which paper's loss.
    """
    pixels = pixels_of(_OP, features)
    rows = Rows(prototypes, variances, bias, prototype_class, pool, num_classes)
    classes = check_rows(_OP, pixels, rows)
    temperature = checks.scale_of(_OP, pixels.features, temperature)
    checks.check_options(
        _OP, ignore_index=ignore_index, backend=backend, normalize=normalize, positive_variance=positive_variance
    )
    checks.check_reduction(_OP, reduction)
    if _is_soft(pixels, labels):
        checks.refuse_ignored_class(_OP, _soft_words(labels), ignore_index)
        if prototype_class is not None:
            checks.refuse_together(_OP, _soft_words(labels), "prototype_class", "soft labels are one per prototype")
    targets = _labels(pixels, labels, classes, backend)
    if class_weight is not None:
        class_weight = _class_weight(pixels, class_weight, classes)
    contrast = Contrast(
        pixels.features, targets, prototypes, class_weight, pixel_weight_of(_OP, pixels, labels, pixel_weight), variances, temperature,
        normalize, ignore_index, reduction,
    )  # fmt: skip
    plain = (label_smoothing, margin, pool, positive_variance, loss) == (0.0, 0.0, "logsumexp", True, "softmax")
    if not plain or bias is not None or prototype_class is not None or not _is_default(denominator):
        contrast = contrast._replace(
            bias=bias, label_smoothing=label_smoothing, pool=pool, margin=margin, positive_variance=positive_variance, loss=loss,
            prototype_class=None if prototype_class is None else prototype_class.long(), classes=classes,
            denominator=checks.denominator_of(_OP, denominator, reduction, pixels.features, pixels.grid),
        )  # fmt: skip
        _check_together(contrast)
    value = recorded(contrast, backend or "")
    return pixels.map(value) if reduction == "none" else value


def _is_default(denominator: str | Tensor) -> bool:
    return isinstance(denominator, str) and denominator == "labelled"


def _is_soft(pixels: Pixels, labels: object) -> bool:
    if isinstance(labels, TeacherTargets):
        return True
    return isinstance(labels, Tensor) and labels.dtype in checks.FLOATS and labels.dim() == len(pixels.grid) + 1


def _soft_words(labels: object) -> str:
    return "probabilities as labels" if isinstance(labels, Tensor) else "TeacherTargets"


def _labels(pixels: Pixels, labels: Tensor | TeacherTargets, classes: int, backend: str | None) -> Tensor | Teacher:
    if isinstance(labels, TeacherTargets):
        return teacher_of(_OP, pixels, labels.resolved(backend), classes)
    if _is_soft(pixels, labels):
        return probabilities_of(_OP, pixels, labels, classes)
    return labels_of(_OP, pixels, labels)


def _class_weight(pixels: Pixels, class_weight: Tensor, classes: int) -> Tensor:
    shape = (classes,) if classes else tuple(class_weight.shape)
    checks.check_constant(_OP, "class_weight", class_weight, (shape,), "one weight per class")
    checks.check_device(_OP, pixels.features, "features", class_weight=class_weight)
    return class_weight.to(checks.wide(pixels.features))


def _check_together(c: Contrast) -> None:
    """Options by themselves, then pairs that mean nothing."""
    checks.check_share(_OP, "label_smoothing", c.label_smoothing)
    checks.check_finite(_OP, "margin", c.margin)
    checks.check_choice(_OP, "loss", c.loss, _LOSS_CHOICES)
    soft = _soft_words(c.labels)
    if isinstance(c.labels, Teacher) or c.labels.is_floating_point():
        if c.margin:
            checks.refuse_together(_OP, soft, "margin", "a margin is taken from the one labelled class")
        if not c.positive_variance:
            checks.refuse_together(_OP, soft, "positive_variance=False", "it is about the one labelled class")
    if not c.positive_variance:
        for name, used in (
            ("label_smoothing", c.label_smoothing),
            ("loss='sigmoid'", c.loss == "sigmoid"),
            ("prototype_class", c.prototype_class is not None),
        ):
            if used:
                checks.refuse_together(
                    _OP, "positive_variance=False", name, "the numerator is one row's logit in the softmax"
                )
        if c.variances is None:
            checks.refuse_together(
                _OP, "positive_variance=False", "variances=None", "there is no variance term to leave out"
            )
