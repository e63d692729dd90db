"""What a Config must obey beyond its types, checked before anything is read or allocated.

Each rule yields sentences that name the setting, its value, what is expected and, where it helps, what to type.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from .. import catalog
from ..errors import ConfigError
from .load import as_text, flatten
from .schema import Config, DataConfig, TrainConfig

STAGES = catalog.names(catalog.STAGES)
TRAINED = catalog.names(catalog.trained())
DRIVING = tuple(row.name for row in catalog.DATA_SETS if row.num_classes)
_CHOICES: dict[str, tuple[str, ...]] = {
    "dataset": catalog.data_set_choices(),
    "model.name": catalog.names(catalog.NETS),
    "optimizer": ("sgd", "adamw"),
    "init": ("weights", "source_only"),
    "absent": ("keep", "decay"),
    "precision": ("fp32", "bf16"),
    "loop.checkpoint": ("none", "stage", "block", "auto"),
    "selection": ("last", "source_val", "target_val"),
    "tta": ("none", "flip"),
}
# by last part of the name: (test, what is expected)
_POSITIVE = (lambda x: x > 0, "a number above 0")
_NOT_NEGATIVE = (lambda x: x >= 0, "a number of 0 or more")
_SHARE = (lambda x: 0 <= x <= 1, "a number from 0 to 1")
_COUNT = (lambda x: x >= 1, "a whole number of 1 or more")
_SIZE = (lambda x: all(v >= 1 for v in x), "width and height of 1 or more, such as 1280,720")
_RANGES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(
        ("temperature", "contrast_temperature", "lr", "discriminator_lr", "head_multiplier", "cap"), _POSITIVE
    ),
    **dict.fromkeys(
        ("adversarial_weight", "contrast_weight", "source_weight", "weight_decay", "power", "frozen_bn_eps"),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        ("class_weight_power", "jitter", "warmup_iterations", "workers", "overlays", "seed"), _NOT_NEGATIVE
    ),
    **dict.fromkeys(("keep", "quantile", "flip", "blur", "rare_crop", "momentum", "class_mix"), _SHARE),
    **dict.fromkeys(
        ("iterations", "schedule_iterations", "batch_size", "images", "train_images", "min_pixels", "feature_dim"),
        _COUNT,
    ),
    **dict.fromkeys(("log_every", "checkpoint_every", "checkpoints_kept", "num_classes", "accumulate"), _COUNT),
    **dict.fromkeys(("size", "eval_size", "estimate_size", "crop"), _SIZE),
    "scale": (lambda x: 0 < x[0] <= x[1], "the smallest and the largest factor, such as 0.5,1.5"),
}


def check_config(config: Config, stages: tuple[str, ...] | None = None) -> None:
    """Raise ConfigError with every broken rule, if any; `stages` are those about to run (default: the config's own)."""
    stages = config.stages if stages is None else stages
    problems = [
        *_values(config),
        *_stage_names(config),
        *_run(config),
        *_schedules(config, stages),
        *_memory(config, stages),
    ]
    problems += [*_domains(config, stages), *_class_mix(config, stages)]
    if problems:
        raise ConfigError("\n  ".join(problems))


def _values(config: Config) -> Iterator[str]:
    for key, value in flatten(dataclasses.asdict(config)).items():
        leaf = key.rpartition(".")[2]
        choices = _CHOICES.get(key) or _CHOICES.get(leaf)
        if choices and value not in choices:
            yield f"{key}: got {value!r}, expected one of {', '.join(choices)}"
        test, expected = _RANGES.get(leaf, (None, ""))
        if any(
            isinstance(v, float) and not math.isfinite(v) for v in (value if isinstance(value, tuple) else (value,))
        ):
            yield f"{key}: got {as_text(value)}, expected a finite number"
        elif test and value is not None and not test(value):
            yield f"{key}: got {as_text(value)}, expected {expected}"
    if config.pseudo_label.cap > 1:
        yield f"pseudo_label.cap: got {config.pseudo_label.cap}, expected at most 1: it caps a probability"


def _stage_names(config: Config) -> Iterator[str]:
    for name in config.stages:
        if name not in STAGES:
            yield f"stages: there is no stage {name!r}; there are {', '.join(STAGES)}"


def _run(config: Config) -> Iterator[str]:
    if not config.name or config.name in (".", "..") or re.search(r"[/\\\0]", config.name):
        yield f"name: got {config.name!r}, expected the name of a folder inside runs_dir ({config.runs_dir}), without a slash"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.loop.device):
        yield f"loop.device: got {config.loop.device!r}, expected auto, cpu, cuda or cuda:N"


