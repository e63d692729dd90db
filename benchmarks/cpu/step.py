"""A whole adaptation step on the CPU, split by phase: ours next to the released loop.

    python -m benchmarks.cpu.step [--net demo|resnet101] [--steps 10] [--save]

`demo`: the settings and the data of `spcl-fast demo`, one process that loads data (loop.workers 1). `resnet101`: DeepLab-v2 on ResNet-101
at 320x160, random images. Phases: waiting for data, the net's forward, losses (up-sampling, prototypes and bank among them), backward, the
optimiser's step. The backward runs through the losses, too: `loss_backward` is that of the same losses on features and logits of the same
sizes alone, timed apart, and what is left of the backward is the net's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.cpu.floors import THREADS
from benchmarks.machine import describe_cpu
from benchmarks.peers.released import released_step, unfold_batch_norm
from spcl_fast.config import Config
from spcl_fast.config.load import load_config
from spcl_fast.data import Batch, dataset_of
from spcl_fast.data.loading import train_batches
from spcl_fast.losses import spcl
from spcl_fast.method.adapt import AdaptStep
from spcl_fast.models import build_model
from spcl_fast.train import memory
from spcl_fast.train.device import Precision
from spcl_fast.train.lean import lean_model

SAVED = RESULTS / "cpu_step.json"
PHASES = ("data", "forward", "loss", "backward", "step")
_RESNET_SIZE = (160, 320)  # height, width


class Clock(memory.PhaseRecorder):
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()

    def enter(self, name: str) -> None:
        if name not in PHASES:
            return
        now = time.perf_counter()
        self.seconds[self.phase] += now - self._since
        self._since = now
        super().enter(name)


def batches_of(config: Config, workers: int) -> Generator[tuple[Batch, Batch], None, None]:
    """Source and target batches as the `adapt` stage is fed, without end; the target has random labels for pseudo-labels."""
    train = config.adapt
    feeds = [
        train_batches(
            dataset_of(domain, domain.train_split), augment, size=domain.size, batch_size=train.batch_size, seed=0, workers=workers
        )
        for domain, augment in ((config.source, train.augment), (config.target, train.target_augment))
    ]  # fmt: skip
    yield from zip(*feeds, strict=False)


def random_batches() -> Generator[tuple[Batch, Batch], None, None]:
    torch.manual_seed(0)
    labels = torch.randint(0, 19, (1, *_RESNET_SIZE), dtype=torch.uint8)
    batch = Batch(torch.rand(1, 3, *_RESNET_SIZE), labels, [""])
    while True:
        yield batch, batch


def build(config: Config, name: str, num_classes: int, released: bool) -> tuple[Callable[[Any, int], Any], Any, Any]:
    """-> step, optimizer, bank (None: released)."""
    torch.manual_seed(0)
    train = config.adapt
    model = build_model(
        name, num_classes, feature_dim=config.model.feature_dim, freeze_bn=config.model.freeze_bn
    ).train()
    optimizer = torch.optim.SGD(model.parameter_groups(train.lr, train.head_multiplier), lr=train.lr, momentum=0.9)
    if released:
        unfold_batch_norm(model)
        if model.chain is not None:
            model.chain.cuts = ()
        return released_step(model, torch.rand(model.channels, num_classes), train), optimizer, None
    bank = spcl.objective(num_classes, model.channels, train)
    shapes = [(train.batch_size, 3, *_RESNET_SIZE)] * 2
    net = lean_model(model, config.loop, Precision(torch.device("cpu"), config.loop.precision), shapes)
    return AdaptStep(net, bank, train, None), optimizer, bank


def measure(loops: dict[str, tuple[Any, Any, Iterator[Any]]], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each phase of each loop, in turn; medians over the steps, of which the first two are left out."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    for it in range(steps + 2):
        for name, (step, optimizer, batches) in loops.items():
            clock = Clock()
            with memory.recording(clock):
                clock.enter("data")
                batch = next(batches)
                clock.enter("step")
                step(batch, it)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                clock.enter("step")
            found[name].append(clock.seconds)
    phases = {
        name: {phase: round(1e3 * statistics.median(one[phase] for one in each[2:]), 3) for phase in PHASES}
        for name, each in found.items()
    }
    return {name: one | {"total": round(sum(one.values()), 3)} for name, one in phases.items()}


def loss_backward_ms(bank, train, features: Tensor, logits: Tensor, labels: Tensor, rounds: int = 7) -> float:
    """The backward of both contrastive losses and of the up-sampled cross-entropy down to features and logits, alone."""
    import spcl_fast as sf

    times = []
    for _ in range(rounds):
        x, z = features.detach().requires_grad_(), logits.detach().requires_grad_()
        segmentation = sf.upsampled_cross_entropy(z, labels, temperature=train.temperature)
        losses = [segmentation + train.contrast_weight * bank(x, labels), train.contrast_weight * bank(x, labels)]
        start = time.perf_counter()
        for loss in losses:
            loss.backward()
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times), 3)


def row(net: str, steps: int) -> dict[str, Any]:
    demo = net == "demo"
    given = [("loop.device", "cpu"), *(() if demo else (("adapt.batch_size", "1"),))]
    config = load_config("demo" if demo else "gta5_cityscapes", (), (), given)
    name = config.model.name if demo else "deeplab_v2_resnet101"
    num_classes = len(dataset_of(config.source, config.source.train_split).classes) if demo else 19
    built = {loop: build(config, name, num_classes, released=loop == "released") for loop in ("released", "ours")}
    feeds = {loop: batches_of(config, workers=1) if demo else random_batches() for loop in built}
    loops = measure({loop: (*built[loop][:2], feeds[loop]) for loop in built}, steps)
    step, _, bank = built["ours"]
    batch = next(feeds["ours"])[0]
    with torch.no_grad():
        features, logits = step.net(batch.images)
    alone = loss_backward_ms(bank, config.adapt, features, logits, batch.labels)
    ours = loops["ours"]
    ours["loss_backward"] = alone
    shares = {"losses_share": (ours["loss"] + alone) / ours["total"], "data_share": ours["data"] / ours["total"]}
    result = {"net": name, "batch": config.adapt.batch_size, "loops": loops}
    result |= {key: round(share, 4) for key, share in shares.items()}
    print(net, json.dumps(result, indent=1), flush=True)
    for feed in feeds.values():
        feed.close()
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("demo", "resnet101"), help="one of the two; without it both")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name}")
    asked = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    memory.keep_freed_memory()
    rows = {net: row(net, asked.steps) for net in ([asked.net] if asked.net else ("demo", "resnet101"))}
    if asked.save:
        record = json.loads(SAVED.read_text(encoding="utf-8")) if SAVED.exists() else {}
        record |= {"machine": describe_cpu(THREADS), "rows": record.get("rows", {}) | rows}
        SAVED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
