"""The formulas of `backends/contract.py` written out by plain autograd in float64: what every backend is measured against.

The arguments are those of the public ops, and dtype: what everything is computed in.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import spcl_fast as sf


def resized(labels: Tensor, height: int, width: int) -> Tensor:
    """Nearest rule, by the function that defines it (float64 holds every label exactly)."""
    if labels.shape[1:] == (height, width):
        return labels.long()
    return F.interpolate(labels[:, None].double(), (height, width), mode="nearest")[:, 0].long()


def as_images(rows: Tensor) -> Tensor:
    """[N, D] as [1, D, N, 1]."""
    return rows.T[None, :, :, None]


def class_logits(
    features, prototypes, *, temperature, normalize=True, bias=None, variances=None, prototype_class=None, pool="logsumexp",
    num_classes=None, dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """prototype_logits of [B, D, h, w]: [B, K, h, w]."""
    z = contrast_logits(
        features, prototypes, temperature=temperature, normalize=normalize, bias=bias, variances=variances,
        prototype_class=prototype_class, pool=pool, num_classes=num_classes, dtype=dtype,
    )  # fmt: skip
    return z.transpose(1, 2).unflatten(2, features.shape[2:])


def contrast_logits(
    features, prototypes, *, temperature, normalize=True, bias=None, variances=None, prototype_class=None, pool="logsumexp",
    num_classes=None, dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """[B, N, K]: the logits of every class at every pixel of features [B, D, h, w]."""
    x, bias = features.to(dtype).flatten(2).transpose(1, 2), None if bias is None else bias.to(dtype)
    temperature = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
    x = F.normalize(x, dim=-1) if normalize else x
    per_image = lambda rows: rows.to(dtype).expand(len(x), *rows.shape[-2:])  # noqa: E731
    z = x @ per_image(prototypes).transpose(1, 2) / temperature
    if variances is not None:
        z = z + 0.5 * x.square() @ per_image(variances).transpose(1, 2) / temperature**2
    if bias is not None:
        z = z + (bias[:, None] if bias.dim() == 2 else bias)
    return z if prototype_class is None else pooled(z, prototype_class, pool, num_classes)


def pooled(rows: Tensor, prototype_class: Tensor, pool: str, num_classes: int | None) -> Tensor:
    """[..., M] -> [..., K]"""
    parts = [rows[..., prototype_class == k] for k in range(num_classes or int(prototype_class.max()) + 1)]
    pools = {"logsumexp": lambda r: r.logsumexp(-1), "max": lambda r: r.amax(-1)}
    empty = torch.full_like(rows[..., 0], -torch.inf)
    return torch.stack([pools[pool](part) if part.shape[-1] else empty for part in parts], -1)


def of_teacher(teacher: sf.TeacherTargets, dtype: torch.dtype) -> Tensor:
    """[B, N, K]"""
    features, prototypes, temperature, u, v = teacher
    scores = features.to(dtype).flatten(2).transpose(1, 2) @ prototypes.to(dtype).T / temperature
    scores = scores if v is None else scores + v.to(dtype)
    return scores.softmax(-1) if u is None else (scores + u.to(dtype).flatten(1)[..., None]).exp()


def targets(
    labels, grid: tuple[int, int], classes: int, ignore_index: int, dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Probabilities [B, N, K], which pixels have a label [B, N], and the labels where they are integers."""
    if isinstance(labels, sf.TeacherTargets):
        target = of_teacher(labels, dtype)
        return target, torch.ones_like(target[..., 0], dtype=torch.bool), None
    if labels.is_floating_point():
        target = labels.to(dtype).flatten(2).transpose(1, 2)
        return target, target.sum(-1) > 0, None
    labels = resized(labels, *grid).flatten(1)
    labelled = labels != ignore_index
    index = labels.where(labelled, 0)
    return F.one_hot(index, classes).to(dtype), labelled, index


