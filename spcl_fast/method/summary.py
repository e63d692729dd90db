"""What a run leaves for its reader: summary.json, and samples of images and features for the report."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import distributed
from ..data import eval_batches, write_label_png
from ..errors import DataError
from ..models import SegmentationModel
from ..ops import upsampled_prediction
from .context import Context

# The name of each trained net in summary.json.
NETS = {
    "source_only": "source_only",
    "control": "control",
    "warmup": "warmup",
    "adapt": "adapted",
    "distill": "distilled",
    "oracle": "oracle",
}
_FEATURES = 2000  # sampled pixels of each domain
_FEATURE_IMAGES = 12


def write_summary(context: Context) -> dict[str, Any]:
    """summary.json from what the stages wrote so far; a net that was not trained or not judged is null."""
    run, summary = context.run, {"classes": list(context.classes.names)}
    for stage, name in NETS.items():
        evaluation = run.read_json(f"{stage}/evaluation.json")
        summary[name] = (
            None if evaluation is None else {key: evaluation[key] for key in ("miou", "iou", "predicted_share")}
        )
    done = {stage: run.done(stage) or {} for stage in NETS}
    summary["gap_closed"] = gap_closed(summary)
    summary["seconds"] = {stage: round(record["seconds"], 1) for stage, record in done.items() if "seconds" in record}
    summary["peak_memory_bytes"] = {
        stage: record["peak_memory_bytes"] for stage, record in done.items() if "peak_memory_bytes" in record
    }
    summary["selection"] = context.config.evaluate.selection
    summary["seed"] = context.config.seed
    summary["machine"] = _machine(context)
    run.write_json("summary.json", summary)
    return summary


def gap_closed(nets: Mapping[str, Any]) -> float | None:
    """How much of the way from source-only to the oracle the last net goes, 1: all of it; None without any of the three."""
    final = nets.get("distilled") or nets.get("adapted")
    source, oracle = nets.get("source_only"), nets.get("oracle")
    if not (final and source and oracle) or oracle["miou"] == source["miou"]:
        return None
    return (final["miou"] - source["miou"]) / (oracle["miou"] - source["miou"])


def _machine(context: Context) -> dict[str, Any]:
    device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else _processor()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@torch.no_grad()
def keep_samples(context: Context, model: SegmentationModel, prototypes: Tensor) -> None:
    """For the report: the images and truths that `judge` keeps predictions of, and a sample of features of both domains."""
    if not distributed.is_main() or context.run.path("features.npz").is_file():
        return
    _keep_pictures(context)
    training, features, labels, domains = model.training, [], [], []
    model.eval()
    for domain, side in enumerate(("source", "target")):
        dataset = context.dataset(side, "train", labels=side == "source").spread(_FEATURE_IMAGES)
        for image, _, _ in eval_batches(dataset, getattr(context.config, side).eval_size, labels=False):
            maps, logits = model(image.to(context.device))
            predicted = upsampled_prediction(
                logits, logits.shape[2:]
            ).labels  # colours the points; target labels are never read
            pick = torch.randperm(predicted.numel(), generator=torch.Generator().manual_seed(0))[
                : _FEATURES // _FEATURE_IMAGES
            ]
            features.append(maps[0].flatten(1).T.float().cpu()[pick])
            labels.append(predicted.flatten().cpu()[pick])
            domains.append(torch.full((len(pick),), domain, dtype=torch.uint8))
    model.train(training)
    np.savez_compressed(
        context.run.path("features.npz"),
        features=torch.cat(features).half().numpy(),
        labels=torch.cat(labels).numpy(),
        domain=torch.cat(domains).numpy(),
        prototypes=prototypes.cpu().numpy(),
    )


def _keep_pictures(context: Context) -> None:
    """The validation images that `Context.judge` shows: report_samples/<name>_image.png and _truth.png."""
    if context.evaluation_data is None:
        return
    dataset = context.pictured(context.evaluation_data)
    for index, name in enumerate(dataset.names):
        try:
            image, label = dataset.load(index)
        except DataError:
            if not dataset.skip_bad_files:
                raise
            continue  # `judge` has no prediction of it either
        path = context.run.path("report_samples", f"{name}_image.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
        write_label_png(context.run.path("report_samples", f"{name}_truth.png"), label, context.classes.palette)
