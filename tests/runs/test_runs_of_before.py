"""Run folders, checkpoints, configs and weights that an earlier version wrote are read, accepted and continued bit for bit.

`before/` holds what commit fece1ad wrote (before/README.md says how). The tests use only what users do: commands and files. Every command
runs in a process of its own with one thread and AVX2 instructions, which is how the runs were made.

The last bits of a training step depend on the processor, on torch and on the compiler of our kernels, so a fixture made on one machine
cannot ask every machine for the same bits. `same_arithmetic` finds out: it trains a small net in plain torch, resizes a picture, draws
random numbers, and compares the hash of the results, the compiler and torch's version (2.14.1 has the probe's bits and, in a few
convolutions' gradients, others) with those of the machine that made the runs. Where they agree, everything is compared bit for bit. Where
they do not, what is only read (settings, accepted identity, finished stages, prototypes) is still compared exactly, and what is computed
within tolerances that another batch, another augmentation, a lost optimizer state or a lost running average breaks at once: each tensor
must have moved from the checkpoint as recorded to 5 % (AVX-512 instead of AVX2 gives 0.1 %).
"""

from __future__ import annotations

import json
import lzma
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from replay import (
    BEFORE,
    EXPECTED,
    all_done,
    assert_close,
    assert_same_checkpoint,
    assert_same_movement,
    assert_same_pictures,
    commands,
    lines_of,
    newest,
    same_arithmetic,
)
from safetensors.torch import load_file, save_file

RUNS = {"whole": ("source_only", "control", "warmup", "adapt", "distill", "oracle"), "lean": ("adapt", "distill")}
INTERRUPTED = [(run, stage) for run, stages in RUNS.items() for stage in stages]
CONFIGS = sorted((BEFORE / "configs").glob("*.yaml"))


# ---- copies of the runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with runs/whole, runs/lean and the pair of data sets that the second reads."""
    root = tmp_path_factory.mktemp("before")
    for run in RUNS:
        with tarfile.open(BEFORE / f"{run}.tar.xz") as archive:
            archive.extractall(root / "runs", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    shutil.copytree(BEFORE / "pair", root / "pair")
    return root


def copy_of(root: Path, run: str, name: str) -> Path:
    """Tensors are linked, not copied: who writes a checkpoint writes a new file."""

    def link(source: str, target: str) -> None:
        (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)

    return Path(shutil.copytree(root / "runs" / run, root / "runs" / name, copy_function=link))


def forget(folder: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)


def interrupt(folder: Path, stage: str) -> None:
    """As a kill between the two checkpoints leaves it: log lines of steps that are to be made again, no end."""
    shutil.rmtree(newest(folder, stage))
    forget(folder, f"{stage}/done.json", f"{stage}/evaluation.json", f"{stage}/predictions", "summary.json")


@pytest.fixture(scope="module")
def continued(root) -> dict[str, Path]:
    """Every interrupted stage after its command ran again; `adapt` of the whole run by `run`, which does all that comes after it, too."""
    folders, words = {}, []
    for run, stage in INTERRUPTED:
        folders[f"{run}_{stage}"] = folder = copy_of(root, run, f"{run}_{stage}")
        interrupt(folder, stage)
        if (run, stage) == ("whole", "adapt"):
            forget(folder, "pseudo_labels_2", "distill", "features.npz")
        command = "run" if (run, stage) == ("whole", "adapt") else stage.replace("_", "-")
        words.append([command, "--run-folder", folder.relative_to(root)])
    folders["anew"] = folder = copy_of(root, "whole", "anew")
    forget(
        folder,
        "warmup",
        "oracle",
        "prototypes",
        "prototypes.safetensors",
        "pseudo_labels",
        "metrics.jsonl",
        "summary.json",
    )
    words += [[name, "--run-folder", "runs/anew"] for name in ("warmup", "oracle")]
    folders["labels"] = folder = copy_of(root, "whole", "labels")
    forget(folder, "prototypes", "prototypes.safetensors", "pseudo_labels", "summary.json")
    words += [[name, "--run-folder", "runs/labels"] for name in ("prototypes", "pseudo-label")]
    all_done(root, *words)
    return folders


@pytest.fixture(scope="module")
def answers(root) -> dict[str, tuple[int, str]]:
    """What the commands that train nothing say, by a name for each."""
    words: dict[str, list[object]] = {}
    for run in RUNS:
        words[f"{run} finished"] = ["run", "--run-folder", copy_of(root, run, f"{run}_finished").relative_to(root)]
    for name, setting, value in (("finished", "adapt.keep", "0.2"), ("interrupted", "adapt.contrast_weight", "0.4")):
        folder = copy_of(root, "whole", f"refused_{name}")
        words[f"refused {name}"] = ["adapt", "--run-folder", folder.relative_to(root), f"--{setting}", value]
    interrupt(root / "runs" / "refused_interrupted", "adapt")

    folder = copy_of(root, "whole", "damaged")
    interrupt(folder, "adapt")
    model = newest(folder, "adapt") / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-5] ^= 1
    model.unlink()  # it is a link
    model.write_bytes(content)
    words["damaged"] = ["adapt", "--run-folder", folder.relative_to(root)]

    folder = copy_of(root, "whole", "taken")
    forget(folder, "prototypes", "prototypes.safetensors")
    file = root / "runs" / "whole" / "prototypes.safetensors"
    words["taken"] = ["prototypes", "--run-folder", folder.relative_to(root), "--prototypes.file", file]

    words["evaluate whole"] = ["evaluate", "runs/whole", "--output", "distilled.json"]
    words["evaluate lean"] = ["evaluate", "runs/lean", "--stage", "adapt", "--output", "adapted.json"]
    words["predict"] = ["predict", "runs/whole", "pair/target/images/val", "predicted"]
    for config in CONFIGS:
        preset, *sets = config.stem.split(".")
        given = [] if preset == "defaults" else ["--preset", preset]
        given += [word for name in sets for word in ("--set", name)]
        words[f"preset {config.stem}"] = ["run", *given, "--print-config"]
        words[f"config {config.stem}"] = ["run", "--config", config, "--print-config"]
    return dict(zip(words, commands(root, *words.values()), strict=True))


