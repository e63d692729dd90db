"""The five doors: a backend, a loss, a net, a data set and a stage are one file and one line of the catalog each, and nothing else.

A copy of the package gets a toy of each kind; then its commands run as they are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

NET = """
from torch import nn

from .base import NetSettings, SegmentationModel, linear_classifier


def toy(num_classes: int, settings: NetSettings) -> SegmentationModel:
    body = nn.Sequential(nn.Conv2d(3, settings.feature_dim, 3, 4, 1), nn.ReLU())
    classifier = linear_classifier(settings.feature_dim, num_classes)
    return SegmentationModel(
        "toy", body, classifier, stride=4, channels=settings.feature_dim, num_classes=num_classes
    )
"""
NET_LINE = 'Net("toy", "spcl_fast.models.toy:toy", "one convolution"),'

DATA_SET = '''
"""pictures/NAME.png next to ids/NAME.png with the ids 10 and 20; the first half is for training."""

from pathlib import Path

from .classes import ClassSet, LabelTable
from .files import find_images
from .layouts import LabelBelow, Layout

CLASSES = ClassSet(("ground", "thing"), ((90, 60, 30), (200, 30, 30)))


def read(root: Path, split: str, num_classes: int) -> Layout:
    images = sorted(find_images(root / "pictures").items())
    half = len(images) // 2
    chosen = images[:half] if split == "train" else images[half:]
    return Layout(dict(chosen), LabelBelow(root / "ids"), LabelTable.of({10: 0, 20: 1}), CLASSES)
'''
DATA_SET_LINE = (
    'DataSet("toy_pictures", "spcl_fast.data.toy:read", "pictures and ids of two classes", num_classes=(2,)),'
)


def add(package: Path, file: str, source: str, table: str, line: str) -> None:
    """One file and one line at the end of a table of the catalog."""
    path = package / file
    assert not path.exists()
    path.write_text(source)
    catalog = package / "catalog.py"
    text = catalog.read_text()
    begin = text.index(f"\n{table} = (")
    end = text.index("\n)", begin)
    catalog.write_text(f"{text[:end]}\n    {line}{text[end:]}")


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A folder with a copy of the package to which a toy of each kind was added."""
    top = tmp_path_factory.mktemp("house")
    package = top / "spcl_fast"
    junk = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "spcl_fast", package, ignore=junk)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=junk)
    add(package, "models/toy.py", NET, "NETS", NET_LINE)
    add(package, "data/toy.py", DATA_SET, "DATA_SETS", DATA_SET_LINE)
    for side, seed in (("source", 0), ("target", 1)):
        pictures(top / side, seed)
    return top


def pictures(root: Path, seed: int) -> None:
    """Eight pictures of a bright square on dark ground."""
    rng = np.random.default_rng(seed)
    for index in range(8):
        ids = np.full((48, 64), 10, np.uint8)
        y, x = rng.integers(4, 24, 2)
        ids[y : y + 20, x : x + 20] = 20
        image = np.where(ids[..., None] == 20, 200, 60) + rng.integers(0, 40, (48, 64, 3))
        for folder, pixels in (("pictures", image.astype(np.uint8)), ("ids", ids)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{index}.png")


def spcl_fast(house: Path, *words: str) -> str:
    """What a command prints; it must succeed, and come from the copy."""
    environment = {**os.environ, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    where = "import spcl_fast, spcl_fast.kernels as k; print(spcl_fast.__file__, k.__file__)"
    found = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, env=environment, cwd=house)
    assert all(path.startswith(str(house)) for path in found.stdout.split()), found
    command = [sys.executable, "-m", "spcl_fast", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=house, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


STAGES = ("source_only", "prototypes", "pseudo_labels", "adapt")


def recipe() -> list[str]:
    words = ["--preset", "demo", "--name", "toys", "--model.name", "toy", "--model.feature_dim", "8"]
    for side in ("source", "target"):
        words += [f"--{side}.dataset", "toy_pictures", f"--{side}.root", side, f"--{side}.num_classes", "2"]
        words += [f"--{side}.size", "64x48", f"--{side}.eval_size", "64x48"]
    for stage in ("source_only", "adapt"):
        words += [f"--{stage}.iterations", "3", f"--{stage}.batch_size", "2"]
    return [*words, "--loop.log_every", "1"]


@pytest.fixture(scope="module")
def run(house) -> Path:
    """A run of everything that is a toy."""
    spcl_fast(house, "run", *recipe(), "--stages", ",".join(STAGES))
    return house / "runs" / "toys"


def test_a_run_trains_the_toys(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["classes"] == ["ground", "thing"]
    assert summary["adapted"]["miou"] >= 0 and all((run / stage / "done.json").is_file() for stage in STAGES)


def test_the_report_shows_them(house, run):
    spcl_fast(house, "report", str(run))
    assert "toy" in (run / "report.html").read_text()


def test_the_plan_counts_them(house, run):
    found = json.loads(spcl_fast(house, "plan", "adapt", *recipe(), "--json"))
    assert [stage["stage"] for stage in found["stages"]] == ["adapt"] and found["stages"][0]["peak_bytes"] > 0


def test_doctor_and_help_know_them(house):
    found = spcl_fast(house, "doctor").splitlines()
    assert any(line.startswith("nets: ") and line.endswith(", toy") for line in found)
    assert any(line.startswith("data sets: ") and line.endswith(", toy_pictures") for line in found)
    text = spcl_fast(house, "run", "-h")
    assert "tiny | toy" in text and "toy_pictures+generated_driver" in text


def test_the_toy_data_set_is_checked(house, run):
    text = spcl_fast(house, "check-data", *recipe(), "--side", "source")
    assert "toy_pictures, split 'train': 4 images, 4 checked" in text and "no problems" in text
