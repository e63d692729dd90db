"""The options whose problems are large: a teacher's targets, evaluation, GMMSeg. Each is ours and the users' formula, ready to call."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import spcl_fast as sf
from benchmarks.problems import IGNORE, upsampling_problem


def _teacher() -> tuple[Callable[[], object], Callable[[], object]]:
    """A DINO head: N 5000 rows, D 256, K 65536; eager holds two [N, K] tensors of 1.3 GB."""
    count, dim, heads, tau = 5000, 256, 65536, 0.05
    generator = torch.Generator().manual_seed(0)
    student = F.normalize(torch.randn(count, dim, generator=generator), dim=1).requires_grad_()
    teacher = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    prototypes = F.normalize(torch.randn(heads, dim, generator=generator), dim=1)
    u, v = sf.balance_(teacher, prototypes, temperature=tau, iterations=1)

    def mine():
        targets = sf.TeacherTargets(teacher, prototypes, tau, u, v)
        loss = sf.prototype_contrastive_loss(
            student, targets, prototypes, temperature=0.1, normalize=False, backend="cpu"
        )
        return torch.autograd.grad(loss, student)

    def eager():
        with torch.no_grad():
            targets = torch.exp(teacher @ prototypes.T / tau + u[:, None] + v)
        return torch.autograd.grad(F.cross_entropy(student @ prototypes.T / 0.1, targets), student)

    return mine, eager


def _confusion() -> tuple[Callable[[], object], Callable[[], object]]:
    """Evaluation at 2048x1024, 19 classes: interpolate, argmax, bincount."""
    logits, labels = upsampling_problem((1, 19, 128, 256), (1024, 2048))

    def mine():
        return sf.upsampled_confusion(logits, labels, backend="cpu")

    def eager():
        predicted = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True).argmax(1)
        known = labels != IGNORE
        return torch.bincount(labels[known].long() * 19 + predicted[known], minlength=361).view(19, 19)

    return mine, eager


def _gmmseg() -> tuple[Callable[[], object], Callable[[], object]]:
    """GMMSeg on a crop of ADE20K: 150 classes x 5 components, D 64; its own code broadcasts [N, K M, D]."""
    classes, components, dim, side = 150, 5, 64, 64
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, dim, side, side, generator=generator).requires_grad_()
    labels = torch.randint(0, classes, (1, side, side), generator=generator)
    mean = torch.randn(classes * components, dim, generator=generator)
    var = 0.5 + torch.rand(mean.shape, generator=generator)
    of_class = torch.arange(classes).repeat_interleave(components)
    bias = -0.5 * (mean.square() / var + var.log()).sum(1)

    def mine():
        loss = sf.prototype_contrastive_loss(
            features, labels, mean / var, variances=-1 / var, bias=bias, temperature=1.0, normalize=False,
            prototype_class=of_class, pool="max", backend="cpu",
        )  # fmt: skip
        return torch.autograd.grad(loss, features)

    def eager():
        x = features.flatten(2)[0].T
        density = -0.5 * ((x[:, None] - mean).square() / var + var.log()).sum(2)
        return torch.autograd.grad(
            F.cross_entropy(density.unflatten(1, (classes, -1)).amax(2), labels.flatten()), features
        )

    return mine, eager


TIES = 4  # pixels of a cell of the confusion matrix whose two best logits differ by rounding (1 measured, of 4155 at least)
LARGE = {
    "teacher targets": ("prototype_contrastive_loss", "N 5000, D 256, K 65536", _teacher),
    "evaluation": ("upsampled_confusion", "K 19, 128x256 to 1024x2048", _confusion),
    "GMMSeg": ("prototype_contrastive_loss", "750 rows, D 64, 64x64", _gmmseg),
}
