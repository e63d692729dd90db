"""`plan`: what it predicts is what a real step holds, and what it says can be pasted."""

from __future__ import annotations

import dataclasses
import json
import resource

import pytest
import torch

from benchmarks.peers import released
from spcl_fast import catalog
from spcl_fast.cli import main
from spcl_fast.config import LoopConfig
from spcl_fast.config.load import load_config
from spcl_fast.errors import ConfigError
from spcl_fast.memory_plan import fitting
from spcl_fast.memory_plan.count import LiveBytes
from spcl_fast.memory_plan.peak import can_recompute, count_step, peak_memory, saved_bytes, step_of
from spcl_fast.models import SegmentationModel

SMALL = {
    "source.size": "64x48",
    "target.size": "56x40",
    "target.eval_size": "56x40",
    "model.name": "deeplab_v2_resnet18",
    "loop.device": "cpu",
    **{f"{stage}.batch_size": "2" for stage in ("source_only", "warmup", "adapt", "distill")},
    "distill.augment.crop": "48x40",
}


def config_of(preset="gta5_cityscapes", **changes):
    return load_config(preset, (), (), list({**SMALL, **changes}.items()))


# --- counting ---


def test_a_storage_is_counted_once_and_until_its_end():
    live = LiveBytes()
    with live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]
        assert live.alive.total() == 4000
        del a
        assert live.alive.total() == 4000, "a view keeps it"
        c = b + 1
        assert live.alive.total() == 7200
        del b, c
    assert live.alive.total() == 0 and live.result.peak == 7200


def test_what_autograd_keeps_is_alive_until_its_backward():
    live = LiveBytes()
    x = torch.rand(1000, requires_grad=True)
    with live:
        y = x.exp()
        loss = (y * y).sum()
        del y
        before = live.alive.total()
        loss.backward()
        x.grad = None
    assert before >= 4000 and live.alive.total() == 4, "only the loss is left"


@pytest.mark.parametrize(
    "stage, loop",
    [
        ("adapt", {}),
        ("adapt", {"loop.precision": "bf16", "loop.checkpoint": "auto", "loop.absorb_gradients": "true"}),
        ("adapt", {"loop.checkpoint": "block", "loop.accumulate": "2", "loop.channels_last": "true"}),
        ("adapt", {"loop.offload": "true", "model.name": "lite0", "source.size": "320x240", "target.size": "320x240"}),
        ("warmup", {"loop.checkpoint": "stage", "model.name": "tiny"}),
        ("distill", {"loop.checkpoint": "auto", "model.name": "lite0"}),
        ("source_only", {"loop.absorb_gradients": "true", "model.name": "tiny"}),
        ("prototypes", {}),
        ("released", {}),
    ],
)
def test_the_prediction_is_the_counted_peak_of_a_real_step(stage, loop):
    config = config_of(**loop)
    theirs = stage == "released"
    predicted = released.released_peak(config, 19) if theirs else peak_memory(config, stage)
    torch.manual_seed(0)
    work = released.counted_step(config, 19) if theirs else step_of(config, stage, 19)
    for domain in work.batch if isinstance(work.batch, tuple) else (work.batch,):
        domain.images.uniform_()
        domain.labels.random_(0, 19)
    counted = count_step(work, on_cpu=True)
    assert predicted.peak_bytes == pytest.approx(counted.peak, rel=0.01)
    assert sum(predicted.categories.values()) == pytest.approx(predicted.peak_bytes, rel=1e-6)
    assert predicted.flops == counted.flops and predicted.host_bytes == counted.host
    assert {k: v for k, v in predicted.phases.items()} == pytest.approx(
        {k: counted.phases[k] for k in predicted.phases}, rel=0.01
    )


def test_the_plan_allocates_nothing():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    predicted = peak_memory(
        config_of(**{"model.name": "lite0", "source.size": "1914x1052", "target.size": "2048x1024"}), "adapt"
    )
    assert predicted.peak_bytes > 2**30 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 2**28


# --- what settings do ---


def test_each_setting_lowers_the_peak_of_full_resolution():
    """The promise of docs/memory.md: at most 4.2 GiB in bf16 without recomputation, 2.0 with it at 1.35 times the operations."""
    full = {
        "model.name": "deeplab_v2_resnet101",
        "source.size": "1914x1052",
        "target.size": "2048x1024",
        "adapt.batch_size": "1",
    }
    full |= {"loop.device": "cuda", "loop.precision": "bf16"}
    half, lean = (
        peak_memory(config_of(**full, **more), "adapt")
        for more in ({}, {"loop.absorb_gradients": "true", "loop.checkpoint": "auto"})
    )
    assert half.peak_bytes <= 4.2 * 2**30
    assert lean.peak_bytes <= 2.0 * 2**30 and lean.flops <= 1.35 * half.flops
    assert lean.categories.get("gradients", 0) < 2**25 and half.floor_bytes > lean.floor_bytes


