"""The part of `make gpu` that asks whether the answers are right: every op against float64."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

import spcl_fast as sf
from benchmarks.peers import formulas
from benchmarks.problems import contrast_problem, upsampling_problem


def _dtypes(context):
    return (torch.float32, torch.float16) if context.dry else (torch.float32, torch.bfloat16, torch.float16)


def gradients(function, *tensors, **settings):
    """-> loss and the gradients of the tensors that are floating."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    loss = function(*leaves, **settings)
    grads = torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])
    return (loss.detach(), *grads)


def worst_ratio(got, eager, truth) -> float:
    """Our error over that of same-dtype eager, both against float64; a few eps of the scale are free."""
    ratios = []
    for g, e, t in zip(got, eager, truth, strict=True):
        if g.isnan().any():
            return float("inf")
        scale = 4 * torch.finfo(e.dtype).eps * t.abs().max().item()
        error, allowed = (g.double() - t).abs().max().item(), (e.double() - t).abs().max().item()
        ratios.append(error / max(allowed, scale, 1e-300))
    return max(ratios)


def eager_contrast(features, labels, prototypes, temperature):
    """All in the features' dtype, as a user would write it."""
    rows = F.normalize(features, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    return F.cross_entropy(
        rows @ prototypes.to(rows.dtype).t() / temperature, labels.flatten().long(), ignore_index=255
    )


def accuracy(context) -> dict:
    """Every op, dtype, temperature and kernel form against float64: at most twice the error of same-dtype eager."""
    rows, failures, left_out = [], [], set()
    shapes = [((1, 40, 5, 7), 5), ((2, 9, 3, 5), 40)]
    if not context.dry:
        shapes = [((2, 256, 65, 129), 19), ((1, 2048, 31, 37), 19), ((1, 512, 64, 64), 150)]
        shapes += [((2, 256, 33, 48), 1900), ((1, 1024, 17, 23), 1900)]
    for (shape, classes), dtype, temperature in itertools.product(shapes, _dtypes(context), (0.05, 1.0, 100.0)):
        features, labels, prototypes = contrast_problem(shape, classes, dtype)
        lacks = context.lacks("prototype_contrastive_loss", dtype, classes, shape[1])
        if lacks:
            left_out.add(lacks)
        for layout in () if lacks else ("pixels", "channels"):
            features = features.contiguous(
                memory_format=torch.channels_last if layout == "channels" else torch.contiguous_format
            )
            asked = {"temperature": temperature, "backend": context.backend}
            got = gradients(sf.prototype_contrastive_loss, features, labels, prototypes, **asked)
            eager = gradients(eager_contrast, features, labels, prototypes, temperature=temperature)
            truth = gradients(eager_contrast, features.double(), labels, prototypes.double(), temperature=temperature)
            rows.append(
                [
                    "contrast",
                    str(dtype),
                    list(shape),
                    classes,
                    layout,
                    temperature,
                    round(worst_ratio(got, eager, truth), 3),
                ]
            )
            if once := context.in_one_pass(features, classes):
                with once:
                    got = gradients(sf.prototype_contrastive_loss, features, labels, prototypes=prototypes, **asked)
                ratio = worst_ratio(got, eager[:2], truth[:2])
                rows.append(
                    ["contrast in one pass", str(dtype), list(shape), classes, layout, temperature, round(ratio, 3)]
                )
        if temperature == 1.0:
            got = sf.class_moments(features, labels, classes, backend=context.backend)
            truth = formulas.one_hot_sums(features.double(), labels, classes)
            eager = formulas.one_hot_sums(features, labels, classes)
            ratio = worst_ratio([got.sums], [eager], [truth])
            rows.append(["moments", str(dtype), list(shape), classes, "channels", None, round(ratio, 3)])
    cases = [((1, 3, 3, 4), (9, 17))]
    if not context.dry:
        cases = [((1, 19, 33, 65), (257, 513)), ((2, 19, 32, 64), (128, 256)), ((1, 150, 65, 33), (40, 90))]
    for (shape, size), dtype in itertools.product(cases, _dtypes(context)):
        logits, labels = upsampling_problem(shape, size, dtype)
        got = gradients(sf.upsampled_cross_entropy, logits, labels, backend=context.backend, temperature=1.8)
        eager = gradients(formulas.interpolate_cross_entropy, logits, labels, temperature=1.8)
        truth = gradients(_exact_upsampled, logits.double(), labels, temperature=1.8)
        rows.append(["upsample", str(dtype), list(shape), size, "", 1.8, round(worst_ratio(got, eager, truth), 3)])
        got = sf.upsampled_prediction(logits, size, backend=context.backend)
        exact = F.interpolate(logits.double(), size, mode="bilinear", align_corners=True).softmax(1).max(1)
        worst = (got.confidence.double() - exact.values).abs().max().item()
        agree = (got.labels == exact.indices).double().mean().item()
        if worst > 1e-4 or agree < 0.9999:
            failures.append(f"prediction {dtype} {shape}: confidence off by {worst:.1e}, labels agree {agree:.5f}")
    failures += [f"{row}: error more than twice that of eager" for row in rows if not row[-1] <= 2]
    columns = ["op", "dtype", "shape", "classes or size", "layout", "temperature", "error over eager's"]
    return {"columns": columns, "rows": rows, "left_out": sorted(left_out), "failures": failures}


def _exact_upsampled(logits, labels, temperature):
    up = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(up / temperature, labels.long(), ignore_index=255)
