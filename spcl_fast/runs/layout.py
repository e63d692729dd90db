"""The run folder: names of its files and folders, columns of its log, phases of a step. Whoever writes or reads one takes its name here.

config.yaml classes.json metrics.jsonl summary.json report.html tensorboard/STAGE/
prototypes.safetensors features.npz labelled.txt held_out.txt report_samples/NAME_image.png, NAME_truth.png
STAGE/done.json                                      of every stage
STAGE/checkpoints/step_XXXXXXXX/ STAGE/evaluation.json STAGE/predictions/NAME.png STAGE/plan.json       of a trained one
STAGE/selected.safetensors, selected.json            of a trained one, where evaluate.selection is not "last"
STAGE/NAME.png STAGE/thresholds.json                 of one that makes pseudo-labels
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from ..config import Config

# of the run
CONFIG = "config.yaml"
CLASSES = "classes.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
TENSORBOARD = "tensorboard"
LOCK = ".lock"
PROTOTYPES = "prototypes.safetensors"  # tensors "prototypes" [K, D] and "images" [K]
LEFT_OUT = "left_out"  # in summary.json: which labelled images the figures are of, where target.fold says so
LABELLED_COUNT = (
    "labelled_target_images"  # in summary.json: of how many the labels were used, where target.labelled is set
)
FEATURES = "features.npz"
LABELLED = "labelled.txt"  # names of the target's images whose labels were used
HELD_OUT = "held_out.txt"  # names of those that target.fold left out
SAID_BEFORE_STAGES = (LOCK, CONFIG, CLASSES, LABELLED, HELD_OUT)  # there before a stage has done anything
SAMPLES = "report_samples"
IMAGE_SUFFIX, TRUTH_SUFFIX = "_image.png", "_truth.png"

# of a stage, in its folder
DONE = "done.json"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation.json"
EVALUATED = "evaluated"  # in that: what the figures depend on besides the net
HELD_OUT_NAMES = "held_out"  # in that: the images that target.fold left out of training, by name
PREDICTIONS = "predictions"
PLAN = "plan.json"
SELECTED = "selected.json"
SELECTED_WEIGHTS = "selected.safetensors"
THRESHOLDS = "thresholds.json"
PICTURE = "picture.png"  # of `spcl-fast head`

# of `spcl-fast cross-validate`, next to the runs: RUNS_DIR/NAME_fold_1, ...; RUNS_DIR/NAME_cross_validation.json, .md
CROSS_VALIDATION = ("cross_validation.json", "cross_validation.md")
BY_FOLD, SPREAD = "miou_by_fold", "miou_standard_deviation"  # of a net in that JSON

# of a checkpoint, in its folder step_XXXXXXXX
STATE = "state.json"
MANIFEST = "manifest.json"

# of `spcl-fast predict`, in the folder that it writes
MASKS = "masks"
OVERLAYS = "overlays"

# of `spcl-fast export`
EXPORTED = ONNX, TORCH = (".onnx", ".pt2")

PHASES = ("data", "forward", "loss", "backward", "step")  # of one training step, in order


class LogLine(TypedDict, total=False):
    """What a line of metrics.jsonl holds next to the losses: a step may not return these names, and no curve is drawn of them."""

    stage: str
    step: int
    seconds: float
    lr: float
    images_per_s: float
    data_wait: float
    peak_memory_bytes: int
    predicted_peak_bytes: int | None
    phase_peak_bytes: dict[str, int] | None


COLUMNS = frozenset(LogLine.__annotations__)


def folder_of(config: Config) -> Path:
    """The run folder of these settings."""
    return Path(config.runs_dir) / config.name


def name_of_fold(name: str, part: int) -> str:
    """What the run of a fold is called; parts count from 1."""
    return f"{name}_fold_{part}"


def is_exported(path: Path) -> bool:
    return path.suffix in EXPORTED and not path.is_dir()


def run_of(path: Path) -> Path | None:
    """The run folder that `path` is or lies in, if any."""
    for folder in (path, *path.resolve().parents):
        if (folder / CONFIG).is_file():
            return folder
    return None


def of_stage(stage: str, name: str) -> str:
    """A file of a stage, relative to the run folder."""
    return f"{stage}/{name}"
