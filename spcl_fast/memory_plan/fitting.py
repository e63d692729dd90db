"""`spcl-fast plan`: which stages are meant, what they take, and the search for settings that fit."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from .. import catalog
from ..config import Config, TrainConfig
from ..config.values import as_text
from ..errors import ConfigError
from .peak import PeakMemory, can_recompute, num_classes_of, peak_memory

_SCALES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)  # of width and height, tried in this order
_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
GIB = 2**30


def parse_bytes(text: str) -> int:
    """'4GiB', '3.5 GB', '900M' in bytes; units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ConfigError(f"--fit {text}: expected an amount of memory such as 4GiB or 900MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def stages_of(config: Config, named: str | None) -> list[str]:
    """The stage asked for, by its own name or its command's, or those of the run. Rounds of one command take the same memory: the first."""
    rows = [catalog.find(catalog.STAGES, name) for name in config.stages] if named is None else [_stage(named)]
    return list(dict.fromkeys(catalog.rounds(row.command)[0].name for row in rows))


def _stage(named: str) -> catalog.Stage:
    found = [row for row in catalog.STAGES if named in (row.name, row.command) or named.replace("-", "_") == row.name]
    if not found:
        planned = [row.name for row in catalog.STAGES if row == catalog.rounds(row.command)[0]]
        raise ConfigError(f"plan {named}: there is no such stage; there are {', '.join(planned)}")
    return found[0]


def silent(line: str) -> None:
    pass


def peaks(config: Config, stages: list[str], say: Callable[[str], None] = silent) -> list[PeakMemory]:
    """say: called with the stage that is being counted, which can take many seconds."""
    num_classes = num_classes_of(config)
    return [_counted(config, stage, num_classes, f"{at} of {len(stages)}", say) for at, stage in enumerate(stages, 1)]


def _counted(config: Config, stage: str, num_classes: int, at: str, say: Callable[[str], None]) -> PeakMemory:
    start = time.monotonic()
    say(f"counting {stage} ({at}) ...")
    found = peak_memory(config, stage, num_classes=num_classes)
    say(f"  {found.peak_bytes / GIB:.2f} GiB ({time.monotonic() - start:.0f} s)")
    return found


# ---- settings that fit ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What to change, and what the stages then take."""

    flags: dict[str, Any]  # setting -> value
    config: Config
    peaks: list[PeakMemory]

    def words(self) -> str:
        return " ".join(f"--{key} {as_text(value)}" for key, value in self.flags.items())


def settings_within(
    config: Config, stages: list[str], limit_bytes: int, *, bf16: bool = True, say: Callable[[str], None] = silent
) -> Fitted:
    """The settings with the fewest operations per step whose peak is within the limit, at the largest images for which there are any.

    Tried in this order, each on top of what is given: nothing; gradients absorbed; bfloat16; then recomputation, parts of the batch, both
    (the one that fits with the fewest counted operations); offload; smaller images. Raises ConfigError that names the least peak found.
    bf16: whether the card has bfloat16. say: called with what is being counted.
    """
    trained = [stage for stage in stages if _trains(stage)] or stages
    num_classes = num_classes_of(config)

    @functools.cache
    def of(changed: Config, stage: str) -> PeakMemory:
        tried.append(stage)
        return _counted(changed, stage, num_classes, f"trial {len(tried)}", say)

    tried: list[str] = []
    hungry = max((of(config, stage) for stage in trained), key=lambda p: p.peak_bytes).stage
    least: PeakMemory | None = None
    recompute = can_recompute(config, num_classes)
    for scale in _SCALES:
        for group in _candidates(config, trained, scale, bf16=bf16, recompute=recompute):
            peaks_of = [(flags, of(apply_flags(config, flags), hungry)) for flags in group]
            smallest = min((p for _, p in peaks_of), key=lambda p: p.peak_bytes)
            least = smallest if least is None or smallest.peak_bytes < least.peak_bytes else least
            fitting = [(flags, p) for flags, p in peaks_of if p.peak_bytes <= limit_bytes]
            for flags, _ in sorted(fitting, key=lambda pair: pair[1].flops):
                changed = apply_flags(config, flags)
                found = [of(changed, stage) for stage in stages]
                if all(p.peak_bytes <= limit_bytes for p in found):
                    return Fitted(flags, changed, found)
        if least is not None and least.floor_bytes > limit_bytes:
            break
    assert least is not None  # every size tried has a group
    raise ConfigError(
        f"nothing fits into {limit_bytes / GIB:.2f} GiB: the least that {hungry} takes at any size tried is {least.peak_bytes / GIB:.2f} "
        f"GiB, of which weights, gradients and optimiser are {least.floor_bytes / GIB:.2f} GiB. Give more memory, or a smaller net "
        "(--model.name)."
    )


def _candidates(
    config: Config, stages: list[str], scale: float, *, bf16: bool = True, recompute: bool = True
) -> Iterator[list[dict[str, Any]]]:
    """Groups of flags, the cheapest group first."""
    base: dict[str, Any] = {} if scale == 1 else _smaller(config, scale)
    if scale == 1:
        yield [{}]
    trains = [_settings(config, stage) for stage in stages if _trains(stage)]
    if trains and all(train.optimizer == "sgd" and train.momentum for train in trains):
        base = base | {"loop.absorb_gradients": True}
        if scale == 1:
            yield [base]
    if bf16:
        base = base | {"loop.precision": "bf16"}
        yield [base]
    elif scale != 1:
        yield [base]
    parts = min((train.batch_size for train in trains), default=1)
    can_divide = parts > 1 and all(train.batch_size % parts == 0 for train in trains)
    recomputed: dict[str, Any] = {"loop.checkpoint": "auto"} if recompute else {}
    divided: dict[str, Any] = {"loop.accumulate": parts} if can_divide else {}
    alone = [one for one in (recomputed, divided) if one]
    if alone:
        yield [base | more for more in (*alone, *([recomputed | divided] if len(alone) > 1 else []))]
    if config.loop.device != "cpu":
        yield [base | recomputed | divided | {"loop.offload": True}]


def _trains(stage: str) -> bool:
    return catalog.find(catalog.STAGES, stage).net is not None


def _settings(config: Config, stage: str) -> TrainConfig:
    return getattr(config, catalog.find(catalog.STAGES, stage).section)


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
