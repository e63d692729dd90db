"""What the stages of a run share: its folder, its data, its nets, and how a stage is trained, judged and found again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import distributed
from ..config import AugmentConfig, Config, TrainConfig
from ..data import (
    Batch,
    ClassSet,
    Dataset,
    class_frequency,
    dataset_of,
    train_batches,
    with_pseudo_labels,
    write_label_png,
)
from ..data.augment import output_size
from ..data.statistics import rarity
from ..errors import CheckpointError, DataError
from ..models import SegmentationModel, build_model
from ..runs.checkpoint import Checkpoint
from ..runs.folder import Run
from ..runs.identity import step_seed
from ..runs.signs import signs
from ..runs.tensorfile import read_tensors, replace_tensors
from ..train.absorb import AbsorbingSGD
from ..train.device import Precision, choose_device
from ..train.evaluate import evaluate_model
from ..train.lean import LeanModel, lean_model
from ..train.loop import fit
from ..train.resume import load_modules
from ..train.schedule import poly_schedule
from ..train.signals import StopRequest

_COUNTED_IMAGES = 1000  # at most so many labels are read for the class weights


class Context:
    """One run. Stages share nothing but its folder; everything here is read from the config or from that folder."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run = Run(Path(config.runs_dir) / config.name)
        self.device = choose_device(config.loop.device)
        self.precision = Precision(self.device, config.loop.precision)
        self.stop = StopRequest()  # the run's own once it listens to signals

    # --- data --------------------------------------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019  a context lives as long as its run
    def dataset(self, side: str, split: str, labels: bool = True) -> Dataset:
        """The data of a domain ("source" | "target"), split "train" | "val"."""
        domain = getattr(self.config, side)
        name = domain.train_split if split == "train" else domain.val_split
        return dataset_of(domain, name, labels=labels, skip_bad_files=self.config.loop.skip_bad_files)

    @functools.cached_property
    def classes(self) -> ClassSet:
        """The classes of both domains. Raises DataError where they differ: their ids would mean different things."""
        source, target = self.dataset("source", "train").classes, self.dataset("target", "train", labels=False).classes
        if source.names != target.names:
            raise DataError(
                f"source and target have different classes: {', '.join(source.names)} and {', '.join(target.names)}. "
                "Give both domains the same ones: source.classes and target.classes may name one JSON file with a table for each."
            )
        return source

    def unlabelled_target(self) -> Dataset:
        """The target's training images that get pseudo-labels: all, or the first pseudo_label.images."""
        dataset, images = self.dataset("target", "train", labels=False), self.config.pseudo_label.images
        return dataset if images is None or images >= len(dataset) else dataset.select(range(images))

    def pseudo_labelled(self, folder: str) -> Dataset:
        """The target's training images with the labels that a pseudo-label stage wrote."""
        given = self.config.pseudo_label.folder if folder == "pseudo_labels" else None
        return with_pseudo_labels(self.unlabelled_target(), given or self.run.path(folder))

    def batches(
        self, stage: str, side: str, dataset: Dataset, train: TrainConfig, augment: AugmentConfig
    ) -> Callable[[int], Iterator[Batch]]:
        """start -> endless batches from that iteration on, other ones for every stage and side."""
        loop = self.config.loop
        seed = step_seed(self.config.seed, f"{stage}/{side}", 0)
        return lambda start: train_batches(
            dataset,
            augment,
            size=getattr(self.config, side).size,
            batch_size=train.batch_size,
            seed=seed,
            start_step=start,
            workers=loop.workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            balanced=train.balanced_sampling and dataset.has_labels,
            pin_memory=self.device.type == "cuda",
        )

    def class_weight(self, dataset: Dataset, power: float) -> Tensor | None:
        """[K] = share ** -power with mean 1 over the classes that occur; an absent class weighs as the rarest.

        None for power 0. Raises DataError where nothing is labelled.
        """
        if not power:
            return None
        met = class_frequency(dataset, _COUNTED_IMAGES) > 0
        if not met.any():
            where = f"{dataset.kind}, split {dataset.split!r}"
            raise DataError(
                f"{where}: no pixel of its labels has a known class; `spcl-fast check-data` tells what is there."
            )
        weight = rarity(dataset, _COUNTED_IMAGES, power)
        return torch.tensor(weight / weight[met].mean(), dtype=torch.float32, device=self.device)

    # --- nets --------------------------------------------------------------------------------------------------------------------

    def new_model(self, *, freeze_bn: bool | None = None, weights: bool = True) -> SegmentationModel:
        """A net as the config has it: the same initial weights for every stage of a seed, or those of model.weights."""
        model = self.config.model
        torch.manual_seed(step_seed(self.config.seed, "model", 0))
        net = build_model(
            model.name,
            len(self.classes),
            weights=model.weights if weights else None,
            feature_dim=model.feature_dim,
            freeze_bn=model.freeze_bn if freeze_bn is None else freeze_bn,
            frozen_bn_eps=model.frozen_bn_eps,
        ).to(self.device)
        return net.to(memory_format=torch.channels_last) if self.config.loop.channels_last else net

    def model_of(self, stage: str, *, freeze_bn: bool | None = None) -> SegmentationModel:
        """The net that a finished stage left: its last, or the one that evaluate.selection picked."""
        model = self.new_model(freeze_bn=freeze_bn, weights=False)
        load_modules(self.checkpoint(stage), {"model": model}, f"the stage {stage!r}")
        if self.config.evaluate.selection != "last" and self.run.path(stage, "selected.safetensors").is_file():
            model.load_state_dict(read_tensors(self.run.path(stage, "selected.safetensors")))
        return model

    def checkpoint(self, stage: str) -> Checkpoint:
        checkpoint = self.run.checkpoints(stage).latest() if self.run.done(stage) else None
        if checkpoint is None:
            raise CheckpointError(
                f"stage {stage!r} is not finished in {self.run.folder}, and a later stage starts from it: do it first."
            )
        return checkpoint

    def source_stage(self) -> str:
        """Which net prototypes, pseudo-labels and adaptation start from: the warm-up's, or source-only's where there was no warm-up."""
        return "warmup" if self.run.done("warmup") else "source_only"

    def image_shape(self, train: TrainConfig, side: str, augment: AugmentConfig) -> tuple[int, ...]:
        """[B, 3, H, W] of what one forward of a stage sees."""
        width, height = output_size(augment, getattr(self.config, side).size)
        return (train.batch_size // self.config.loop.accumulate, 3, height, width)

    def lean(self, model: SegmentationModel, shapes: list[tuple[int, ...]]) -> LeanModel:
        """The net with the loop's settings on precision and memory."""
        return lean_model(model, self.config.loop, self.precision, shapes)

    def optimizer(self, model: SegmentationModel, train: TrainConfig) -> torch.optim.Optimizer:
        groups = model.parameter_groups(train.lr, train.head_multiplier)
        fused = self.device.type == "cuda"  # the default there (foreach) makes one more copy of all gradients
        if train.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay, fused=fused or None)
        if self.config.loop.absorb_gradients:
            return AbsorbingSGD(groups, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
        return torch.optim.SGD(
            groups, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay, fused=fused or None
        )

    # --- a stage ------------------------------------------------------------------------------------------------------------------

    def train(
        self,
        stage: str,
        model: SegmentationModel,
        step: Callable[[Any, int], Mapping[str, Tensor]],
        batches: Callable[[int], Iterator[Any]],
        train: TrainConfig,
        *,
        after: tuple[str, ...] = (),
        modules: Mapping[str, nn.Module] | None = None,
        optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
    ) -> None:
        """Fit `model` (and other modules) with `step`, then judge it on the target's validation images. `after`: what it starts from."""
        model.train()
        result = fit(
            stage=stage,
            run=self.run,
            modules={"model": model, **(modules or {})},
            optimizers={"model": self.optimizer(model, train), **(optimizers or {})},
            step=step,
            batches=batches,
            iterations=train.iterations,
            schedule=poly_schedule(train),
            seed=self.config.seed,
            settings=self.config.loop,
            identity=self.identity(stage, train, after),
            at_checkpoint=lambda done: self._select(stage, model, done),
            plan=lambda: self._planned(stage),
            watch=self._warn_of_collapse(),
        )
        if result.skipped:
            self.run.say(f"{stage}: finished before ({result.steps} iterations)")
        if not result.skipped or self.run.read_json(f"{stage}/evaluation.json") is None:
            self.judge(stage, self.model_of(stage) if self.config.evaluate.selection != "last" else model)

    def shown(self, train: TrainConfig) -> Callable[[int], bool]:
        """Whether an iteration ends with a log line."""
        return lambda it: (it + 1) % self.config.loop.log_every == 0 or it + 1 == train.iterations

    def _warn_of_collapse(self) -> Callable[[Mapping[str, Any]], None]:
        """Says each sign of a collapse in a stage's log lines once."""
        said: set[str] = set()

        def watch(record: Mapping[str, Any]) -> None:
            for sign in signs(record, self.classes.names):
                if sign.title not in said:
                    self.run.say(f"warning: {sign.title}. {sign.text}")
                said.add(sign.title)

        return watch

    def _planned(self, stage: str) -> int | None:
        """What `spcl-fast plan` says for this device; None where it cannot tell, which must not stop a training.

        Also keeps in <stage>/plan.json what each memory-saving setting saves, for the report.
        """
        from ..memory_plan.peak import (  # counts a step of fake tensors: seconds, once a stage and a setting that is on
            predict,
            saved_bytes,
        )

        config, num_classes = (
            replace(self.config, loop=replace(self.config.loop, device=self.device.type)),
            len(self.classes),
        )
        try:
            peak = predict(config, stage, num_classes=num_classes).peak_bytes
            saved = saved_bytes(config, stage, peak, num_classes=num_classes)
            self.run.write_json(f"{stage}/plan.json", {"peak_bytes": peak, "saved_bytes": saved})
            return peak
        except Exception as error:
            self.run.say(f"{stage}: its memory could not be predicted: {type(error).__name__}: {error}")
            return None

    def identity(self, stage: str, settings: Any, after: tuple[str, ...] = ()) -> dict[str, Any]:
        """What the stage's result depends on; the stages before it by the hash of theirs."""
        config = self.config
        inputs = {name: (self.run.done(name) or {}).get("settings_sha256") for name in after}
        return {
            "source": config.source,
            "target": config.target,
            "model": config.model,
            "evaluate": {
                "selection": config.evaluate.selection
            },  # which of its nets a stage hands on, and is judged by
            stage: settings,
            "inputs": inputs,
            "run_seed": config.seed,
        }

    def finished_before(self, stage: str, identity: dict[str, Any]) -> bool:
        """Whether an untrained stage is complete with these settings; says so. Raises CheckpointError where it has others."""
        if not self.run.is_done(stage, identity):
            return False
        self.run.say(f"{stage}: finished before")
        return True

    @property
    def evaluation_data(self) -> Dataset | None:
        """The target's labelled validation images, or None where it has none."""
        try:
            return self.dataset("target", "val")
        except DataError as error:
            self.run.say(
                f"not evaluated: the target's {self.config.target.val_split!r} split cannot be read with labels: {error}"
            )
            return None

    def judge(self, stage: str, model: SegmentationModel) -> None:
        """Write the stage's evaluation.json and a few predictions for the report. The main process works; the others wait."""
        dataset = self.evaluation_data
        if distributed.is_main() and dataset is not None:
            evaluate = self.config.evaluate
            shown = {*self.pictured(dataset).names}

            def keep(index: int, name: str, labels: np.ndarray) -> None:
                self.stop.raise_if_requested(f"evaluating {stage}")
                if name in shown:
                    write_label_png(self.run.path(stage, "predictions", f"{name}.png"), labels, self.classes.palette)

            size = self.config.target.eval_size
            scores = evaluate_model(
                model, dataset, size, device=self.device, tta=evaluate.tta, images=evaluate.images, keep=keep
            )
            self.run.write_json(f"{stage}/evaluation.json", scores.as_json())
            self.run.say(
                f"{stage}: {scores.miou:.1f} mIoU on {len(dataset.spread(evaluate.images))} target validation images"
            )
        distributed.barrier()

    def pictured(self, dataset: Dataset) -> Dataset:
        """Of the target's validation images those whose predictions the report shows."""
        return dataset.spread(self.config.evaluate.images).spread(self.config.evaluate.overlays)

    def _select(self, stage: str, model: SegmentationModel, done: int) -> None:
        """Keep the weights that do best on the validation images that evaluate.selection names; "last" keeps none."""
        selection = self.config.evaluate.selection
        if selection == "last":
            return
        if distributed.is_main():
            side = selection.removesuffix("_val")
            best = self.run.read_json(f"{stage}/selected.json")
            if best is None or best["step"] != done:
                scores = evaluate_model(
                    model, self.dataset(side, "val"), getattr(self.config, side).eval_size, device=self.device
                )
                if best is None or best["step"] > done or scores.miou > best["miou"]:
                    replace_tensors(self.run.path(stage, "selected.safetensors"), model.state_dict())
                    self.run.write_json(f"{stage}/selected.json", {"step": done, "miou": scores.miou, "by": selection})
        distributed.barrier()
