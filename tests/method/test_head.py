"""`spcl-fast head`: features of a frozen net once on the disk, a head trained on them, a whole net at the end."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from tiny_run import save_scenes

from spcl_fast.cli import main
from spcl_fast.config.load import load_config
from spcl_fast.data import build_dataset
from spcl_fast.data.dataset import FileDataset
from spcl_fast.errors import ConfigError
from spcl_fast.losses import CosineHead, LinearHead
from spcl_fast.method import feature_cache
from spcl_fast.method import head as head_module
from spcl_fast.method.feature_cache import cached_features
from spcl_fast.method.head import into_classifier, train_head
from spcl_fast.method.trained import load_trained
from spcl_fast.models import SegmentationModel, build_model
from spcl_fast.runs.tensorfile import read_tensors
from spcl_fast.train.device import Precision


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return save_scenes(tmp_path_factory.mktemp("scenes"), "generated_target", count=5)


def words(scenes, runs, name="run", **changes) -> list[str]:
    given = {
        "name": name, "runs_dir": runs, "target.root": scenes, "target.size": "48x32", "target.eval_size": "48x32", "model.name": "tiny",
        "head.iterations": 6, "head.batch_size": 2, "loop.workers": 0, "loop.log_every": 1, "loop.checkpoint_every": 1,
        "loop.checkpoints_kept": 9, "evaluate.overlays": 2, **changes,
    }  # fmt: skip
    return ["--preset", "folders", *(f"--{key}={value}" for key, value in given.items())]


def config_of(scenes, runs, **changes):
    given = [word.removeprefix("--").split("=", 1) for word in words(scenes, runs, **changes)[2:]]
    return load_config("folders", (), ["head"], [(key, value) for key, value in given])


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """The folder of runs, with one of the command."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["head", *words(scenes, runs)]) == 0
    return runs


