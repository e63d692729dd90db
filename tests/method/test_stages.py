"""The method end to end on tiny generated runs, and one adapt step against a plain transcription of the released loop."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import STAGES, TRAINED, save_scenes, tiny_config

from spcl_fast.compat.spcl import load_semantic_prototype, load_thres_const
from spcl_fast.data import build_dataset, read_label_png
from spcl_fast.errors import CheckpointError, ConfigError, DataError, Interrupted, NumericError
from spcl_fast.memory_plan.peak import forecast
from spcl_fast.method.context import Context
from spcl_fast.method.domains import Domains, class_weight
from spcl_fast.method.prototypes import read_prototypes
from spcl_fast.method.run import run_stages
from spcl_fast.method.training import warn_of_collapse
from spcl_fast.report import write_report
from spcl_fast.runs.folder import Run
from spcl_fast.runs.signs import signs
from spcl_fast.runs.tensorfile import replace_tensors
from spcl_fast.train.signals import StopRequest


def test_every_stage_leaves_its_files_and_the_summary_its_figures(finished):
    summary = json.loads(finished.run.path("summary.json").read_text())
    for name in ("source_only", "control", "warmup", "adapted", "distilled", "oracle"):
        assert 0 <= summary[name]["miou"] <= 100 and list(summary[name]["iou"]) == summary["classes"]
    assert summary["selection"] == "last" and set(summary["seconds"]) == set(TRAINED)
    assert all(value > 0 for value in summary["peak_memory_bytes"].values())
    gap = (summary["distilled"]["miou"] - summary["source_only"]["miou"]) / (
        summary["oracle"]["miou"] - summary["source_only"]["miou"]
    )
    assert summary["gap_closed"] == pytest.approx(gap)
    for stage in TRAINED:
        assert finished.run.done(stage)["step"] == 2
        assert len(list(finished.run.path(stage, "predictions").glob("*.png"))) == 2
    assert read_prototypes(finished.run).shape == (len(finished.classes), 32)
    with np.load(finished.run.path("features.npz")) as sample:
        assert sample["features"].shape[0] == len(sample["labels"]) == len(sample["domain"])


def test_pseudo_labels_keep_only_what_reaches_its_threshold(finished):
    for stage in ("pseudo_labels", "pseudo_labels_2"):
        record = json.loads(finished.run.path(stage, "thresholds.json").read_text())
        names = finished.domains.dataset("target", "train", labels=False).names
        labels = np.stack([read_label_png(finished.run.path(stage, f"{name}.png")) for name in names])
        counted = {k: int((labels == i).sum()) for i, k in enumerate(finished.classes.names)}
        assert counted == record["kept_pixels"]
        for name, predicted in record["predicted_pixels"].items():
            assert record["kept_pixels"][name] <= predicted
            if predicted and record["thresholds"][name] < 0.9:  # the median: half of them, and those equal to it, stay
                assert record["kept_pixels"][name] >= predicted // 2


def test_log_shows_what_would_reveal_a_collapse(finished):
    line = finished.run.metrics("adapt")[-1]
    num_classes = len(finished.classes)
    assert line.keys() >= {
        "segmentation",
        "source_excess",
        "target_excess",
        "source_agreement",
        "lr",
        "images_per_s",
        "data_wait",
        "peak_memory_bytes",
    }
    assert len(line["prototype_norm"]) == len(line["kept_share"]) == len(line["prototype_nearest"]) == num_classes
    assert max(line["prototype_nearest"]) <= 1 + 1e-5
    for stage in ("warmup", "adapt", "distill"):
        assert sum(finished.run.metrics(stage)[-1]["predicted_share"]) == pytest.approx(1, abs=1e-4)


def test_a_domain_of_which_no_pixel_counts_is_warned_of():
    names, seen = ["a", "b"], {"stage": "adapt", "prototype_norm": [1.0, 1.0], "target_excess": -0.1}
    assert [sign.title for sign in signs(seen, names)] == ["No source pixel counts in the contrastive loss"]
    both = seen | {"source_excess": -0.2}
    assert not signs(both, names) and not signs({"stage": "distill", "segmentation": 1.0}, names)
    both.pop("target_excess")
    assert [sign.title for sign in signs(both, names)] == ["No target pixel counts in the contrastive loss"]


def test_a_collapse_is_said_while_the_net_trains_and_once(finished, monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(finished.run, "output", output)
    names = finished.classes.names
    shares = [0.0] * len(names)
    shares[2] = 1.0
    watch = warn_of_collapse(finished)
    watch({"stage": "adapt", "step": 10, "predicted_share": [1 / len(names)] * len(names)})
    assert not output.getvalue()
    for _ in range(2):
        watch({"stage": "adapt", "step": 20, "predicted_share": shares})
    said = output.getvalue()
    assert (
        said.count("warning: One class takes over") == 1
        and f"100% of the target batch was predicted {names[2]}" in said
    )
    assert "adapt.contrast_weight" in said


def test_a_finished_run_is_skipped_and_other_settings_are_refused(finished, capsys):
    before = {stage: finished.run.path(stage, "done.json").stat().st_mtime_ns for stage in TRAINED}
    run_stages(finished.config, STAGES)
    assert {stage: finished.run.path(stage, "done.json").stat().st_mtime_ns for stage in TRAINED} == before
    changed = dataclasses.replace(
        finished.config, adapt=dataclasses.replace(finished.config.adapt, contrast_temperature=0.5)
    )
    with pytest.raises(CheckpointError, match="contrast_temperature"):
        run_stages(changed, ("adapt",))


def test_settings_that_were_refused_are_not_the_runs(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.run.folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()  # as where a run was interrupted
    kept = (tmp_path / "run" / "config.yaml").read_text()
    refused = tiny_config(tmp_path, **{"adapt.contrast_temperature": "0.5"})
    with pytest.raises(CheckpointError, match="contrast_temperature"):
        run_stages(refused, ("adapt",))
    assert (tmp_path / "run" / "config.yaml").read_text() == kept

    def held(*_):
        raise CheckpointError("Another process is writing the run")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Another process"):
        patch.setattr(Run, "_take_lock", held)
        run_stages(tiny_config(tmp_path, **{"distill.iterations": "7"}), ("distill",))
    assert (tmp_path / "run" / "config.yaml").read_text() == kept
    run_stages(tiny_config(tmp_path, **{"evaluate.overlays": "1"}), ("adapt",))
    assert "overlays: 1" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_broken_validation_image_that_the_report_would_show_is_skipped_where_bad_files_are(tmp_path):
    root = tmp_path / "target"
    for split in ("train", "val"):
        scenes = build_dataset("generated_target", None, split)
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(4):
            scenes.image(i).save(root / "images" / split / f"{i}.png")
            Image.fromarray(scenes.label(i)).save(root / "labels" / split / f"{i}.png")
    palette = [list(colour) for colour in scenes.classes.palette]
    (root / "classes.json").write_text(json.dumps({"names": scenes.classes.names, "palette": palette}))
    (root / "images" / "val" / "0.png").write_bytes(b"no picture")

    stages = ("source_only", "prototypes", "pseudo_labels", "adapt")
    folders = {"target.dataset": "folders", "target.root": str(root)}
    config = tiny_config(tmp_path, **folders, **{"loop.skip_bad_files": "true"})
    run_stages(config, stages)
    run = Context(config).run
    assert {path.name for path in run.path("report_samples").glob("*.png")} == {"2_image.png", "2_truth.png"}
    assert {path.name for path in run.path("adapt", "predictions").glob("*.png")} == {"2.png"}
    with pytest.raises(DataError, match=r"0\.png"):
        run_stages(tiny_config(tmp_path, "strict", **folders), stages)


def test_a_net_that_is_not_finite_gives_no_pseudo_labels_and_no_prototypes(tmp_path):
    config = tiny_config(tmp_path, **{"source_only.iterations": "1"})
    run_stages(config, ("source_only",))
    context = Context(config)
    model = context.model_of("source_only")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "model_of", lambda *_, **__: model)
        for stage in ("prototypes", "pseudo_labels"):
            with pytest.raises(NumericError, match="net of source_only are not finite"):
                run_stages(config, (stage,))
            assert context.run.done(stage) is None


def test_labels_without_a_known_class_are_refused_in_words(finished):
    data = finished.domains.dataset("source", "train")
    assert torch.isfinite(class_weight(data, 0.5)).all()
    ignored = data.spread(1)
    ignored.label = lambda index: np.full((4, 4), 255, np.uint8)
    with pytest.raises(DataError, match="no pixel of its labels has a known class"):
        class_weight(ignored, 0.5)


def test_a_stage_without_its_predecessor_says_which(finished, tmp_path):
    shutil.copytree(finished.run.folder, tmp_path / "run")
    (tmp_path / "run" / "prototypes.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "adapt")
    with pytest.raises(CheckpointError, match="'prototypes' is not finished"):
        run_stages(tiny_config(tmp_path), ("adapt",))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match="'source_only' is not finished"):
        run_stages(tiny_config(tmp_path), ("adapt",))


def test_target_labels_are_read_by_the_oracle_and_the_evaluation_only(tmp_path, monkeypatch):
    opened = []
    original = Domains.dataset.__wrapped__

    def spy(self, side, split, labels=True):
        opened.append((side, split, labels))
        return original(self, side, split, labels)

    monkeypatch.setattr(Domains, "dataset", spy)
    run_stages(tiny_config(tmp_path), STAGES[:-1])
    assert ("target", "train", False) in opened and ("target", "train", True) not in opened


@pytest.mark.parametrize("doing", ["averaging prototypes", "predicting pseudo-labels", "evaluating warmup"])
def test_a_signal_between_trained_stages_stops_with_its_own_exit_code_and_the_run_goes_on(tmp_path, monkeypatch, doing):
    original, listening = StopRequest.raise_if_requested, [True]

    def signal_arrives(self, text):
        if text == doing and listening:
            listening.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, text)

    monkeypatch.setattr(StopRequest, "raise_if_requested", signal_arrives)
    stages = ("source_only", "warmup", "prototypes", "pseudo_labels")
    with pytest.raises(Interrupted, match=f"Stopped by SIGTERM while {doing}"):
        run_stages(tiny_config(tmp_path), stages)
    run_stages(tiny_config(tmp_path), stages)
    assert Context(tiny_config(tmp_path)).run.done("pseudo_labels")


def test_what_the_release_left_is_taken_over(finished, tmp_path):
    """semantic_prototype.pth [D, K], thres_const.npy, and a folder of palette PNGs."""
    prototype = torch.randn(32, len(finished.classes))
    torch.save(prototype, tmp_path / "semantic_prototype.pth")
    np.save(tmp_path / "thres_const.npy", np.full(len(finished.classes), 0.25))
    given = {
        "prototypes.file": str(tmp_path / "semantic_prototype.pth"),
        "pseudo_label.thresholds": str(tmp_path / "thres_const.npy"),
    }
    config = tiny_config(tmp_path, **given)
    run_stages(config, ("source_only", "prototypes", "pseudo_labels"))
    torch.testing.assert_close(read_prototypes(Context(config).run), prototype.T)
    record = json.loads(Context(config).run.path("pseudo_labels", "thresholds.json").read_text())
    assert set(record["thresholds"].values()) == {0.25}

    replace_tensors(tmp_path / "other.safetensors", {"means": prototype})
    other = tiny_config(tmp_path, **{**given, "prototypes.file": str(tmp_path / "other.safetensors")})
    Context(config).run.path("prototypes", "done.json").unlink()
    with pytest.raises(CheckpointError, match=r"other.safetensors holds means; expected 'prototypes' \[K, D\]"):
        run_stages(other, ("prototypes",))

    folder = str(finished.run.path("pseudo_labels"))
    labelled = tiny_config(tmp_path, "labelled", **{"pseudo_label.folder": folder})
    run_stages(labelled, ("source_only", "prototypes", "pseudo_labels", "adapt"))
    assert not list(Context(labelled).run.path("pseudo_labels").glob("*.png")) and Context(labelled).run.done("adapt")


def test_a_lean_run_logs_plan_and_phases_and_resumes_bit_for_bit(tmp_path):
    lean = {
        "checkpoint": "auto",
        "accumulate": "2",
        "absorb_gradients": "true",
        "precision": "bf16",
        "checkpoint_every": "1",
    }
    sgd = {f"{stage}.optimizer": "sgd" for stage in ("source_only", "adapt")}
    config = tiny_config(tmp_path, **{f"loop.{key}": value for key, value in lean.items()}, **sgd)
    stages = ("source_only", "prototypes", "pseudo_labels", "adapt")
    run_stages(config, stages, forecast=forecast)
    context = Context(config)
    line = context.run.metrics("adapt")[-1]
    assert line["predicted_peak_bytes"] > 0 and {"forward", "loss", "backward"} <= line["phase_peak_bytes"].keys()
    whole = context.checkpoint("adapt").tensors
    context.run.path("adapt", "done.json").unlink()
    shutil.rmtree(context.run.path("adapt", "checkpoints", "step_00000002"))
    run_stages(config, stages, forecast=forecast)
    again = context.checkpoint("adapt").tensors
    assert again.keys() == whole.keys() and all(torch.equal(again[key], value) for key, value in whole.items())


def test_a_target_without_labels_has_pictures_of_every_net_and_is_said_to_be_so_once(tmp_path, capsys):
    root = save_scenes(tmp_path / "target", "generated_target")
    shutil.rmtree(root / "labels")
    config = tiny_config(tmp_path, **{"target.dataset": "folders", "target.root": str(root)})
    run_stages(config, ("source_only", "prototypes", "pseudo_labels", "adapt"))
    assert capsys.readouterr().out.count("not evaluated: the target's 'val' split has no labels") == 1
    run = Context(config).run
    for stage in ("source_only", "adapt"):
        assert {path.name for path in run.path(stage, "predictions").glob("*.png")} == {"0.png", "2.png"}
    page = write_report(run.folder).read_text()
    assert "Images of the target, which has no labels." in page and "No pictures were saved." not in page
    assert "written when adaptation ends" not in page
    assert page.count("the target has no labelled validation images") == 1


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_trained_batch_norm_with_one_value_per_channel_is_a_wrong_setting(tmp_path, frozen):
    small = {
        "model.name": "lite0",
        "model.freeze_bn": frozen,
        "source_only.augment.crop": "16,16",
        "source.size": "32,32",
    }
    config = tiny_config(tmp_path, **{**small, "source_only.batch_size": "1"})
    for work in (
        lambda: run_stages(config, ("source_only",)),
        lambda: run_stages(config, ("source_only",), forecast=forecast),
        lambda: forecast(config, "source_only", 5),
    ):
        if frozen == "true":
            work()
            continue
        with pytest.raises(ConfigError, match=r"BatchNorm.*source_only.augment.crop.*source_only.batch_size"):
            work()


def test_what_is_not_the_releases_is_refused_in_words(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "p.pth")
    with pytest.raises(CheckpointError, match=r"holds a dict; expected a tensor \[D, 5\]"):
        load_semantic_prototype(tmp_path / "p.pth", 5)
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(CheckpointError, match="thres_const.npy"):
        load_thres_const(tmp_path / "empty.npy", 5)
    np.save(tmp_path / "short.npy", np.zeros(3))
    with pytest.raises(CheckpointError, match=r"float64 \[3\]; expected a threshold for each of 5 classes"):
        load_thres_const(tmp_path / "short.npy", 5)
    for value in (np.nan, 90.0, -0.5):
        np.save(tmp_path / "odd.npy", np.array([0.1, value, 0.3, 0.4, 0.5]))
        with pytest.raises(CheckpointError, match="expected probabilities from 0 to 1"):
            load_thres_const(tmp_path / "odd.npy", 5)
    np.save(tmp_path / "objects.npy", np.array([{}] * 5))
    torch.save({"a": np.float64(1)}, tmp_path / "more.pth")
    (tmp_path / "odd.npy").write_bytes(b"odd")
    for load, name in (
        (load_thres_const, "objects.npy"),
        (load_thres_const, "odd.npy"),
        (load_semantic_prototype, "more.pth"),
    ):
        with pytest.raises(CheckpointError, match="and it holds more than that, is damaged or is empty") as caught:
            load(tmp_path / name, 5)
        assert "pickle" not in str(caught.value) and "weights_only" not in str(caught.value)
    torch.save(torch.full((8, 5), torch.nan), tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match="not finite"):
        load_semantic_prototype(tmp_path / "nan.pth", 5)


def test_distillation_takes_mixed_images(finished, tmp_path):
    shutil.copytree(finished.run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "distill")
    run_stages(tiny_config(tmp_path, **{"distill.class_mix": "1"}), ("distill",))
    before, after = (first_line(folder, "distill") for folder in (finished.run.folder, tmp_path / "run"))
    # the first step's source loss is that of one and the same net
    assert before["segmentation"] == after["segmentation"] and before["distillation"] != after["distillation"]


def first_line(folder, stage: str) -> dict:
    return next(
        line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if line["stage"] == stage
    )
