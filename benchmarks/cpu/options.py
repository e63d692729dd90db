"""Every option of the losses next to what a user would write: `python -m benchmarks.cpu.options [--only bias,pool] [--save]`.

For each option and shape, forward and backward on the CPU in float32: ours, the users' rows formula, and the channel-first formula under
torch.compile, in turn in one process, after each was checked against the formula in float64. Floor: 3 S of traffic (S: bytes of the
features), as for the plain loss. Peaks are the resident set above what was resident before, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import spcl_fast as sf
from benchmarks import RESULTS, shapes
from benchmarks.cpu.figures import THREADS
from benchmarks.machine import describe_cpu
from benchmarks.problems import IGNORE, contrast_problem, upsampling_problem
from spcl_fast.train import memory

SAVED = RESULTS / "cpu_options.json"
CONTRAST_SHAPES = ("A", "B'", "E'")
_TEMPERATURE, _COMPONENTS = 0.1, 3  # prototypes per class where they are pooled
ROUNDS, SLOW_ROUNDS = 11, 3


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
    leaf = features.detach().requires_grad_()
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


def contrast_rows(only: set[str]) -> list[dict]:
    rows = []
    for name in CONTRAST_SHAPES:
        *shape, num_classes = shapes.CONTRAST[name]
        features, found = cases(tuple(shape), num_classes)
        for option, case in found.items():
            if only and option not in only:
                continue
            torch._dynamo.reset()
            compiled = torch.compile(channel_first_formula, dynamic=False)
            functions = {"ours": ours, "users' formula": rows_formula, "compiled": compiled}
            for function in functions.values():
                refuse_a_wrong_answer(function, features, case)
            leaf = features.detach().requires_grad_()
            calls = {
                peer: (lambda f=function, c=case, x=leaf: torch.autograd.grad(f(x, c), x))
                for peer, function in functions.items()
            }
            rows.append(_row("prototype_contrastive_loss", option, name, in_turn(calls)))
    return rows


def _row(op: str, option: str, shape: str, times: dict, **more: Any) -> dict:
    mine = times["ours"]["median_ms"]
    faster = {peer: round(took["median_ms"] / mine, 2) for peer, took in times.items() if peer != "ours"}
    row = {"op": op, "option": option, "shape": shape, "times": times, "times_faster_than": faster, **more}
    print(f"{op} {option} {shape}: {mine:.2f} ms, faster than {faster} {more or ''}", flush=True)
    return row


# ---- the large ones: time and peak -----------------------------------------------------------------------------------


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


def peak_of(option: str, which: str) -> int:
    """Bytes above what was resident before, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu.options", "--peak", option, which]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _first_calls() -> None:
    """What libraries, and the ops, import and set up at their first call is not the call's."""
    x, labels = torch.ones(1, 64, 2, 2, requires_grad=True), torch.zeros(1, 2, 2, dtype=torch.uint8)
    (x @ x).sum().backward()
    sf.upsampled_confusion(x.detach(), labels, backend="cpu")
    sf.prototype_contrastive_loss(x, labels, torch.ones(64, 64), temperature=1.0, backend="cpu").backward()
    F.cross_entropy(F.interpolate(x, (2, 2), mode="bilinear"), labels.long()).backward()


def _print_peak(option: str, which: str) -> None:
    mine, eager = LARGE[option][2]()
    call = mine if which == "ours" else eager
    _first_calls()
    memory.reset_peak()  # gives freed memory back first: what is resident now stays
    before = memory.resident_bytes()
    kept = call()
    print(memory.peak_bytes() - before)
    del kept


def large_rows(only: set[str]) -> list[dict]:
    rows = []
    for option, (op, words, make) in LARGE.items():
        if only and option not in only:
            continue
        mine, eager = make()
        for a, b in zip(_tensors(mine()), _tensors(eager()), strict=True):
            torch.testing.assert_close(
                a,
                b,
                rtol=1e-3 if b.is_floating_point() else 0,
                atol=2e-2 * b.abs().max().item() if b.is_floating_point() else TIES,
            )
        times = in_turn({"ours": mine, "users' formula": eager})
        peaks = {which: peak_of(option, which) for which in ("ours", "eager")}
        rows.append(_row(op, option, words, times, peak_bytes=peaks))
    return rows


def _tensors(found: object) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)  # type: ignore[arg-type]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="options, comma-separated")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name}")
    parser.add_argument("--peak", nargs=2, metavar=("OPTION", "WHICH"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    if options.peak:
        _print_peak(*options.peak)
        return 0
    only = set(filter(None, options.only.split(",")))
    rows = contrast_rows(only) + large_rows(only)
    if options.save:
        SAVED.write_text(
            json.dumps({"machine": describe_cpu(THREADS), "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
