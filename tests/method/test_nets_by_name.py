"""Nets of timm, transformers and a module of one's own through a whole run: plan, training, resume, evaluation, prediction, export.

With stand-ins for both libraries, which CI does not have; the real ones are in tests/clients.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import stand_ins
import torch
from tiny_run import tiny_config

from spcl_fast.cli import main
from spcl_fast.memory_plan.peak import count_step, peak_memory, step_of
from spcl_fast.method.export import export_trained
from spcl_fast.method.run import run_stages
from spcl_fast.method.trained import load_trained
from spcl_fast.runs.tensorfile import read_tensors

OWN = """
from torch import nn

class Net(nn.Module):
    stride, channels, mean, std = 4, 6, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1))

    def forward(self, images):
        return self.module(images)
"""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Where the stand-ins and a net of one's own are found."""
    stand_ins.take(monkeypatch)
    (tmp_path / "own_net.py").write_text(OWN)
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    (backbone / "config.json").write_text(json.dumps({"model_type": "hidden"}))
    (backbone / "preprocessor_config.json").write_text('{"image_mean": [0.3, 0.4, 0.5], "image_std": [0.2, 0.3, 0.4]}')
    monkeypatch.chdir(tmp_path)


NAMES = ("timm/small_cnn", "timm/small_vit", "transformers/backbone", "own_net:Net")


def config_of(tmp_path, name, **changes):
    given = {"model.name": name, "loop.checkpoint_every": "1", "loop.checkpoints_kept": "9", "model.layer_decay": "0.7"}
    return tiny_config(tmp_path, **(given | changes))


@pytest.mark.parametrize("stage", ["adapt", "distill"])
@pytest.mark.parametrize("name", NAMES)
def test_the_plan_of_such_a_net_is_the_counted_peak_of_a_real_step(tmp_path, name, stage):
    config = config_of(tmp_path, name)
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, device="cpu"))
    predicted = peak_memory(config, stage)
    work = step_of(config, stage, 5)
    for domain in work.batch if isinstance(work.batch, tuple) else (work.batch,):
        domain.images.uniform_()
        domain.labels.random_(0, 5)
    counted = count_step(work, on_cpu=True)
    assert predicted.peak_bytes == pytest.approx(counted.peak, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_such_a_net_goes_on_bit_for_bit_and_is_loaded_exported_and_predicts(tmp_path, name):
    config = config_of(tmp_path / "runs", name, **{"source_only.iterations": "4"})
    run, stages = tmp_path / "runs" / "run", ("source_only", "prototypes", "pseudo_labels", "adapt")
    run_stages(config, stages)
    assert json.loads((run / "summary.json").read_text())["adapted"]["miou"] >= 0
    checkpoints = run / "source_only" / "checkpoints"
    whole = read_tensors(checkpoints / "step_00000004" / "model.safetensors")
    for step in ("step_00000004", "step_00000003"):
        shutil.rmtree(checkpoints / step)
    for stage in stages:
        (run / stage / "done.json").unlink()
    run_stages(config, ("source_only",))
    again = read_tensors(checkpoints / "step_00000004" / "model.safetensors")
    assert all(torch.equal(value, again[key]) for key, value in whole.items()) and whole.keys() == again.keys()

    trained = load_trained(run, config, "source_only")
    assert trained.model.name == name and not trained.model.training
    state = {key: value for key, value in trained.model.state_dict().items() if "num_batches" not in key}
    assert len(state) > 3 and all(torch.equal(value, again[key]) for key, value in state.items())
    export_trained(run, config, "source_only", tmp_path / "net.pt2", images=2)
    images = run / "report_samples"
    words = [str(images), str(tmp_path / "net"), "--stage", "source_only"]
    assert main(["predict", str(run), *words]) == 0
    assert main(["predict", str(tmp_path / "net.pt2"), str(images), str(tmp_path / "file")]) == 0
    for path in sorted((tmp_path / "net" / "masks").glob("*.png")):
        assert path.read_bytes() == (tmp_path / "file" / "masks" / path.name).read_bytes()


def test_another_layer_decay_is_another_run(tmp_path, capsys):
    words = [
        f"--{key}={value}"
        for key, value in {
            "name": "run",
            "runs_dir": tmp_path,
            "iterations": 1,
            "batch_size": 2,
            "model.name": "own_net:Net",
        }.items()
    ]
    words += [
        "--preset",
        "demo",
        "--source.size",
        "48x32",
        "--source.eval_size",
        "48x32",
        "--target.eval_size",
        "48x32",
    ]
    words += ["--source.train_images", "4", "--evaluate.images", "2", "--loop.workers", "0"]
    assert main(["source-only", *words]) == 0
    assert main(["source-only", *words, "--model.layer_decay", "0.5"]) == 5
    assert "model.layer_decay: 1.0 -> 0.5" in capsys.readouterr().err


def test_the_command_line_says_how_to_get_a_library_that_is_not_there(monkeypatch, tmp_path, capsys):
    stand_ins.forget(monkeypatch)
    assert main(["plan", "--preset", "demo", "--model.name", "timm/resnet18"]) == 2
    assert "needs 'timm', which is not installed: pip install \"spcl_fast[timm]\"" in capsys.readouterr().err
    assert main(["plan", "--preset", "demo", "--model.name", "tim/resnet18"]) == 2
    assert "expected one of" in capsys.readouterr().err