def contrast(
    features, labels, prototypes, *, temperature, normalize=True, ignore_index=255, class_weight=None, pixel_weight=None, variances=None,
    reduction="mean", bias=None, label_smoothing=0.0, prototype_class=None, pool="logsumexp", num_classes=None, margin=0.0,
    positive_variance=True, denominator="labelled", loss="softmax", dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """prototype_contrastive_loss of [B, D, h, w] or, with labels, of [N, D]."""
    shape = (features.shape[0], *features.shape[2:])
    if features.dim() == 2:
        features, labels = as_images(features), labels[None, :, None]
    linear = {"temperature": temperature, "normalize": normalize, "bias": bias, "dtype": dtype}
    pooling = {"prototype_class": prototype_class, "pool": pool, "num_classes": num_classes}
    rows = contrast_logits(features, prototypes, variances=variances, **linear)
    temperature = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
    classes = rows.shape[-1] if prototype_class is None else num_classes or int(prototype_class.max()) + 1
    target, labelled, index = targets(labels, features.shape[2:], classes, ignore_index, dtype)
    if margin:
        owner = torch.arange(classes) if prototype_class is None else prototype_class
        rows = rows - (owner == index[..., None]).to(dtype) * margin / temperature
    z = rows if prototype_class is None else pooled(rows, **pooling)
    weight = torch.ones(classes, dtype=dtype) if class_weight is None else class_weight.to(dtype)
    smooth = target * (1 - label_smoothing) + label_smoothing / classes
    if loss == "sigmoid":
        aimed = torch.where(smooth == 0, 0, smooth * z)
        nll = (weight * (F.softplus(z, threshold=1e9) - aimed)).sum(-1)
    elif positive_variance or variances is None:
        nll = torch.where(smooth == 0, 0, weight * smooth * (z.logsumexp(-1, keepdim=True) - z)).sum(-1)
    else:
        own = (
            contrast_logits(features, prototypes, **linear).gather(-1, index[..., None])[..., 0] - margin / temperature
        )
        nll = weight[index] * (z.logsumexp(-1) - own)
    counted = labelled.to(dtype) if index is None or loss == "sigmoid" else weight[index] * labelled
    nll = nll.where(labelled, 0) * (1 if pixel_weight is None else pixel_weight.to(dtype).flatten(1))
    return reduced(nll.view(shape), labelled, counted, reduction, denominator)


def reduced(nll: Tensor, labelled: Tensor, counted: Tensor, reduction: str, denominator: str | Tensor) -> Tensor:
    if reduction != "mean":
        return nll if reduction == "none" else nll.sum()
    if isinstance(denominator, str):
        denominator = {"labelled": counted.sum(), "all": labelled.numel()}[denominator]
    return nll.sum() / denominator


def moments(features, labels, num_classes, *, normalize=True, ignore_index=255, pixel_weight=None, dtype=torch.float64):
    """sums [K, D], counts [K] (integers without pixel_weight), squares [K, D] by a one-hot product."""
    if features.dim() == 4:
        labels = resized(labels, *features.shape[2:])
        features = features.permute(0, 2, 3, 1).flatten(0, 2)
    rows, labels = features.to(dtype), labels.flatten().long()
    if normalize:
        rows = F.normalize(rows, dim=1)
    one_hot = F.one_hot(labels.where(labels != ignore_index, num_classes), num_classes + 1)[:, :num_classes].to(dtype)
    rows = rows.where((labels != ignore_index)[:, None], 0)
    if pixel_weight is not None:
        one_hot = one_hot * pixel_weight.to(dtype).flatten()[:, None]
    counts = one_hot.sum(0).long() if pixel_weight is None else one_hot.sum(0)
    return one_hot.T @ rows, counts, one_hot.T @ rows.square()


def interpolated(logits: Tensor, size, *, temperature=1.0, align_corners=True, dtype=torch.float64) -> Tensor:
    bilinear = {"size": tuple(size), "mode": "bilinear", "align_corners": align_corners}
    return F.interpolate(logits.to(dtype), **bilinear) / temperature


def upsampled(
    logits, labels, *, temperature=1.0, align_corners=True, ignore_index=255, class_weight=None, pixel_weight=None, reduction="mean",
    label_smoothing=0.0, denominator="labelled", size=None, gamma=None, dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """The losses of up-sampled logits; gamma: the binary one."""
    soft, classes = labels.is_floating_point(), logits.shape[1]
    size = size or (labels.shape[2:] if soft else labels.shape[1:])
    z = interpolated(logits, size, temperature=temperature, align_corners=align_corners, dtype=dtype)
    weight = (torch.ones(classes, dtype=dtype) if class_weight is None else class_weight.to(dtype))[:, None, None]
    if soft:
        target = interpolated(labels, size, align_corners=align_corners, dtype=dtype)
        labelled = target.sum(1) > 0
    else:
        labelled = labels != ignore_index
        index = labels.long().where(labelled, 0)
        target = F.one_hot(index, classes).permute(0, 3, 1, 2).to(dtype)
    smooth = target * (1 - label_smoothing) + label_smoothing / classes
    if gamma is not None:
        wrong = smooth * (-z).sigmoid() + (1 - smooth) * z.sigmoid()
        nll = (weight * F.binary_cross_entropy_with_logits(z, smooth, reduction="none") * wrong**gamma).sum(1)
    else:
        nll = torch.where(smooth == 0, 0, weight * smooth * (z.logsumexp(1, keepdim=True) - z)).sum(1)
    counted = labelled.to(dtype) if soft or gamma is not None else weight[:, 0, 0][index] * labelled
    nll = nll.where(labelled, 0) * (1 if pixel_weight is None else pixel_weight.to(dtype))
    return reduced(nll, labelled, counted, reduction, denominator)


def prediction(logits, size, **settings) -> Mapping[str, Tensor]:
    """What upsampled_prediction gives in float64, and how far the best probability lies from the second."""
    probability = interpolated(logits, size, **settings).softmax(1)
    confidence, labels = probability.max(1)
    second = probability.topk(2, 1).values[:, 1] if probability.shape[1] > 1 else torch.zeros_like(confidence)
    return {"labels": labels, "confidence": confidence, "margin": confidence - second}


def nan_pixels(logits: Tensor, size: tuple[int, int], *, align_corners: bool) -> tuple[Tensor, Tensor]:
    """[B, H, W]: pixels with a part of a NaN node of any class; and those between which and such a node lies at most a rounding, where a
    weight of 0 may still make NaN of it."""
    nodes = logits.isnan().any(1, keepdim=True).double()
    certain = F.interpolate(nodes, size, mode="bilinear", align_corners=align_corners)[:, 0] > 1e-4
    near = F.max_pool2d(nodes, 3, 1, 1)
    return certain, F.interpolate(near, size, mode="bilinear", align_corners=align_corners)[:, 0] > 1e-4


def assert_as_accurate(got: Tensor, eager: Tensor, truth: Tensor, factor: float = 2.0, slack: float = 4.0) -> None:
    """`got` may be `factor` times worse than same-dtype eager PyTorch, both against the float64 `truth`, plus a few eps of its scale."""
    truth = truth.double()
    assert got.shape == truth.shape
    error = (got.double() - truth).abs().max().item() if got.numel() else 0.0
    allowed = (eager.double() - truth).abs().max().item() if got.numel() else 0.0
    scale = truth.abs().max().item() if got.numel() else 0.0
    limit = factor * allowed + slack * torch.finfo(got.dtype).eps * scale
    assert error <= limit, f"error {error:.3e} against float64; same-dtype eager has {allowed:.3e}, limit {limit:.3e}"
