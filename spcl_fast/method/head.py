"""`spcl-fast head`: a linear or cosine head on the features of a frozen net, which are computed once and kept on the disk.

The head is trained by `upsampled_cross_entropy` of its low-resolution logits; no backward goes through the net. What is kept after every
step is a whole net, the frozen body with the head as its classifier, so that evaluate, predict and export take it like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import catalog, distributed
from ..config import Config
from ..config.load import dump_config
from ..config.schema import HeadConfig
from ..data import Batch, ClassSet, Dataset, overlay, read_label_png
from ..data.sampling import BalancedOrder, Order, ShuffledOrder
from ..data.statistics import class_presence
from ..errors import ConfigError, DataError
from ..losses import CosineHead, LinearHead
from ..models import SegmentationModel
from ..runs import layout
from ..runs.identity import step_seed
from ..train import memory
from ..train.loop import fit
from ..train.meter import Weighted
from ..train.schedule import poly_schedule
from ..train.signals import stop_requests
from .context import Context
from .domains import Domains, class_weight
from .evaluation import evaluate_stage, keep_best, needs_evaluation
from .feature_cache import CachedFeatures, cached_features
from .held_out import check_given_files, fold_record, write_names
from .labels import check_own_labels
from .parts import is_labelled
from .samples import keep_pictures
from .stage import OWN, Feed
from .summary import figures_of, machine
from .training import RunNets

ROW = catalog.HEAD
Head = LinearHead | CosineHead


class HeadContext(Context):
    """The source is read only where the head learns from it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.domains: LearntDomain = LearntDomain(config)

    def _content_of_images(self, side: str) -> str | None:
        return super()._content_of_images(side) if side in ("target", self.config.head.side) else None


class LearntDomain(Domains):
    """The classes are those of the domain that the head learns from, and of the other one only where both are read."""

    @property
    def classes(self) -> ClassSet:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.config.head.side == "source":
            return super().classes
        return self.dataset("target", "train", labels=self.config.target.labelled is None).classes

    def learnt(self) -> Dataset:
        """The images that the head learns from: a domain's training images, of the target only those of target.labelled if it is given."""
        side = self.config.head.side
        labelled = self.labelled_target if side == "target" else None
        return self.dataset(side, "train") if labelled is None else labelled


def train_head(config: Config) -> None:
    """Train the head of a run, or what is left of it, evaluate it on the target's validation images and write summary.json and a picture.

    Raises what `fit` raises, ConfigError and DataError.
    """
    with distributed.session(config.loop.device):
        context = HeadContext(config)
        with context.run.leaves_nothing_if_refused(), context.run.exclusive(), stop_requests() as stop:
            context.stop = stop
            memory.reset_peak(context.device)
            _train(context)
        context.run.close()


def _train(context: HeadContext) -> None:
    config, train, run = context.config, context.config.head, context.run
    others = [row.name for row in catalog.STAGES if run.stage(row.name).is_dir()]
    if others:
        raise ConfigError(
            f"{run.folder} is the folder of a run that has {others[0]}, and a head has one of its own: give another --name"
        )
    check_given_files(context, (ROW,))
    dataset = context.domains.learnt()
    check_own_labels(context, ROW.name, Feed(train.side, OWN, train.augment), dataset)
    nets = RunNets(context, ())
    model = nets.start().requires_grad_(False)
    head = new_head(config, model.channels, len(context.classes)).to(context.device)
    optimizer = nets.optimizer_of([{"name": "head", "params": list(head.parameters()), "lr": train.lr}], train)
    optimizer.register_step_post_hook(lambda *_: into_classifier(head, model))
    weight = class_weight(dataset, train.class_weight_power)
    _introduce(context, dataset)
    features, seconds = _features(context, model, dataset)
    result = fit(
        stage=ROW.name,
        run=run,
        modules={"model": model, "head": head},
        optimizers={"head": optimizer},
        step=head_step(head, train, None if weight is None else weight.to(context.device)),
        batches=lambda start: cached_batches(features, _order(dataset, features, train, config.seed), train, start),
        iterations=train.iterations,
        schedule=poly_schedule(train),
        seed=config.seed,
        settings=config.loop,
        identity=context.identity(ROW),
        at_checkpoint=lambda done: keep_best(context, ROW.name, model, done),
    )
    if result.skipped:
        run.say(f"{ROW.name}: finished before ({result.steps} iterations)")
    if not result.skipped or needs_evaluation(context, ROW.name):
        picked = config.evaluate.selection != "last"
        evaluate_stage(context, ROW.name, context.model_of(ROW.name) if picked else model)
    keep_pictures(context)
    if distributed.is_main():
        _write_picture(context)
        _write_summary(context, features, seconds)
    distributed.barrier()


def new_head(config: Config, dim: int, num_classes: int) -> Head:
    """The head that model.classifier names."""
    torch.manual_seed(step_seed(config.seed, ROW.name, 0))
    if config.model.classifier == "cosine":
        return CosineHead(dim, num_classes)
    return LinearHead(dim, num_classes, batch_norm=config.head.batch_norm)


@torch.no_grad()
def into_classifier(head: Head, model: SegmentationModel) -> None:
    """The classifier of the net becomes the head as it is now."""
    classifier: Any = model.classifier
    if isinstance(head, CosineHead):
        classifier.weight.copy_(head.weight[:, :, None, None])
        classifier.log_scale.copy_(head.log_scale)
    else:
        weight, bias = head.as_convolution()
        classifier.weight.copy_(weight)
        classifier.bias.copy_(bias)


