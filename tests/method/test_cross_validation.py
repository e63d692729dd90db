"""Cross-validation: one run per fold, every labelled image counted once, source-only trained once, stopped and continued."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
from test_folds import LABELLED, config_of
from tiny_run import save_scenes

from spcl_fast.cli import main
from spcl_fast.config.load import dump_config
from spcl_fast.errors import CheckpointError, ConfigError, Interrupted
from spcl_fast.method.context import Context
from spcl_fast.method.cross_validation import cross_validate, folds_of, pooled
from spcl_fast.method.domains import Domains
from spcl_fast.report.folds import folds_table

STAGES = "source_only,control"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return save_scenes(root / "source", "generated_source"), save_scenes(root / "target", "generated_target", count=6)


def config_for(scenes, folder, stages=STAGES, fold=None, **changes):
    return config_of(scenes, folder, fold, name="mine", stages=stages, **changes)


def command(config, folder, *words) -> int:
    file = folder / "mine.yaml"
    file.write_text(dump_config(config))
    return main(["cross-validate", "--config", str(file), *words])


@pytest.fixture(scope="module")
def done(scenes, tmp_path_factory):
    """Three folds by the command, and what they left."""
    folder = tmp_path_factory.mktemp("runs")
    config = config_for(scenes, folder)
    assert command(config, folder, "--folds", "3") == 0
    return config, folder, json.loads((folder / "mine_cross_validation.json").read_text())


def test_every_labelled_image_is_predicted_once_by_nets_that_did_not_learn_its_label(done):
    config, folder, record = done
    left_out = [fold["images"] for fold in record["folds"]]
    assert sorted(name for names in left_out for name in names) == LABELLED.split(",")
    for part, names in enumerate(left_out, start=1):
        learned = (folder / f"mine_fold_{part}" / "labelled.txt").read_text().split()
        assert sorted(learned + names) == LABELLED.split(",")
    named = Domains(config).named_target
    pixels = sum(int((np.asarray(named.label(i)) != 255).sum()) for i in range(len(named)))
    for net in ("source_only", "control"):
        assert np.sum(record[net]["confusion"]) == pixels


def test_the_figures_are_those_of_the_summed_confusion(done):
    _, folder, record = done
    for stage in ("source_only", "control"):
        found = [
            json.loads((folder / f"mine_fold_{part}" / stage / "evaluation.json").read_text()) for part in (1, 2, 3)
        ]
        confusion = sum(np.array(one["confusion"]) for one in found)
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        iou = [100 * hit / both if both else None for hit, both in zip(confusion.diagonal(), union, strict=True)]
        assert list(record[stage]["iou"].values()) == pytest.approx(iou)
        assert record[stage]["miou"] == pytest.approx(np.mean([value for value in iou if value is not None]))
        by_fold = [one["miou"] for one in found]
        assert record[stage]["miou_by_fold"] == by_fold
        assert record[stage]["miou_standard_deviation"] == pytest.approx(np.std(by_fold, ddof=1))


def test_what_does_not_depend_on_the_fold_is_trained_once(done):
    _, folder, _ = done

    def weights(part, stage):
        return max((folder / f"mine_fold_{part}" / stage / "checkpoints").iterdir()) / "model.safetensors"

    first = weights(1, "source_only")
    assert all(weights(part, "source_only").samefile(first) for part in (2, 3))
    assert not weights(2, "control").samefile(weights(1, "control"))
    seconds = [
        json.loads((folder / f"mine_fold_{part}" / "source_only" / "done.json").read_text())["seconds"]
        for part in (1, 2)
    ]
    assert seconds[0] == seconds[1]


def test_the_table_has_a_column_per_net_and_rows_for_classes_folds_and_their_spread(done):
    record = done[2]
    lines = folds_table(record).splitlines()
    assert lines[0].split() == ["class", "source-only", "control"]
    titles = [line.split("  ")[0] for line in lines]
    assert titles[2 : 2 + len(record["classes"])] == record["classes"]
    assert f"mIoU, fold 2/3 ({len(record['folds'][1]['images'])} images)" in titles
    assert "standard deviation over folds" in titles
    cells = next(line for line in lines if line.startswith("mIoU ")).split()
    assert cells[1:] == [f"{record[net]['miou']:.1f}" for net in ("source_only", "control")]
    assert "over all 5 labelled target images" in lines[-1] and "learned from 3 or 4 of them" in lines[-1]
    page = (done[1] / "mine_cross_validation.md").read_text()
    assert page.startswith("# mine: 3 folds\n") and f"| 1/3 | `{done[1]}/mine_fold_1` |" in page
    assert (done[1] / "mine_fold_3" / "report.html").is_file()


def test_the_gains_spread_is_that_of_the_gain_and_not_of_the_images():
    """Images of one fold are harder for every net: the difference of two nets hardly varies."""
    nets = {
        name: {"miou": miou, "iou": {"road": miou}, "miou_by_fold": by_fold, "miou_standard_deviation": 14.1}
        for name, miou, by_fold in (("source_only", 40.0, [30.0, 50.0]), ("adapted", 45.0, [34.0, 56.0]))
    }
    folds = [{"run": "r", "fold": f"{part}/2", "images": ["a"]} for part in (1, 2)]
    record = {"classes": ["road"], **nets, "labelled_images": 2, "learned_from": [1], "folds": folds}
    rows = {line.split("  ")[0]: line.split() for line in folds_table(record).splitlines()}
    assert rows["mIoU, fold 1/2 (1 image)"][-3:] == ["30.0", "34.0", "+4.0"]
    assert rows["standard deviation over folds"][-3:] == ["14.1", "14.1", "1.4"]


def test_stopped_between_folds_and_in_one_the_same_command_goes_on_to_the_same_figures(scenes, done, tmp_path, capsys):
    config = config_for(scenes, tmp_path)

    def stop(run):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="Stopped by SIGTERM while cross-validating, before fold 2 of 3"):
        cross_validate(config, 3, after=stop)
    folder = tmp_path / "mine_fold_2" / "control"

    def stop_in_control(text):
        if "fold 2" in text:
            Context.identity = stopping  # type: ignore[method-assign]

    identity = Context.identity

    def stopping(self, row):
        if row.name == "control" and self.run.done("source_only") is not None and self.labels_checked:
            os.kill(os.getpid(), signal.SIGTERM)
        return identity(self, row)

    try:
        with pytest.raises(Interrupted):
            cross_validate(config, 3, say=stop_in_control)
    finally:
        Context.identity = identity  # type: ignore[method-assign]
    assert not (folder / "done.json").exists() and (tmp_path / "mine_fold_2" / "source_only" / "done.json").exists()
    capsys.readouterr()
    assert command(config, tmp_path, "--folds", "3") == 0
    assert "control: finished before (2 iterations)" in capsys.readouterr().out
    record = json.loads((tmp_path / "mine_cross_validation.json").read_text())
    assert [record[net] for net in ("source_only", "control")] == [done[2][net] for net in ("source_only", "control")]


def test_a_run_of_before_gives_its_stages_that_need_no_labels(scenes, done, tmp_path, capsys):
    config = config_for(scenes, tmp_path)
    assert command(config, tmp_path, "--folds", "2", "--fork", str(done[1] / "mine_fold_1")) == 0
    out = capsys.readouterr().out
    assert out.count("source_only: taken over from") == 2 and "not taken over" not in out
    assert out.count("source_only: to be evaluated again") == 2  # on the images of these folds


def test_figures_of_other_images_are_not_summed(scenes, done, tmp_path):
    config, folder, _ = done
    file = folder / "mine_fold_2" / "control" / "evaluation.json"
    kept = file.read_text()
    other = json.loads(kept)
    other["evaluated"]["held_out"] = ["0"]
    file.write_text(json.dumps(other))
    try:
        with pytest.raises(CheckpointError, match="has no figures of the 2 images that fold 2/3 leaves out"):
            pooled(config, folds_of(config, 3))
    finally:
        file.write_text(kept)


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"labelled": "null"}, (), "target.labelled: got null, and cross-validate leaves a part"),
        ({"fold": "1/2"}, (), "target.fold: got 1/2, and cross-validate does every fold in a run of its own"),
        ({}, ("--folds", "6"), "expected at most 5 parts: target.labelled names 5 images"),
        ({}, ("--folds", "1"), "got '1', expected a whole number of 2 or more"),
        (
            {"stages": "prototypes,pseudo_labels"},
            (),
            "none of them trains a net: there is nothing to evaluate. Add one of",
        ),
        (
            {"evaluate.selection": "target_val"},
            (),
            "a net that is chosen on the images that are left out is not evaluated",
        ),
        ({"stages": "control"}, (), "stage 'source_only' is not finished in"),
    ],
)
def test_what_cannot_be_cross_validated_is_refused_before_any_run(scenes, tmp_path, capsys, changes, words, said):
    code = command(config_for(scenes, tmp_path, **changes), tmp_path, *words)
    assert said in capsys.readouterr().err
    assert code == (CheckpointError.exit_code if "finished" in said else ConfigError.exit_code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml"]


def test_another_number_of_folds_needs_another_name(scenes, done, tmp_path, capsys):
    config, folder, _ = done
    assert command(config, folder, "--folds", "2") == CheckpointError.exit_code
    assert "(target.fold: '1/3' -> '1/2')" in capsys.readouterr().err
