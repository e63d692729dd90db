"""Every option of the losses next to what a user would write: `python -m benchmarks.cpu.options [--only bias,margin] [--shape A] [--save]`.

For each option and shape, forward and backward on the CPU in float32: ours, the users' rows formula, and the channel-first formula under
torch.compile, in turn in one process, after each was checked against the formula in float64. Floor: 3 S of traffic (S: bytes of the
features), as for the plain loss. Peaks are the resident set above what was resident before, the gradient included, each in a process of
its own; `--peaks` measures them alone. `--save` replaces what was measured and keeps every other row. Under SPCL_FAST_CPU_CAPABILITY the
rows go to a list of that instruction set's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import spcl_fast as sf
from benchmarks import RESULTS, shapes
from benchmarks.cpu.floors import THREADS
from benchmarks.cpu.large_options import LARGE, TIES
from benchmarks.machine import describe_cpu
from benchmarks.problems import IGNORE, contrast_problem
from spcl_fast.train import memory

SAVED = RESULTS / "cpu_options.json"
CONTRAST_SHAPES = ("A", "B'", "E'")
_TEMPERATURE, _COMPONENTS = 0.1, 3  # prototypes per class where they are pooled
ROUNDS, SLOW_ROUNDS = 11, 3


class Chosen(NamedTuple):
    """What of it all is measured."""

    options: str  # comma-separated; "": all
    shapes: str
    times: bool
    peaks: bool

    def option(self, name: str) -> bool:
        return not self.options or name in self.options.split(",")

    def shape(self, name: str) -> bool:
        return not self.shapes or name in self.shapes.split(",")


class Case(NamedTuple):
    """One option: what differs from the plain loss, as keyword arguments of ours and as logits -> loss of a formula."""

    labels: Tensor
    prototypes: Tensor
    options: dict[str, Any]
    loss: Callable[[Tensor, Tensor], Tensor]  # z [N, K] (or [B, K, P]), labels of that layout -> loss
    bias: Tensor | None = None
    temperature: float | Tensor = _TEMPERATURE
    variances: Tensor | None = None
    rows_per_class: int = 0
    pool: str = ""


def _cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, ignore_index=IGNORE)


def _sigmoid(z: Tensor, y: Tensor) -> Tensor:
    labelled = y != IGNORE
    one_hot = F.one_hot(y.where(labelled, 0), z.shape[1])
    one_hot = one_hot.movedim(-1, 1).to(z.dtype)
    each = F.binary_cross_entropy_with_logits(z, one_hot, reduction="none").sum(1)
    return (each * labelled).sum() / labelled.sum()


def _margin(z: Tensor, y: Tensor) -> Tensor:
    shift = F.one_hot(y.where(y != IGNORE, 0), z.shape[1]).movedim(-1, 1).to(z.dtype)
    return _cross_entropy(z - shift * (0.2 / _TEMPERATURE), y)


def cases(shape: tuple[int, ...], num_classes: int) -> tuple[Tensor, dict[str, Case]]:
    """-> features, {option: case}."""
    features, labels, prototypes = contrast_problem(shape, num_classes)
    batch, dim, height, width = shape
    generator = torch.Generator().manual_seed(1)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    bias, variances = randn(num_classes), torch.rand(num_classes, dim, generator=generator)
    per_image = F.normalize(randn(batch, num_classes, dim), dim=2)
    soft = torch.softmax(3 * randn(batch, num_classes, height, width), 1)
    rows = F.normalize(randn(num_classes * _COMPONENTS, dim), dim=1)
    of_class = torch.arange(num_classes).repeat_interleave(_COMPONENTS)
    temperature = torch.tensor(_TEMPERATURE)
    plain = Case(labels, prototypes, {}, _cross_entropy)
    return features, {
        "plain": plain,
        "bias": plain._replace(options={"bias": bias}, bias=bias),
        "per-image prototypes": plain._replace(prototypes=per_image),
        "tensor temperature": plain._replace(temperature=temperature.requires_grad_()),
        "label smoothing": plain._replace(
            options={"label_smoothing": 0.1},
            loss=lambda z, y: F.cross_entropy(z, y, ignore_index=IGNORE, label_smoothing=0.1),
        ),
        "denominator": plain._replace(
            options={"denominator": "all"},
            loss=lambda z, y: F.cross_entropy(z, y, ignore_index=IGNORE, reduction="sum") / y.numel(),
        ),
        "DistCL variances": plain._replace(
            options={"variances": variances, "positive_variance": True}, variances=variances, temperature=10.0
        ),
        "probabilities": plain._replace(labels=soft, loss=F.cross_entropy),
        "pool max": plain._replace(
            prototypes=rows,
            options={"prototype_class": of_class, "pool": "max"},
            rows_per_class=_COMPONENTS,
            pool="max",
        ),
        "pool logsumexp": plain._replace(
            prototypes=rows,
            options={"prototype_class": of_class, "pool": "logsumexp"},
            rows_per_class=_COMPONENTS,
            pool="logsumexp",
        ),
        "margin": plain._replace(options={"margin": 0.2}, loss=_margin),
        "sigmoid": plain._replace(options={"loss": "sigmoid"}, loss=_sigmoid),
    }


def ours(features: Tensor, case: Case) -> Tensor:
    return sf.prototype_contrastive_loss(
        features, case.labels, case.prototypes, temperature=case.temperature, backend="cpu", **case.options
    )


def _pooled(z: Tensor, case: Case) -> Tensor:
    if not case.rows_per_class:
        return z
    z = z.unflatten(1, (-1, case.rows_per_class))
    return z.amax(2) if case.pool == "max" else z.logsumexp(2)


def rows_formula(features: Tensor, case: Case) -> Tensor:
    """As users write it: unit rows of pixels, one product, F.cross_entropy."""
    dtype = features.dtype
    unit = F.normalize(features, dim=1).permute(0, 2, 3, 1).flatten(1, 2)
    prototypes = case.prototypes.to(dtype)
    z = unit @ prototypes.mT / case.temperature
    if case.variances is not None:
        z = z + 0.5 * (unit.square() @ case.variances.to(dtype).mT) / case.temperature**2
    if case.bias is not None:
        z = z + case.bias.to(dtype)
    labels = case.labels
    labels = labels.flatten().long() if labels.dim() == 3 else labels.movedim(1, -1).flatten(0, 2).to(dtype)
    return case.loss(_pooled(z.flatten(0, 1), case), labels)


def channel_first_formula(features: Tensor, case: Case) -> Tensor:
    """The best formula we know: one product on [K, D] x [D, P], the norm applied to the logits, no transpose."""
    dtype = features.dtype
    x = features.flatten(2)
    inv = 1 / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    z = (case.prototypes.to(dtype) @ x) * (inv / case.temperature)
    if case.variances is not None:
        z = z + (case.variances.to(dtype) @ x.square()) * (0.5 * inv.square() / case.temperature**2)
    if case.bias is not None:
        z = z + case.bias.to(dtype)[:, None]
    labels = case.labels.flatten(1).long() if case.labels.dim() == 3 else case.labels.flatten(2).to(dtype)
    return case.loss(_pooled(z, case), labels)


def _gradient(function: Callable[[Tensor, Case], Tensor], features: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    leaf = features if features.requires_grad else features.detach().requires_grad_()
    loss = function(leaf, case)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def refuse_a_wrong_answer(function: Callable, features: Tensor, case: Case) -> None:
    """Against the rows formula in float64 on the first rows of every image."""
    some = features[:, :, :4].contiguous()
    case = case._replace(labels=case.labels[..., :4, :])
    loss, gradient = _gradient(function, some, case)
    expected, slope = _gradient(rows_formula, some.double(), case)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-3, atol=1e-5 * slope.abs().max().item())


def in_turn(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Milliseconds of each call, A B C A B C ...; the slow ones in a few of the rounds only."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(ROUNDS):
        for name, call in calls.items():
            if name != "ours" and number >= SLOW_ROUNDS:
                continue
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"median_ms": round(statistics.median(found), 2), "min_ms": round(min(found), 2), "rounds": len(found)}
        for name, found in times.items()
    }


def contrast_rows(chosen: Chosen) -> Iterator[dict]:
    for name in filter(chosen.shape, CONTRAST_SHAPES):
        features, found = problem_of(name)
        for option, case in found.items():
            if not chosen.option(option):
                continue
            more = {"peak_bytes": _peaks(option, name)} if chosen.peaks else {}
            if chosen.times:
                more["times"] = _times(features, case)
            yield _row("prototype_contrastive_loss", option, name, **more)


def problem_of(name: str) -> tuple[Tensor, dict[str, Case]]:
    *shape, num_classes = shapes.CONTRAST[name]
    return cases(tuple(shape), num_classes)


def _times(features: Tensor, case: Case) -> dict:
    torch._dynamo.reset()
    compiled = torch.compile(channel_first_formula, dynamic=False)
    functions = {"ours": ours, "users' formula": rows_formula, "compiled": compiled}
    for function in functions.values():
        refuse_a_wrong_answer(function, features, case)
    leaf = features.detach().requires_grad_()
    return in_turn({peer: functools.partial(_gradient, function, leaf, case) for peer, function in functions.items()})


def _row(op: str, option: str, shape: str, times: dict | None = None, **more: Any) -> dict:
    if times is not None:
        mine = times["ours"]["median_ms"]
        faster = {peer: round(took["median_ms"] / mine, 2) for peer, took in times.items() if peer != "ours"}
        more = {"times": times, "times_faster_than": faster, "load": round(os.getloadavg()[0], 2), **more}
    print(op, option, shape, more, flush=True)
    return {"op": op, "option": option, "shape": shape, **more}


# ---- peaks, and the large ones ------------------------------------------------------------------------------------------


def _peaks(option: str, shape: str) -> dict[str, int]:
    return {which: peak_of(option, shape, which) for which in ("ours", "eager")}


def peak_of(option: str, shape: str, which: str) -> int:
    """Bytes above what was resident before, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu.options", "--peak", option, shape, which]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _first_calls() -> None:
    """What libraries, and the ops, import and set up at their first call is not the call's."""
    x, labels = torch.ones(1, 64, 2, 2, requires_grad=True), torch.zeros(1, 2, 2, dtype=torch.uint8)
    (x @ x).sum().backward()
    sf.upsampled_confusion(x.detach(), labels, backend="cpu")
    sf.prototype_contrastive_loss(x, labels, torch.ones(64, 64), temperature=1.0, backend="cpu").backward()
    F.cross_entropy(F.interpolate(x, (2, 2), mode="bilinear"), labels.long()).backward()