def head_step(head: Head, train: HeadConfig, weight: Tensor | None) -> Callable[[Batch, int], dict[str, Weighted]]:
    """Cross-entropy of the head's logits, up-sampled to the labels, and its backward. A batch's images are features [B, D, h, w]."""

    def step(batch: Batch, it: int) -> dict[str, Weighted]:
        with memory.phase("loss"):
            loss = head.loss(batch.images, batch.labels, temperature=train.temperature, class_weight=weight)
        with memory.phase("backward"):
            loss.backward()
        return {"segmentation": Weighted(loss.detach(), is_labelled(batch))}

    return step


def _features(context: Context, model: SegmentationModel, dataset: Dataset) -> tuple[CachedFeatures, float]:
    config, train = context.config, context.config.head
    folder = Path(train.cache_dir) if train.cache_dir else Path(config.runs_dir) / "features"
    begun = time.monotonic()
    found = cached_features(
        model,
        dataset,
        getattr(config, train.side).size,
        folder,
        dtype=train.cache_dtype,
        precision=context.precision,
        say=context.run.say,
        stop=lambda: context.stop.raise_if_requested("computing features"),
    )
    if not found.computed:
        context.run.say(f"features: those of {len(found.names)} images are in {found.path}")
    return found, time.monotonic() - begun


def _order(dataset: Dataset, features: CachedFeatures, train: HeadConfig, seed: int) -> Order:
    seed = step_seed(seed, f"{ROW.name}/{train.side}", 0)
    if not train.balanced_sampling:
        return ShuffledOrder(len(features.names), seed)
    if list(dataset.names) != features.names:
        raise DataError("head.balanced_sampling needs every image to be readable: leave it out, or mend the files")
    return BalancedOrder(class_presence(dataset), seed)


def cached_batches(features: CachedFeatures, order: Order, train: HeadConfig, start: int) -> Iterator[Batch]:
    """Batches from iteration `start` on, without end; their images are features. With N processes each gets others."""
    each, step = train.batch_size * distributed.world_size(), start
    first = distributed.rank() * train.batch_size
    while True:
        rows = [order(step * each + first + slot) for slot in range(train.batch_size)]
        values = np.stack([features.values[row] for row in rows]).astype(np.float32)
        labels = np.stack([features.labels[row] for row in rows])
        yield Batch(torch.from_numpy(values), torch.from_numpy(labels), [features.names[row] for row in rows])
        step += 1


# ---- what a reader finds -----------------------------------------------------------------------------------------------


def _introduce(context: Context, dataset: Dataset) -> None:
    """Classes and settings, which what the folder holds has accepted: a finished or interrupted head of others is refused by `fit`."""
    if not distributed.is_main():
        return
    run, classes = context.run, context.classes
    if run.path(layout.CONFIG).is_file() and run.stage(ROW.name).is_dir():
        return
    run.write_json(layout.CLASSES, classes.as_json())
    run.write_text(layout.CONFIG, dump_config(context.config))
    write_names(context, learned=dataset is context.domains.labelled_target)


def _write_summary(context: Context, features: CachedFeatures, seconds: float) -> None:
    run, done = context.run, context.run.done(ROW.name) or {}
    evaluation = run.read_json(layout.of_stage(ROW.name, layout.EVALUATION))
    before = run.read_json(layout.SUMMARY) or {}
    made = round(seconds, 1) if features.computed else before.get("seconds", {}).get("features")
    summary = {
        "classes": list(context.classes.names),
        ROW.name: figures_of(evaluation),
        "features": {
            "file": str(features.path),
            "images": len(features.names),
            "shape": list(features.values.shape[1:]),
            "bytes": int(features.values.nbytes + features.labels.nbytes),
        },
        "seconds": {"features": made, ROW.name: round(done.get("seconds", 0.0), 1)},
        "peak_memory_bytes": {ROW.name: done.get("peak_memory_bytes")},
        "selection": context.config.evaluate.selection,
        "seed": context.config.seed,
        "machine": machine(context),
    }
    left_out = fold_record(context.domains)
    if left_out is not None:
        summary[layout.LEFT_OUT] = left_out
    run.write_json(layout.SUMMARY, summary)


def _write_picture(context: Context) -> None:
    """Image, labels and prediction next to each other, a row for each image whose prediction was kept."""
    dataset, palette, rows = context.pictured, context.classes.palette, []
    for index, name in enumerate(dataset.names if dataset is not None else ()):
        path = context.run.path(ROW.name, layout.PREDICTIONS, f"{name}.png")
        if dataset is None or not path.is_file():
            continue
        image, label = dataset.load(index)
        predicted = read_label_png(path)
        seen = np.asarray(image.resize((predicted.shape[1], predicted.shape[0])))
        row = [seen, *(overlay(seen, ids, palette) for ids in (label, predicted) if ids is not None)]
        rows.append(np.concatenate([np.asarray(Image.fromarray(one).resize(_PICTURE)) for one in row], axis=1))
    if rows:
        path = context.run.path(ROW.name, layout.PICTURE)
        Image.fromarray(np.concatenate(rows)).save(path)
        context.run.say(
            f"picture: {path} (image{', labels' if rows[0].shape[1] > 2 * _PICTURE[0] else ''}, prediction)"
        )


_PICTURE = (320, 240)  # width and height of one part of it
