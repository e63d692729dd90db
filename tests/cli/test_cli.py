"""The command line from outside: exit codes, texts, and what the commands hand to the stages."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from spcl_fast import catalog, errors
from spcl_fast.cli import actions, commands, entry, main
from spcl_fast.config import load as settings

ROOTS = ["--source.root", "a", "--target.root", "b"]


@pytest.fixture
def stages(monkeypatch):
    """What would have been trained: (config, names of stages) of every call."""
    calls = []
    module = types.ModuleType("spcl_fast.method.run")
    module.run_stages = lambda config, names, **_: calls.append((config, tuple(names)))
    monkeypatch.setitem(sys.modules, "spcl_fast.method.run", module)
    monkeypatch.setattr(actions, "show_end", lambda run: calls.append(run))
    return calls


def fails(capsys, code, *words):
    """Run, expect that exit code, one message without traceback, nothing on stdout; return the message."""
    assert main(list(words)) == code
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.startswith("spcl-fast")
    return captured.err


# ---------------------------------------------------------------------------------------------- help


def test_help_answers_in_under_a_second_without_torch():
    script = "import sys; from spcl_fast.cli import main; code = main(['run', '--help']); assert 'torch' not in sys.modules; sys.exit(code)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # CPU time: the machine may be busy with other things
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.0
    assert "--adapt.contrast_temperature" in done.stdout


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_of_every_command_has_an_example(name, capsys):
    assert main([name, "-h"]) == 0
    out = capsys.readouterr().out
    example = commands.COMMANDS[name].example
    assert f"example:\n  {example}\n" in out and example.startswith(f"spcl-fast {name}")


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_top_level_help_lists_every_command(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in commands.COMMANDS) and "example:" in out


def test_the_commands_of_the_contract_are_there():
    contract = "doctor demo run warmup prototypes pseudo-label adapt distill evaluate predict check-data plan report bench tune"
    assert set(contract.split()) <= set(commands.COMMANDS)


def test_python_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "spcl_fast", "adpt"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "did you mean adapt?" in done.stderr


def test_without_a_command_help_is_shown_and_the_code_is_2(capsys):
    assert main([]) == 2
    assert "pseudo-label" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- what is refused


def test_unknown_command_option_and_setting_get_a_suggestion(capsys):
    assert "did you mean check-data?" in fails(capsys, 2, "check-dat")
    assert "did you mean preset?" in fails(capsys, 2, "run", "--prest", "demo")
    assert "did you mean adapt.contrast_temperature?" in fails(capsys, 2, "run", "--adapt.contrast_temprature", "1")
    assert "adapt.contrast_temperature" in fails(capsys, 2, "run", "--contrast_temperature", "1")
    assert "did you mean folders?" in fails(capsys, 2, "run", "--preset", "folder")


def test_a_wrong_type_names_key_value_and_expectation(capsys):
    told = fails(capsys, 2, "adapt", *ROOTS, "--adapt.lr", "fast")
    assert told == "spcl-fast adapt: adapt.lr (command line): got 'fast', expected a number\n"


def test_a_missing_value_is_told(capsys):
    assert "--adapt.lr: a value is missing, expected a number" in fails(capsys, 2, "run", "--adapt.lr")
    assert "--adapt.lr: a value is missing" in fails(capsys, 2, "run", "--adapt.lr", "--seed", "1")


def test_adapt_without_source_is_refused_before_anything_is_read(capsys, stages):
    told = fails(capsys, 2, "adapt", "--target.root", "b")
    assert "source.root is not set, and adapt reads the source data: give --source.root path/to/folder" in told
    assert not stages


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError("c"),
        errors.DataError("d"),
        errors.NumericError("n"),
        errors.CheckpointError("k"),
        errors.Interrupted("i"),
    ],
)
def test_every_error_has_its_exit_code_and_no_traceback(error, capsys, stages, monkeypatch):
    def stop(config, names, **_):
        raise error

    monkeypatch.setattr(sys.modules["spcl_fast.method.run"], "run_stages", stop)
    assert error.exit_code == {"c": 2, "d": 3, "n": 4, "k": 5, "i": 75}[str(error)]
    assert fails(capsys, error.exit_code, "run", *ROOTS) == f"spcl-fast run: {error}\n"


def test_a_bug_is_told_as_one_and_debug_shows_where(capsys, stages, monkeypatch):
    def stop(config, names, **_):
        raise ZeroDivisionError("x")

    monkeypatch.setattr(sys.modules["spcl_fast.method.run"], "run_stages", stop)
    assert "unexpected ZeroDivisionError: x" in fails(capsys, 1, "run", *ROOTS)
    with pytest.raises(ZeroDivisionError):
        main(["run", *ROOTS, "--debug"])


@pytest.mark.parametrize(
    ("name", "extra"), [("rich.progress", "train"), ("safetensors", "train"), ("yaml", "train"), ("pytest", "test")]
)
def test_a_missing_library_is_told_with_the_command_that_brings_it(name, extra, capsys, stages, monkeypatch):
    def stop(config, names, **_):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys.modules["spcl_fast.method.run"], "run_stages", stop)
    library = name.partition(".")[0]
    assert (
        fails(capsys, 2, "adapt", *ROOTS) == f"spcl-fast adapt needs '{library}': pip install \"spcl_fast[{extra}]\"\n"
    )


def test_without_any_extra_help_and_doctor_work_and_a_run_names_what_it_needs():
    script = (
        "import sys\n"
        "for name in ('yaml', 'rich', 'PIL', 'safetensors', 'matplotlib', 'jinja2', 'pytest'):\n"
        "    sys.modules[name] = None\n"
        "from spcl_fast.cli import main\n"
        "codes = [main(words) for words in (['run', '-h'], ['doctor'], ['adapt', '--preset', 'demo'])]\n"
        "sys.exit(codes != [0, 0, 2])\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    }  # interpreted kernels take seconds
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "spcl-fast adapt needs 'yaml': pip install \"spcl_fast[train]\"\n"


def test_all_processes_fail_but_one_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["run", "--nonsense.key", "1"]) == 2
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------- what reaches the stages


def test_print_config_prints_what_config_reads_back(capsys, stages, tmp_path):
    assert main(["run", "--preset", "folders", "--adapt.lr=3e-3", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["adapt"]["lr"] == 3e-3 and not stages
    (tmp_path / "x.yaml").write_text(text)
    assert main(["run", "--config", str(tmp_path / "x.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text


def test_words_become_settings_wherever_they_stand(stages):
    words = [
        "--seed",
        "3",
        "--set",
        "released",
        "--adapt.contrast-temperature",
        "0.5",
        "--preset=demo",
        "--skip-bad-files",
        "--CPA_LOSS",
        "2",
    ]
    assert main(["run", *words, "--source.size", "64x48", "--resume", "never"]) == 0
    (config, names), run = stages
    assert (config.seed, config.adapt.contrast_temperature, config.adapt.absent) == (3, 0.5, "decay")
    assert (config.loop.skip_bad_files, config.loop.resume, config.adapt.contrast_weight) == (True, "never", 2)
    assert config.source.size == (64, 48) and names == config.stages and run.name == "demo"


def test_a_flag_takes_an_explicit_value_too(stages):
    assert main(["run", *ROOTS, "--loop.skip_bad_files", "false", "--model.freeze_bn", "false"]) == 0
    assert stages[0][0].loop.skip_bad_files is False and stages[0][0].model.freeze_bn is False


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["warmup"], ("warmup",)),
        (["prototypes"], ("prototypes",)),
        (["pseudo-label"], ("pseudo_labels",)),
        (["pseudo-label", "--round", "2"], ("pseudo_labels_2",)),
        (["adapt"], ("adapt",)),
        (["distill"], ("distill",)),
        (["source-only"], ("source_only",)),
        (["control"], ("control",)),
        (["oracle"], ("oracle",)),
    ],
)
def test_a_stage_command_runs_that_stage_alone(words, expected, stages):
    assert main([*words, "--preset", "demo"]) == 0
    assert [names for _, names in stages] == [expected] and expected[0] in catalog.names(catalog.STAGES)


def test_demo_is_a_run_of_its_preset_and_ends_with_table_and_report(stages):
    assert main(["demo", "--seed", "7", "--name", "seven"]) == 0
    (config, names), shown = stages
    assert (config.source.dataset, config.seed, names) == ("generated_source", 7, config.stages)
    assert shown.parts == ("runs", "seven")


def test_run_goes_on_in_the_folder_of_a_run_with_its_settings(stages, tmp_path, capsys):
    run = tmp_path / "elsewhere" / "old"
    run.mkdir(parents=True)
    assert main(["run", "--preset", "demo", "--adapt.keep", "0.7", "--print-config"]) == 0
    (run / "config.yaml").write_text(capsys.readouterr().out)
    assert main(["adapt", "--run-folder", str(run), "--adapt.min_pixels", "5"]) == 0
    config = stages[0][0]
    assert (config.adapt.keep, config.adapt.min_pixels, config.name, config.runs_dir) == (
        0.7,
        5,
        "old",
        str(run.parent),
    )
    assert "config.yaml" in fails(capsys, 2, "adapt", "--run-folder", str(tmp_path))


def test_a_whole_run_ends_with_the_table_the_summary_and_the_report(monkeypatch, tmp_path, capsys):
    tables, report = types.ModuleType("tables"), types.ModuleType("report")
    tables.iou_table, report.write_report = (
        lambda summary: f"mIoU {summary['adapted']['miou']}",
        lambda run: run / "report.html",
    )
    monkeypatch.setitem(sys.modules, "spcl_fast.report", report)
    monkeypatch.setitem(sys.modules, "spcl_fast.report.tables", tables)
    (tmp_path / "summary.json").write_text(json.dumps({"adapted": {"miou": 41.5}}))
    actions.show_end(tmp_path)
    out = capsys.readouterr().out
    assert "mIoU 41.5" in out and str(tmp_path / "summary.json") in out and str(tmp_path / "report.html") in out


def test_torchrun_takes_none_of_our_options_for_its_own():
    from torch.distributed.run import (
        get_args_parser,  # it abbreviates: an option of ours that begins one of its own never reaches us
    )

    options = {
        option
        for name, command in commands.COMMANDS.items()
        for option in entry._parser(name, command)._option_string_actions
    }
    ours = {f"--{key}" for key in [*settings.all_settings(), *settings.ALIASES]} | {
        o for o in options if o.startswith("--")
    } - {"--help"}
    theirs = [option for option in get_args_parser()._option_string_actions if option.startswith("--")]
    assert not [(a, b) for a in ours for b in theirs if b.startswith(a)]


# ---------------------------------------------------------------------------------------------- the other commands


def test_report_and_evaluate_name_a_folder_that_is_not_there(capsys, tmp_path):
    assert "no such run folder" in fails(capsys, 2, "report", str(tmp_path / "none"))
    assert "no such run folder" in fails(capsys, 2, "evaluate", str(tmp_path / "none"))
    assert "--preset NAME or --config" in fails(capsys, 2, "evaluate", str(tmp_path))
    assert "usage: spcl-fast predict" in fails(capsys, 2, "predict")


def test_help_of_a_long_output_survives_a_closed_pipe():
    done = subprocess.run(
        f"{sys.executable} -m spcl_fast run --help | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout.startswith("usage")


def test_the_console_script_is_installed():
    script = os.path.join(os.path.dirname(sys.executable), "spcl-fast")
    if not os.path.exists(script):
        pytest.skip("the package is not installed in this environment")
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.startswith("spcl_fast ")


def test_the_extras_of_the_message_are_those_of_the_package():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    names = {"yaml": "PyYAML", "PIL": "pillow", "pytest_benchmark": "pytest-benchmark"}
    for library, extra in entry._EXTRA.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{extra} = ["))
        assert names.get(library, library).lower() in line.lower(), f"{library} is not in the extra {extra!r}"
