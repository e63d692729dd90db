"""Everything the report knows: the files of a run folder, read as far as they are there and whole. What is missing becomes a sentence."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import catalog
from . import layout

# Stage of a trained net -> its name in summary.json and its name for the reader, in the order of the method.
TRAINED = {row.name: (row.net, row.title) for row in catalog.with_nets() if row.net is not None}
# Colour-blind-safe (Okabe and Ito); classes that come without a palette get these in turn.
SAFE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#8A6D00")


@dataclass(frozen=True)
class Evaluation:
    """How a net did on the target's validation images. iou in percent, None where the class is neither there nor predicted."""

    miou: float
    iou: dict[str, float | None]
    confusion: np.ndarray | None = None  # int [K, K], true class in rows
    predicted_share: dict[str, float] = field(default_factory=dict)
    true_share: dict[str, float] = field(default_factory=dict)
    evaluated: dict[str, Any] | None = None  # what the figures depend on besides the net; None: not known


@dataclass(frozen=True)
class Features:
    """A sample of pixels of both domains."""

    features: np.ndarray  # float32 [n, D]
    labels: np.ndarray  # int [n]
    domain: np.ndarray  # int [n]: 0 source, 1 target
    prototypes: np.ndarray  # float32 [K, D]


@dataclass
class RunFolder:
    """A run as the report sees it. `missing` lists what was not there or not readable."""

    folder: Path
    classes: list[str] = field(default_factory=list)
    palette: list[tuple[int, int, int]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # by stage
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by stage, by step
    thresholds: dict[str, dict[str, Any]] = field(default_factory=dict)  # by pseudo-label stage
    saved_bytes: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # by stage: planned bytes that each setting of the loop saves
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage
    features: Features | None = None
    settings: str = ""
    missing: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)  # file -> what is wrong with it

    @property
    def final(self) -> str | None:
        """The stage of the net that the run is about: the distilled one, else the adapted one; the head where it is one's folder."""
        results = (*reversed(catalog.names(catalog.with_role("result"))), catalog.HEAD.name)
        return next((stage for stage in results if stage in self.evaluations), None)

    @property
    def is_head(self) -> bool:
        """Whether this is the folder of a head: no stage, nothing adapted."""
        return any(catalog.HEAD.name in found for found in (self.evaluations, self.metrics, self.done))

    @property
    def baseline(self) -> str | None:
        """The stage of the net without adaptation: source-only, else the warm-up."""
        bases = catalog.names((*catalog.with_role("baseline"), *catalog.with_role("start")))
        return next((stage for stage in bases if stage in self.evaluations), None)

    def setting(self, *path: str, default: Any = None) -> Any:
        """A value of config.yaml, or `default`."""
        value: Any = self.parsed_settings
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    parsed_settings: dict[str, Any] = field(default_factory=dict)


