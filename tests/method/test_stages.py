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
import torch.nn.functional as F
from PIL import Image

from spcl_fast.compat.spcl import load_semantic_prototype, load_thres_const
from spcl_fast.config import Config
from spcl_fast.config.load import load_config
from spcl_fast.data import build_dataset, read_label_png
from spcl_fast.errors import CheckpointError, DataError, Interrupted, NumericError
from spcl_fast.memory_plan.peak import forecast
from spcl_fast.method.adapt import STAGE as ADAPT
from spcl_fast.method.context import Context
from spcl_fast.method.domains import Domains, class_weight
from spcl_fast.method.prototypes import read_prototypes
from spcl_fast.method.run import run_stages
from spcl_fast.method.training import batches_of, warn_of_collapse
from spcl_fast.models import build_model
from spcl_fast.runs.folder import Run
from spcl_fast.runs.tensorfile import replace_tensors
from spcl_fast.train.evaluate import Scores, evaluate_model
from spcl_fast.train.signals import StopRequest

TINY = {
    "source.size": "[48, 32]",
    "source.eval_size": "[48, 32]",
    "source.train_images": "6",
    "target.size": "[48, 32]",
    "target.eval_size": "[48, 32]",
    "target.train_images": "6",
    "evaluate.images": "4",
    "evaluate.overlays": "2",
    "loop.workers": "0",
    "loop.log_every": "1",
}
TRAINED = ("source_only", "control", "warmup", "adapt", "distill", "oracle")
STAGES = (
    "source_only",
    "control",
    "warmup",
    "prototypes",
    "pseudo_labels",
    "adapt",
    "pseudo_labels_2",
    "distill",
    "oracle",
)