def test_what_a_setting_saves_is_what_the_peak_rises_by_without_it():
    lean = config_of(**{"loop.precision": "bf16", "loop.absorb_gradients": "true"})
    peak = peak_memory(lean, "adapt").peak_bytes
    saved = saved_bytes(lean, "adapt", peak, num_classes=19)
    assert saved == {
        "precision": peak_memory(config_of(**{"loop.absorb_gradients": "true"}), "adapt").peak_bytes - peak,
        "absorb_gradients": peak_memory(config_of(**{"loop.precision": "bf16"}), "adapt").peak_bytes - peak,
    }
    assert saved["absorb_gradients"] > 2**20
    assert saved_bytes(config_of(), "adapt", 0, num_classes=19) == {}


def test_offload_takes_activations_to_the_host():
    at = config_of(**{"loop.device": "cuda"})
    plain, offloaded = peak_memory(at, "adapt"), peak_memory(fitting.apply_flags(at, {"loop.offload": True}), "adapt")
    # tensors of 1 MiB and more go: at this size none; at a larger one most
    assert offloaded.peak_bytes == plain.peak_bytes and offloaded.host_bytes == 0
    larger = config_of(**{"loop.device": "cuda", "source.size": "640x480", "target.size": "640x480"})
    plain, offloaded = (
        peak_memory(larger, "adapt"),
        peak_memory(fitting.apply_flags(larger, {"loop.offload": True}), "adapt"),
    )
    assert offloaded.peak_bytes < 0.7 * plain.peak_bytes and offloaded.host_bytes > 0


# --- the command ---


def run(capsys, *words):
    code = main(["plan", *words])
    return code, capsys.readouterr()


def words_of(**changes):
    return [word for key, value in (SMALL | changes).items() for word in (f"--{key}", value)]


def test_a_preset_is_planned_without_data_on_the_disk(capsys):
    code, told = run(
        capsys,
        "adapt",
        "--preset",
        "gta5_cityscapes",
        *words_of(**TINY | {"loop.device": "auto"}),
    )
    assert code == 0
    assert "adapt" in told.out and "peak by phase" in told.out and "not yet measured on a GPU" in told.out


def test_json_has_every_stage_of_the_run(capsys):
    code, told = run(capsys, "--preset", "gta5_cityscapes", "--json", *words_of(**TINY))
    record = json.loads(told.out)
    assert code == 0 and [entry["stage"] for entry in record["stages"]] == [
        "warmup",
        "prototypes",
        "pseudo_labels",
        "adapt",
        "distill",
    ]
    for entry in record["stages"]:
        assert entry["peak_bytes"] == sum(entry["categories"].values()) > entry["floor_bytes"] * 0.5 > 0


TINY = {"model.name": "tiny", "source.size": "160x120", "target.size": "160x120"}


def test_fit_prints_flags_that_fit_when_pasted(capsys):
    config = config_of(**TINY)
    limit = int(0.6 * peak_memory(config, "adapt").peak_bytes)
    code, told = run(
        capsys, "adapt", "--preset", "gta5_cityscapes", "--fit", f"{limit / 2**20:.3f}MiB", "--json", *words_of(**TINY)
    )
    assert code == 0
    flags = json.loads(told.out)["command_line"].split()
    given = {key.removeprefix("--"): value for key, value in zip(flags[::2], flags[1::2], strict=True)}
    assert given and "source.size" not in given, "settings before smaller images"
    assert peak_memory(config_of(**TINY | given), "adapt").peak_bytes <= limit


def test_fit_leaves_alone_what_fits_already():
    assert fitting.settings_within(config_of(**TINY), ["adapt"], 2**30).flags == {}


def test_smaller_images_are_the_last_resort():
    config = config_of(**TINY)
    candidates = [flags for group in fitting._candidates(config, ["adapt"], 1) for flags in group]
    least = min(peak_memory(fitting.apply_flags(config, flags), "adapt").peak_bytes for flags in candidates)
    fitted = fitting.settings_within(config, ["adapt"], int(0.93 * least))
    assert "source.size" in fitted.flags and fitted.peaks[0].peak_bytes <= 0.93 * least


