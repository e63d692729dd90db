"""The parts of `make gpu` that measure: ceilings, host cost per call, and every op on the quoted shapes next to its peers.

Times are medians by device events, L2 flushed between repeats; for ours also of CUDA-graph replays (without the launcher) and by the
caller's clock. A spread is the 20th and the 80th percentile. GB/s count the bytes that must move (S = bytes of the features: 1 S forward
and class sums, 3 S forward + backward), over the copy bandwidth of this run.
"""

from __future__ import annotations

import statistics
import time

import torch

import spcl_fast as sf
from benchmarks import shapes as quoted
from benchmarks.gpu.predicted import compared, machine_of, predicted
from benchmarks.peers import formulas
from benchmarks.problems import contrast_problem, upsampling_problem
from spcl_fast import backends
from spcl_fast.backends.contract import Contrast, Wanted

SHAPES = {name: quoted.CONTRAST[name] for name in quoted.GPU}
UPSAMPLED = {name: quoted.UPSAMPLED[name] for name in quoted.GPU_UPSAMPLED}
_DRY = {"A": (1, 40, 3, 5, 5)}
_DRY_UPSAMPLED = {"U1": ((1, 3, 2, 3), (9, 11))}
Time = tuple[float, float, float]  # microseconds: median, 20th and 80th percentile
_TEMPERATURE = 0.1
_EXPONENTIALS_PER_SM_CLOCK = 16


def shapes(context) -> dict:
    return _DRY if context.dry else SHAPES


def upsampled_shapes(context) -> dict:
    return _DRY_UPSAMPLED if context.dry else UPSAMPLED


def dtypes(context):
    return (torch.float32,) if context.dry else (torch.bfloat16, torch.float32)


def time_us(context, call, milliseconds: int = 60) -> Time:
    if context.dry:
        return wall_us(context, call)
    from triton.testing import do_bench

    call()
    return tuple(1e3 * t for t in do_bench(call, warmup=milliseconds // 3, rep=milliseconds, quantiles=[0.5, 0.2, 0.8]))


def median_us(context, call, milliseconds: int = 60) -> float:
    return time_us(context, call, milliseconds)[0]


def graph_us(context, call) -> Time | None:
    """The same without launch cost; None where there are no graphs."""
    if context.dry:
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return time_us(context, graph.replay)


def wall_us(context, call, batches: int = 11, calls: int = 20) -> Time:
    """By the caller's clock: calls issued one after the other, waited for at the end of each batch. What a call costs where nothing hides
    its launches."""
    if context.dry:
        batches, calls = 2, 1
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start) / calls)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[-1]


def peak_bytes(context, call) -> int | None:
    """What a call allocates at its peak, beyond what was there."""
    if context.dry:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


_ceilings: dict = {}


def ceilings(context) -> dict:
    """Copy bandwidth (read + written) and matrix rates of this machine, in this run."""
    if _ceilings:
        return _ceilings
    size = 1 << (12 if context.dry else 30)
    source = torch.empty(size, dtype=torch.uint8, device=context.device).random_()
    target = torch.empty_like(source)
    _ceilings["copy_gb_s"] = 2 * size / median_us(context, lambda: target.copy_(source)) / 1e3
    for dtype in dtypes(context):
        n = 64 if context.dry else (8192 if dtype == torch.bfloat16 else 4096)
        a, b = (torch.randn(n, n, device=context.device, dtype=dtype) for _ in range(2))
        _ceilings[f"matmul_tflop_s_{dtype}"] = 2 * n**3 / median_us(context, lambda a=a, b=b: a @ b) / 1e6
    if not context.dry:
        properties = torch.cuda.get_device_properties(0)
        clock_khz = getattr(properties, "clock_rate", 1_755_000)
        _ceilings["exp_per_us"] = properties.multi_processor_count * _EXPONENTIALS_PER_SM_CLOCK * clock_khz / 1e3
    else:
        _ceilings["exp_per_us"] = 1e3
    return _ceilings