# ---- the tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "stage"), INTERRUPTED)
def test_a_stage_interrupted_before_goes_on_to_the_bits_of_the_undisturbed_run(root, continued, run, stage):
    recorded, folder = root / "runs" / run, continued[f"{run}_{stage}"]
    start = sorted((recorded / stage / "checkpoints").glob("step_*"))[0]
    assert_same_checkpoint(newest(folder, stage), newest(recorded, stage), start)
    assert lines_of(folder, stage) and len(lines_of(folder, stage)) == len(lines_of(recorded, stage))
    assert_close(lines_of(folder, stage), lines_of(recorded, stage), 1e-3)
    old, new = (json.loads((where / stage / "done.json").read_text()) for where in (recorded, folder))
    assert {key: new[key] for key in ("stage", "step", "checkpoint")} == {
        key: old[key] for key in ("stage", "step", "checkpoint")
    }
    assert {key: new["settings"].get(key, "absent") for key in old["settings"]} == old["settings"]
    old, new = (json.loads((where / stage / "evaluation.json").read_text()) for where in (recorded, folder))
    assert_close({key: new[key] for key in old}, old, 0.1, 2.0)


def test_a_run_interrupted_in_adaptation_ends_as_the_undisturbed_one(root, continued):
    recorded, folder = root / "runs" / "whole", continued["whole_adapt"]
    assert_same_pictures(folder / "pseudo_labels_2", recorded / "pseudo_labels_2")
    distilled = sorted((recorded / "distill" / "checkpoints").glob("step_*"))
    assert_same_movement(newest(folder, "distill"), distilled[-1], distilled[0])
    old, new = (json.loads((where / "summary.json").read_text()) for where in (recorded, folder))
    figures = (
        "classes",
        "source_only",
        "control",
        "warmup",
        "adapted",
        "distilled",
        "oracle",
        "gap_closed",
        "selection",
    )
    assert_close({key: new[key] for key in figures}, {key: old[key] for key in figures}, 0.1, 2.0)
    assert (folder / "report.html").is_file()


def test_prototypes_and_pseudo_labels_of_a_net_of_before_are_those_of_before(root, continued):
    recorded, folder = root / "runs" / "whole", continued["labels"]
    old, new = (load_file(where / "prototypes.safetensors") for where in (recorded, folder))
    assert torch.equal(new["images"], old["images"])
    tolerance = 0 if same_arithmetic() else 0.01
    torch.testing.assert_close(new["prototypes"], old["prototypes"], rtol=tolerance, atol=tolerance)
    assert_same_pictures(folder / "pseudo_labels", recorded / "pseudo_labels")
    old, new = (json.loads((where / "pseudo_labels" / "thresholds.json").read_text()) for where in (recorded, folder))
    assert_close(new["thresholds"], old["thresholds"], 1e-2)


@pytest.mark.parametrize("stage", ["warmup", "oracle"])
def test_a_stage_begun_anew_starts_from_the_weights_and_batches_of_before(continued, stage):
    """The first weights of net and discriminator, the order of batches and the augmentation follow from the seed."""
    assert_close(lines_of(continued["anew"], stage), EXPECTED["anew"][stage]["lines"], 1e-3)
    manifest = json.loads((newest(continued["anew"], stage) / "manifest.json").read_text())
    hashes = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}
    assert hashes.keys() == EXPECTED["anew"][stage]["sha256"].keys()
    if same_arithmetic():
        assert hashes == EXPECTED["anew"][stage]["sha256"]