def _schedules(config: Config, stages: tuple[str, ...]) -> Iterator[str]:
    for name in TRAINED:
        stage: TrainConfig = getattr(config, name)
        if name in stages and stage.schedule_iterations is not None and stage.schedule_iterations < stage.iterations:
            yield (
                f"{name}.schedule_iterations: got {stage.schedule_iterations}, expected at least {name}.iterations "
                f"({stage.iterations}): the learning rate is 0 from there on; null ends it at the last iteration"
            )


def _class_mix(config: Config, stages: tuple[str, ...]) -> Iterator[str]:
    distill = config.distill
    if "distill" not in stages or not distill.class_mix:
        return
    if not distill.source_weight:
        yield "distill.class_mix: what is pasted comes from the source images of the step, expected distill.source_weight above 0 with it"
    source, target = config.adapt.augment.crop or config.source.size, distill.augment.crop or config.target.size
    if tuple(source) != tuple(target):
        yield (
            f"distill.class_mix: source images of {as_text(source)} (adapt.augment.crop) cannot be pasted onto target images of "
            f"{as_text(target)} (distill.augment.crop), expected one size"
        )


def _memory(config: Config, stages: tuple[str, ...]) -> Iterator[str]:
    loop = config.loop
    if loop.compile and loop.checkpoint != "none":
        yield f"loop.checkpoint: got {loop.checkpoint!r} with loop.compile, expected none: a compiled body decides itself what it keeps"
    for name in (name for name in TRAINED if name in stages):
        stage: TrainConfig = getattr(config, name)
        if loop.accumulate >= 1 and stage.batch_size % loop.accumulate:
            yield (
                f"loop.accumulate: got {loop.accumulate}, expected a divisor of {name}.batch_size ({stage.batch_size}): "
                "the parts of a batch are equally large"
            )
        if loop.absorb_gradients and (stage.optimizer != "sgd" or not stage.momentum):
            yield f"loop.absorb_gradients: {name} has {stage.optimizer} with momentum {stage.momentum}, expected sgd with momentum"


def _domains(config: Config, stages: tuple[str, ...]) -> Iterator[str]:
    rows = {}
    for side in ("source", "target"):
        domain: DataConfig = getattr(config, side)
        name, plus, _ = domain.dataset.partition("+")
        if name not in catalog.names(catalog.DATA_SETS):
            continue  # _values has said so
        rows[side] = row = catalog.find(catalog.DATA_SETS, name)
        needing = [stage for stage in catalog.STAGES if stage.name in stages and side in stage.reads]
        if needing and row.needs_root and not domain.root:
            yield f"{side}.root is not set, and {needing[0].name} reads the {side} data: give --{side}.root path/to/folder"
        if side == "target" and plus:
            yield f"target.dataset: got {domain.dataset!r}, expected one data set: generated scenes can join the source alone"
        if row.num_classes and domain.num_classes not in row.num_classes:
            expected = " or ".join(map(str, row.num_classes))
            yield f"{side}.num_classes: got {domain.num_classes}, expected {expected}, the classes of {row.summary}"
    both = len(rows) == 2 and all(row.num_classes for row in rows.values())
    if both and config.source.num_classes != config.target.num_classes:
        yield (
            f"source.num_classes ({config.source.num_classes}) and target.num_classes ({config.target.num_classes}) differ: "
            "one net predicts for both domains, so give both the same"
        )
