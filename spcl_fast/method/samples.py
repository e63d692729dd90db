"""What a run keeps for the pictures of its report: images with their truths, and a sample of features of both domains."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import distributed
from ..data import eval_batches, write_label_png
from ..errors import DataError
from ..models import SegmentationModel
from ..ops import upsampled_prediction
from ..runs import layout
from .context import Context

_FEATURES = 2000  # sampled pixels of each domain
_FEATURE_IMAGES = 12


@torch.no_grad()
def keep_samples(context: Context, model: SegmentationModel, prototypes: Tensor) -> None:
    """The images and truths that `evaluate_stage` keeps predictions of, and features of both domains; once per run."""
    if not distributed.is_main() or context.run.path(layout.FEATURES).is_file():
        return
    keep_pictures(context)
    training, features, labels, domains = model.training, [], [], []
    model.eval()
    for domain, side in enumerate(("source", "target")):
        dataset = context.domains.dataset(side, "train", labels=side == "source").spread(_FEATURE_IMAGES)
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
        context.run.path(layout.FEATURES),
        features=torch.cat(features).half().numpy(),
        labels=torch.cat(labels).numpy(),
        domain=torch.cat(domains).numpy(),
        prototypes=prototypes.cpu().numpy(),
    )


def keep_pictures(context: Context) -> None:
    """The images and truths that `evaluate_stage` keeps predictions of, once per run."""
    run = context.run
    if not distributed.is_main() or run.path(layout.SAMPLES).is_dir():
        return
    dataset = context.pictured
    if dataset is None:
        return
    for index, name in enumerate(dataset.names):
        try:
            image, label = dataset.load(index)
        except DataError:
            if not dataset.skip_bad_files:
                raise
            continue  # the evaluation has no prediction of it either
        path = run.path(layout.SAMPLES, name + layout.IMAGE_SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
        if label is not None:
            write_label_png(run.path(layout.SAMPLES, name + layout.TRUTH_SUFFIX), label, context.classes.palette)
