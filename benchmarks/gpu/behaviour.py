"""The parts of `make gpu` about how the ops behave: CUDA graphs, streams, determinism, more than 2**31 elements, torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import spcl_fast as sf
from benchmarks.gpu.right import gradients
from benchmarks.gpu.where import Skipped
from benchmarks.problems import contrast_problem, upsampling_problem


def _calls(context):
    """name -> a call of one op on inputs of its own; results as a tuple of tensors."""
    shape, low, size = (
        ((1, 20, 3, 5), (1, 3, 3, 4), (9, 12)) if context.dry else ((2, 256, 64, 128), (2, 19, 33, 65), (256, 512))
    )
    features, labels, prototypes = contrast_problem(shape, 5, torch.float32)
    logits, big = upsampling_problem(low, size, torch.float32)
    asked = {"temperature": 0.1, "backend": context.backend}
    return {
        **one_pass_calls(context, features, labels, prototypes),
        "contrast": lambda: gradients(sf.prototype_contrastive_loss, features, labels, prototypes, **asked),
        "moments": lambda: sf.class_moments(features, labels, len(prototypes), squares=True, backend=context.backend),
        "upsample": lambda: gradients(sf.upsampled_cross_entropy, logits, big, backend=context.backend),
        "prediction": lambda: sf.upsampled_prediction(logits, size, backend=context.backend),
    }


def one_pass_calls(context, features, labels, prototypes) -> dict:
    """The same for the form in one pass, where the backend has it; half its launches scale, too."""
    if not context.in_one_pass(features, len(prototypes)):
        return {}

    def call(factor):
        def loss(f, y):
            return factor * sf.prototype_contrastive_loss(f, y, prototypes, temperature=0.1, backend=context.backend)

        with context.in_one_pass(features, len(prototypes)):
            return gradients(loss, features, labels)

    return {"contrast in one pass": lambda: call(1.0), "contrast in one pass, scaled": lambda: call(0.5)}


def _differ(a, b) -> bool:
    return not all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def graphs_and_streams(context) -> dict:
    """Each op captured into a CUDA graph and replayed 100 times, and run on a side stream: the same bits."""
    if context.dry:
        raise Skipped("CUDA graphs need a GPU")
    failures = []
    for name, call in _calls(context).items():
        expected = [t.clone() for t in call()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            on_side = call()
        torch.cuda.current_stream().wait_stream(side)
        if _differ(expected, on_side):
            failures.append(f"{name}: other bits on a side stream")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for _ in range(100):
            graph.replay()
        torch.cuda.synchronize()
        if _differ(expected, captured):
            failures.append(f"{name}: other bits from a CUDA graph")
    return {"ops": list(_calls(context)), "failures": failures}


def determinism(context) -> dict:
    """The same call again and again: the same bits."""
    repeats = 2 if context.dry else 100
    failures = []
    for name, call in _calls(context).items():
        expected = [t.clone() for t in call()]
        if any(_differ(expected, call()) for _ in range(repeats)):
            failures.append(f"{name}: a repeat gave other bits")
    return {"repeats": repeats, "failures": failures}


def beyond_2_31(context) -> dict:
    """More than 2**31 elements: the last image of a huge batch must give the bits it gives alone."""
    if context.dry:
        raise Skipped("needs the memory of a GPU")
    failures = []

    def same(name, batch, alone):
        if not torch.equal(batch, alone) or batch.isnan().any():
            failures.append(f"{name}: the last image differs from the same image alone")

    shape, dtype = (127, 2048, 65, 129), torch.bfloat16
    features = torch.randn(shape, device=context.device, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 19, (127, 65, 129), device=context.device)
    prototypes = F.normalize(torch.randn(19, 2048, device=context.device), dim=1)
    loss = sf.prototype_contrastive_loss(
        features, labels, prototypes, temperature=0.1, reduction="none", backend=context.backend
    )
    (grad,) = torch.autograd.grad(loss.sum(), features)
    alone = features[-1:].detach().clone().requires_grad_()
    loss_alone = sf.prototype_contrastive_loss(
        alone, labels[-1:], prototypes, temperature=0.1, reduction="none", backend=context.backend
    )
    (grad_alone,) = torch.autograd.grad(loss_alone.sum(), alone)
    same("contrast loss", loss[-1:], loss_alone)
    same("contrast gradient", grad[-1:], grad_alone)
    only_last = torch.full_like(labels, 255)
    only_last[-1] = labels[-1]
    sums = sf.class_moments(features.detach(), only_last, 19, backend=context.backend).sums
    expected = sf.class_moments(alone.detach(), labels[-1:], 19, backend=context.backend).sums
    if not torch.allclose(sums, expected, rtol=1e-4, atol=1e-4):
        failures.append("moments: the last image differs from the same image alone")
    del features, grad, loss, alone, grad_alone
    failures += _rows_beyond_2_24(context)

    logits = torch.randn(1025, 2, 16, 32, device=context.device).requires_grad_()
    labels = torch.randint(0, 2, (1025, 1024, 2048), device=context.device, dtype=torch.uint8)
    loss = sf.upsampled_cross_entropy(logits, labels, reduction="sum", backend=context.backend)
    (grad,) = torch.autograd.grad(loss, logits)
    alone = logits[-1:].detach().clone().requires_grad_()
    (grad_alone,) = torch.autograd.grad(
        sf.upsampled_cross_entropy(alone, labels[-1:], reduction="sum", backend=context.backend), alone
    )
    same("upsample, labels beyond 2**31", grad[-1:], grad_alone)
    del labels, grad, logits

    logits = torch.randn(55, 19, 1024, 2048, device=context.device, dtype=torch.bfloat16)
    got = sf.upsampled_prediction(logits, (128, 256), backend=context.backend)
    expected = sf.upsampled_prediction(logits[-1:].clone(), (128, 256), backend=context.backend)
    same("prediction, logits beyond 2**31", got.confidence[-1:], expected.confidence)
    return {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1), "failures": failures}


def _rows_beyond_2_24(context) -> list[str]:
    """[N, D] with more rows than float32 can count: the last ones must give what they give alone. Under 1 GB."""
    first, rows = 2**24, 1024  # a whole number of tiles before the last rows
    features = torch.randn(first + rows, 4, device=context.device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 5, (first + rows,), device=context.device, dtype=torch.uint8)
    prototypes = F.normalize(torch.randn(5, 4, device=context.device), dim=1)
    asked = {"temperature": 0.1, "reduction": "none", "backend": context.backend}
    loss = sf.prototype_contrastive_loss(features, labels, prototypes, **asked)
    (grad,) = torch.autograd.grad(loss.sum(), features)
    alone = features[first:].detach().clone().requires_grad_()
    loss_alone = sf.prototype_contrastive_loss(alone, labels[first:], prototypes, **asked)
    (grad_alone,) = torch.autograd.grad(loss_alone.sum(), alone)
    labels[:first] = 255
    counts = sf.class_moments(features.detach(), labels, 5, backend=context.backend).counts
    pairs = {
        "contrast loss": (loss[first:], loss_alone), "contrast gradient": (grad[first:], grad_alone),
        "moments": (counts, torch.bincount(labels[first:].long(), minlength=5)),
    }  # fmt: skip
    return [
        f"{name}: rows beyond 2**24 differ from the same rows alone"
        for name, (a, b) in pairs.items()
        if not torch.equal(a, b)
    ]


def compiled(context) -> dict:
    """torch.compile(fullgraph=True) around each loss, ignored pixels included: the same bits."""
    failures = []
    backend = "aot_eager" if context.dry else "inductor"
    features, labels, prototypes = contrast_problem(
        (1, 20, 3, 5) if context.dry else (2, 256, 32, 64), 5, torch.float32
    )
    logits, big = upsampling_problem((1, 3, 3, 4), (9, 12), torch.float32)

    def both(features, labels, prototypes, logits, big):
        contrast = sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.1, backend=context.backend)
        return contrast + sf.upsampled_cross_entropy(logits, big, backend=context.backend)

    expected = gradients(both, features, labels, prototypes, logits, big)
    if _differ(
        expected,
        gradients(torch.compile(both, fullgraph=True, backend=backend), features, labels, prototypes, logits, big),
    ):
        failures.append("torch.compile gives other bits")
    return {"backend": backend, "failures": failures}