def test_what_cannot_fit_says_what_the_least_is(capsys):
    code, told = run(capsys, "adapt", "--preset", "gta5_cityscapes", "--fit", "1MiB", *words_of(**TINY))
    assert code == 2
    assert (
        "nothing fits into 0.00 GiB: the least that adapt takes at any size tried is" in told.err
        and "--model.name" in told.err
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_what_cannot_recompute_is_not_advised_to(monkeypatch, capsys, compiled):
    if not compiled:  # any net that is not made of blocks
        monkeypatch.setattr(SegmentationModel, "chain", property(lambda net: None))
    config = dataclasses.replace(config_of(**TINY), loop=LoopConfig(compile=compiled))
    assert not can_recompute(config, 19) and (can_recompute(config_of(**TINY), 19) == compiled)
    offered = [flags for group in fitting._candidates(config, ["adapt"], 1, recompute=False) for flags in group]
    assert {"loop.accumulate", "loop.offload"} <= {key for flags in offered for key in flags}
    assert not any("loop.checkpoint" in flags for flags in offered)
    assert all(flags not in offered[:at] for at, flags in enumerate(offered))
    words = ["--fit", "1MiB", "--loop.compile", str(compiled).lower()]
    code, told = run(capsys, "adapt", "--preset", "gta5_cityscapes", *words, *words_of(**TINY))
    assert code == 2 and "nothing fits into 0.00 GiB" in told.err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--fit", "much"], "--fit much: expected an amount of memory such as 4GiB or 900MiB"),
        (["dance"], "plan dance: there is no such stage; there are source_only"),
        (["--loop.accumulate", "3"], "loop.accumulate: got 3, expected a divisor of adapt.batch_size (2)"),
        (
            ["--loop.checkpoint", "all"],
            "loop.checkpoint (command line): got 'all', expected one of none, stage, block, auto",
        ),
        (
            ["--loop.compile", "true", "--loop.checkpoint", "auto"],
            "loop.checkpoint: got 'auto' with loop.compile, expected none",
        ),
        (
            ["--adapt.optimizer", "adamw", "--loop.absorb_gradients"],
            "adapt has adamw with momentum 0.9, expected sgd with",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(capsys, words, message):
    stage = [] if words[0] == "dance" else ["adapt"]
    code, told = run(capsys, *stage, "--preset", "gta5_cityscapes", *words_of(), *words)
    assert code == 2 and message in told.err


def test_amounts_of_memory_are_read_as_people_write_them():
    amounts = {"4GiB": 4 << 30, "4 GB": 4 << 30, "1.5g": 3 << 29, "900M": 900 << 20, "1024": 1024}
    assert {text: fitting.parse_bytes(text) for text in amounts} == amounts
    with pytest.raises(ConfigError):
        fitting.parse_bytes("0GiB")


def test_stages_are_named_as_commands_name_them():
    config = dataclasses.replace(config_of(), stages=("warmup", "adapt"))
    assert fitting.stages_of(config, "pseudo-label") == ["pseudo_labels"] and fitting.stages_of(
        config, "source-only"
    ) == ["source_only"]
    assert fitting.stages_of(config, None) == ["warmup", "adapt"]


def test_the_second_round_of_pseudo_labels_takes_what_the_first_takes(capsys):
    config = dataclasses.replace(config_of(), stages=("pseudo_labels", "adapt", "pseudo_labels_2"))
    assert fitting.stages_of(config, None) == ["pseudo_labels", "adapt"] and fitting.stages_of(
        config, "pseudo_labels_2"
    ) == ["pseudo_labels"]
    code, told = run(capsys, "--preset", "gta5_cityscapes", "--stages", "pseudo_labels_2", *words_of())
    assert code == 0 and "pseudo_labels" in told.out, told.err


# --- one declaration ---


@pytest.mark.parametrize("row", catalog.trained(), ids=lambda row: row.name)
def test_the_plan_counts_the_stage_that_is_trained(row, monkeypatch):
    """A step that holds a tensor more is predicted to: there is no second declaration that could forget it."""
    stage, config = catalog.load(row.home), config_of(**TINY)
    plain = peak_memory(config, row.name, num_classes=19).peak_bytes

    class Larger:
        name, feeds = stage.name, staticmethod(stage.feeds)

        @staticmethod
        def build(config, nets):
            trainee = stage.build(config, nets)
            trainee.modules = {**trainee.modules, "more": torch.nn.Linear(1024, 1024, bias=False)}
            return trainee

    load = catalog.load
    monkeypatch.setattr(catalog, "load", lambda home: Larger if home == row.home else load(home))
    assert peak_memory(config, row.name, num_classes=19).peak_bytes == plain + 2**22
