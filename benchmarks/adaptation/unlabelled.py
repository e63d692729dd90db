"""What can be known of a net without labels of the target, to tune by. Labels are read of the source's validation split alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spcl_fast.data import Dataset, eval_batches
from spcl_fast.method.context import Context
from spcl_fast.models import SegmentationModel
from spcl_fast.ops import agreement_labels, class_moments, upsampled_prediction
from spcl_fast.train.evaluate import Scores

TARGET_IMAGES = 24  # spread over the training split; each is seen three times
SMALLER = 0.75


def keep_signals(context: Context, stage: str) -> dict[str, Any]:
    """<stage>/signals.json of a trained stage, written once."""
    kept = context.run.read_json(f"{stage}/signals.json")
    if kept is not None:
        return kept
    model = context.model_of(stage).eval()
    scores, prototypes = on_source(
        model, context.domains.dataset("source", "val"), context.config.source.eval_size, context.device
    )
    target = context.domains.unlabelled_target().spread(TARGET_IMAGES)
    signals = on_target(model, target, context.config.target.eval_size, prototypes)
    source_share = scores.confusion.sum(1) / max(scores.confusion.sum(), 1)
    signals["share_distance"] = 0.5 * float(np.abs(np.array(signals["predicted_share"]) - source_share).sum())
    signals["predicted_share"] = dict(zip(context.classes.names, signals["predicted_share"], strict=True))
    signals["source_share"] = dict(zip(context.classes.names, source_share.tolist(), strict=True))
    signals["source_miou"] = scores.miou
    context.run.write_json(f"{stage}/signals.json", signals)
    return signals


@torch.no_grad()
def on_source(
    model: SegmentationModel, dataset: Dataset, size: tuple[int, int], device: torch.device | str = "cpu"
) -> tuple[Scores, Tensor]:
    """Scores on labelled source images, and the net's own prototypes [K, D] there: mean unit features of correctly predicted pixels."""
    num_classes = len(dataset.classes)
    confusion = torch.zeros(num_classes**2, dtype=torch.int64)
    sums: Tensor | float = 0.0
    for image, label, _ in eval_batches(dataset, size):
        features, logits = model(image.to(device))
        truth = torch.from_numpy(label).to(device)[None]
        sums = sums + class_moments(features, agreement_labels(truth, logits.argmax(1)), num_classes).sums
        predicted = upsampled_prediction(logits, label.shape).labels
        pair = truth.long() * num_classes + predicted.long()
        confusion += torch.bincount(pair[truth != dataset.classes.ignore_index].cpu(), minlength=num_classes**2)
    return Scores(dataset.classes, confusion.view(num_classes, num_classes).numpy()), F.normalize(sums, dim=1)


@torch.no_grad()
def on_target(model: SegmentationModel, dataset: Dataset, size: tuple[int, int], prototypes: Tensor) -> dict[str, Any]:
    """Means over the pixels of unlabelled images.

    entropy: of the softmax, as a share of ln K. agreement_flip, agreement_scale: share of pixels predicted alike in the mirrored and in a
    smaller image. margin: cosine to the nearest prototype less that to the second nearest. predicted_share [K].
    """
    height, width = size[::-1]
    present = prototypes[prototypes.norm(dim=1) > 0]
    means: dict[str, list[float]] = {name: [] for name in ("entropy", "agreement_flip", "agreement_scale", "margin")}
    counts = torch.zeros(len(prototypes), dtype=torch.int64)
    for image, _, _ in eval_batches(dataset, size, labels=False):
        image = image.to(prototypes.device)
        features, logits = model(image)
        _, mirrored = model(image.flip(3))
        small = F.interpolate(image, (round(height * SMALLER), round(width * SMALLER)), mode="bilinear", antialias=True)
        _, smaller = model(small)
        labels, mirrored, smaller = (
            upsampled_prediction(x, (height, width)).labels for x in (logits, mirrored.flip(3), smaller)
        )
        log_p = logits.float().log_softmax(1)
        means["entropy"].append(float(-(log_p.exp() * log_p).sum(1).mean()) / math.log(logits.shape[1]))
        means["agreement_flip"].append(float((labels == mirrored).float().mean()))
        means["agreement_scale"].append(float((labels == smaller).float().mean()))
        if len(present) > 1:
            nearest = torch.einsum("bdhw,kd->bkhw", F.normalize(features.float()), present).topk(2, dim=1).values
            means["margin"].append(float((nearest[:, 0] - nearest[:, 1]).mean()))
        counts += torch.bincount(labels.flatten().cpu().long(), minlength=len(counts))
    signals: dict[str, Any] = {name: float(np.mean(values)) if values else None for name, values in means.items()}
    return signals | {"predicted_share": (counts / counts.sum()).tolist()}
