"""The part of `make gpu` that trains: one adaptation step, the released loop and ours, at the released sizes and at full resolution.

Peaks are torch's: allocated, and reserved by its allocator. Next to them stands what `plan` predicts (results/plan.json, made without a
GPU). The full-resolution step of ours runs under a limit of 4 GiB on what the allocator may reserve: running out of it is a failure.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time

import torch

from benchmarks import RESULTS
from benchmarks.peers.released import released_step, unfold_batch_norm
from spcl_fast.config import AdaptConfig, LoopConfig
from spcl_fast.data import Batch
from spcl_fast.losses import spcl
from spcl_fast.method.adapt import AdaptStep
from spcl_fast.models import build_model
from spcl_fast.train.absorb import AbsorbingSGD
from spcl_fast.train.device import Precision
from spcl_fast.train.lean import lean_model

SIZES = {"released sizes": ((720, 1280), (512, 1024)), "full resolution": ((1052, 1914), (1024, 2048))}  # height, width
_DRY_SIZES = {"released sizes": ((48, 64), (40, 56)), "full resolution": ((64, 80), (64, 96))}
# names as in plan.json; None: the released loop
LOOPS: dict[str, LoopConfig | None] = {
    "released loop, fp32": None,
    "fp32": LoopConfig(),
    "bf16": LoopConfig(precision="bf16"),
    "bf16, checkpoint auto, absorb_gradients": LoopConfig(precision="bf16", checkpoint="auto", absorb_gradients=True),
    "bf16, offload, absorb_gradients": LoopConfig(precision="bf16", absorb_gradients=True, offload=True),
}
LIMITED, LIMIT_BYTES = "bf16, checkpoint auto, absorb_gradients", 4 << 30
_PLAN = RESULTS / "plan.json"


def build(context, settings: LoopConfig | None, sizes):
    """-> step, optimizer, batch."""
    torch.manual_seed(0)
    train = AdaptConfig()
    model = (
        build_model("tiny" if context.dry else "deeplab_v2_resnet101", 19, feature_dim=16).to(context.device).train()
    )
    batch = tuple(
        Batch(
            torch.rand(1, 3, *size, device=context.device),
            torch.randint(0, 19, (1, *size), device=context.device, dtype=torch.uint8),
            [""],
        )
        for size in sizes
    )
    groups = model.parameter_groups(train.lr, train.head_multiplier)
    options = {"lr": train.lr, "momentum": train.momentum, "weight_decay": train.weight_decay}
    if settings is None:
        unfold_batch_norm(model)
        prototypes = torch.rand(model.channels, 19, device=context.device)
        return released_step(model, prototypes, train), torch.optim.SGD(groups, **options), batch
    if context.dry:
        settings = dataclasses.replace(settings, offload=False)
    bank = spcl.objective(19, model.channels, train).to(context.device)
    net = lean_model(
        model, settings, Precision(context.device, settings.precision), [domain.images.shape for domain in batch]
    )
    fused = {} if context.dry else {"fused": True}
    optimizer = (
        AbsorbingSGD(groups, **options) if settings.absorb_gradients else torch.optim.SGD(groups, **options, **fused)
    )
    return AdaptStep(net, bank, train, None), optimizer, batch


def measure(context, settings: LoopConfig | None, sizes, repeats: int = 4) -> dict:
    """Seconds and peaks of a step, the first one left out: it allocates what stays and chooses cuDNN's algorithms."""
    step, optimizer, batch = build(context, settings, sizes)
    seconds, gpu = [], context.device.type == "cuda"
    for it in range(repeats):
        if it == 1 and gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step(batch, it)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    best = min(seconds[1:])
    row = {"seconds": round(best, 4), "images_per_s": round(2 / best, 3)}
    if gpu:
        row |= {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return row


def adapt_steps(context) -> dict:
    rows, failures = [], []
    predicted = json.loads(_PLAN.read_text())
    for title, sizes in (_DRY_SIZES if context.dry else SIZES).items():
        plans = {entry["name"]: entry["peak_gib"] for entry in predicted[title]}
        for name, settings in LOOPS.items():
            limited = title == "full resolution" and name == LIMITED
            limit = LIMIT_BYTES if limited else None
            row = {"sizes": title, "loop": name, "predicted_bytes": round(plans[name] * 2**30), "limit_bytes": limit}
            try:
                row |= _within(context, limit, settings, sizes)
            except torch.OutOfMemoryError as error:
                row["out_of_memory"] = str(error).split(". ")[0]
                failures += [f"{title}, {name}: out of memory"] * limited
            if "allocated_bytes" in row:
                row["measured_over_predicted"] = round(row["allocated_bytes"] / row["predicted_bytes"], 4)
            rows.append(row)
            print("   ", row, flush=True)
    return {"rows": rows, "failures": failures}


def _within(context, limit_bytes: int | None, settings: LoopConfig | None, sizes) -> dict:
    gc.collect()
    if context.device.type != "cuda":
        return measure(context, settings, sizes)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(context.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total) if limit_bytes else 1.0, context.device)
    try:
        return measure(context, settings, sizes)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, context.device)