def tiny_config(tmp_path, name="run", preset="demo", sets=(), **changes) -> Config:
    iterations = {f"{stage}.iterations": "2" for stage in TRAINED} | {f"{stage}.batch_size": "2" for stage in TRAINED}
    given = {**TINY, **iterations, "runs_dir": str(tmp_path), "name": name, **changes}
    return load_config(preset, (), sets, list(given.items()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Context:
    config = tiny_config(tmp_path_factory.mktemp("runs"))
    run_stages(config, STAGES)
    return Context(config)


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
        "lr",
        "images_per_s",
        "data_wait",
        "peak_memory_bytes",
    }
    assert len(line["prototype_norm"]) == len(line["kept_share"]) == len(line["prototype_nearest"]) == num_classes
    assert max(line["prototype_nearest"]) <= 1 + 1e-5
    for stage in ("warmup", "adapt", "distill"):
        assert sum(finished.run.metrics(stage)[-1]["predicted_share"]) == pytest.approx(1, abs=1e-4)


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


def test_a_net_picked_by_labels_is_never_called_the_last(tmp_path):
    run_stages(tiny_config(tmp_path, **{"evaluate.selection": "target_val"}), ("source_only",))
    with pytest.raises(CheckpointError, match="evaluate.selection: 'target_val' -> 'last'"):
        run_stages(tiny_config(tmp_path), ("source_only",))


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


def test_selection_on_source_keeps_the_best_checkpoint(tmp_path):
    config = tiny_config(
        tmp_path, **{"evaluate.selection": "source_val", "loop.checkpoint_every": "1", "source_only.iterations": "4"}
    )
    run_stages(config, ("source_only",))
    context = Context(config)
    picked = json.loads(context.run.path("source_only", "selected.json").read_text())
    scores = evaluate_model(
        context.model_of("source_only"), context.domains.dataset("source", "val"), config.source.eval_size
    )
    assert picked["by"] == "source_val" and scores.miou == pytest.approx(picked["miou"])


def test_scores_are_those_of_a_hand_count():
    classes = dataclasses.make_dataclass("Classes", ["names"])(("a", "b", "c"))
    scores = Scores(classes, np.array([[5, 1, 0], [3, 1, 0], [0, 0, 0]]))
    assert scores.iou == {"a": pytest.approx(500 / 9), "b": pytest.approx(20.0), "c": None}
    assert scores.miou == pytest.approx((500 / 9 + 20) / 2)
    assert scores.as_json()["predicted_share"] == {"a": 0.8, "b": 0.2, "c": 0.0}


def test_scores_agree_with_torchmetrics(finished):
    from torchmetrics.functional.classification import multiclass_jaccard_index
    from torchmetrics.functional.segmentation import mean_iou  # noqa: F401  the import itself fails where torchvision is broken

    model, dataset = finished.model_of("source_only"), finished.domains.dataset("target", "val").select(range(3))
    kept = {}
    scores = evaluate_model(
        model, dataset, (48, 32), keep=lambda i, name, labels: kept.update({i: torch.from_numpy(labels.copy())})
    )
    truth = torch.cat([torch.from_numpy(np.array(dataset.label(i))).flatten() for i in range(3)]).long()
    predicted = torch.cat([kept[i].flatten() for i in range(3)]).long()
    expected = multiclass_jaccard_index(predicted, truth, len(dataset.classes), average="none", ignore_index=255)
    ours = torch.tensor([0.0 if value is None else value / 100 for value in scores.iou.values()])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


# ---- parity with the release -------------------------------------------------------------------------------------------


def released_adapt_step(model, prototypes, source, target, pseudo, lr):
    """One iteration as `train_ours.py` does it, both graphs alive and the source graph gone through twice. prototypes [D, K]."""
    optimizer = torch.optim.SGD(
        [{"params": model.feature_extractor.parameters()}, {"params": model.classifier.parameters(), "lr": 10 * lr}],
        lr=lr,
        momentum=0.9,
        weight_decay=5e-4,
    )
    src_feat = model.features(source.images)
    src_seg = model.classify(src_feat)
    pred = F.interpolate(src_seg, source.images.shape[2:], mode="bilinear", align_corners=True)
    loss_seg = F.cross_entropy(pred / 1.8, source.labels.long(), ignore_index=255)
    loss_seg.backward(retain_graph=True)
    tgt_feat = model.features(target.images)
    tgt_mask = F.interpolate(pseudo[None].float(), tgt_feat.shape[2:], mode="nearest")[0].long()
    src_mask = F.interpolate(source.labels[None].float(), src_feat.shape[2:], mode="nearest")[0].long()
    src_mask[src_mask != src_seg.detach().argmax(1)] = 255
    unit = F.normalize(src_feat.detach(), dim=1).permute(0, 2, 3, 1)
    current = torch.zeros_like(prototypes)
    for k in src_mask.unique().tolist():
        if k != 255:
            current[:, k] = unit[src_mask == k].mean(0)
    prototypes = 0.1 * prototypes + 0.9 * current
    loss_cl = 0
    for feat, mask in ((src_feat, src_mask), (tgt_feat, tgt_mask)):
        rows = F.normalize(feat, dim=1).permute(0, 2, 3, 1).reshape(-1, feat.shape[1])
        loss_cl = loss_cl + F.cross_entropy(rows @ prototypes / 100, mask.flatten(), ignore_index=255)
    loss_cl.backward()
    optimizer.step()
    return prototypes


def test_one_adapt_step_under_released_settings_is_the_released_step(tmp_path):
    config = tiny_config(
        tmp_path,
        preset="gta5_cityscapes",
        sets=("released",),
        **{
            "source.dataset": "generated_source",
            "target.dataset": "generated_target",
            "model.name": "deeplab_v2_resnet18",
            "model.weights": "null",
            "warmup.iterations": "3",
            "adapt.iterations": "1",
            "pseudo_label.estimate_size": "[48, 32]",
        },
    )
    assert (config.adapt.contrast_temperature, config.adapt.absent, config.adapt.keep, config.model.frozen_bn_eps) == (
        100,
        "decay",
        0.1,
        0,
    )
    run_stages(config, ("warmup", "prototypes", "pseudo_labels", "adapt"))
    context = Context(config)
    source, target = next(batches_of(context, "adapt", config.adapt, ADAPT.feeds(config))(0))
    assert (target.labels != 255).any() and (source.labels != 255).any()

    model = context.model_of("warmup")
    start = {key: value.clone() for key, value in model.state_dict().items()}
    prototypes = released_adapt_step(
        model, read_prototypes(context.run).T.clone(), source, target, target.labels, config.adapt.lr
    )
    ours = context.checkpoint("adapt")
    moved = 0
    for key, value in model.state_dict().items():
        step = (value - start[key]).abs().max()
        moved += bool(step > 0)
        torch.testing.assert_close(ours.group("model")[key], value, rtol=1e-5, atol=max(1e-8, 1e-3 * step.item()))
    assert moved > 20
    torch.testing.assert_close(ours.group("bank")["prototypes"], prototypes.T, rtol=1e-5, atol=1e-6)


def test_released_batch_norm_has_no_eps():
    model = build_model("deeplab_v2_resnet18", 4, frozen_bn_eps=0.0)
    assert all(module.eps == 0 for module in model.modules() if type(module).__name__ == "FrozenBatchNorm2d")
