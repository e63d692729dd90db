"""What a command finds out before any work: where it writes, what stands for a setting, and help that shows it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from spcl_fast.cli import commands, main
from spcl_fast.config.load import all_settings, load_config
from spcl_fast.errors import ConfigError
from spcl_fast.memory_plan import cards, fitting
from spcl_fast.memory_plan.fitting import settings_within
from spcl_fast.runs.output import tell
from spcl_fast.runs.signs import gain_note
from spcl_fast.train import device


def told(capsys, code, *words):
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "This is a bug" not in captured.err
    return captured.err


# ---- places that cannot be written -----------------------------------------------------------------------------------


def test_a_runs_folder_that_is_a_file_is_named_before_torch_is_imported(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    err = told(capsys, 2, "run", "--preset", "demo", "--runs_dir", tmp_path / "file")
    assert f"{tmp_path / 'file'} is a file, not a folder" in err and "disk" not in err


def test_what_evaluate_and_predict_write_to_is_tried_first(tmp_path, capsys, monkeypatch):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"")
    (tmp_path / "images").mkdir()
    (tmp_path / "file").write_text("")
    given = ("--preset", "demo")
    err = told(capsys, 2, "evaluate", weights, *given, "--output", tmp_path)
    assert "--output" in err and "that is a folder" in err
    assert "is a file, not a folder" in told(
        capsys, 2, "evaluate", weights, *given, "--output", tmp_path / "file" / "x"
    )
    assert "is a file, not a folder" in told(
        capsys, 2, "predict", weights, tmp_path / "images", tmp_path / "file", *given
    )
    err = told(capsys, 2, "evaluate", weights, *given, "--output", "/proc/nothing/x.json")
    assert "--output" in err and "cannot be written" in err
    assert not any(path.name.startswith("tmp") for path in tmp_path.iterdir()), "trying leaves nothing behind"


def test_predict_does_not_write_into_the_folder_it_reads(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "w").write_bytes(b"")
    for output in (tmp_path / "images", tmp_path / "images" / "out", tmp_path / "images" / ".." / "images"):
        err = told(capsys, 2, "predict", tmp_path / "w", tmp_path / "images", output, "--preset", "demo")
        assert "lies in the folder of the images" in err


def test_a_wrong_run_is_told_without_torch(tmp_path):
    script = (
        "import sys; from spcl_fast.cli import main; "
        "code = main(['predict', 'runs/nothing', 'images', 'out', '--preset', 'demo']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "runs/nothing: there is no such run folder" in done.stderr, done.stderr


# ---- settings that are printed are those that run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--loop.device", "gpu"], "loop.device: got 'gpu', expected auto, cpu, cuda or cuda:N"),
        (["--loop.precision", "fp16"], "expected one of fp32, bf16"),
        (["--stages", "adpt"], "did you mean adapt?"),
        (["--source.size", "0x0"], "source.size: got 0,0"),
        (["--adapt.iterations", "-3"], "adapt.iterations: got -3"),
        (["--adapt.iterations", "90000"], "adapt.schedule_iterations"),
    ],
)
def test_print_config_refuses_what_a_run_refuses(words, expected, capsys):
    assert expected in told(capsys, 2, "run", "--preset", "gta5_cityscapes", *words, "--print-config")
    assert main(["run", "--preset", "gta5_cityscapes", "--print-config"]) == 0, "roots are not needed to print"


def test_one_flag_sets_every_stage_and_a_stages_own_wins_wherever_it_stands(capsys):
    for words in (["--iterations", "7", "--adapt.iterations", "9"], ["--adapt.iterations=9", "--iterations=7"]):
        assert main(["run", "--preset", "demo", *words, "--batch-size", "3", "--print-config"]) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        stages = ("source_only", "control", "warmup", "adapt", "distill", "oracle", "online", "head")
        assert [config[stage]["iterations"] for stage in stages] == [7, 7, 7, 9, 7, 7, 7, 7]
        assert {config[stage]["batch_size"] for stage in stages} == {3}
    assert "--iterations: a value is missing, expected a whole number" in told(capsys, 2, "run", "--iterations")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapt: &a\n  lr: *a\n", "an alias (*name) stands inside of what it names"),
        ("adapt.lr: 1\nadapt:\n  lr: 2\n", "adapt.lr is given twice"),
        ("CPA_LOSS: 1\nadapt:\n  contrast_weight: 2\n", "adapt.contrast_weight is given twice"),
        ("stages: []\n", "stages: got nothing, expected at least one of source_only"),
        ("source: {label_ending: .tif}\n", "source.label_ending: got '.tif'"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(text, expected, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert expected in told(capsys, 2, "run", "--preset", "folders", "--config", tmp_path / "c.yaml", "--print-config")


def test_a_number_of_samples_that_looks_at_nothing_is_refused(capsys):
    for number in ("0", "-1", "x"):
        assert f"got '{number}', expected a whole number" in told(capsys, 2, "check-data", "--samples", number)


def test_report_writes_into_no_folder_but_a_runs(tmp_path, capsys):
    assert "is no run folder" in told(capsys, 2, "report", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_which_no_stage_has_begun_has_nothing_to_report(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert "no stage of it has begun" in told(capsys, 2, "report", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_of_run_has_a_word_for_every_setting_and_fits_a_few_screens(capsys):
    assert all(setting.about.help for setting in all_settings().values())
    assert main(["run", "-h"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 190
    assert main(["head", "-h"]) == 0
    of_head = capsys.readouterr().out  # a command of its own: its settings are no run's
    for key in all_settings():
        section, _, leaf = key.partition(".")
        shown = of_head if section == "head" else out
        assert f"--{key} [" in shown or f"--STAGE.{leaf} [" in shown, key
    assert "--STAGE.iterations [40000; distill 20000]" in out


def test_help_with_a_preset_shows_its_values(capsys):
    assert main(["adapt", "--preset", "folders", "-h"]) == 0
    out = capsys.readouterr().out
    assert "--adapt.contrast_temperature [0.1]" in out and "in brackets: value of the preset" in out
    assert main(["adapt", "-h"]) == 0
    assert "--adapt.contrast_temperature [100.0]" in capsys.readouterr().out
    assert "did you mean folders?" in told(capsys, 2, "adapt", "--preset", "folder", "-h")


def test_a_word_that_stands_alone_is_named_without_a_dump_of_the_usage(capsys):
    err = told(capsys, 2, "run", "preset", "folders")
    assert err == (
        "spcl-fast run: there is no place for 'preset folders' here; did you mean --preset folders? (spcl-fast run -h explains)\n"
    )
    for name in commands.COMMANDS:
        assert len(told(capsys, 2, name, "odd", "words", "at", "the", "end")) < 300


# ---- plan ------------------------------------------------------------------------------------------------------------


def test_a_card_without_bfloat16_gets_no_advice_to_use_it(monkeypatch):
    tried = []

    def counted(config, stage, *, num_classes):
        tried.append(config.loop.precision)
        raise ConfigError("enough")

    monkeypatch.setattr(fitting, "peak_memory", counted)
    config = load_config("demo")
    for bf16 in (False, True):
        groups = [list(fitting._candidates(config, ["adapt"], scale, bf16=bf16)) for scale in (1.0, 0.5)]
        flags = [one for group in groups for many in group for one in many]
        assert any("loop.precision" in one for one in flags) is bf16
        assert any(one.get("loop.checkpoint") == "auto" for one in flags)
        assert {"source.size", "target.size"} <= {key for one in groups[1][0] for key in one}
    with pytest.raises(ConfigError, match="enough"):
        settings_within(config, ["adapt"], 2**30, bf16=False)
    assert tried == ["fp32"]


def test_cards_are_known_by_the_names_that_people_use():
    assert cards.card("RTX 2080 Ti") == cards.card("2080ti") and not cards.card("2080ti").bf16
    assert cards.card("GeForce RTX 3090").bf16 and cards.card("A100").usable_bytes == 39 * 2**30
    with pytest.raises(ConfigError, match=r"--gpu h101: not in the table; did you mean h100\?"):
        cards.card("h101")


def test_plan_without_a_root_names_the_setting(capsys):
    err = told(capsys, 2, "plan", "adapt", "--preset", "folders")
    assert "source.root is not set, and plan needs the classes of folders: give --source.root" in err


def test_plan_says_what_it_is_counting(capsys):
    words = ["--preset", "demo", "--source.size", "48,32", "--target.size", "48,32", "--loop.device", "cpu"]
    assert main(["plan", "source-only", *words]) == 0
    captured = capsys.readouterr()
    assert "counting source_only (1 of 1) ..." in captured.err and "counting" not in captured.out


# ---- honest figures, busy machines --------------------------------------------------------------------------------------


def test_a_gain_without_a_control_says_what_it_is():
    nets = {name: {"miou": 50.0, "iou": {"a": 50.0}} for name in ("source_only", "adapted")}
    assert "part of it may come from more training alone" in gain_note({"classes": ["a"], **nets})
    assert gain_note({"classes": ["a"], **nets, "control": nets["adapted"]}) == ""
    assert gain_note({"classes": ["a"], "source_only": nets["source_only"], "adapted": None}) == ""


def test_threads_on_a_busy_machine_are_warned_of(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: {0, 1})
    assert "set OMP_NUM_THREADS=1" in device.crowded(6.0) and device.crowded(0.5) is None
    monkeypatch.setattr(device.torch, "get_num_threads", lambda: 1)
    assert device.crowded(6.0) is None
    monkeypatch.setattr(device.torch, "get_num_threads", lambda: 2)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "2")
    assert device.crowded(6.0) is None, "who sets it knows"


# ---- what surrounds a command ------------------------------------------------------------------------------------------


def shell(line, **environment):
    done = subprocess.run(
        ["bash", "-c", line.replace("spcl-fast", f"{sys.executable} -m spcl_fast")],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "This is a bug" not in done.stderr, done.stderr
    return done


def test_an_output_that_cannot_be_written_is_no_bug():
    full = shell("spcl-fast run --preset demo --print-config > /dev/full")
    assert full.returncode == 1 and "cannot write what is shown: No space left on device. Make room" in full.stderr
    assert shell("spcl-fast run --preset demo --print-config >&-").returncode == 0


def test_training_goes_on_where_its_lines_cannot_be_written(tmp_path, capsys):
    with open("/dev/full", "w") as full:
        tell(full, "first")
        tell(full, "second")
    assert capsys.readouterr().err == "nothing more is shown: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("words", [("evaluate",), ("predict", "images", "out")])
def test_a_stage_that_trains_no_net_gets_a_suggestion(words, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"target: {{dataset: generated_target}}\nname: {tmp_path.name}\n")
    (tmp_path / "images").mkdir()
    rest = [tmp_path / word for word in words[1:]]
    err = told(capsys, 2, words[0], tmp_path / "run", *rest, "--stage", "adpt")
    assert "--stage adpt: no net is of such a stage; did you mean adapt?" in err


def test_a_backend_of_the_environment_that_is_not_there_is_a_wrong_setting(monkeypatch, capsys):
    monkeypatch.setenv("SPCL_FAST_BACKEND", "trition")
    assert "SPCL_FAST_BACKEND=trition: there is no such backend; did you mean triton?" in told(
        capsys, 2, "run", "--preset", "demo"
    )