def _call(option: str, shape: str, which: str) -> Callable[[], object]:
    if option in LARGE:
        return LARGE[option][2]()[which == "eager"]
    features, found = problem_of(shape)
    return functools.partial(
        _gradient, ours if which == "ours" else rows_formula, features.requires_grad_(), found[option]
    )


def _print_peak(option: str, shape: str, which: str) -> None:
    call = _call(option, shape, which)
    _first_calls()
    memory.reset_peak()  # gives freed memory back first: what is resident now stays
    before = memory.resident_bytes()
    kept = call()
    print(memory.peak_bytes() - before)
    del kept


def large_rows(chosen: Chosen) -> Iterator[dict]:
    for option, (op, words, make) in LARGE.items():
        if not chosen.option(option) or not chosen.shape(words):
            continue
        more: dict[str, Any] = {"peak_bytes": _peaks(option, words)} if chosen.peaks else {}
        if chosen.times:
            mine, eager = make()
            for a, b in zip(_tensors(mine()), _tensors(eager()), strict=True):
                torch.testing.assert_close(
                    a,
                    b,
                    rtol=1e-3 if b.is_floating_point() else 0,
                    atol=2e-2 * b.abs().max().item() if b.is_floating_point() else TIES,
                )
            more["times"] = in_turn({"ours": mine, "users' formula": eager})
        yield _row(op, option, words, **more)