def host_cost(context) -> dict:
    """Microseconds of the caller's time per call: calls on tiny inputs, issued without waiting."""
    features, labels, prototypes = contrast_problem((1, 64, 8, 8), 19, torch.float32)
    logits, big = upsampling_problem((1, 19, 4, 4), (16, 16), torch.float32)
    leaf, node = features.clone().requires_grad_(), logits.clone().requires_grad_()
    kernels = backends.module(context.backend)
    contrast = Contrast(features, labels, prototypes, None, None, None, 0.1, True, 255, "mean")
    asked = {"temperature": 0.1, "backend": context.backend}
    calls = {
        "primitive_forward": lambda: kernels.contrast_forward(contrast, Wanted(True, True)),
        "forward": lambda: sf.prototype_contrastive_loss(features, labels, prototypes, **asked),
        "forward_backward": lambda: sf.prototype_contrastive_loss(leaf, labels, prototypes, **asked).backward(),
        "class_moments": lambda: sf.class_moments(features, labels, 19, backend=context.backend),
        "upsampled_cross_entropy": lambda: sf.upsampled_cross_entropy(node, big, backend=context.backend).backward(),
        "upsampled_prediction": lambda: sf.upsampled_prediction(logits, (16, 16), backend=context.backend),
    }
    repeats, cost = (1 if context.dry else 200), {}
    for name, call in calls.items():
        for _ in range(0 if context.dry else 10):
            call()
        if not context.dry:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        cost[name] = round(1e6 * (time.perf_counter() - start) / repeats, 1)
        if not context.dry:
            torch.cuda.synchronize()
    return {"us_per_call": cost}


def _row(context, op, shape_name, dtype, call, floor_us, counted_bytes=None, **more) -> dict:
    times = {"us": time_us(context, call), "graph_us": graph_us(context, call), "wall_us": wall_us(context, call)}
    best = min(took[0] for way, took in times.items() if took and way != "wall_us")
    row = {"op": op, "shape": shape_name, "dtype": str(dtype).removeprefix("torch.")}
    row |= {way: took and round(took[0], 1) for way, took in times.items()}
    row |= {
        "spread": {way: [round(us, 1) for us in took[1:]] for way, took in times.items() if took},
        "floor_us": round(floor_us, 1),
    }
    row |= {"share_of_floor": round(floor_us / best, 3), "peak_bytes": peak_bytes(context, call)}
    if counted_bytes:
        rate = counted_bytes / best / 1e3
        row |= {"gb_s": round(rate), "share_of_copy": round(rate / ceilings(context)["copy_gb_s"], 3)}
    row |= more
    if not context.dry:
        arch = machine_of(".".join(map(str, torch.cuda.get_device_capability(context.device))))
        copy = ceilings(context)["copy_gb_s"]
        row |= compared(best, predicted(op, shape_name, row["dtype"], context.backend, copy, arch))
    print("   ", {k: v for k, v in row.items() if v is not None}, flush=True)
    return row


def _sizes(values: int, num_classes: int, dim: int) -> dict:
    """What the choice of a backend goes by: `backends.measured`."""
    return {"sizes": {"values": values, "num_classes": num_classes, "dim": dim}}


def _peers_us(context, calls: dict) -> dict:
    """name -> µs, or why not."""
    times = {}
    for name, call in calls.items():
        try:
            times[name] = round(median_us(context, call, 40), 1)
        except Exception as error:  # a peer that cannot do it is a result
            times[name] = f"{type(error).__name__}: {str(error)[:120]}"
            if context.device.type == "cuda":
                torch.cuda.empty_cache()
    return times


def _agree(name, got, expected, tolerance) -> list[str]:
    difference = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return [] if difference <= tolerance else [f"{name}: differs by {difference:.1e} from the eager formula; not timed"]


def _floor_us(context, shape, dtype, passes: int, products: int) -> float:
    """The larger of the memory time (`passes` S) and the matrix time (`products` of 2 N D K)."""
    batch, dim, height, width, classes = shape
    pixels, itemsize = batch * height * width, dtype.itemsize
    memory = passes * pixels * dim * itemsize / ceilings(context)["copy_gb_s"] / 1e3
    return max(memory, products * 2 * pixels * dim * classes / ceilings(context)[f"matmul_tflop_s_{dtype}"] / 1e6)


def _one_pass_row(context, shape, name, dtype, both, ours, size) -> dict:
    """Forward and backward in one pass: two S; and again with an incoming gradient that is not 1, which scales what was written."""
    scaled_us = time_us(context, lambda: both(lambda: 0.5 * ours()))[0]
    floor = _floor_us(context, shape, dtype, 2, 2)
    return _row(
        context, "contrast forward + backward in one pass", name, dtype, lambda: both(ours), floor, 2 * size, scaled_us=round(scaled_us, 1)
    )  # fmt: skip


