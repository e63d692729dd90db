"""What the C++ kernels of the up-sampled losses do beyond what the ops ask for: binary losses of smoothed labels and of probabilities."""

from __future__ import annotations

import oracle
import pytest
import torch
from on_backends import asked
from oracle import assert_as_accurate
from problems import problem

from spcl_fast.backends import cpu
from spcl_fast.backends.contract import UpsampledLoss

REASON = cpu.why_not(asked("upsampled_cross_entropy"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
OPTIONS = {
    "binary, smoothed": {"label_smoothing": 0.1, "class_weight": True},
    "binary, probabilities": {"labels": True},
    "focal, probabilities, smoothed": {"labels": True, "gamma": 1.5, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("low", "high", "batch"),
    [
        ((9, 11), (33, 70), 2),
        ((9, 11), (9, 11), 2),
        ((9, 11), (5, 7), 2),
        ((70, 6), (100, 13), 8),
        ((70, 6), (23, 13), 8),
    ],
)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_binary_loss_of_soft_labels_is_as_accurate_as_eager(option, low, high, batch, align_corners):
    p, options = problem((batch, 1, *low), 7, high), dict(OPTIONS[option])
    soft = options.pop("labels", False)
    labels = p.nodes if soft else p.labels
    if options.pop("class_weight", False):
        options |= {"class_weight": p.class_weight, "pixel_weight": p.label_weight}
    common = {"gamma": 0.0, "align_corners": align_corners, "temperature": 1.3} | options
    for reduction in ("mean", "none"):
        given = {
            "class_weight": None,
            "pixel_weight": None,
            "ignore_index": 255,
            "reduction": reduction,
            "size": high,
        } | common
        got = cpu.upsampled_binary_cross_entropy(UpsampledLoss(p.logits, labels, **given), reduction != "none")
        eager, truth = (
            by_autograd(p.logits, labels, dtype, reduction=reduction, size=high, **common)
            for dtype in (torch.float32, torch.float64)
        )
        for g, e, t in list(zip(got, eager, truth, strict=True))[: 2 if reduction == "mean" else 1]:
            assert_as_accurate(g, e, t)


def by_autograd(logits, labels, dtype, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.to(dtype, copy=True).requires_grad_()
    loss = oracle.upsampled(leaf, labels, dtype=dtype, **settings)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]
