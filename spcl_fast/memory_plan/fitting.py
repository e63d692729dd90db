"""`spcl-fast plan`: tables of predicted peak memory, and the search for settings that fit."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

from ..config import Config, rules
from ..config.values import as_text
from ..errors import ConfigError
from .peak import CATEGORIES, Prediction, num_classes_of, predict

_FIRST_ROUND = {"pseudo_labels_2": "pseudo_labels"}  # takes the same memory
STAGES = tuple(stage for stage in rules.STAGES if stage not in _FIRST_ROUND)
_SCALES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)  # of width and height, tried in this order
_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
GIB = 2**30
NOT_COUNTED = "not counted: the CUDA context, cuDNN's workspace, the allocator's gaps (not yet measured on a GPU): leave room for them"


def parse_bytes(text: str) -> int:
    """'4GiB', '3.5 GB', '900M' in bytes; units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ConfigError(f"--fit {text}: expected an amount of memory such as 4GiB or 900MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def stages_of(config: Config, named: str | None) -> list[str]:
    """The stage asked for, by its own name or its command's, or those of the run."""
    if named is None:
        return list(dict.fromkeys(_FIRST_ROUND.get(stage, stage) for stage in config.stages))
    stage = named.replace("-", "_")
    stage = {"pseudo_label": "pseudo_labels", **_FIRST_ROUND}.get(stage, stage)
    if stage not in STAGES:
        raise ConfigError(f"plan {named}: there is no such stage; there are {', '.join(STAGES)}")
    return [stage]


def predictions(config: Config, stages: list[str], against: str | None) -> list[Prediction]:
    if against not in (None, "released"):
        raise ConfigError(f"--against {against}: expected released")
    num_classes = num_classes_of(config)
    result = [predict(config, stage, num_classes=num_classes) for stage in stages]
    return result + [predict(config, "adapt", released=True, num_classes=num_classes)] * (against is not None)


# ---- settings that fit ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fit:
    """What to change, and what the stages then take."""

    flags: dict[str, Any]  # setting -> value
    config: Config
    predictions: list[Prediction]

    def words(self) -> str:
        return " ".join(f"--{key} {as_text(value)}" for key, value in self.flags.items())


def fit(config: Config, stages: list[str], limit_bytes: int) -> Fit:
    """The settings with the fewest operations a step whose peak is within the limit, at the largest images for which there are any.

    Tried in this order, each on top of what is given: nothing; gradients absorbed; bfloat16; then recomputation, parts of the batch, both
    (the one that fits with the fewest counted operations); offload; smaller images. Raises ConfigError that names the least peak found.
    """
    trained = [stage for stage in stages if stage in rules.TRAINED] or stages
    num_classes = num_classes_of(config)

    @functools.cache
    def of(changed: Config, stage: str) -> Prediction:
        return predict(changed, stage, num_classes=num_classes)

    hungry = max((of(config, stage) for stage in trained), key=lambda p: p.peak_bytes).stage
    least: Prediction | None = None
    for scale in _SCALES:
        for group in _candidates(config, trained, scale):
            tried = [(flags, of(apply_flags(config, flags), hungry)) for flags in group]
            smallest = min((p for _, p in tried), key=lambda p: p.peak_bytes)
            least = smallest if least is None or smallest.peak_bytes < least.peak_bytes else least
            fitting = [(flags, p) for flags, p in tried if p.peak_bytes <= limit_bytes]
            for flags, _ in sorted(fitting, key=lambda pair: pair[1].flops):
                changed = apply_flags(config, flags)
                found = [of(changed, stage) for stage in stages]
                if all(p.peak_bytes <= limit_bytes for p in found):
                    return Fit(flags, changed, found)
        if least is not None and least.floor_bytes > limit_bytes:
            break
    raise ConfigError(
        f"nothing fits into {limit_bytes / GIB:.2f} GiB: the least that {hungry} takes at any size tried is {least.peak_bytes / GIB:.2f} "
        f"GiB, of which weights, gradients and optimiser are {least.floor_bytes / GIB:.2f} GiB. Give more memory, or a smaller net "
        "(--model.name)."
    )


def _candidates(config: Config, stages: list[str], scale: float) -> Iterator[list[dict[str, Any]]]:
    """Groups of flags, the cheapest group first."""
    base: dict[str, Any] = {} if scale == 1 else _smaller(config, scale)
    if scale == 1:
        yield [{}]
    trains = [getattr(config, stage) for stage in stages if stage in rules.TRAINED]
    if trains and all(train.optimizer == "sgd" and train.momentum for train in trains):
        base = base | {"loop.absorb_gradients": True}
        if scale == 1:
            yield [base]
    base = base | {"loop.precision": "bf16"}
    yield [base]
    recomputed = base | {"loop.checkpoint": "auto"}
    parts = min((train.batch_size for train in trains), default=1)
    divided = (
        {"loop.accumulate": parts} if all(train.batch_size % parts == 0 for train in trains) and parts > 1 else None
    )
    yield [recomputed, *([base | divided, recomputed | divided] if divided else [])]
    if config.loop.device != "cpu":
        yield [recomputed | (divided or {}) | {"loop.offload": True}]


def _smaller(config: Config, scale: float) -> dict[str, Any]:
    """Both domains' images, to multiples of the nets' stride."""
    sides = {f"{side}.size": getattr(config, side).size for side in ("source", "target")}
    return {key: tuple(max(8, round(v * scale / 8) * 8) for v in size) for key, size in sides.items()}


def apply_flags(config: Config, flags: dict[str, Any]) -> Config:
    for key, value in flags.items():
        section, _, name = key.partition(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


# ---- text ----------------------------------------------------------------------------------------------------------------------------


def as_json(found: list[Prediction], config: Config, fitted: Fit | None = None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "settings": {
            "source.size": list(config.source.size),
            "target.size": list(config.target.size),
            **dataclasses.asdict(config.loop),
        },
        "stages": [dataclasses.asdict(p) for p in found],
    }
    return result | ({"flags": fitted.flags, "command_line": fitted.words()} if fitted is not None else {})


def as_table(found: list[Prediction], config: Config) -> str:
    """Peak by category, in MiB, and by phase."""
    names = [name for name in CATEGORIES if any(p.categories.get(name, 0) >= 2**20 for p in found)]
    header = ["stage", "peak GiB", *names, "floor", "TFLOP a step"]
    rows = [header]
    for p in found:
        parts = [f"{p.categories.get(name, 0) / 2**20:,.0f}" for name in names]
        rows.append(
            [_label(p), f"{p.peak_bytes / GIB:.2f}", *parts, f"{p.floor_bytes / 2**20:,.0f}", f"{p.flops / 1e12:.2f}"]
        )
    lines = _aligned(rows)
    sizes = f"source {as_text(config.source.size).replace(',', 'x')}, target {as_text(config.target.size).replace(',', 'x')}"
    loop = config.loop
    lines.insert(0, f"{config.model.name}, {sizes}, {loop.precision}; categories at the peak in MiB")
    phases = list(dict.fromkeys(name for p in found for name in p.phases))
    by_phase = [
        [_label(p), *(f"{p.phases[name] / 2**20:,.0f}" if name in p.phases else "-" for name in phases)] for p in found
    ]
    lines += ["", *_aligned([["peak by phase, MiB", *phases], *by_phase])]
    host = max(p.host_bytes for p in found)
    lines += [f"in the host's memory: {host / 2**20:,.0f} MiB"] * bool(host)
    lines += [f"{p.stage}: recomputed segments begin at blocks {as_text(p.cuts)}" for p in found if p.cuts]
    return "\n".join([*lines, *([] if loop.device == "cpu" else [NOT_COUNTED])])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _label(p: Prediction) -> str:
    return p.stage if p.loop == "ours" else f"{p.stage}, released loop"
