"""The adaptation experiments on tiny generated runs: plans, shared stages, signals without labels, lines and what is made of them."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from benchmarks.adaptation import seed as seed_module
from benchmarks.adaptation import sharing
from benchmarks.adaptation.day_to_dusk import make_pair
from benchmarks.adaptation.left_out_drives import make_folds
from benchmarks.adaptation.lines import latest
from benchmarks.adaptation.plan import Plan, read_plan, recipe, what_ran
from benchmarks.adaptation.sharing import depends_on, take_over
from benchmarks.adaptation.unlabelled import keep_signals, on_source, on_target
from spcl_fast.config import Config
from spcl_fast.data import build_dataset
from spcl_fast.data.generated import GeneratedDataset
from spcl_fast.errors import ConfigError, DataError
from spcl_fast.method.context import Context
from spcl_fast.method.run import run_stages
from spcl_fast.runs.identity import flat_settings, settings_sha256

ROOT = Path(__file__).resolve().parents[2]
ADAPTATION = ROOT / "benchmarks" / "adaptation"
DOMAIN = {"size": [48, 32], "eval_size": [48, 32], "train_images": 6}
TINY = {
    "preset": "demo",
    "evaluate.images": 4,
    "evaluate.overlays": 1,
    **{f"{stage}.iterations": 2 for stage in ("source_only", "warmup", "adapt", "distill")},
    **{f"{stage}.batch_size": 2 for stage in ("source_only", "warmup", "adapt", "distill")},
}
PLAN = Plan(
    seeds=(0,),
    pairs={"generated": {"source": DOMAIN, "target": DOMAIN}},
    settings={"contrast": TINY, "plain": {**TINY, "adapt.contrast_weight": 0}},
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder, forecast = tmp_path_factory.mktemp("adaptation"), functools.cache(seed_module.forecast)
    with pytest.MonkeyPatch.context() as patch:
        # of the memory that a stage takes nothing here depends: forecast once, which takes as long as three stages
        patch.setattr(seed_module, "forecast", lambda *_: forecast(config_of(folder), "source_only", 9))
        seed_module.run_seed(PLAN, "generated", 0, folder / "results", folder / "runs")
    return folder


def config_of(folder: Path, setting: str = "contrast", seed: int = 0, **changes):
    plan = Plan(PLAN.seeds, PLAN.pairs, {setting: {**PLAN.settings[setting], **changes}})
    return plan.config("generated", setting, seed, folder / "runs")


# ---- a whole seed ------------------------------------------------------------------------------------------------------


def test_every_setting_ends_in_one_line_that_says_all(finished):
    lines = latest(finished / "results" / "generated.jsonl")
    assert list(lines) == [("contrast", 0), ("plain", 0)]
    for line in lines.values():
        assert list(line["nets"]) == ["source_only", "warmup", "adapted", "distilled"]
        for net in line["nets"].values():
            signals = net["signals"]
            assert 0 <= net["miou"] <= 100 and 0 <= signals["source_miou"] <= 100 and 0 <= signals["entropy"] <= 1
            assert sum(net["predicted_share"].values()) == pytest.approx(1) == sum(signals["predicted_share"].values())
        for labels in line["pseudo_labels"].values():
            assert 0 < labels["kept_share"] <= 1
        assert set(line["seconds"]) == {"source_only", "warmup", "adapt", "distill"}
        assert (
            line["settings_sha256"] == settings_sha256(line["settings"])
            and line["versions"]["torch"] == torch.__version__
        )
    assert (
        lines["plain", 0]["settings"]["adapt.contrast_weight"]
        == 0
        != lines["contrast", 0]["settings"]["adapt.contrast_weight"]
    )


def test_settings_share_what_they_have_in_common_and_train_the_rest_apart(finished):
    runs = [Path(config.runs_dir) / config.name for config in (config_of(finished), config_of(finished, "plain"))]
    for stage in (
        "source_only",
        "warmup",
        "prototypes",
        "pseudo_labels",
    ):  # done.json holds the seconds: a second training would show
        assert len({(run / stage / "done.json").read_bytes() for run in runs}) == 1
        assert (
            len(
                {(run / stage / "signals.json").read_bytes() for run in runs if (run / stage / "signals.json").exists()}
            )
            <= 1
        )
    for stage in ("adapt", "distill"):
        assert len({(run / stage / "done.json").read_bytes() for run in runs}) == 2


def test_a_line_that_is_there_is_not_made_again(finished, monkeypatch):
    def refuse(*_):
        raise AssertionError("ran again")

    monkeypatch.setattr(seed_module, "run_setting", refuse)
    before = (finished / "results" / "generated.jsonl").read_bytes()
    seed_module.run_seed(PLAN, "generated", 0, finished / "results", finished / "runs")
    assert (finished / "results" / "generated.jsonl").read_bytes() == before
    changed = Plan((0,), PLAN.pairs, {"contrast": {**TINY, "adapt.iterations": 3}})
    with pytest.raises(AssertionError, match="ran again"):
        seed_module.run_seed(changed, "generated", 0, finished / "results", finished / "runs")


def test_settings_of_stages_that_a_run_does_not_have_make_no_other_recipe(tmp_path):
    """A preset that gains values of another stage asks for no line to be made again; those of its own stages do."""
    plain = recipe(config_of(tmp_path))
    assert what_ran(plain) == what_ran(recipe(config_of(tmp_path, **{"online.ema": 0.5, "oracle.iterations": 3})))
    assert what_ran(plain) != what_ran(recipe(config_of(tmp_path, **{"distill.lr": 0.5})))
    assert what_ran(plain) != what_ran(recipe(config_of(tmp_path, **{"loop.precision": "bf16"})))


def test_a_line_that_was_lost_comes_back_from_the_folder_without_training(finished, tmp_path):
    seed_module.run_seed(PLAN, "generated", 0, tmp_path, finished / "runs")
    old, new = latest(finished / "results" / "generated.jsonl"), latest(tmp_path / "generated.jsonl")
    for key, line in new.items():
        assert {**line, "date": ""} == {**old[key], "date": ""}


def test_a_stopped_run_goes_on_and_leaves_no_process(tmp_path):
    plan = tmp_path / "plan.yaml"
    long = {**TINY, "stages": ["source_only"], "source_only.iterations": 60, "loop.log_every": 1}
    plan.write_text(json.dumps({"seeds": [0], "pairs": PLAN.pairs, "settings": {"long": long}}))
    command = [
        sys.executable,
        "-m",
        "benchmarks.adaptation",
        "run",
        plan,
        "--results",
        tmp_path / "results",
        "--runs",
        tmp_path / "runs",
    ]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics, waited = tmp_path / "runs" / "generated", time.monotonic()
    while not list(metrics.glob("*/metrics.jsonl")):
        assert first.poll() is None and time.monotonic() - waited < 120, (
            first.stderr.read() if first.poll() is not None else "no step yet"
        )
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 75 and "Stopped by SIGTERM" in said
    log = (metrics / "seed_0.log").read_text()
    assert "Stopped by SIGTERM at step" in log  # the child had saved its state when the parent left
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    assert "source_only: going on from step" in (metrics / "seed_0.log").read_text()
    assert list(latest(tmp_path / "results" / "generated.jsonl")) == [("long", 0)]


# ---- plans and sharing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", sorted((ADAPTATION / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_here_are_valid(plan):
    read = read_plan(plan)
    assert read.seeds and read.pairs and read.settings


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seeds: [0]", "expected seeds, pairs and settings"),
        ("seeds: [0]\npairs: {a: {}}\nsettings: {}", "none of them empty"),
        ("seeds: [0]\npairs: {a: {}}\nsettings: {b: {preset: demo, adapt.contrast_wait: 1}}", "contrast_wait"),
        ("seeds: [", "cannot be read"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_runs(tmp_path, content, said):
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_plan(tmp_path / "plan.yaml")


def test_a_changed_recipe_gets_a_folder_of_its_own_and_other_roots_do_not(tmp_path):
    name = config_of(tmp_path).name
    assert config_of(tmp_path, **{"adapt.lr": 0.5}).name != name
    assert config_of(tmp_path, **{"loop.workers": 1}).name == name
    assert (
        config_of(tmp_path, **{"model.weights": "here/w.npz"}).name
        == config_of(tmp_path, **{"model.weights": "there/w.npz"}).name
        != name
    )
    assert "here" not in json.dumps(recipe(config_of(tmp_path, **{"model.weights": "here/w.npz"})))


@pytest.mark.parametrize(
    ("change", "same", "others"),
    [
        (
            {"adapt.contrast_weight": 0},
            ("source_only", "warmup", "prototypes", "pseudo_labels"),
            ("adapt", "pseudo_labels_2", "distill"),
        ),
        ({"source_only.lr": 0.5}, (), ("source_only", "warmup", "adapt", "distill")),
        ({"warmup.init": "weights"}, ("source_only",), ("warmup", "adapt", "distill")),
        (
            {"stages": ["source_only", "prototypes", "pseudo_labels", "adapt"]},
            ("source_only",),
            ("prototypes", "pseudo_labels", "adapt"),
        ),
        ({"pseudo_label.cap": 0.5}, ("source_only", "warmup", "prototypes"), ("pseudo_labels", "adapt", "distill")),
        ({"evaluate.tta": "flip"}, (), ("source_only", "distill")),
        ({"target.labelled": "2"}, ("source_only", "oracle"), ("control", "prototypes", "adapt", "distill")),
        ({"target.labelled": "4", "target.fold": "1/2"}, ("source_only",), ("control", "adapt", "distill", "oracle")),
        ({"seed": 1}, (), ("source_only", "warmup", "distill")),
    ],
)
def test_a_stage_depends_on_its_settings_and_on_those_of_the_stages_before(tmp_path, change, same, others):
    seed = change.get("seed", 0)
    a, b = (
        config_of(tmp_path),
        config_of(tmp_path, seed=seed, **{key: value for key, value in change.items() if key != "seed"}),
    )
    a, b = flat_settings(a), flat_settings(b)
    assert all(depends_on(stage, a) == depends_on(stage, b) for stage in same)
    assert not any(depends_on(stage, a) == depends_on(stage, b) for stage in others)


def test_a_copy_that_is_cut_short_is_never_taken_for_a_finished_stage(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    config = config_of(tmp_path, **{"adapt.contrast_weight": 0.7})
    run = Path(config.runs_dir) / config.name

    copytree = shutil.copytree

    def cut_short(source, target):
        copytree(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sharing.shutil, "copytree", cut_short)
        take_over("prototypes", config)
    assert not (run / "prototypes").exists()
    assert take_over("prototypes", config) is not None
    assert (run / "prototypes" / "done.json").is_file() and (run / "prototypes.safetensors").is_file()
    assert take_over("prototypes", config) is None  # it is there now
    assert take_over("adapt", config) is None  # nobody has one


def test_an_unfinished_stage_is_not_taken_over(finished, tmp_path):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    for record in (tmp_path / "runs").glob("generated/*/warmup/done.json"):
        record.unlink()
    config = config_of(tmp_path, **{"adapt.contrast_weight": 0.7})
    assert take_over("source_only", config) is not None
    assert take_over("warmup", config) is None


def test_a_stage_of_a_version_before_a_setting_is_taken_over_where_the_setting_is_at_its_default(finished, tmp_path):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    for file in (tmp_path / "runs").glob("generated/*/config.yaml"):
        settings = yaml.safe_load(file.read_text())
        assert settings["model"].pop("frozen_bn_eps") == Config().model.frozen_bn_eps
        file.write_text(yaml.safe_dump(settings))
    assert take_over("warmup", config_of(tmp_path, **{"model.frozen_bn_eps": 0.5})) is None
    assert take_over("warmup", config_of(tmp_path, **{"adapt.contrast_weight": 0.7})) is not None


def test_an_oracle_is_the_same_whatever_the_source(tmp_path):
    scores = []
    for source in ("generated_source", "generated_target"):
        config = config_of(tmp_path, **{"stages": ["oracle"], "oracle.iterations": 2, "source.dataset": source})
        run_stages(config)
        scores.append(Context(config).run.read_json("oracle/evaluation.json"))
    assert scores[0] == scores[1]


# ---- signals -----------------------------------------------------------------------------------------------------------


class ByPosition(torch.nn.Module):
    """Class 0 on the left, class 1 on the right, whatever the image: no net could agree less with its mirror image."""

    def forward(self, images):
        height, width = images.shape[2] // 4, images.shape[3] // 4
        right = (torch.arange(width) >= width // 2).float().expand(1, height, width)
        logits = torch.stack([1 - right, right, torch.full_like(right, -9.0)], 1) * 100
        return torch.stack([1 - right, right], 1), logits


def test_signals_of_a_net_that_is_known_by_heart():
    dataset = GeneratedDataset("generated_target", "train", count=2, has_labels=False)
    signals = on_target(ByPosition(), dataset, (64, 32), torch.eye(2))
    assert signals["entropy"] == pytest.approx(0, abs=1e-6) and signals["margin"] == pytest.approx(1)
    assert signals["agreement_flip"] < 0.05 and signals["agreement_scale"] > 0.95
    assert sum(signals["predicted_share"]) == pytest.approx(1) and signals["predicted_share"][0] == pytest.approx(
        0.5, abs=0.05
    )


class Uniform(torch.nn.Module):
    """Knows nothing."""

    def forward(self, images):
        shape = (1, 9, images.shape[2] // 4, images.shape[3] // 4)
        return torch.ones(shape), torch.zeros(shape)


def test_a_net_that_knows_nothing_has_full_entropy_and_no_margin():
    dataset = GeneratedDataset("generated_source", "val", count=None, has_labels=True).select([0, 1])
    scores, prototypes = on_source(Uniform(), dataset, (64, 32))
    assert (
        scores.confusion[:, 1:].sum() == 0 and scores.confusion[:, 0].sum() == 2 * 256 * 128
    )  # every pixel is called class 0
    assert prototypes[0].norm() == pytest.approx(1) and not prototypes[1:].any()
    signals = on_target(Uniform(), dataset, (64, 32), prototypes)
    assert signals["entropy"] == pytest.approx(1) and signals["margin"] is None  # of one prototype there is none
    assert signals["agreement_flip"] == signals["agreement_scale"] == 1


def test_signals_read_no_label_of_the_target(finished, monkeypatch):
    read = GeneratedDataset.label

    def watched(self, index):
        assert self.kind == "generated_source", "a target label was read"
        return read(self, index)

    context = Context(config_of(finished))
    context.run.path("adapt", "signals.json").rename(context.run.path("adapt", "kept.json"))
    monkeypatch.setattr(GeneratedDataset, "label", watched)
    assert keep_signals(context, "adapt") == json.loads(context.run.path("adapt", "kept.json").read_text())


# ---- day to dusk -------------------------------------------------------------------------------------------------------


def test_day_and_dusk_are_told_apart_and_share_no_frame(tmp_path):
    names = {
        "train": [f"0001TP_{i:03d}" for i in range(12)] + [f"0006R0_{i:03d}" for i in range(5)],
        "val": ["0016E5_000", "0016E5_001"],
    }
    for split, frames in names.items():
        for kind in ("images", "labels"):
            (tmp_path / "camvid" / kind / split).mkdir(parents=True)
        for name in frames:
            Image.new("RGB", (8, 6)).save(tmp_path / "camvid" / "images" / split / f"{name}.jpg")
            Image.new("L", (8, 6)).save(tmp_path / "camvid" / "labels" / split / f"{name}.png")
    (tmp_path / "camvid" / "classes.json").write_text('{"names": ["a", "b"]}')
    make_pair(tmp_path / "camvid", tmp_path)
    found = {
        (root, split): build_dataset("folders", tmp_path / root, split).names
        for root in ("camvid_day", "camvid_dusk")
        for split in ("train", "val")
    }
    assert found["camvid_day", "train"] == names["train"][12:] and found["camvid_day", "val"] == names["val"]
    assert found["camvid_dusk", "train"] == names["train"][:8] and found["camvid_dusk", "val"] == names["train"][9:12]


def test_a_camvid_without_dusk_is_refused(tmp_path):
    with pytest.raises(DataError, match="found 0 day and 0 dusk"):
        make_pair(tmp_path, tmp_path / "out")


def test_the_real_camvid_makes_the_pair(shared_dir, tmp_path):
    roots = make_pair(shared_dir / "data" / "camvid", tmp_path)
    assert {root.name: count for root, count in roots.items()} == {"camvid_day": 305 + 101, "camvid_dusk": 41 + 15}


# ---- a drive left out ----------------------------------------------------------------------------------------------------


def test_each_drive_is_evaluated_once_and_never_trained_on_then(shared_dir, tmp_path):
    roots = make_folds(shared_dir / "data" / "camvid", tmp_path)
    evaluated = []
    for root in roots:
        drive = root.name.removeprefix("camvid_without_")
        train, val = (build_dataset("folders", root, split).names for split in ("train", "val"))
        assert all(name.startswith(drive) for name in val) and not any(name.startswith(drive) for name in train)
        assert len(train) + len(val) == 367 + 101
        evaluated += val
    assert len(evaluated) == len(set(evaluated)) == 367 + 101


def test_a_camvid_that_lacks_a_drive_names_it(tmp_path):
    (tmp_path / "images" / "train").mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "train" / "0006R0_1.png")
    with pytest.raises(DataError, match="called after 0001TP, 0016E5"):
        make_folds(tmp_path, tmp_path / "out")
