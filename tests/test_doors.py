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
import yaml
from PIL import Image

from spcl_fast import catalog

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

LOSS = """
from .spcl import SPCLObjective


class Toy(SPCLObjective):
    def forward(self, features, labels):
        return 2 * super().forward(features, labels)


def objective(num_classes, dim, settings):
    return Toy(num_classes, dim, temperature=settings.contrast_temperature, keep=settings.keep)
"""
LOSS_LINE = 'Loss("toy_loss", "spcl_fast.losses.toy:objective", "twice the loss of SPCL"),'

BACKEND = """
from . import reference
from .reference import *


def why_not(ask):
    return None if ask.op == "class_moments" and ask.device.type == "cpu" else "the toy knows class_moments alone"


def class_moments(problem):
    print("toy class_moments")
    return reference.class_moments(problem)
"""
BACKEND_LINE = 'Backend("toy", "spcl_fast.backends.toy", ("cpu",)),'

STAGE = """
from dataclasses import dataclass

from ..config.schema import TrainConfig, setting  # nothing that imports torch: the command line reads these settings


@dataclass(frozen=True)
class ToyConfig(TrainConfig):
    schedule_iterations: int | None = None
    strength: float = setting(0.5, "how much of a toy it is", least=0, most=1)


class ToyStage:
    name = "toy_stage"

    def feeds(self, config):
        from .stage import OWN, Feed

        return (Feed("source", OWN, config.toy_stage.augment),)

    def build(self, config, nets):
        from .stage import Trainee, forward_shapes
        from .supervised import supervised_step

        train, model = config.toy_stage, nets.start()
        net = nets.lean(model, forward_shapes(config, train, self.feeds(config)))
        step = supervised_step(net, train, None, config.loop.accumulate)
        return Trainee(step, net, {"model": model}, {"model": nets.optimizer(model, train)})


STAGE = ToyStage()
"""
STAGE_LINE = (
    'Stage("toy_stage", "spcl_fast.method.toy:STAGE", "toy_stage", "toy-stage", "train on for the fun of it", '
    '"--preset demo", title="toyed", net="toyed", role="result", after=("adapt",), '
    'settings="spcl_fast.method.toy:ToyConfig"),'
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
    add(package, "losses/toy.py", LOSS, "LOSSES", LOSS_LINE)
    add(package, "backends/toy.py", BACKEND, "BACKENDS", BACKEND_LINE)
    add(package, "method/toy.py", STAGE, "STAGES", STAGE_LINE)
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


def python(house: Path, *words: str) -> str:
    """What Python prints with the copy of the package; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=house, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def spcl_fast(house: Path, *words: str) -> str:
    return python(house, "-m", "spcl_fast", *words)


STAGES = ("source_only", "prototypes", "pseudo_labels", "adapt", "toy_stage")


def recipe() -> list[str]:
    words = ["--preset", "demo", "--name", "toys", "--model.name", "toy", "--model.feature_dim", "8"]
    for side in ("source", "target"):
        words += [f"--{side}.dataset", "toy_pictures", f"--{side}.root", side, f"--{side}.num_classes", "2"]
        words += [f"--{side}.size", "64x48", f"--{side}.eval_size", "64x48"]
    for stage in ("source_only", "adapt", "toy_stage"):
        words += [f"--{stage}.iterations", "3", f"--{stage}.batch_size", "2"]
    return [*words, "--adapt.loss", "toy_loss", "--toy_stage.strength", "0.25", "--loop.log_every", "1"]


@pytest.fixture(scope="module")
def run(house) -> Path:
    """A run of everything that is a toy."""
    spcl_fast(house, "run", *recipe(), "--stages", ",".join(STAGES))
    return house / "runs" / "toys"


def test_the_copy_is_what_runs(house):
    where = "import spcl_fast, spcl_fast.kernels as k; print(spcl_fast.__file__, k.__file__)"
    assert all(path.startswith(str(house)) for path in python(house, "-c", where).split())


def test_the_file_of_a_stage_may_be_imported_before_the_settings(house):
    first = (
        "import spcl_fast.method.toy as toy; from spcl_fast.config import Config; print(Config().toy_stage.strength)"
    )
    assert python(house, "-c", first).strip() == "0.5"


def test_a_run_trains_the_toys(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["classes"] == ["ground", "thing"]
    assert all(summary[net]["miou"] >= 0 for net in ("source_only", "adapted", "toyed"))
    assert all((run / stage / "done.json").is_file() for stage in STAGES)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["toy_stage"]["strength"] == 0.25 and settings["adapt"]["loss"] == "toy_loss"


def test_a_finished_run_of_toys_is_skipped(house, run):
    again = spcl_fast(house, "toy-stage", "--run-folder", str(run))
    assert "toy_stage: finished before" in again


def test_the_report_shows_them(house, run):
    spcl_fast(house, "report", str(run))
    page = (run / "report.html").read_text()
    assert "final net, toyed" in page  # it is the final net of this run


def test_the_plan_counts_them(house, run):
    found = json.loads(spcl_fast(house, "plan", "toy-stage", *recipe(), "--json"))
    assert [stage["stage"] for stage in found["stages"]] == ["toy_stage"] and found["stages"][0]["peak_bytes"] > 0


def test_doctor_names_them_and_tests_the_backend(house):
    lines = spcl_fast(house, "doctor").splitlines()
    for what, name in (("nets", "toy"), ("losses", "toy_loss"), ("data sets", "toy_pictures"), ("stages", "toy_stage")):
        assert any(line.startswith(f"{what}: ") and line.endswith(f", {name}") for line in lines)
    own = [line for line in lines if " toy " in line]
    assert any("class_moments" in line and "usable, self-test passed" in line for line in own)
    assert any("not usable: the toy knows class_moments alone" in line for line in own)


def test_help_knows_them(house):
    text = spcl_fast(house, "run", "-h")
    for words in ("tiny | toy", "toy_pictures+generated_driver", " | toy_loss", "--toy_stage.strength [0.5]"):
        assert words in " ".join(text.split())
    assert "how much of a toy it is" in spcl_fast(house, "toy-stage", "-h")
    assert "  toy-stage      train on for the fun of it" in spcl_fast(house, "--help")


def test_the_toy_data_set_is_checked(house, run):
    text = spcl_fast(house, "check-data", *recipe(), "--side", "source")
    assert "toy_pictures, split 'train': 4 images, 4 checked" in text and "no problems" in text


def test_the_tests_of_an_op_run_on_the_toy_backend(house):
    tests = house / "tests"
    shutil.copytree(ROOT / "tests" / "ops", tests / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "cuda_emulator", tests / "cuda_emulator")
    for path in (ROOT / "tests").glob("*.py"):
        if not path.name.startswith("test_"):
            shutil.copy(path, tests / path.name)
    shutil.copy(ROOT / "pyproject.toml", house / "pyproject.toml")
    out = python(house, "-m", "pytest", "tests/ops/test_class_moments.py", "-k", "toy", "-rP", "-p", "no:cacheprovider")
    assert " passed" in out and "failed" not in out and "toy class_moments" in out


def test_every_home_of_the_catalog_is_there():
    for table in (catalog.BACKENDS, catalog.LOSSES, catalog.NETS, catalog.DATA_SETS, catalog.STAGES):
        assert len(set(catalog.names(table))) == len(table)
        for row in table:
            assert catalog.load(row.home) is not None, row
    assert {stage.role for stage in catalog.trained()} <= set(catalog.ROLES)
    assert all(stage.role == "" for stage in catalog.STAGES if stage.net is None)