@pytest.mark.parametrize("run", RUNS)
def test_a_finished_run_of_before_is_accepted_and_nothing_of_it_is_done_again(root, answers, run):
    recorded, folder = root / "runs" / run, root / "runs" / f"{run}_finished"
    code, said = answers[f"{run} finished"]
    assert code == 0, said[-3000:]
    names = {path.relative_to(recorded) for path in recorded.rglob("*") if path.is_file()} - {
        Path("summary.json"),
        Path("config.yaml"),
    }
    assert not [name for name in names if (folder / name).read_bytes() != (recorded / name).read_bytes()]
    assert not [
        name for name in names if name.suffix == ".safetensors" and not (folder / name).samefile(recorded / name)
    ]
    old, new = (json.loads((where / "summary.json").read_text()) for where in (recorded, folder))
    assert {key: new[key] for key in old if key != "machine"} == {
        key: value for key, value in old.items() if key != "machine"
    }
    assert f"{old['distilled']['miou']:.1f}" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("end", "change"), [("finished", "adapt.keep: 0.1 -> 0.2"), ("interrupted", "adapt.contrast_weight: 0.3 -> 0.4")]
)
def test_other_settings_than_those_of_before_are_refused_with_their_name(answers, end, change):
    code, said = answers[f"refused {end}"]
    assert code == 5 and change in said


def test_a_damaged_checkpoint_of_before_is_noticed(answers):
    code, said = answers["damaged"]
    assert code == 5 and "model.safetensors is damaged" in said


def test_figures_and_masks_of_a_net_of_before_are_those_of_before(root, answers):
    assert [answers[name][0] for name in ("evaluate whole", "evaluate lean", "predict")] == [0, 0, 0]
    for output, stage in (("distilled.json", "whole/distill"), ("adapted.json", "lean/adapt")):
        old = json.loads((root / "runs" / stage / "evaluation.json").read_text())
        new = json.loads((root / output).read_text())
        assert_close({key: new[key] for key in old}, old, 0.1, 2.0)
    assert_same_pictures(root / "predicted" / "masks", BEFORE / "masks" / "whole")


def test_prototypes_of_a_run_of_before_are_taken_over_bit_for_bit(root, answers):
    assert answers["taken"][0] == 0, answers["taken"][1]
    new, old = (load_file(root / "runs" / run / "prototypes.safetensors")["prototypes"] for run in ("taken", "whole"))
    assert torch.equal(new, old)


def flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("given", ["preset", "config"])
def test_presets_mean_what_they_meant_and_configs_of_before_are_read(answers, given, config):
    """Every setting of before, by its name and with its value; there may be new ones."""
    code, said = answers[f"{given} {config.stem}"]
    assert code == 0, said
    old, new = flat(yaml.safe_load(config.read_text())), flat(yaml.safe_load(said))
    other = {key: (value, new.get(key, "gone")) for key, value in old.items() if new.get(key, "gone") != value}
    assert len(old) > 150 and not other


NETS = json.loads(lzma.decompress((BEFORE / "nets.json.xz").read_bytes()))


def weights_of(net: str) -> dict[str, torch.Tensor]:
    """A net of before with weights that are a formula of their place: drawn-looking numbers that no version of a library changes.

    The classifier's bias is recorded: the one with which the net of before predicted more than one class.
    """
    weights, batch_norm = {}, any(key.endswith("running_var") for key in NETS[net])
    for number, (key, shape) in enumerate(NETS[net].items()):
        noise = 43758.5453 * np.sin(12.9898 * np.arange(math.prod(shape), dtype=np.float64) + 78.233 * number)
        noise = math.sqrt(12) * ((noise - np.floor(noise)) - 0.5).reshape(shape)
        if len(shape) == 4:
            noise *= math.sqrt(2 / math.prod(shape[1:]))
        elif key.endswith(("running_var", "weight")):
            noise = (0.6 if batch_norm and key.endswith("weight") else 1.0) + 0.1 * noise
        else:
            noise *= 0.1
        weights[key] = torch.from_numpy(noise).float()
    last = next(key for key in weights if key.startswith("classifier.") and key.endswith("bias"))
    weights[last] = torch.tensor(EXPECTED["bias"].get(net, [0.0] * len(weights[last])))
    return weights


@pytest.fixture(scope="module")
def predicted(root) -> Path:
    """The masks that every net of before, loaded from a file with the names of before, makes of two images."""
    words = []
    for net in NETS:
        save_file(weights_of(net), root / f"{net}.safetensors")
        settings = ["--model.name", net, "--model.feature_dim", 4, "--target.eval_size", "[64, 40]"]
        files = [f"{net}.safetensors", "pair/target/images/val", f"nets/{net}"]
        words.append(["predict", *files, "--config", "runs/lean/config.yaml", *settings])
    all_done(root, *words)
    for net in NETS:
        (root / f"{net}.safetensors").unlink()
    return root / "nets"


@pytest.mark.parametrize("net", NETS)
def test_weights_of_every_net_of_before_load_and_predict_as_before(predicted, net):
    assert_same_pictures(predicted / net / "masks", BEFORE / "masks" / net)
