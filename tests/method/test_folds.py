"""A fold: no net learns from the labels that target.fold leaves out, every figure is of these images, and one folder has one fold."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import save_scenes, tiny_config

from spcl_fast import catalog
from spcl_fast.cli import main
from spcl_fast.config.rules import check_config
from spcl_fast.data.dataset import FileDataset
from spcl_fast.errors import CheckpointError, ConfigError
from spcl_fast.method import run as run_module
from spcl_fast.method.context import Context
from spcl_fast.method.domains import Domains
from spcl_fast.method.run import run_stages
from spcl_fast.report import write_report
from spcl_fast.runs.identity import flat_settings, settings_difference
from spcl_fast.runs.tensorfile import read_tensors

STAGES = catalog.names(catalog.STAGES)
NAMES = [str(i) for i in range(6)]
LABELLED = "0,1,2,4,5"
MAY_OPEN = {"evaluate_model", "keep_pictures"}  # the figures, and the truths that a report shows


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return save_scenes(root / "source", "generated_source"), save_scenes(root / "target", "generated_target", count=6)


def config_of(scenes, tmp_path, fold="1/2", name="run", labelled=LABELLED, **changes):
    source, target = scenes
    given = {"source.root": str(source), "target.root": str(target), "target.labelled": labelled}
    given |= {"source.dataset": "folders", "target.dataset": "folders"}
    given |= {} if fold is None else {"target.fold": fold}
    for row in catalog.trained():  # whatever looks at labels before the first step
        given |= {f"{row.name}.class_weight_power": "0.5", f"{row.name}.balanced_sampling": "true"}
        given |= {f"{row.name}.augment.crop": "32x32", f"{row.name}.augment.rare_crop": "0.5"}
    given["online.target_augment.crop"] = "32x32"
    return tiny_config(tmp_path, name=name, **given, **changes)


def leaks(config, monkeypatch) -> dict[str, set[str]]:
    """Do every stage. -> by stage the left-out images whose label was asked for by anything but evaluation."""
    found: dict[str, set[str]] = {}
    held_out, stage = set(Domains(config).held_out.names), []
    do, folder = run_module._do, f"{config.target.root}/labels/train/"

    def noting_stage(context, row, forecast):
        stage.append(row.name)
        do(context, row, forecast)

    def noting(read):
        def reading(self, index):
            path = str(self.label_path(index))
            if path.startswith(folder) and self.names[index] in held_out and not MAY_OPEN & callers():
                found.setdefault(stage[-1] if stage else "before", set()).add(self.names[index])
            return read(self, index)

        return reading

    monkeypatch.setattr(run_module, "_do", noting_stage)
    for name in ("label", "label_ids"):
        monkeypatch.setattr(FileDataset, name, noting(getattr(FileDataset, name)))
    run_stages(config, STAGES)
    assert stage == list(STAGES)
    return found


def callers() -> set[str]:
    found, frame = set(), sys._getframe()
    while frame is not None:
        found.add(frame.f_code.co_name)
        frame = frame.f_back
    return found


@pytest.fixture(scope="module")
def done(scenes, tmp_path_factory):
    """A run of every stage with the first of two folds, and the left-out labels that were opened by anything but evaluation."""
    config = config_of(scenes, tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:
        found = leaks(config, patch)
    return Context(config), found


# ---- no leak -----------------------------------------------------------------------------------------------------------


def test_only_evaluation_opens_a_label_that_is_left_out(done):
    assert done[1] == {}
    assert sorted(done[0].domains.held_out.names + done[0].domains.labelled_target.names) == LABELLED.split(",")


def test_a_label_that_leaks_is_seen_in_every_stage_that_has_labels_of_the_target(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(Domains, "_without_held_out", lambda self, dataset: dataset)
    found = leaks(config_of(scenes, tmp_path), monkeypatch)
    fold = "1/2"
    assert set(found) == {row.name for row in catalog.STAGES if catalog.depends_on_labelled(row, fold)}
    assert set(found) == set(STAGES) - {"source_only"}


def results(context) -> dict[str, torch.Tensor]:
    """Every tensor that the stages of a run leave to one another: nets with what they are trained with, prototypes, pseudo-labels."""
    found = {}
    for row in catalog.trained():
        for file in sorted(context.checkpoint(row.name).path.glob("*.safetensors")):
            found |= {f"{row.name}/{file.name}/{key}": value for key, value in read_tensors(file).items()}
    found |= read_tensors(context.run.path("prototypes.safetensors"))
    for stage in ("pseudo_labels", "pseudo_labels_2"):
        for name in NAMES:
            found[f"{stage}/{name}"] = torch.from_numpy(np.array(Image.open(context.run.path(stage, f"{name}.png"))))
    return found


def with_other_labels(scenes, folder, names):
    """A copy of the target whose labels of these images are wrong everywhere."""
    target = save_scenes(folder, "generated_target", count=6)
    for name in names:
        path = target / "labels" / "train" / f"{name}.png"
        label = np.array(Image.open(path))
        Image.fromarray((label + 3) % 9).save(path)
    return scenes[0], target


@pytest.mark.parametrize("which", ["held_out", "labelled_target"])
def test_other_labels_change_a_result_only_where_they_are_learned(scenes, done, tmp_path, which):
    """Whatever way a label could take into a net: the bits of every stage are those of a run with other labels of the left-out images."""
    changed = with_other_labels(scenes, tmp_path / "other", getattr(done[0].domains, which).names)
    config = config_of(changed, tmp_path)
    run_stages(config, STAGES)
    before, after = results(done[0]), results(Context(config))
    assert before.keys() == after.keys() and len(before) > 500
    same = {key.partition("/")[0] for key in before if not torch.equal(before[key], after[key])}
    assert not same if which == "held_out" else same >= set(catalog.names(catalog.trained())) - {"source_only"}
    figures = [json.loads(one.run.path("summary.json").read_text()) for one in (done[0], Context(config))]
    assert (figures[0]["distilled"] != figures[1]["distilled"]) or which == "labelled_target"


# ---- whose figures they are --------------------------------------------------------------------------------------------


def test_every_figure_is_of_all_left_out_images_and_says_so(scenes, done, capsys):
    context = done[0]
    held_out = context.domains.held_out
    pixels = sum(int((np.asarray(held_out.label(i)) != 255).sum()) for i in range(len(held_out)))
    for row in catalog.trained():
        found = json.loads(context.run.path(row.name, "evaluation.json").read_text())
        assert np.sum(found["confusion"]) == pixels, row.name
    summary = json.loads(context.run.path("summary.json").read_text())
    assert summary["left_out"] == {"fold": "1/2", "images": 3, "labelled_images": 5}
    assert summary["labelled_target_images"] == 2
    assert context.run.path("held_out.txt").read_text().split() == held_out.names
    assert context.run.path("labelled.txt").read_text().split() == context.domains.labelled_target.names
    words = "3 of the 5 labelled target images, left out of training (fold 1/2)"
    page = write_report(context.run.folder).read_text()
    assert f"IoU in percent on {words}." in page and "validation images" not in page
    assert main(["evaluate", str(context.run.folder), "--stage", "adapt"]) == 0
    out = capsys.readouterr().out
    miou = json.loads(context.run.path("adapt", "evaluation.json").read_text())["miou"]
    assert f" on {words}" in out and f"mIoU            {miou:>7.1f}" in out


def test_the_table_in_the_terminal_says_so(done, capsys):
    from spcl_fast.cli.actions import show_end

    show_end(done[0].run.folder)
    assert "\non 3 of the 5 labelled target images, left out of training (fold 1/2)\n" in capsys.readouterr().out


def test_nets_that_may_have_learned_the_labels_are_not_evaluated_on_them(scenes, done, tmp_path, capsys):
    run_stages(config_of(scenes, tmp_path, None), ["source_only", "control"])
    for run, fold in ((tmp_path / "run", "1/2"), (done[0].run.folder, "2/2")):
        assert main(["evaluate", str(run), "--target.fold", fold]) == 2
        assert f"target.fold: got {fold}, and nothing shows that" in capsys.readouterr().err


# ---- what a folder holds -----------------------------------------------------------------------------------------------


def test_only_what_learns_from_labels_is_another_fold(scenes, tmp_path):
    contexts = [Context(config_of(scenes, tmp_path, fold)) for fold in ("1/2", "2/2", None)]
    for row in catalog.STAGES:
        first, second, none = (flat_settings(context.identity(row)) for context in contexts)
        learns = row.name != "source_only"
        assert bool(settings_difference(first, second)) == bool(settings_difference(first, none)) == learns
        before = {key: value for key, value in none.items() if key != "target.fold"}  # as a version without the setting
        assert not settings_difference(before, none)
        assert bool(settings_difference(before, first)) == learns


def test_another_fold_is_refused_by_the_stage_itself_and_by_those_that_start_from_it(scenes, tmp_path):
    run_stages(config_of(scenes, tmp_path), ["source_only", "warmup"])
    other = config_of(scenes, tmp_path, "2/2")
    with pytest.raises(CheckpointError, match="warmup in .* with other settings .target.fold: '1/2' -> '2/2'"):
        run_stages(other, ["warmup"])
    with pytest.raises(
        CheckpointError, match="has warmup, which learned from other labels .target.fold: '1/2' -> '2/2'"
    ):
        run_stages(other, ["prototypes"])
    with pytest.raises(
        CheckpointError, match="which learned from other labels .run_seed: 0 -> 1"
    ):  # it draws the parts
        run_stages(config_of(scenes, tmp_path, seed="1"), ["prototypes"])
    run_stages(
        other, ["source_only"], redo=["warmup"]
    )  # evaluated on the other fold's images, after warmup was thrown away
    assert (tmp_path / "run" / "held_out.txt").read_text().split() == Domains(other).held_out.names


def test_a_stage_that_learned_from_all_labels_is_nothing_to_start_from(scenes, tmp_path):
    run_stages(config_of(scenes, tmp_path, fold=None), ["source_only", "warmup"])
    with pytest.raises(CheckpointError, match="which learned from other labels .target.fold: None -> '1/2'"):
        run_stages(config_of(scenes, tmp_path), ["prototypes"])


def test_weights_of_a_run_that_learned_a_left_out_label_are_refused(scenes, done, tmp_path):
    run_stages(config_of(scenes, tmp_path, None, name="all"), ["source_only", "control", "oracle"])
    held_out = done[0].domains.held_out.names[0]

    def start_from(stage, fold="1/2"):
        weights = max((tmp_path / "all" / stage / "checkpoints").iterdir())
        run_stages(config_of(scenes, tmp_path, fold, name="new", **{"model.weights": str(weights)}), ["source_only"])

    with pytest.raises(ConfigError, match=f"model.weights: .*all, which learned from the label of '{held_out}'"):
        start_from("control")
    with pytest.raises(ConfigError, match="model.weights: .* learned from the label of"):
        start_from("oracle")
    assert not (tmp_path / "new").exists()
    start_from("source_only")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fold": "0/2"}, "target.fold: got '0/2', expected i/n"),
        ({"fold": "3/2"}, "target.fold: got '3/2', expected i/n"),
        ({"fold": "1/1"}, "target.fold: got '1/1', expected i/n"),
        ({"fold": "01/2"}, "target.fold: got '01/2', expected i/n"),
        ({"fold": "half"}, "target.fold: got 'half', expected i/n"),
        ({"labelled": "null"}, "target.fold: got '1/2', and there is nothing to leave out: give --target.labelled"),
        (
            {"evaluate.selection": "target_val"},
            "evaluate.selection: got target_val with target.fold 1/2, expected last or",
        ),
    ],
)
def test_a_fold_that_makes_no_sense_is_refused(scenes, tmp_path, changes, said):
    with pytest.raises(ConfigError) as caught:
        check_config(config_of(scenes, tmp_path, **changes))
    assert said in str(caught.value)


def test_generated_scenes_have_folds_too(tmp_path):
    config = tiny_config(tmp_path, **{"target.labelled": "4", "target.fold": "2/2"})
    run_stages(config, ["source_only", "control"])
    assert len((tmp_path / "run" / "held_out.txt").read_text().split()) == 2
    other = tiny_config(tmp_path, **{"target.labelled": "4", "target.fold": "1/2"})
    with pytest.raises(CheckpointError, match="target.fold: '2/2' -> '1/2'"):
        run_stages(other, ["control"])
