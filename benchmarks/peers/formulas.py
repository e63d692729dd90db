"""The same values by other means: what our ops are timed against. Plain PyTorch transcriptions, and adapters of libraries where installed.

Every contrast peer has the signature (features, labels [B, h, w], prototypes [K, D], temperature) -> mean loss over labels != 255.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F


def released_contrast(features, labels, prototypes, temperature):
    """The released loss: F.normalize, two transposes with a copy, mm, cross-entropy. Source: core/utils/loss.py of SPCL."""
    unit = F.normalize(features, p=2, dim=1).transpose(1, 2).transpose(2, 3).contiguous().view(-1, features.shape[1])
    return F.cross_entropy(
        unit.mm(prototypes.to(unit.dtype).t()) / temperature, labels.view(-1).long(), ignore_index=255
    )


def channel_first_contrast(features, labels, prototypes, temperature):
    """The best eager formula we know: one matmul on [K, D] x [D, P], the norm applied to the logits, no transpose."""
    x = features.flatten(2)
    inv = 1 / x.float().norm(dim=1, keepdim=True).clamp_min(1e-12)
    logits = (prototypes.to(x.dtype) @ x).float() * (inv / temperature)
    return F.cross_entropy(logits, labels.flatten(1).long(), ignore_index=255)


def _rows(features, labels):
    rows = F.normalize(features, dim=1).permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    return rows, labels.reshape(-1).long()


def linear_cross_entropy(features, labels, prototypes, temperature):
    rows, target = _rows(features, labels)
    return F.linear_cross_entropy(rows, (prototypes / temperature).to(rows.dtype), target, ignore_index=255)


def liger_contrast(features, labels, prototypes, temperature):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    rows, target = _rows(features, labels)
    return LigerFusedLinearCrossEntropyLoss(ignore_index=255)((prototypes / temperature).to(rows.dtype), rows, target)


def cut_contrast(features, labels, prototypes, temperature):
    from cut_cross_entropy import linear_cross_entropy as cut

    rows, target = _rows(features, labels)
    return cut(rows, (prototypes / temperature).to(rows.dtype), target, ignore_index=255)


def metric_learning_contrast(features, labels, prototypes, temperature):
    """NormalizedSoftmaxLoss of pytorch-metric-learning with these prototypes as its weights; it knows no ignored rows."""
    from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

    num_classes, dim = prototypes.shape
    loss = NormalizedSoftmaxLoss(num_classes, dim, temperature=temperature)
    loss.W = torch.nn.Parameter(prototypes.t().to(features.dtype), requires_grad=False)
    target = labels.reshape(-1).long()
    labelled = target != 255
    return loss(features.permute(0, 2, 3, 1).reshape(-1, dim)[labelled], target[labelled])


def contrast_peers() -> tuple[dict, dict[str, str]]:
    """-> {name: function}, {name: why it is not there}."""
    peers, missing = {"released": released_contrast, "channel_first": channel_first_contrast}, {}
    for name, function, package in (
        ("liger", liger_contrast, "liger_kernel"),
        ("cut_cross_entropy", cut_contrast, "cut_cross_entropy"),
        ("metric_learning", metric_learning_contrast, "pytorch_metric_learning"),
    ):
        if importlib.util.find_spec(package):
            peers[name] = function
        else:
            missing[name] = f"{package} is not installed"
    if hasattr(F, "linear_cross_entropy"):
        peers["linear_cross_entropy"] = linear_cross_entropy
    else:
        missing["linear_cross_entropy"] = f"torch {torch.__version__} has no F.linear_cross_entropy"
    return peers, missing


def released_prototypes(features, labels, num_classes):
    """The released update's means: a boolean mask over the transposed copy per class. Source: train_ours.py of SPCL."""
    batch, dim, height, width = features.shape
    unit = F.normalize(features, p=2, dim=1).transpose(1, 2).transpose(2, 3).contiguous()
    labels, current = labels.long(), features.new_zeros(dim, num_classes)
    for k in labels.unique():
        if k != 255:
            mask = labels == k
            rows = unit[mask.view(batch, height, width, 1).repeat(1, 1, 1, dim)].view(-1, dim)
            current[:, [k]] = rows.mean(0).view(-1, 1)
    return current


def one_hot_sums(features, labels, num_classes):
    """Class sums by a one-hot product per image, without a transpose of the features."""
    target = labels.flatten(1).long()
    one_hot = F.one_hot(target.where(target != 255, num_classes), num_classes + 1)[..., :num_classes].to(features.dtype)
    unit = F.normalize(features, dim=1).flatten(2)
    return torch.bmm(unit, one_hot).sum(0).t()


def interpolate_cross_entropy(logits, labels, temperature):
    up = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(up.float() / temperature, labels.long(), ignore_index=255)


def interpolate_prediction(logits, size):
    confidence, labels = F.interpolate(logits, size, mode="bilinear", align_corners=True).float().softmax(1).max(1)
    return labels.to(torch.uint8), confidence