def _tensors(found: object) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)  # type: ignore[arg-type]


def save(rows: list[dict], times: bool) -> None:
    """Joins the file's rows; those of an instruction set that was asked for are a list of their own."""
    result = json.loads(SAVED.read_text(encoding="utf-8")) if SAVED.exists() else {}
    level = os.environ.get("SPCL_FAST_CPU_CAPABILITY")
    part = result.setdefault("instructions", {}).setdefault(level, {}) if level else result
    if times or "machine" not in part:
        part["machine"] = describe_cpu(THREADS)
    found = {(row["op"], row["option"], row["shape"]): row for row in part.get("rows", [])}
    for row in rows:
        key = row["op"], row["option"], row["shape"]
        found[key] = found.get(key, {}) | row
    part["rows"] = [found[key] for key in sorted(found, key=lambda key: (key[1] in LARGE, key[1:]))]
    SAVED.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="options, comma-separated")
    parser.add_argument("--shape", default="", help="shapes, comma-separated")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name}")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--peaks", action="store_true", help="peaks and no times")
    what.add_argument("--times", action="store_true", help="times and no peaks")
    parser.add_argument("--peak", nargs=3, metavar=("OPTION", "SHAPE", "WHICH"), help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    if asked.peak:
        _print_peak(*asked.peak)
        return 0
    chosen = Chosen(asked.only, asked.shape, times=not asked.peaks, peaks=not asked.times)
    rows = [*contrast_rows(chosen), *large_rows(chosen)]
    if asked.save:
        save(rows, chosen.times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