def contrast(context) -> dict:
    rows, failures, left_out = [], [], {}
    peers, missing = formulas.contrast_peers()
    for (name, shape), dtype in ((s, d) for d in dtypes(context) for s in shapes(context).items()):
        *map_shape, classes = shape
        lacks = context.lacks("prototype_contrastive_loss", dtype, classes, shape[1])
        if lacks:
            left_out[name] = lacks
            continue
        features, labels, prototypes = contrast_problem(tuple(map_shape), classes, dtype)
        size = features.numel() * dtype.itemsize
        leaf = features.requires_grad_()

        def ours(leaf=leaf, labels=labels, prototypes=prototypes):
            return sf.prototype_contrastive_loss(
                leaf, labels, prototypes, temperature=_TEMPERATURE, backend=context.backend
            )

        def both(function, leaf=leaf):
            return torch.autograd.grad(function(), leaf)

        wrong = _agree(
            f"contrast {name} {dtype}", both(ours)[0],
            both(lambda f=formulas.channel_first_contrast, a=(leaf, labels, prototypes): f(*a, _TEMPERATURE))[0],
            2e-2 if dtype != torch.float32 else 1e-3,
        )  # fmt: skip
        failures += wrong
        if wrong:
            continue
        detached = leaf.detach()
        forward = lambda f=detached, y=labels, p=prototypes: ours(f, y, p)  # noqa: E731
        rows.append(
            _row(context, "contrast forward", name, dtype, forward, _floor_us(context, shape, dtype, 1, 1), size)
        )
        calls = {
            n: lambda f=f, a=(leaf, labels, prototypes): both(lambda: f(*a, _TEMPERATURE)) for n, f in peers.items()
        }
        rows.append(
            _row(
                context, "contrast forward + backward", name, dtype, lambda: both(ours), _floor_us(context, shape, dtype, 3, 2), 3 * size,
                allowed_bytes=size + 16 * features.numel() // features.shape[1], peers_us=_peers_us(context, calls),
                **_sizes(features.numel(), classes, shape[1]),
            )
        )  # fmt: skip
        if once := context.in_one_pass(features, classes):
            with once:
                rows.append(_one_pass_row(context, shape, name, dtype, both, ours, size))
        del features, leaf, detached
    return {"rows": rows, "peers_missing": missing, "left_out": left_out, "failures": failures}


def moments(context) -> dict:
    rows, failures = [], []
    for (name, shape), dtype in ((s, d) for d in dtypes(context) for s in shapes(context).items()):
        *map_shape, classes = shape
        features, labels, _ = contrast_problem(tuple(map_shape), classes, dtype)
        call = lambda f=features, y=labels, k=classes: sf.class_moments(f, y, k, backend=context.backend).sums  # noqa: E731
        wrong = _agree(
            f"moments {name} {dtype}", call(), formulas.one_hot_sums(features.float(), labels, classes), 1e-3
        )
        failures += wrong
        if wrong:
            continue
        peers = {
            "released": lambda f=features, y=labels, k=classes: formulas.released_prototypes(f, y, k),
            "one_hot_matmul": lambda f=features, y=labels, k=classes: formulas.one_hot_sums(f, y, k),
        }
        if classes > 1000:
            peers.pop("released")  # a host sync and a masked copy per class: minutes
        size = features.numel() * dtype.itemsize
        floor = size / ceilings(context)["copy_gb_s"] / 1e3
        more = {"peers_us": _peers_us(context, peers), **_sizes(features.numel(), classes, shape[1])}
        rows.append(_row(context, "class_moments", name, dtype, call, floor, size, **more))
    return {"rows": rows, "failures": failures}