def read_run(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.summary = _json(run, layout.SUMMARY) or {}
    if not run.summary:
        run.missing.append(
            f"{layout.SUMMARY}: the run has not come to its end; what follows is what its stages have written so far"
        )
    _read_settings(run)
    for stage in TRAINED:
        evaluation = _evaluation(
            _json(run, layout.of_stage(stage, layout.EVALUATION)), run, layout.of_stage(stage, layout.EVALUATION)
        )
        # A summary may be all that was kept of a run.
        evaluation = evaluation or _evaluation(run.summary.get(TRAINED[stage][0]), run, layout.SUMMARY)
        if evaluation is not None:
            run.evaluations[stage] = evaluation
    for stage in (*catalog.names(catalog.STAGES), catalog.HEAD.name):
        record = _json(run, layout.of_stage(stage, layout.DONE))
        if record is not None:
            run.done[stage] = record
    for stage in TRAINED:
        record = _json(run, layout.of_stage(stage, layout.PLAN)) or {}
        run.saved_bytes[stage] = _numbers(record.get("saved_bytes"))
    for stage in (row.name for row in catalog.STAGES if row.net is None):
        record = _json(run, layout.of_stage(stage, layout.THRESHOLDS))
        if record is not None and all(
            isinstance(record.get(key), dict) for key in ("thresholds", "predicted_pixels", "kept_pixels")
        ):
            run.thresholds[stage] = record
    _read_classes(run)
    _read_metrics(run)
    _read_features(run)
    _say_what_is_missing(run)
    return run


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _json(run: RunFolder, name: str) -> dict[str, Any] | None:
    try:
        value = json.loads((run.folder / name).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        return _damaged(run, name, str(error))
    if not isinstance(value, dict):
        return _damaged(run, name, f"a {type(value).__name__}, expected an object")
    return value


def _damaged(run: RunFolder, name: str, what: str) -> None:
    run.damaged[name] = f"{name} is damaged ({what})"
    run.missing.append(f"{run.damaged[name]}; it was left out")


def _numbers(value: Any) -> dict[str, float]:
    known = {str(key): number(item) for key, item in value.items()} if isinstance(value, dict) else {}
    return {key: item for key, item in known.items() if item is not None}


def _evaluation(value: Any, run: RunFolder, name: str) -> Evaluation | None:
    if value is None:
        return None
    miou = number(value.get("miou")) if isinstance(value, dict) else None
    if miou is None or not isinstance(value.get("iou"), dict):
        unlabelled = isinstance(value, dict) and value.get("miou", 0) is None
        why = "no mIoU, as no evaluated pixel is labelled" if unlabelled else "no mIoU or no IoU by class"
        run.missing.append(f"{name} holds {why}; it was left out")
        return None
    confusion = None
    try:
        confusion = np.asarray(value["confusion"], dtype=np.int64)
        if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
            confusion = None
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    iou = {str(key): number(item) for key, item in value["iou"].items()}
    shares = (_numbers(value.get(name)) for name in ("predicted_share", "true_share"))
    evaluated = value.get(layout.EVALUATED)
    return Evaluation(miou, iou, confusion, *shares, evaluated=evaluated if isinstance(evaluated, dict) else None)


def _read_settings(run: RunFolder) -> None:
    try:
        run.settings = (run.folder / layout.CONFIG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        run.missing.append(f"{layout.CONFIG}: the run's settings were not saved")
        return
    try:
        import yaml

        parsed = yaml.safe_load(run.settings)
    except Exception:  # shown as text all the same; a report must not fail on it
        parsed = None
    run.parsed_settings = parsed if isinstance(parsed, dict) else {}


def _read_classes(run: RunFolder) -> None:
    record = _json(run, layout.CLASSES) or {}
    names = record.get("names") or run.summary.get("classes")
    if not isinstance(names, list) or not names:
        names = next((list(evaluation.iou) for evaluation in run.evaluations.values()), [])
    run.classes = [str(name) for name in names]
    try:
        colours = [[int(np.clip(part, 0, 255)) for part in colour] for colour in record.get("palette") or ()]
        run.palette = [(red, green, blue) for red, green, blue in colours]
        whole = len(run.palette) == len(run.classes)
    except (TypeError, ValueError):
        whole = False
    if not whole:
        spare = [(int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)) for colour in SAFE_COLOURS]
        run.palette = [spare[i % len(spare)] for i in range(len(run.classes))]


def _read_metrics(run: RunFolder) -> None:
    try:
        lines = (run.folder / layout.METRICS).read_bytes().splitlines()
    except OSError:
        return
    torn = 0
    for line in lines:
        try:
            record = json.loads(line)
            stage, step = str(record["stage"]), int(record["step"])
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            torn += 1
            continue
        run.metrics.setdefault(stage, []).append({**record, "step": step})
    for records in run.metrics.values():
        records.sort(key=lambda record: record["step"])
    if torn:
        run.missing.append(f"{layout.METRICS}: {torn} line{'s' if torn > 1 else ''} cut short; left out of the curves")


def _read_features(run: RunFolder) -> None:
    path = run.folder / layout.FEATURES
    if not path.is_file():
        return
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, prototypes = (np.asarray(arrays[key], dtype=np.float32) for key in ("features", "prototypes"))
            labels, domain = (np.asarray(arrays[key]).astype(np.int64).ravel() for key in ("labels", "domain"))
        if (
            features.ndim != 2
            or prototypes.ndim != 2
            or features.shape[1] != prototypes.shape[1]
            or not len(features) == len(labels) == len(domain)
        ):
            raise ValueError("its arrays do not fit each other")
    except Exception as error:  # a cut zip file raises anything
        run.missing.append(f"{layout.FEATURES} is damaged ({error}); the picture of the features was left out")
        return
    whole = np.isfinite(features).all(1)
    run.features = Features(features[whole], labels[whole], domain[whole], np.nan_to_num(prototypes))


def _say_what_is_missing(run: RunFolder) -> None:
    say = run.missing.append
    absent = [stage for stage in TRAINED if stage not in run.evaluations]
    started = [stage for stage in absent if stage in run.metrics or stage in run.done]
    unscored = [TRAINED[stage][1] for stage in started if stage in run.done]
    if unscored:
        say(f"scores of {', '.join(unscored)}: the target has no labelled validation images")
    for stage in started:
        if stage not in run.done:
            step = run.metrics[stage][-1]["step"]
            say(
                f"{TRAINED[stage][1]}: the stage stopped after step {step}; the same command goes on from its last checkpoint"
            )
    adapted = any(row.name in run.done for row in catalog.with_role("result"))
    for row in () if run.is_head else catalog.trained():
        needed = row.role != "result" or not adapted  # one way to adapt is enough
        if row.absent and needed and row.name in absent and row.name not in started:
            say(f"{row.title}: {row.absent} (stage {row.name})")
    if not run.metrics:
        say(f"{layout.METRICS}: no logged step, so there are no curves")
    later = "" if adapted else " (written when adaptation ends)"
    with_prototypes = not (adapted or run.is_head) or (run.folder / layout.PROTOTYPES).is_file()
    if run.features is None and with_prototypes and not any(layout.FEATURES in line for line in run.missing):
        say(f"{layout.FEATURES}: no sample of features{later}")
    if not list(run.folder.glob(f"{layout.SAMPLES}/**/*{layout.IMAGE_SUFFIX}")):
        say(f"{layout.SAMPLES}: no pictures{later}")
