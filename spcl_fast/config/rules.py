"""What a Config must obey beyond its types, checked before anything is read or allocated.

Each rule yields sentences that name the setting, its value, what is expected and, where it helps, what to type.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from .. import catalog
from ..errors import ConfigError
from .fold import read_fold
from .load import all_settings, dotted
from .schema import AugmentConfig, Config, DataConfig, DistillConfig, HeadConfig, LoopConfig, OnlineConfig, TrainConfig
from .values import as_text


def check_config(config: Config, stages: tuple[str, ...] | None = None, *, reading: bool = True) -> None:
    """Raise ConfigError with every broken rule, if any; `stages` are those about to run (default: the config's own).

    reading: their data are about to be read, so each domain needs its folder.
    """
    stages = config.stages if stages is None else stages
    rows = [stage for stage in (*catalog.STAGES, catalog.HEAD) if stage.name in stages]
    problems = [
        *_values(config),
        *_scales(config),
        *_windows(config),
        *_run(config),
        *_few_labels(config),
        *_fold(config),
    ]
    for section in dict.fromkeys(stage.section for stage in rows):
        problems += _stage(config, section, getattr(config, section))
    first = {side: [stage.name for stage in rows if side in stage.reads and reading] for side in ("source", "target")}
    problems += _needs(config, rows)
    problems += _domains(config, {side: readers[0] for side, readers in first.items() if readers})
    _refuse(problems)


def check_domains(config: Config, readers: dict[str, str]) -> None:
    """The same for what reads data and is no stage: `readers` has its name by side."""
    _refuse([*_values(config), *_windows(config), *_fold(config), *_domains(config, readers)])


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n  ".join(problems))


def _values(config: Config) -> Iterator[str]:
    """Choices and ranges, for a Config made in Python too."""
    values = dotted(dataclasses.asdict(config))
    for key, setting in all_settings().items():
        if (problem := setting.problem(values[key])) is not None:
            yield f"{key}: {problem}"


def _scales(config: Config) -> Iterator[str]:
    for key, value in dotted(dataclasses.asdict(config)).items():
        if key.endswith("augment.scale") and value[0] > value[1]:
            yield f"{key}: got {as_text(value)}, expected the smallest and the largest factor, such as 0.5,1.5"


def _windows(config: Config) -> Iterator[str]:
    window, stride = config.evaluate.window, config.evaluate.window_stride
    if stride is None:
        return
    if window is None:
        yield f"evaluate.window_stride: got {as_text(stride)} without evaluate.window, expected the size of a window with it"
    elif stride[0] > window[0] or stride[1] > window[1]:
        yield (
            f"evaluate.window_stride: got {as_text(stride)}, expected at most evaluate.window ({as_text(window)}): "
            "pixels between two windows would be in none"
        )


def _run(config: Config) -> Iterator[str]:
    if not config.name or config.name in (".", "..") or re.search(r"[/\\\0]", config.name):
        yield f"name: got {config.name!r}, expected the name of a folder inside runs_dir ({config.runs_dir}), without a slash"
    if not config.stages:
        yield f"stages: got nothing, expected at least one of {', '.join(catalog.names(catalog.STAGES))}"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.loop.device):
        yield f"loop.device: got {config.loop.device!r}, expected auto, cpu, cuda or cuda:N"
    if config.loop.compile and config.loop.checkpoint != "none":
        yield (
            f"loop.checkpoint: got {config.loop.checkpoint!r} with loop.compile, expected none: a compiled body decides itself "
            "what it keeps"
        )


def _few_labels(config: Config) -> Iterator[str]:
    """Their weight is a setting of every trained stage, for files of before; where nothing reads it, it keeps its default."""
    for stage in (*(stage for stage in catalog.trained() if not stage.few_labels), catalog.HEAD):
        section = getattr(config, stage.section)
        if section.labelled_weight != type(section)().labelled_weight:
            yield (
                f"{stage.section}.labelled_weight: got {section.labelled_weight}, and nothing reads it: no step of {stage.name} has "
                "images of target.labelled next to others. Leave it out."
            )


def _needs(config: Config, rows: list[catalog.Stage]) -> Iterator[str]:
    values = dotted(dataclasses.asdict(config))
    for row in rows:
        if row.needs and values[row.needs] is None:
            yield f"{row.needs} is not set, and {row.name} has nothing to do without it: give --{row.needs}, or leave the stage out"


def _fold(config: Config) -> Iterator[str]:
    fold, target = config.target.fold, config.target
    if fold is None:
        return
    try:
        read_fold(fold)
    except ValueError as error:
        yield f"target.fold: got {fold!r}, expected {error}"
    if target.labelled is None:
        yield f"target.fold: got {fold!r}, and there is nothing to leave out: give --target.labelled with it, or leave it out"
    if config.evaluate.selection == "target_val":
        yield (
            f"evaluate.selection: got target_val with target.fold {fold}, expected last or source_val: a net that is chosen on the images "
            "that are left out is not evaluated on them"
        )


def _stage(config: Config, section: str, stage: object) -> Iterator[str]:
    """The settings of a stage that is about to run, called `section`."""
    if isinstance(stage, TrainConfig):
        yield from _schedule(section, stage)
        yield from _memory(config.loop, section, stage)
    if isinstance(stage, HeadConfig):
        yield from _head(config, section, stage)
    if isinstance(stage, DistillConfig):
        yield from _class_mix(config, section, stage)
    if isinstance(stage, OnlineConfig):
        yield from _online_mix(config, section, stage)


def _schedule(section: str, stage: TrainConfig) -> Iterator[str]:
    if stage.schedule_iterations is not None and stage.schedule_iterations < stage.iterations:
        yield (
            f"{section}.schedule_iterations: got {stage.schedule_iterations}, expected at least {section}.iterations "
            f"({stage.iterations}): the learning rate is 0 from there on; null ends it at the last iteration"
        )


def _memory(loop: LoopConfig, section: str, stage: TrainConfig) -> Iterator[str]:
    if loop.accumulate >= 1 and stage.batch_size % loop.accumulate:
        yield (
            f"loop.accumulate: got {loop.accumulate}, expected a divisor of {section}.batch_size ({stage.batch_size}): "
            "the parts of a batch are equally large"
        )
    if loop.absorb_gradients and (stage.optimizer != "sgd" or not stage.momentum):
        yield f"loop.absorb_gradients: {section} has {stage.optimizer} with momentum {stage.momentum}, expected sgd with momentum"


def _head(config: Config, section: str, stage: HeadConfig) -> Iterator[str]:
    if config.model.classifier == "own":
        yield "model.classifier: got own, expected linear or cosine: the head takes the classifier's place"
    if stage.augment != AugmentConfig():
        yield f"{section}.augment: features are computed once, so their images are not augmented: leave it out"
    if config.loop.accumulate != 1 or config.loop.absorb_gradients or config.loop.checkpoint != "none":
        yield "loop: accumulate, absorb_gradients and checkpoint save the memory of a net's backward, and a head has none: leave them out"
    if stage.side == "source" and not config.source.root and _needs_root(config.source):
        yield f"source.root is not set, and {section} learns from the source: give --source.root path/to/folder"


def _needs_root(domain: DataConfig) -> bool:
    name = domain.dataset.partition("+")[0]
    return name in catalog.names(catalog.DATA_SETS) and catalog.find(catalog.DATA_SETS, name).needs_root


def _class_mix(config: Config, section: str, stage: DistillConfig) -> Iterator[str]:
    if not stage.class_mix:
        return
    if not stage.source_weight:
        yield (
            f"{section}.class_mix: what is pasted comes from the source images of the step, expected {section}.source_weight "
            "above 0 with it"
        )
    source, target = config.adapt.augment.crop or config.source.size, stage.augment.crop or config.target.size
    if tuple(source) != tuple(target):
        yield (
            f"{section}.class_mix: source images of {as_text(source)} (adapt.augment.crop) cannot be pasted onto target images of "
            f"{as_text(target)} ({section}.augment.crop), expected one size"
        )


def _online_mix(config: Config, section: str, stage: OnlineConfig) -> Iterator[str]:
    source = stage.augment.crop or config.source.size
    target = stage.target_augment.crop or config.target.size
    if stage.mix_weight and tuple(source) != tuple(target):
        yield (
            f"{section}.mix_weight: source images of {as_text(source)} ({section}.augment.crop) cannot be pasted onto target images of "
            f"{as_text(target)} ({section}.target_augment.crop), expected one size, or a weight of 0"
        )


def _domains(config: Config, readers: dict[str, str]) -> Iterator[str]:
    """`readers`: by side, who is about to read its data."""
    rows = {}
    for side in ("source", "target"):
        domain: DataConfig = getattr(config, side)
        name, plus, _ = domain.dataset.partition("+")
        if name not in catalog.names(catalog.DATA_SETS):
            continue  # _values has reported it
        rows[side] = row = catalog.find(catalog.DATA_SETS, name)
        if side in readers and row.needs_root and not domain.root:
            yield f"{side}.root is not set, and {readers[side]} reads the {side} data: give --{side}.root path/to/folder"
        if side == "target" and plus:
            yield f"target.dataset: got {domain.dataset!r}, expected one data set: generated scenes can join the source alone"
        ending = domain.label_ending
        if ending is not None and ("/" in ending or not ending.lower().endswith(".png")):
            yield f"{side}.label_ending: got {ending!r}, expected what follows an image's name in its label's, such as _mask.png"
        if row.num_classes and domain.num_classes not in row.num_classes:
            expected = " or ".join(map(str, row.num_classes))
            yield f"{side}.num_classes: got {domain.num_classes}, expected {expected}, the classes of {row.summary}"
    both = len(rows) == 2 and all(row.num_classes for row in rows.values())
    if both and config.source.num_classes != config.target.num_classes:
        yield (
            f"source.num_classes ({config.source.num_classes}) and target.num_classes ({config.target.num_classes}) differ: "
            "one net predicts for both domains, so give both the same"
        )
