"""The paper's formulas in float64 by plain autograd, and the same formulas eagerly in a given dtype: what every backend is judged by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resized(labels: Tensor, height: int, width: int) -> Tensor:
    """Nearest rule, by the function that defines it (float64 holds every label exactly)."""
    return F.interpolate(labels[:, None].double(), (height, width), mode="nearest")[:, 0].long()


def reduced(
    nll: Tensor, labels: Tensor, num_classes: int, class_weight, pixel_weight, ignore_index: int, reduction: str
) -> Tensor:
    labelled = labels != ignore_index
    weight = torch.ones(num_classes, dtype=nll.dtype) if class_weight is None else class_weight.to(nll.dtype)
    weight = weight[labels.where(labelled, 0)] * labelled
    loss = torch.where(labelled, nll * weight * (1 if pixel_weight is None else pixel_weight.to(nll.dtype)), 0)
    if reduction == "none":
        return loss
    return loss.sum() / weight.sum() if reduction == "mean" else loss.sum()


def contrast(
    features, labels, prototypes, *, temperature, normalize=True, ignore_index=255, class_weight=None, pixel_weight=None, variances=None,
    reduction="mean", dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """The loss as the paper writes it, on [N, D] rows, in `dtype`; differentiable by autograd."""
    num_classes = len(prototypes)
    if features.dim() == 2:
        rows, shape = features.to(dtype), features.shape[:1]
    else:
        labels = resized(labels, *features.shape[2:])
        rows, shape = features.to(dtype).permute(0, 2, 3, 1).flatten(0, 2), labels.shape
    if normalize:
        rows = F.normalize(rows, dim=1)
    logits = rows @ prototypes.to(dtype).T / temperature
    if variances is not None:
        logits = logits + 0.5 * rows.square() @ variances.to(dtype).T / temperature**2
    labels = labels.reshape(shape).long()
    target = labels.where(labels != ignore_index, 0).flatten()
    nll = F.cross_entropy(logits, target, reduction="none").view(shape)
    return reduced(nll, labels, num_classes, class_weight, pixel_weight, ignore_index, reduction)


def contrast_logits(
    features, prototypes, *, temperature, normalize=True, bias=None, variances=None, prototype_class=None, pool="logsumexp",
    num_classes=None, dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """[B, N, K]: the logits of every class at every pixel of features [B, D, h, w]; differentiable by autograd."""
    x, bias = features.to(dtype).flatten(2).transpose(1, 2), None if bias is None else bias.to(dtype)
    temperature = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
    x = F.normalize(x, dim=-1) if normalize else x
    per_image = lambda rows: rows.to(dtype).expand(len(x), *rows.shape[-2:])  # noqa: E731
    z = x @ per_image(prototypes).transpose(1, 2) / temperature
    if variances is not None:
        z = z + 0.5 * x.square() @ per_image(variances).transpose(1, 2) / temperature**2
    if bias is not None:
        z = z + (bias[:, None] if bias.dim() == 2 else bias)
    if prototype_class is None:
        return z
    classes = num_classes or int(prototype_class.max()) + 1
    rows = [z[..., prototype_class == k] for k in range(classes)]
    pools = {"logsumexp": lambda r: r.logsumexp(-1), "max": lambda r: r.amax(-1)}
    return torch.stack([pools[pool](r) if r.shape[-1] else torch.full_like(z[..., 0], -torch.inf) for r in rows], -1)


def contrast_with_options(
    features, labels, prototypes, *, temperature, normalize=True, ignore_index=255, class_weight=None, pixel_weight=None, variances=None,
    reduction="mean", bias=None, label_smoothing=0.0, prototype_class=None, pool="logsumexp", num_classes=None, margin=0.0,
    positive_variance=True, denominator="labelled", loss="softmax", dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """prototype_contrastive_loss of [B, D, h, w] with labels of that grid, written out; differentiable by autograd."""
    linear = {"temperature": temperature, "normalize": normalize, "bias": bias, "prototype_class": prototype_class, "pool": pool,
              "num_classes": num_classes, "dtype": dtype}  # fmt: skip
    z = contrast_logits(features, prototypes, variances=variances, **linear)
    classes, shape = z.shape[-1], (features.shape[0], *features.shape[2:])
    temperature = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
    soft = labels.is_floating_point()
    weight = torch.ones(classes, dtype=dtype) if class_weight is None else class_weight.to(dtype)
    if soft:
        target = labels.to(dtype).flatten(2).transpose(1, 2)
        labelled = target.sum(-1) > 0
    else:
        labelled = labels.flatten(1) != ignore_index
        index = labels.flatten(1).long().where(labelled, 0)
        target = F.one_hot(index, classes).to(dtype)
        z = z - target * margin / temperature
    smooth = target * (1 - label_smoothing) + label_smoothing / classes
    if loss == "sigmoid":
        nll = (weight * F.binary_cross_entropy_with_logits(z, smooth, reduction="none")).sum(-1)
    elif positive_variance or variances is None:
        nll = torch.where(smooth == 0, 0, weight * smooth * (z.logsumexp(-1, keepdim=True) - z)).sum(-1)
    else:
        own = (
            contrast_logits(features, prototypes, **linear).gather(-1, index[..., None])[..., 0] - margin / temperature
        )
        nll = weight[index] * (z.logsumexp(-1) - own)
    counted = labelled.to(dtype) if soft or loss == "sigmoid" else weight[index] * labelled
    nll = nll.where(labelled, 0) * (1 if pixel_weight is None else pixel_weight.to(dtype).flatten(1))
    if reduction == "none":
        return nll.view(shape)
    if reduction == "sum":
        return nll.sum()
    if isinstance(denominator, str):
        denominator = {"labelled": counted.sum(), "all": labelled.numel()}[denominator]
    return nll.sum() / denominator


def laid_out(features: Tensor, labels: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The same values [B, D, H, W] as they may lie in memory; for "rows" as [B * H * W, D] with the labels [B, H, W] flat."""
    height, width = features.shape[2:]
    if layout == "channels_last":
        return features.contiguous(memory_format=torch.channels_last), labels
    if layout == "sliced":
        return F.pad(features, (2, 3, 1, 1), value=torch.nan)[:, :, 1 : height + 1, 2 : width + 2], labels
    if layout == "transposed":
        return features.transpose(2, 3).contiguous().transpose(2, 3), labels
    if layout == "rows":
        return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]), labels.flatten()
    if layout == "misaligned":
        return torch.cat([features.new_zeros(1), features.flatten()])[1:].view(features.shape), labels
    if layout == "every other image":
        return features.repeat_interleave(2, 0)[::2], labels
    raise ValueError(layout)


