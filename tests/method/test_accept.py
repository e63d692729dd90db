"""What a run's folder holds and what is asked for now: the same data elsewhere, changed settings, stages to do again or to take over."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_run import save_scenes, tiny_config

from spcl_fast import catalog
from spcl_fast.cli import main
from spcl_fast.config.load import load_config
from spcl_fast.errors import CheckpointError, ConfigError, DataError
from spcl_fast.method.context import Context
from spcl_fast.method.run import run_stages

FIRST = ("source_only", "prototypes", "pseudo_labels")


def in_folders(tmp_path, data, **changes):
    sides = {f"{side}.dataset": "folders" for side in ("source", "target")}
    sides |= {f"{side}.root": str(data / side) for side in ("source", "target")}
    return tiny_config(tmp_path, **{**sides, "source.classes": str(data / "source" / "classes.json"), **changes})


@pytest.fixture
def moved(tmp_path):
    """A run whose data lie in another folder since, and that folder."""
    for side in ("source", "target"):
        save_scenes(tmp_path / "job1" / side, f"generated_{side}")
    run_stages(in_folders(tmp_path, tmp_path / "job1"), ("source_only",))
    (tmp_path / "job1").rename(tmp_path / "job2")
    return tmp_path / "job2"


def test_a_run_goes_on_where_its_data_lie_in_another_folder(moved, tmp_path, capsys):
    run_stages(in_folders(tmp_path, moved), FIRST)
    said = capsys.readouterr().out
    assert "source_only: finished before" in said and Context(in_folders(tmp_path, moved)).run.done("pseudo_labels")


def test_a_stage_that_was_killed_goes_on_where_its_data_lie_in_another_folder(moved, tmp_path, capsys):
    (tmp_path / "run" / "source_only" / "done.json").unlink()
    run_stages(in_folders(tmp_path, moved), ("source_only",))
    assert "going on from step 2" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["image", "label", "classes"])
def test_other_data_under_the_same_path_are_refused_by_name(moved, tmp_path, change):
    source = moved / "source"
    if change == "image":
        (source / "images" / "train" / "3.png").unlink()
        (source / "labels" / "train" / "3.png").unlink()
    elif change == "label":
        label = source / "labels" / "train" / "0.png"
        label.write_bytes(label.read_bytes() + b"\0")
    else:
        (source / "classes.json").write_text((source / "classes.json").read_text() + " ")
    setting = "source.classes" if change == "classes" else "source.root"
    with pytest.raises(CheckpointError, match=f"what {setting} holds: "):
        run_stages(in_folders(tmp_path, moved), ("source_only",))


def test_other_classes_in_the_data_sets_own_file_are_refused(moved, tmp_path):
    own = moved / "source" / "classes.json"
    without = {"source.classes": "null"}
    run_stages(in_folders(tmp_path, moved, name="own", **without), ("source_only",))
    content = json.loads(own.read_text())
    content["names"][0] = "street"
    for path in (own, moved / "target" / "classes.json"):
        path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="what source.root holds: '4 images of 9 classes"):
        run_stages(in_folders(tmp_path, moved, name="own", **without), ("source_only",))


def test_a_refused_setting_of_a_late_stage_is_not_the_runs_though_earlier_stages_fit(finished, tmp_path, capsys):
    shutil.copytree(finished.run.folder, tmp_path / "run")
    kept = (tmp_path / "run" / "config.yaml").read_text()
    refused = tiny_config(tmp_path, **{"adapt.contrast_weight": "0.7"})
    with pytest.raises(CheckpointError) as caught:
        run_stages(refused)
    assert "adapt.contrast_weight: " in str(caught.value) and "-> 0.7" in str(caught.value)
    assert "--redo adapt" in str(caught.value) and "sha256" not in str(caught.value)
    assert (tmp_path / "run" / "config.yaml").read_text() == kept
    assert "finished before" not in capsys.readouterr().out, "found before the first stage"


def test_the_settings_kept_are_those_that_a_stage_ran_with(finished, tmp_path):
    shutil.copytree(finished.run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "distill")
    run_stages(tiny_config(tmp_path, **{"warmup.lr": "0.5", "distill.lr": "0.25"}), ("distill",))
    config = load_config(None, [tmp_path / "run" / "config.yaml"])
    assert config.warmup == finished.config.warmup and config.distill.lr == 0.25


def test_a_stage_that_will_be_missing_is_named_before_the_first_step(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="'prototypes' is not finished.*adapt starts from it.*add prototypes"):
        run_stages(tiny_config(tmp_path), ("source_only", "adapt"))
    assert not (tmp_path / "run" / "source_only").exists()


def test_a_refused_run_leaves_no_folder_that_looks_like_one(tmp_path):
    for refused in (
        {"model.weights": str(tmp_path / "none.npz")},  # found after classes and settings were written
        {"source.dataset": "folders", "source.root": str(tmp_path / "none")},
    ):
        with pytest.raises((ConfigError, DataError)):
            run_stages(tiny_config(tmp_path, **refused), ("source_only",))
        assert not (tmp_path / "run").exists()
    with pytest.raises(CheckpointError):
        run_stages(tiny_config(tmp_path), ("adapt",))
    with pytest.raises(ConfigError):
        run_stages(tiny_config(tmp_path), ("source_only",), fork_of=tmp_path / "none")
    assert not (tmp_path / "run").exists()


def test_a_refused_start_removes_nothing_that_was_there(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError):
        run_stages(tiny_config(tmp_path, **{"model.weights": str(tmp_path / "none.npz")}), ("source_only",))
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_redo_does_a_changed_stage_and_what_started_from_it_again_and_nothing_twice(finished, tmp_path, capsys):
    shutil.copytree(finished.run.folder, tmp_path / "run")
    changed = tiny_config(tmp_path, **{"adapt.contrast_weight": "0.7"})
    stages = ("warmup", "prototypes", "pseudo_labels", "adapt", "pseudo_labels_2", "distill")
    weights = {stage: Context(changed).checkpoint(stage).tensors for stage in ("warmup", "adapt", "distill")}
    capsys.readouterr()
    run_stages(changed, stages, redo=("adapt",))
    said = capsys.readouterr().out
    assert "adapt: to be done again (adapt.contrast_weight: " in said and "warmup: finished before" in said
    assert "distill: to be done again, as it started from adapt" in said
    after = {stage: Context(changed).checkpoint(stage).tensors for stage in weights}
    same = {stage: all(torch.equal(after[stage][k], v) for k, v in old.items()) for stage, old in weights.items()}
    assert same == {"warmup": True, "adapt": False, "distill": False}
    run_stages(changed, stages, redo=("adapt",))  # as after a kill: what has these settings stays
    assert "adapt: finished before" in capsys.readouterr().out


def test_fork_takes_over_the_stages_that_stay_the_same(finished, tmp_path, capsys):
    config = tiny_config(tmp_path, "other", **{"adapt.contrast_weight": "0.7"})
    stages = ("warmup", "prototypes", "pseudo_labels", "adapt")
    run_stages(config, stages, fork_of=finished.run.folder)
    said = capsys.readouterr().out
    for stage in ("source_only", "warmup", "prototypes", "pseudo_labels"):
        assert f"{stage}: taken over from {finished.run.folder}" in said
    assert "adapt: not taken over" in said and "-> 0.7" in said
    new, old = Context(config).run, finished.run
    assert new.metrics("warmup") == old.metrics("warmup") and new.done("warmup") == old.done("warmup")
    assert json.loads(new.path("summary.json").read_text())["warmup"] is not None
    assert old.done("adapt") and new.done("adapt")["settings"]["adapt.contrast_weight"] == 0.7
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        run_stages(tiny_config(tmp_path, "third"), stages, fork_of=tmp_path / "none")


def test_redo_of_an_unknown_stage_gets_a_suggestion(capsys):
    assert main(["run", "--preset", "demo", "--redo", "adpt"]) == 2
    assert "--redo adpt: there is no such stage; did you mean adapt?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "stage", "again"),
    [
        ("adapt", "warmup", "`spcl-fast warmup --redo warmup`"),
        ("distill", "adapt", "`spcl-fast adapt --redo adapt`"),
    ],
)
@pytest.mark.parametrize(
    ("setting", "value", "shown"),
    [
        ("freeze_body", "true", "False -> True"),
        ("layer_decay", "0.5", "1.0 -> 0.5"),
        ("name", "lite0", "'tiny' -> 'lite0'"),
    ],
)
def test_a_stage_by_itself_is_refused_where_the_net_that_it_starts_from_has_other_settings(
    finished, tmp_path, capsys, command, stage, again, setting, value, shown
):
    shutil.copytree(finished.run.folder, tmp_path / "run")
    later = [row.name for row in catalog.STAGES if row.name == command or command in row.after]
    for name in later:
        shutil.rmtree(tmp_path / "run" / name)
    kept = (tmp_path / "run" / "config.yaml").read_text()
    words = [command, "--run-folder", str(tmp_path / "run"), f"--model.{setting}", value]
    assert main([*words, "--redo", "oracle"]) == CheckpointError.exit_code
    assert (tmp_path / "run" / "oracle").is_dir(), "what is refused removes nothing"
    said = capsys.readouterr().err
    assert f"Stage {stage} in {tmp_path / 'run'} was finished with other settings (model.{setting}: {shown}). " in said
    assert f"Set them back, do it again first ({again}), or give this run another name" in said
    assert not (tmp_path / "run" / command).exists() and (tmp_path / "run" / "config.yaml").read_text() == kept


def test_the_command_that_does_a_missing_input_names_its_round(finished, tmp_path):
    shutil.copytree(finished.run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pseudo_labels_2")
    with pytest.raises(CheckpointError, match=r"do it first \(`spcl-fast pseudo-label --round 2`\)"):
        run_stages(tiny_config(tmp_path), ("distill",))


def test_a_stage_by_itself_may_find_the_weights_file_of_the_net_in_another_folder(tmp_path):
    run_stages(tiny_config(tmp_path, "first"), ("source_only",))
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        shutil.copy2(
            Context(tiny_config(tmp_path, "first")).checkpoint("source_only").path / "model.safetensors",
            tmp_path / place,
        )
    weights = {place: {"model.weights": str(tmp_path / place / "model.safetensors")} for place in ("a", "b")}
    run_stages(tiny_config(tmp_path, **weights["a"]), ("source_only",))
    run_stages(tiny_config(tmp_path, **weights["b"]), ("control",))
    (tmp_path / "b" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="what model.weights holds: "):
        run_stages(tiny_config(tmp_path, **weights["b"]), ("control",))