def test_it_trains_evaluates_and_leaves_figures_a_picture_and_a_net(finished, tmp_path, scenes):
    run = finished / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (
        summary["head"]["miou"] >= 0
        and summary["features"]["images"] == 5
        and summary["features"]["shape"] == [80, 8, 12]
    )
    assert summary["seconds"]["features"] is not None and (run / "head" / "picture.png").is_file()
    losses = [json.loads(line)["segmentation"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and losses[-1] < losses[0]
    figures = tmp_path / "figures.json"
    assert main(["evaluate", str(run), "--output", str(figures)]) == 0
    assert json.loads(figures.read_text())["miou"] == summary["head"]["miou"]
    assert main(["export", str(run), str(tmp_path / "net.pt2"), "--images", "1"]) == 0
    assert main(["predict", str(run), str(scenes / "images" / "val"), str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out" / "masks").glob("*.png"))) == 5


def test_the_body_stays_as_it_was_and_the_classifier_is_the_head(finished, scenes):
    config = config_of(scenes, finished)
    saved = read_tensors(finished / "run" / "head" / "checkpoints" / "step_00000006" / "model.safetensors")
    first = read_tensors(finished / "run" / "head" / "checkpoints" / "step_00000001" / "model.safetensors")
    assert all(torch.equal(value, first[key]) for key, value in saved.items() if key.startswith("feature_extractor."))
    assert not torch.equal(saved["classifier.weight"], first["classifier.weight"])
    trained = load_trained(finished / "run", config).model
    state = read_tensors(finished / "run" / "head" / "checkpoints" / "step_00000006" / "head.safetensors")
    head = LinearHead(80, trained.num_classes, batch_norm=True).eval()
    head.load_state_dict(state)
    features, logits = trained(torch.rand(1, 3, 32, 48))
    torch.testing.assert_close(logits, head(features), rtol=1e-4, atol=1e-4)


def test_a_head_that_was_stopped_goes_on_bit_for_bit(finished, scenes, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs)
    checkpoints = runs / "run" / "head" / "checkpoints"
    whole = {name: read_tensors(checkpoints / "step_00000006" / f"{name}.safetensors") for name in ("model", "head")}
    for step in (4, 5, 6):
        shutil.rmtree(checkpoints / f"step_0000000{step}")
    (runs / "run" / "head" / "done.json").unlink()
    assert main(["head", *words(scenes, runs)]) == 0
    said = capsys.readouterr().out
    assert "head: going on from step 3 of 6" in said and "features: those of 5 images are in" in said
    for name, tensors in whole.items():
        again = read_tensors(checkpoints / "step_00000006" / f"{name}.safetensors")
        assert all(torch.equal(value, again[key]) for key, value in tensors.items())
    assert main(["head", *words(scenes, runs)]) == 0
    assert "head: finished before (6 iterations)" in capsys.readouterr().out


def test_other_settings_and_folders_of_runs_are_refused(finished, scenes, tmp_path, capsys):
    def answer(code: int, *more: str, name: str = "run") -> str:
        assert main(["head", *words(scenes, finished, name), *more]) == code
        return capsys.readouterr().err

    assert "head.lr: 0.002 -> 0.1" in answer(5, "--head.lr", "0.1")
    assert "model.classifier: got own, expected linear or cosine" in answer(2, "--model.classifier", "own")
    assert "head.augment: features are computed once" in answer(2, "--head.augment.flip", "0.5")
    assert "a head has none" in answer(2, "--loop.accumulate", "2")
    assert "source.root is not set, and head learns from the source" in answer(2, "--head.side", "source")
    (finished / "stages" / "adapt").mkdir(parents=True)
    assert "is the folder of a run that has adapt" in answer(2, name="stages")


def test_a_cosine_head_ends_as_a_net_too(scenes, tmp_path):
    assert main(["head", *words(scenes, tmp_path, **{"model.classifier": "cosine"})]) == 0
    config = config_of(scenes, tmp_path, **{"model.classifier": "cosine"})
    net = load_trained(tmp_path / "run", config).model
    head = CosineHead(80, net.num_classes)
    head.load_state_dict(read_tensors(tmp_path / "run" / "head" / "checkpoints" / "step_00000006" / "head.safetensors"))
    features, logits = net(torch.rand(1, 3, 32, 48))
    torch.testing.assert_close(logits, head(features), rtol=1e-4, atol=1e-4)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "net.pt2"), "--images", "1"]) == 0


def test_a_head_learns_from_the_source_and_is_scored_on_the_target(scenes, tmp_path):
    source = save_scenes(tmp_path / "source", "generated_source", count=3)
    given = {"head.side": "source", "source.root": source, "source.size": "48x32", "source.eval_size": "48x32"}
    assert main(["head", *words(scenes, tmp_path, **given)]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["features"]["images"] == 3


def test_it_learns_from_the_named_images_alone_and_needs_no_other_label(tmp_path, capsys):
    scenes = save_scenes(tmp_path / "scenes", "generated_target", count=5)
    for number in (0, 2, 3):
        (scenes / "labels" / "train" / f"{number}.png").unlink()
    # validation scenes have the same names, and may not be learnt from: other splits' folders, so they are other files
    given = {"target.labelled": "1,4"}
    assert main(["head", *words(scenes, tmp_path, **given)]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["features"]["images"] == 2
    assert (tmp_path / "run" / "labelled.txt").read_text() == "1\n4\n"
    assert main(["head", *words(scenes, tmp_path, **{"target.labelled": "1,"})]) == 5
    assert "target.labelled" in capsys.readouterr().err


def test_of_a_fold_it_learns_from_the_rest_and_is_scored_on_what_is_left_out(tmp_path, monkeypatch):
    scenes = save_scenes(tmp_path / "scenes", "generated_target", count=5)
    given = {"target.labelled": "0,1,3,4", "target.fold": "1/2"}
    opened, at_work = {True: set(), False: set()}, []
    evaluate, read = head_module.evaluate_stage, FileDataset.label

    def evaluating(*given, **more):
        at_work.append(True)
        try:
            return evaluate(*given, **more)
        finally:
            at_work.pop()

    def reading(self, index):
        opened[bool(at_work)].add(self.names[index])
        return read(self, index)

    monkeypatch.setattr(head_module, "evaluate_stage", evaluating)
    for shown in ("keep_pictures", "_write_picture"):  # true labels for the eye
        monkeypatch.setattr(head_module, shown, lambda *given: None)
    monkeypatch.setattr(FileDataset, "label", reading)
    assert main(["head", *words(scenes, tmp_path, **given)]) == 0
    learned, left_out = ((tmp_path / "run" / name).read_text().split() for name in ("labelled.txt", "held_out.txt"))
    assert sorted(learned + left_out) == ["0", "1", "3", "4"] and len(learned) == len(left_out) == 2
    assert opened[False] and not opened[False] & set(left_out)
    assert opened[True] == set(left_out)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["features"]["images"] == 2


def test_the_folder_has_a_report_with_scores_pictures_and_curves_and_no_word_of_adaptation(finished, capsys):
    run = finished / "run"
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Scores" in page and "head on frozen features" in page and "Confusion" in page
    assert page.count('alt="0: ') == 3, "image, prediction and truth of a picture"
    assert 'alt="losses and learning rate of each stage"' in page and 'alt="IoU of each class for each net"' in page
    for word in ("Pseudo-labels", "prototypes", "not trained, so", "Not in this report", "contrastive", "adapt"):
        assert word not in page.partition("<h2>Settings</h2>")[0], word


def test_a_head_that_is_refused_leaves_no_folder(scenes, tmp_path, capsys):
    assert main(["head", *words(scenes, tmp_path), "--model.weights", str(tmp_path / "none.npz")]) == 2
    assert not (tmp_path / "run").exists()


def test_a_weight_that_nothing_reads_is_refused(scenes, tmp_path, capsys):
    assert main(["head", *words(scenes, tmp_path), "--head.labelled_weight", "0.5"]) == 2
    assert "head.labelled_weight: got 0.5, and nothing reads it" in capsys.readouterr().err


def test_the_help_of_the_command_says_what_it_starts_from(capsys):
    assert main(["head", "-h"]) == 0
    text = capsys.readouterr().out
    assert (
        "which are computed once" in text
        and "it starts from --set head" in text
        and "--head.cache_dtype [float16]" in text
    )


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_classifier_that_is_written_is_the_head_in_eval_mode(batch_norm):
    torch.manual_seed(0)
    net = build_model("tiny", 4, feature_dim=None, classifier="linear")
    head = LinearHead(80, 4, batch_norm=batch_norm)
    features = 2 + 3 * torch.randn(2, 80, 5, 7)
    for _ in range(3):
        head(features)
    into_classifier(head, net)
    torch.testing.assert_close(net.classify(features), head.eval()(features), rtol=1e-4, atol=1e-4)


# ---- the files of features -------------------------------------------------------------------------------------------


class Counting:
    """How many images the net was shown."""

    def __init__(self, monkeypatch, fail_at=None):
        self.count, true = 0, SegmentationModel.features

        def features(net, images):
            self.count += 1
            if self.count == fail_at:
                raise RuntimeError("the machine stopped")
            return true(net, images)

        monkeypatch.setattr(SegmentationModel, "features", features)


def cached(scenes, folder, net=None, size=(48, 32), dtype="float16", **options):
    net = net or build_tiny()
    dataset = build_dataset("folders", scenes, "train", **options)
    return cached_features(
        net, dataset, size, folder, dtype=dtype, precision=Precision(torch.device("cpu")), say=lambda text: None
    )


def build_tiny(seed=0):
    torch.manual_seed(seed)
    return build_model("tiny", 4, feature_dim=None)


def test_features_are_computed_once_and_are_those_of_the_net(scenes, tmp_path, monkeypatch):
    seen = Counting(monkeypatch)
    first = cached(scenes, tmp_path, dtype="float32")
    assert first.computed and seen.count == 5 and first.values.dtype == np.float32
    again = cached(scenes, tmp_path, dtype="float32")
    assert not again.computed and seen.count == 5 and again.path == first.path
    dataset, net = build_dataset("folders", scenes, "train"), build_tiny().eval()
    for row, name in enumerate(dataset.names):
        image, label = dataset.load(row)
        image = torch.from_numpy(np.array(image.resize((48, 32), 3))).permute(2, 0, 1)[None] / 255
        assert again.names[row] == name
        torch.testing.assert_close(torch.from_numpy(again.values[row]), net.features(image)[0])
        assert again.labels[row].shape == (32, 48) and set(np.unique(again.labels[row])) <= set(np.unique(label))
    assert cached(scenes, tmp_path).values.dtype == np.float16


def test_features_of_anything_else_are_in_another_file(scenes, tmp_path, monkeypatch):
    mine = tmp_path / "scenes"
    shutil.copytree(scenes, mine)
    folder, net = tmp_path / "features", build_tiny()
    paths = [cached(mine, folder, net).path]

    def changed(**options) -> None:
        found = cached(mine, folder, **({"net": net} | options))
        assert found.computed and found.path not in paths
        paths.append(found.path)

    changed(net=build_tiny(1))
    changed(size=(40, 32))
    changed(dtype="float32")
    with torch.no_grad():
        net.mean.add_(0.01)
    changed()
    image = next((mine / "images" / "train").glob("*.png"))
    os.utime(image, ns=(1, 1))  # the same size, another time of change: edited
    changed()
    label = next((mine / "labels" / "train").glob("*.png"))
    os.utime(label, ns=(1, 1))
    changed()
    image.unlink()
    (mine / "labels" / "train" / image.name).unlink()
    changed()
    with torch.no_grad():
        next(net.classifier.parameters()).add_(1.0)  # no part of the features
    assert not cached(mine, folder, net).computed


def test_half_a_file_of_features_is_never_met(scenes, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Counting(patch, fail_at=3)
        with pytest.raises(RuntimeError, match="the machine stopped"):
            cached(scenes, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / f".tmp-{'0' * 24}.features.npy-1").write_bytes(b"of a killed process")
    assert cached(scenes, tmp_path).computed


def test_a_full_disk_and_a_feature_that_does_not_fit_are_errors_in_words(scenes, tmp_path, monkeypatch):
    net = build_tiny()
    with torch.no_grad():
        for parameter in net.feature_extractor.parameters():
            parameter.mul_(1e4)
    with pytest.raises(ConfigError, match="does not fit into float16: give --head.cache_dtype float32"):
        cached(scenes, tmp_path, net)
    about = os.statvfs(tmp_path)
    monkeypatch.setattr(feature_cache.os, "statvfs", lambda path: os.statvfs_result((*about[:4], 1, *about[5:])))
    with pytest.raises(ConfigError, match="the features take 0.00 GiB, and .* has 0.00 GiB left. Name another folder"):
        cached(scenes, tmp_path)
    assert not list(tmp_path.iterdir())


def test_broken_images_are_left_out_where_that_is_asked_for(scenes, tmp_path):
    mine = tmp_path / "scenes"
    shutil.copytree(scenes, mine)
    (mine / "images" / "train" / "2.png").write_bytes(b"no picture")
    found = cached(mine, tmp_path / "features", skip_bad_files=True)
    assert len(found.values) == len(found.labels) == len(found.names) == 4 and not any(
        "2" in name for name in found.names
    )


def test_it_is_trained_in_python_too(scenes, tmp_path):
    train_head(config_of(scenes, tmp_path))
    assert (tmp_path / "run" / "head" / "done.json").is_file()
