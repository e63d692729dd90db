"""The parts of `gpu.py` that ask whether the answers are right: accuracy, graphs, streams, determinism, size, compile, tests, sanitizer."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_context import Context, Skipped
from peers import formulas

import spcl_fast as sf
from spcl_fast import backends

BENCHMARKS = Path(__file__).resolve().parent


def _dtypes(context):
    return (torch.float32, torch.float16) if context.dry else (torch.float32, torch.bfloat16, torch.float16)


def problem(context, shape, num_classes, dtype, seed=0, label_dtype=torch.uint8):
    """Fresh random features, blocky labels with a border of 255, unit prototypes. Never zeros."""
    generator = torch.Generator(context.device).manual_seed(seed)
    batch, dim, height, width = shape
    features = torch.randn(shape, generator=generator, device=context.device, dtype=torch.float32).to(dtype)
    coarse = torch.randint(
        0, num_classes, (batch, -(-height // 8), -(-width // 8)), generator=generator, device=context.device
    )
    labels = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].contiguous()
    labels[:, : height // 8] = 255
    prototypes = F.normalize(torch.randn(num_classes, dim, generator=generator, device=context.device), dim=1)
    return features, labels.to(label_dtype if num_classes <= 255 else torch.int64), prototypes


def upsampling_problem(context, shape, size, dtype, seed=0):
    generator = torch.Generator(context.device).manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=generator, device=context.device)).to(dtype)
    labels = torch.randint(
        0, shape[1], (shape[0], *size), generator=generator, device=context.device, dtype=torch.uint8
    )
    labels[:, : size[0] // 8] = 255
    return logits, labels


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
        features, labels, prototypes = problem(context, shape, classes, dtype)
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
        logits, labels = upsampling_problem(context, shape, size, dtype)
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


def _calls(context):
    """name -> a call of one op on inputs of its own; results as a tuple of tensors."""
    shape, low, size = (
        ((1, 20, 3, 5), (1, 3, 3, 4), (9, 12)) if context.dry else ((2, 256, 64, 128), (2, 19, 33, 65), (256, 512))
    )
    features, labels, prototypes = problem(context, shape, 5, torch.float32)
    logits, big = upsampling_problem(context, low, size, torch.float32)
    asked = {"temperature": 0.1, "backend": context.backend}
    return {
        **_one_pass_calls(context, features, labels, prototypes),
        "contrast": lambda: gradients(sf.prototype_contrastive_loss, features, labels, prototypes, **asked),
        "moments": lambda: sf.class_moments(features, labels, len(prototypes), squares=True, backend=context.backend),
        "upsample": lambda: gradients(sf.upsampled_cross_entropy, logits, big, backend=context.backend),
        "prediction": lambda: sf.upsampled_prediction(logits, size, backend=context.backend),
    }


def _one_pass_calls(context, features, labels, prototypes) -> dict:
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


def build_cuda(context) -> dict:
    """The CUDA extension, built in place for this GPU alone where it is not there yet."""
    if context.dry:
        raise Skipped("needs a GPU and a CUDA build of torch")
    cuda = backends.module("cuda")
    if cuda.missing() is None:
        return {"built": "before", "failures": []}
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"SPCL_FAST_CUDA_ARCHS": arch}
    try:
        run = subprocess.run(
            command,
            cwd=BENCHMARKS.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=context.seconds_left,
        )
    except subprocess.TimeoutExpired:
        return {"failures": ["building ran out of time"]}
    cuda.missing.cache_clear()
    reason = cuda.missing()
    if reason and "nvcc was not found" in reason:
        raise Skipped(reason)
    return {"built": arch, "failures": [f"{reason}\n{run.stderr[-600:]}"] if reason else []}


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
    features, labels, prototypes = problem(
        context, (1, 20, 3, 5) if context.dry else (2, 256, 32, 64), 5, torch.float32
    )
    logits, big = upsampling_problem(context, (1, 3, 3, 4), (9, 12), torch.float32)

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


def _environment() -> dict[str, str]:
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_suite(context) -> dict:
    """The kernels' own tests, on the GPU: split over processes, since most of the time is compilation."""
    if context.dry:
        raise Skipped("`make test` runs them in the interpreter")
    files = [str(BENCHMARKS.parent / "tests" / f"test_triton_{word}.py") for word in ("contrast", "upsample")]
    command = [sys.executable, "-m", "pytest", "-p", "offline", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    listed = subprocess.run(
        [*command, "--collect-only", *files], env=_environment(), cwd=BENCHMARKS.parent, capture_output=True, text=True
    )
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if not names:
        return {"failures": [f"nothing collected: {listed.stdout[-500:]}{listed.stderr[-500:]}"]}
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    running = [
        subprocess.Popen(
            [*command, "--tb=line", *names[i::workers]],
            env=_environment(),
            cwd=BENCHMARKS.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(min(workers, len(names)))
    ]
    failures, tails = [], []
    for process in running:
        try:
            output, _ = process.communicate(timeout=max(10, context.seconds_left - 5))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            failures.append("a worker ran out of time")
        tails.append(output.strip().splitlines()[-1] if output.strip() else "no output")
        if process.returncode not in (0, 5):
            failures += [line for line in output.splitlines() if line.startswith("FAILED") or "Error" in line][:8] or [
                tails[-1]
            ]
    return {"tests": len(names), "workers": tails, "failures": failures}


def sanitizer(context) -> dict:
    """compute-sanitizer over one call of every op on odd shapes: memcheck, racecheck, initcheck, synccheck; 0 errors."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if context.dry or not Path(tool).exists():
        raise Skipped("compute-sanitizer is not here" if not context.dry else "needs a GPU")
    failures, done = [], []
    for kind in ("memcheck", "racecheck", "initcheck", "synccheck"):
        if context.seconds_left < 45:
            break
        command = [
            tool,
            "--tool",
            kind,
            "--error-exitcode",
            "9",
            sys.executable,
            str(BENCHMARKS / "gpu_correct.py"),
            context.backend,
        ]
        try:
            run = subprocess.run(
                command, env=_environment(), capture_output=True, text=True, timeout=max(30, context.seconds_left - 10)
            )
        except subprocess.TimeoutExpired:
            failures.append(f"{kind}: out of time")
            continue
        done.append(kind)
        if run.returncode:
            failures.append(f"{kind}: {run.stdout[-600:]}")
    return {"tools": done, "failures": failures}


def _every_op_once(backend: str) -> None:
    """What the sanitizer watches: each op and kernel form on odd shapes."""
    context = Context(torch.device("cuda", 0), False, 0.0, backend)
    for dtype, shape, classes in itertools.product(
        (torch.float32, torch.bfloat16), ((2, 33, 5, 7), (1, 600, 3, 5)), (5, 70)
    ):
        features, labels, prototypes = problem(context, shape, classes, dtype)
        gradients(sf.prototype_contrastive_loss, features, labels, prototypes, temperature=0.1, backend=context.backend)
        for call in _one_pass_calls(context, features, labels, prototypes).values():
            call()
        sf.class_moments(features, labels, classes, squares=True, backend=context.backend)
        sf.class_moments(features, labels, 3000, backend=context.backend)
        sf.PrototypeBank(classes, shape[1], backend=context.backend).to(context.device).update_(features, labels)
    for size in ((9, 17), (2, 3)):
        logits, labels = upsampling_problem(context, (2, 5, 3, 35), size, torch.float32)
        gradients(sf.upsampled_cross_entropy, logits, labels, backend=context.backend)
        sf.upsampled_prediction(logits, size, backend=context.backend)
    torch.cuda.synchronize()


if __name__ == "__main__":
    _every_op_once(sys.argv[1])