def moments(features, labels, num_classes, *, normalize=True, ignore_index=255, dtype=torch.float64):
    """sums [K, D], counts [K], squares [K, D] by a one-hot product."""
    if features.dim() == 4:
        labels = resized(labels, *features.shape[2:])
        features = features.permute(0, 2, 3, 1).flatten(0, 2)
    rows, labels = features.to(dtype), labels.flatten().long()
    if normalize:
        rows = F.normalize(rows, dim=1)
    one_hot = F.one_hot(labels.where(labels != ignore_index, num_classes), num_classes + 1)[:, :num_classes].to(dtype)
    return one_hot.T @ rows, one_hot.sum(0).long(), one_hot.T @ rows.square()


def upsampled(
    logits, labels, *, temperature=1.0, align_corners=True, ignore_index=255, class_weight=None, pixel_weight=None, reduction="mean",
    dtype=torch.float64,
) -> Tensor:  # fmt: skip
    up = F.interpolate(logits.to(dtype), labels.shape[1:], mode="bilinear", align_corners=align_corners) / temperature
    labels = labels.long()
    nll = F.cross_entropy(up, labels.where(labels != ignore_index, 0), reduction="none")
    return reduced(nll, labels, logits.shape[1], class_weight, pixel_weight, ignore_index, reduction)


def upsampled_with_options(
    logits, labels, *, temperature=1.0, align_corners=True, ignore_index=255, class_weight=None, pixel_weight=None, reduction="mean",
    label_smoothing=0.0, denominator="labelled", size=None, gamma=None, dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """The losses of up-sampled logits, written out; gamma: the binary one."""
    soft = labels.is_floating_point()
    size = size or (labels.shape[2:] if soft else labels.shape[1:])
    bilinear = {"size": tuple(size), "mode": "bilinear", "align_corners": align_corners}
    z, classes = F.interpolate(logits.to(dtype), **bilinear) / temperature, logits.shape[1]
    weight = (torch.ones(classes, dtype=dtype) if class_weight is None else class_weight.to(dtype))[:, None, None]
    if soft:
        target = F.interpolate(labels.to(dtype), **bilinear)
        labelled = target.sum(1) > 0
    else:
        labelled = labels != ignore_index
        index = labels.long().where(labelled, 0)
        target = F.one_hot(index, classes).permute(0, 3, 1, 2).to(dtype)
    smooth = target * (1 - label_smoothing) + label_smoothing / classes
    if gamma is not None:
        log_q = F.logsigmoid(torch.where(target > 0, z, -z))
        nll = -(weight * (1 - log_q.exp()) ** gamma * log_q).sum(1)
    else:
        nll = (weight * smooth * (z.logsumexp(1, keepdim=True) - z)).sum(1)
    counted = labelled.to(dtype) if soft or gamma is not None else weight[:, 0, 0][index] * labelled
    nll = nll.where(labelled, 0) * (1 if pixel_weight is None else pixel_weight.to(dtype))
    if reduction != "mean":
        return nll if reduction == "none" else nll.sum()
    if isinstance(denominator, str):
        denominator = {"labelled": counted.sum(), "all": labelled.numel()}[denominator]
    return nll.sum() / denominator


def assert_as_accurate(got: Tensor, eager: Tensor, truth: Tensor, factor: float = 2.0, slack: float = 4.0) -> None:
    """`got` may be `factor` times worse than same-dtype eager PyTorch, both judged by the float64 `truth`, plus a few eps of its scale."""
    truth = truth.double()
    assert got.shape == truth.shape
    error = (got.double() - truth).abs().max().item() if got.numel() else 0.0
    allowed = (eager.double() - truth).abs().max().item() if got.numel() else 0.0
    scale = truth.abs().max().item() if got.numel() else 0.0
    limit = factor * allowed + slack * torch.finfo(got.dtype).eps * scale
    assert error <= limit, f"error {error:.3e} against float64; same-dtype eager has {allowed:.3e}, limit {limit:.3e}"