def source_step(context) -> dict:
    """What SPCL does with a source batch's features: move the prototypes, then loss and gradient. Three reads of them and one write."""
    rows = []
    for (name, shape), dtype in ((s, d) for d in dtypes(context) for s in list(shapes(context).items())[:2]):
        *map_shape, classes = shape
        features, labels, _ = contrast_problem(tuple(map_shape), classes, dtype)
        bank = sf.PrototypeBank(classes, shape[1], backend=context.backend).to(context.device)
        leaf = features.requires_grad_()

        def step(bank=bank, leaf=leaf, labels=labels):
            bank.update_(leaf, labels)
            loss = sf.prototype_contrastive_loss(
                leaf, labels, bank.prototypes, temperature=_TEMPERATURE, backend=context.backend
            )
            return torch.autograd.grad(loss, leaf)

        size = features.numel() * dtype.itemsize
        rows.append(_row(context, "source step", name, dtype, step, _floor_us(context, shape, dtype, 4, 2), 4 * size))
    return {"rows": rows, "failures": []}


def _ours_up(context, logits, labels):
    return sf.upsampled_cross_entropy(logits, labels, temperature=1.8, backend=context.backend)


def _eager_up(context, logits, labels):
    return formulas.interpolate_cross_entropy(logits, labels, 1.8)


def upsample(context) -> dict:
    rows, failures = [], []
    for (name, (shape, size)), dtype in ((s, d) for d in dtypes(context) for s in upsampled_shapes(context).items()):
        logits, labels = upsampling_problem(shape, size, dtype)
        leaf = logits.requires_grad_()

        def both(function, leaf=leaf, labels=labels):
            return torch.autograd.grad(function(context, leaf, labels), leaf)[0]

        wrong = _agree(
            f"upsample {name} {dtype}", both(_ours_up), both(_eager_up), 1e-2 if dtype != torch.float32 else 1e-4
        )
        failures += wrong
        if wrong:
            continue
        floor = shape[0] * shape[1] * size[0] * size[1] / ceilings(context)["exp_per_us"]
        peers = _peers_us(context, {"interpolate + cross_entropy": lambda f=both: f(_eager_up)})
        call = lambda f=both: f(_ours_up)  # noqa: E731
        sizes = _sizes(labels.numel() * shape[1], shape[1], shape[1])
        rows.append(
            _row(
                context, "upsampled_cross_entropy with gradient", name, dtype, call, 2 * floor, peers_us=peers, **sizes
            )
        )
        if shape[1] <= 256:
            detached = logits.detach()
            peers = _peers_us(
                context,
                {"interpolate + softmax + max": lambda d=detached, s=size: formulas.interpolate_prediction(d, s)},
            )
            predict = lambda d=detached, s=size: sf.upsampled_prediction(d, s, backend=context.backend)  # noqa: E731
            rows.append(_row(context, "upsampled_prediction", name, dtype, predict, floor, peers_us=peers, **sizes))
    return {"rows": rows, "failures": failures}


def compiled_peers(context) -> dict:
    """torch.compile of the best eager formulas, forward + backward; as many as the time allows."""
    rows, left_out = [], []
    mode = {"backend": "aot_eager"} if context.dry else {}
    jobs = [("upsample", name, torch.float32) for name in upsampled_shapes(context)]
    jobs = [("contrast", name, dtype) for dtype in dtypes(context) for name in shapes(context)] + jobs
    jobs.sort(key=lambda job: job[1] in ("D", "S", "U0"))  # the least telling last
    for op, name, dtype in jobs:
        if context.seconds_left < (0 if context.dry else 40):
            left_out.append([op, name, str(dtype)])
            continue
        torch._dynamo.reset()
        if op == "contrast":
            *map_shape, classes = shapes(context)[name]
            features, labels, prototypes = contrast_problem(tuple(map_shape), classes, dtype)
            function, leaf = torch.compile(formulas.channel_first_contrast, **mode), features.requires_grad_()
            call = lambda f=function, x=leaf, y=labels, p=prototypes: torch.autograd.grad(f(x, y, p, _TEMPERATURE), x)  # noqa: E731
        else:
            shape, size = upsampled_shapes(context)[name]
            logits, labels = upsampling_problem(shape, size, dtype)
            function, leaf = torch.compile(formulas.interpolate_cross_entropy, **mode), logits.requires_grad_()
            call = lambda f=function, x=leaf, y=labels: torch.autograd.grad(f(x, y, 1.8), x)  # noqa: E731
        took = _peers_us(context, {"compile": call})["compile"]
        rows.append({"op": op, "shape": name, "dtype": str(dtype).removeprefix("torch."), "us": took})
        print("   ", rows[-1], flush=True)
    return {"rows": rows, "left_out_for_time": left_out}
