"""The run folder: whole files, each step once in the metrics, one reader's view of what is finished, and what the user sees."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from faults import FAULTS, Crash, FaultyDisk, TinyStage

from spcl_fast import catalog
from spcl_fast.config import AdaptConfig, AugmentConfig, Config, DistillConfig
from spcl_fast.errors import CheckpointError
from spcl_fast.runs import folder as log
from spcl_fast.runs.durable import replace_file, replace_json
from spcl_fast.runs.folder import Run
from spcl_fast.runs.identity import flat_settings, settings_difference, settings_sha256, step_seed
from spcl_fast.train import memory, progress
from spcl_fast.train.progress import Progress

RECORD = {
    "stage": "adapt",
    "step": 20,
    "lr": 1e-4,
    "loss_seg": 0.5,
    "images_per_s": 12.3,
    "data_wait": 0.031,
    "peak_memory_bytes": 3 << 30,
}


# --- files ---


def test_json_is_whole_and_readable_by_every_language(tmp_path):
    run = Run(tmp_path / "runs" / "a")
    assert run.read_json("summary.json") is None
    run.write_json("adapt/evaluation.json", {"miou": float("nan"), "iou": [1.0, float("inf")], "n": 3})
    assert json.loads((tmp_path / "runs" / "a" / "adapt" / "evaluation.json").read_text()) == {
        "miou": None,
        "iou": [1.0, None],
        "n": 3,
    }
    run.write_text("config.yaml", "seed: 0\n")
    assert sorted(path.name for path in run.folder.iterdir()) == ["adapt", "config.yaml"], "no temporary files stay"


def test_a_damaged_json_is_an_error_that_names_it(tmp_path):
    (tmp_path / "summary.json").write_text('{"miou": 4')
    with pytest.raises(CheckpointError, match="summary.json cannot be read: .*Remove it to have it made anew"):
        Run(tmp_path).read_json("summary.json")


@pytest.mark.parametrize("kind", FAULTS)
def test_a_replaced_file_is_old_or_new_whatever_operation_fails(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for at in range(1, 50):
        path = tmp_path / str(at) / "x.json"
        replace_json(path, {"of": "old", "long": "x" * 100})
        with FaultyDisk(tmp_path, kind, at) as disk:
            try:
                replace_json(path, {"of": "new", "long": "y" * 100})
            except (OSError, Crash):
                pass
            else:
                assert json.loads(path.read_text())["of"] == "new"
        assert json.loads(path.read_text())["of"] in ("old", "new")
        if not disk.fails:
            break
    assert 6 < at < 49


def test_other_processes_write_nothing(tmp_path):
    run = Run(tmp_path / "run", writes=False)
    run.write_json("a.json", {})
    run.write_text("b.txt", "")
    run.append_metrics(RECORD)
    run.sync_metrics()
    run.forget_metrics_after("adapt", 0)
    run.mark_done("adapt", {})
    run.say("hello")
    with run.exclusive():
        pass
    assert not (tmp_path / "run").exists()


def test_a_stage_name_never_leaves_the_run(tmp_path):
    for name in ("../x", "a/b", "", ".hidden", "/etc"):
        with pytest.raises(ValueError, match="is not a stage name"):
            Run(tmp_path).stage(name)


# --- finished stages ---


def test_done_holds_for_the_same_settings_and_names_what_differs(tmp_path):
    run = Run(tmp_path)
    config = AdaptConfig()
    assert not run.is_done("adapt", {"adapt": config})
    run.mark_done("adapt", {"adapt": config, "inputs": {"warmup": "abc"}}, seconds=2.5)
    assert run.is_done("adapt", {"adapt": config, "inputs": {"warmup": "abc"}})
    assert run.done("adapt")["seconds"] == 2.5
    other = AdaptConfig(lr=1.0, augment=AugmentConfig(crop=(64, 32)))
    with pytest.raises(CheckpointError, match="finished with other settings") as caught:
        run.is_done("adapt", {"adapt": other, "inputs": {"warmup": "abd"}})
    assert (
        "(adapt.lr: 0.00025 -> 1.0; adapt.augment.crop: None -> [64, 32]; warmup was done again with other settings)"
        in str(caught.value)
    )


def test_a_setting_that_an_older_version_had_not_counts_as_its_default(tmp_path):
    older = {
        key: value
        for key, value in flat_settings({"distill": DistillConfig(lr=0.1)}).items()
        if key != "distill.class_mix"
    }
    Run(tmp_path).mark_done("distill", older)
    assert Run(tmp_path).is_done("distill", {"distill": DistillConfig(lr=0.1)})
    for changed, said in (
        (DistillConfig(lr=0.1, class_mix=0.5), "class_mix: 0.0 -> 0.5"),
        (DistillConfig(lr=0.2), "lr: 0.1 -> 0.2"),
    ):
        with pytest.raises(CheckpointError, match=rf"\(distill.{said}\)"):
            Run(tmp_path).is_done("distill", {"distill": changed})
    without = {
        key: value for key, value in flat_settings({"distill": DistillConfig()}).items() if key != "distill.class_mix"
    }
    assert "distill.class_mix: 0.0 -> '(absent)'" in settings_difference(
        flat_settings({"distill": DistillConfig()}), without
    )


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"settings": 3}', '{"settings": {"seed": 1}, "settings_sha256": "0"}']
)
def test_a_damaged_done_means_not_finished(tmp_path, content):
    run = Run(tmp_path)
    (tmp_path / "adapt").mkdir()
    (tmp_path / "adapt" / "done.json").write_text(content)
    assert run.done("adapt") is None and not run.is_done("adapt", {"seed": 1})


def test_settings_flatten_the_same_after_a_round_trip_through_json():
    flat = flat_settings({"adapt": AdaptConfig(), "sizes": ((1, 2), (3, 4)), "path": os.path, "empty": {}})
    assert json.loads(json.dumps(flat)) == flat
    assert settings_sha256(json.loads(json.dumps(flat))) == settings_sha256(flat)
    assert flat["adapt.augment.scale"] == [1.0, 1.0] and flat["sizes"] == [[1, 2], [3, 4]]
    assert settings_difference(flat, flat) == ""
    assert settings_difference({"a": 1}, {"a": 1.0}) == "", "numbers compare by value"
    assert settings_difference({"a": 1}, {"b": None}) == "a: 1 -> '(absent)'; b: '(absent)' -> None"


@pytest.mark.parametrize("row", [*catalog.STAGES, catalog.HEAD], ids=lambda row: row.name)
def test_a_setting_that_a_stage_lacked_counts_as_its_default_whatever_its_section_is_called(row):
    now = flat_settings({row.name: getattr(Config(), row.section)})
    assert all(settings_difference({key: now[key] for key in now if key != left}, now) == "" for left in now)
    some = next(iter(now))
    assert settings_difference({**now, some: "another"}, now)


def test_seeds_differ_by_run_stage_step_and_process():
    seeds = {
        step_seed(s, stage, it, rank)
        for s in (0, 1)
        for stage in ("adapt", "warmup")
        for it in range(50)
        for rank in (0, 1)
    }
    assert len(seeds) == 2 * 2 * 50 * 2 and all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(0, "adapt", 0) == step_seed(0, "adapt", 0, 0) == 7866359396151919252, (
        "a change would break resuming of every run"
    )


# --- metrics ---


def test_each_step_stands_once_after_a_resume_and_torn_lines_go(tmp_path):
    run = Run(tmp_path, tensorboard=False)
    for stage, step in (("warmup", 20), ("warmup", 40), ("adapt", 20), ("adapt", 40), ("adapt", 60)):
        run.append_metrics({**RECORD, "stage": stage, "step": step})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"stage": "adapt", "st')
    assert len(run.metrics()) == 5
    run.forget_metrics_after("adapt", 40)
    assert [(record["stage"], record["step"]) for record in run.metrics()] == [
        ("warmup", 20),
        ("warmup", 40),
        ("adapt", 20),
        ("adapt", 40),
    ]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    run.append_metrics({**RECORD, "step": 60})
    assert [record["step"] for record in run.metrics("adapt")] == [20, 40, 60]
    run.forget_metrics_after("adapt", 0)
    assert [record["stage"] for record in run.metrics()] == ["warmup", "warmup"]


def test_nothing_is_rewritten_when_nothing_goes(tmp_path):
    run = Run(tmp_path, tensorboard=False)
    run.append_metrics(RECORD)
    before = os.stat(tmp_path / "metrics.jsonl").st_ino
    run.forget_metrics_after("adapt", 20)
    assert os.stat(tmp_path / "metrics.jsonl").st_ino == before


def test_a_metrics_value_that_is_not_finite_is_null(tmp_path):
    run = Run(tmp_path, tensorboard=False)
    run.append_metrics({**RECORD, "shares": [0.5, float("nan")]})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["shares"] == [0.5, None]


def test_a_full_disk_while_logging_is_an_error_in_words(tmp_path):
    run = Run(tmp_path / "run", tensorboard=False)
    run.append_metrics(RECORD)
    with (
        FaultyDisk(tmp_path, "ENOSPC", 2),
        pytest.raises(CheckpointError, match="Cannot write .*metrics.jsonl: No space left on device"),
    ):
        run.append_metrics({**RECORD, "step": 40})
    run.forget_metrics_after("adapt", 20)
    assert [record["step"] for record in run.metrics()] == [20], "the torn half is gone"


# --- TensorBoard ---


class FakeWriter:
    made: list[FakeWriter] = []

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.points, self.closed = folder, purge_step, [], False
        FakeWriter.made.append(self)

    def add_scalar(self, name, value, step):
        self.points.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_every_number_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeWriter, "made", [])
    monkeypatch.setattr(log, "_summary_writer", lambda: FakeWriter)
    run = Run(tmp_path)
    run.append_metrics({"stage": "adapt", "step": 20, "loss": 0.5, "shares": [0.25, 0.75]})
    run.append_metrics({"stage": "adapt", "step": 40, "loss": 0.25})
    run.close()
    (writer,) = FakeWriter.made
    assert writer.folder.endswith("tensorboard/adapt") and writer.purge_step == 20 and writer.closed
    assert writer.points == [("loss", 0.5, 20), ("shares/00", 0.25, 20), ("shares/01", 0.75, 20), ("loss", 0.25, 40)]


def test_a_missing_or_broken_tensorboard_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = Run(tmp_path)
    run.append_metrics(RECORD)
    assert run.metrics() == [RECORD] and not (tmp_path / "tensorboard").exists()


# --- what the user sees ---


def test_without_a_terminal_there_is_one_plain_line_a_logged_step(tmp_path):
    output = io.StringIO()
    TinyStage().fit(tmp_path, iterations=8, output=output)
    lines = output.getvalue().splitlines()
    assert len(lines) == 2
    for word in ("tiny 4/8", "loss_main ", "lr 0.0", " images/s", "data wait ", " %", "peak ", "iB", "eta 0:00:0"):
        assert word in lines[0], word
    assert "\x1b" not in output.getvalue() and "\r" not in output.getvalue()
    output = io.StringIO()
    TinyStage().fit(tmp_path, iterations=8, output=output)
    assert output.getvalue() == "", "a finished stage is not shown as training"


def test_training_goes_on_where_nobody_reads_its_lines():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        for step in (10, 20):
            Progress("adapt", 40, 0, output).report({**RECORD, "step": step}, eta_seconds=1)
            Run("unused", output=output).say("one more")


def test_letters_that_the_output_cannot_show_do_not_stop_training():
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Run("unused", output=output).say("pseudo-labels: never predicted on target: 天空")
    assert output.buffer.getvalue() == b"pseudo-labels: never predicted on target: \\u5929\\u7a7a\n"


def test_a_plain_line_is_exactly_this():
    output = io.StringIO()
    with Progress("adapt", 4000, 0, output) as shown:
        shown.report(RECORD, eta_seconds=3725)
    assert (
        output.getvalue()
        == "adapt 20/4000  loss_seg 0.5  lr 0.0001  12.3 images/s  data wait 3 %  peak 3 GiB  eta 1:02:05\n"
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_a_bar_with_the_same_words(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    output = Terminal()
    with Progress("adapt", 4000, 0, output) as shown:
        shown.advance(20)
        shown.report(RECORD, eta_seconds=1)
    for word in ("adapt", "20/4000", "eta", "loss_seg 0.5", "12.3 images/s", "data wait 3 %", "peak 3 GiB"):
        assert word in output.getvalue(), word


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    output = Terminal()
    with Progress("adapt", 4000, 0, output) as shown:
        shown.advance(20)
        shown.report(RECORD, eta_seconds=1)
    assert output.getvalue().startswith("adapt 20/4000")


def test_sizes_and_times_read_well():
    assert [progress.size(n) for n in (0, 1023, 1536, 5 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5 MiB",
        "3 TiB",
    ]
    assert [progress.duration(s) for s in (0.2, 59.6, 3599, 90061)] == ["0:00:00", "0:01:00", "0:59:59", "25:01:01"]


# --- memory ---


def test_the_peak_is_seen_and_starts_anew():
    if not memory.reset_peak():
        pytest.skip("this system cannot reset the peak of a process")
    before = memory.resident_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.peak_bytes() >= before + (60 << 20)
    del block
    memory.reset_peak()
    assert memory.peak_bytes() < before + (32 << 20)


def test_without_proc_the_peak_comes_from_rusage(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no folder" / "none")
    assert not memory.reset_peak()
    assert memory.peak_bytes() > 10 << 20
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.peak_bytes() == 5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_kept_until_the_peak_is_counted_anew():
    program = """
import resource, torch
from spcl_fast.train import memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), memory.keep_freed_memory(), [faults() for _ in range(6)][-1])
print(memory.resident_bytes(), memory.reset_peak() and memory.resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    as_it_comes, kept, faults, before, after = done.stdout.split()
    assert kept == "True" and int(faults) <= int(as_it_comes) // 4  # of 16384 pages, or 32 huge ones
    if after != "False":
        assert int(before) - int(after) > 48 << 20


def test_bytes_are_what_was_given(tmp_path):
    size, sha256 = replace_file(tmp_path / "deep" / "x", [b"ab", memoryview(b"c")])
    assert (tmp_path / "deep" / "x").read_bytes() == b"abc" and size == 3
    assert sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
