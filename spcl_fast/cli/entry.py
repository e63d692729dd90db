"""The command line. Nothing here imports torch until a command needs it, so that --help answers at once.

Which commands there are is in commands.py. Those with settings take --preset, --config, --set and any `--section.name value` of
config/schema.py. Here: words to settings, errors to one message and an exit code, help.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..config import load as settings
from ..errors import ConfigError, SpclFastError
from ..runs import layout
from ..runs.output import silence
from .commands import COMMANDS, Command
from .help import settings_help

if TYPE_CHECKING:
    from ..config import Config

# import name -> the extra that brings it; torch, numpy and triton come with the package itself
_EXTRA = {
    **dict.fromkeys(("yaml", "rich", "PIL", "safetensors", "matplotlib", "jinja2"), "train"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "timm": "timm",
    "transformers": "transformers",
    **dict.fromkeys(("pytest", "pytest_benchmark", "hypothesis", "torchmetrics"), "test"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 a bug, 2 settings, 3 data, 4 numeric, 5 checkpoint, 75 stopped by a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    name = argv[0] if argv and argv[0] in COMMANDS else None
    title = f"spcl-fast {name}" if name else "spcl-fast"
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  closed by the caller (`>&-`): nothing is shown
    for stream in (sys.stdout, sys.stderr):  # an ASCII terminal shows the names of classes and files in escapes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if name is None:
            return _top_level(argv)
        code = COMMANDS[name].act(_parse(name, [word for word in argv[1:] if word != "--debug"])) or 0
        sys.stdout.flush()  # here, where a full disk is still reported
        return code
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _complain(title, "stopped from the keyboard", 130)
    except BrokenPipeError:  # `spcl-fast run --help | head`
        silence(sys.stdout)
        return 0
    except Exception as error:
        if debug:
            raise
        return _complain(title, *_in_words(title, error))


def _in_words(title: str, error: Exception) -> tuple[str, int]:
    if isinstance(error, SpclFastError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _EXTRA:
        library = (error.name or "").partition(".")[0]
        return f"{title} needs '{library}': pip install \"spcl_fast[{_EXTRA[library]}]\"", ConfigError.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        silence(sys.stdout)
        return f"cannot write what is shown: {error.strerror}. Make room, or send the output elsewhere", 1
    remedy = "This is a bug, or something no check foresaw: the same command with --debug shows where."
    return f"unexpected {type(error).__name__}: {error}\n{remedy}", 1


def _complain(title: str, message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    if rank != "0" and code == ConfigError.exit_code:
        return code  # every process of torchrun reads the same settings: one message is enough
    if not message.startswith(title):
        message = f"{title}: {message}"
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
    return code


# ---------------------------------------------------------------------------------------------- words to settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Answer as for every other wrong setting: one message, exit 2."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:  # such as a missing argument
            wanted = " ".join(str(action.metavar or action.dest) for action in self._get_positional_actions())
            raise ConfigError(f"{message}; usage: {self.prog} {wanted} ({self.prog} -h explains)")
        if not unknown.startswith("-"):
            first, *rest = unknown.split()
            known = [option.lstrip("-") for option in self._option_string_actions if option.startswith("--")]
            meant = f"; did you mean --{' '.join([first, *rest])}?" if first in known else ""
            raise ConfigError(f"there is no place for {unknown!r} here{meant} ({self.prog} -h explains)")
        word = unknown.split()[0].partition("=")[0]
        known = [option.lstrip("-") for option in self._option_string_actions if option.startswith("--")]
        takes_settings = "preset" in known
        hint = settings.suggestion(word.lstrip("-"), [*known, *(settings.all_settings() if takes_settings else ())])
        raise ConfigError(f"unknown option {word}{hint} ({self.prog} -h lists all)")


def _split(words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Settings (`--adapt.lr 1e-4`, `--seed=3`, `--skip-bad-files`) and all other words."""
    given, shared, others = [], [], []
    rest = iter(range(len(words)))
    for i in rest:
        name, equals, value = words[i].removeprefix("--").partition("=")
        key = settings.canonical(name)
        everywhere = settings.of_every_stage(key)
        if not words[i].startswith("--") or not (
            "." in name or everywhere or key in settings.all_settings() or key in settings.sections()
        ):
            others.append(words[i])
            continue
        if not everywhere:
            settings.check_setting(key, "command line")
        following = words[i + 1] if i + 1 < len(words) else None
        if equals:
            text = value
        elif settings.is_flag(key) and (following is None or following.lower() not in ("true", "false")):
            text = "true"
        elif following is None or following.startswith("--"):
            raise ConfigError(
                f"--{name}: a value is missing, expected {settings.all_settings()[(everywhere or [key])[0]].expected()}"
            )
        else:
            text = following
            next(rest)
        shared += [(one, text) for one in everywhere]
        given += [] if everywhere else [(key, text)]
    return [*shared, *given], others  # a stage's own setting wins, wherever it stands


def _parse(name: str, words: list[str]) -> argparse.Namespace:
    command = COMMANDS[name]
    parser = _parser(name, command)
    if command.sections is None:
        return parser.parse_args(words)
    if {"-h", "--help"} & set(words):
        _parser(name, command, _named_before(words)).parse_args(["-h"])
    given, others = _split(words)
    args = parser.parse_args(others)
    if args.run_folder is not None:
        args.config.insert(0, _config_of_run(args.run_folder))
        given[:0] = [("runs_dir", str(args.run_folder.parent)), ("name", args.run_folder.name)]
    args.given = given
    args.command = name
    return args


def _config_of_run(run: Path) -> Path:
    if not (run / layout.CONFIG).is_file():
        raise ConfigError(f"--run-folder {run}: expected the folder of a run, with {layout.CONFIG} in it")
    return run / layout.CONFIG


def _named_before(words: list[str]) -> Config | None:
    """The settings of --preset and --set, for a help text that shows their values; None where no preset is named."""
    named: dict[str, list[str]] = {"--preset": [], "--set": []}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option in named:
            named[option].append(value if equals else following)
    return settings.load_config(named["--preset"][-1], (), named["--set"]) if named["--preset"] else None


def _parser(name: str, command: Command, shown: Config | None = None) -> _Parser:
    parser = _Parser(
        prog=f"spcl-fast {name}",
        description=command.summary,
        epilog=f"example:\n  {command.example}\n{'' if command.sections is None else settings_help(command.sections, shown)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if command.sections is not None:
        presets, sets = ", ".join(settings.available("preset")), ", ".join(settings.available("set"))
        parser.add_argument("--preset", metavar="NAME", help=f"start from these settings: {presets}")
        parser.add_argument(
            "--config", metavar="FILE", action="append", default=[], type=Path, help="YAML file of settings; may repeat"
        )
        parser.add_argument("--set", metavar="NAME", action="append", default=[], help=f"named changes on top: {sets}")
        parser.add_argument(
            "--run-folder", metavar="FOLDER", type=Path, help="start from the settings of a run and go on in its folder"
        )
        parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and stop")
    if command.arguments:
        command.arguments(parser)
    return parser


def _top_level(argv: list[str]) -> int:
    if argv and argv[0] == "--version":
        from .. import __version__

        print(f"spcl_fast {__version__}")
        return 0
    words = [word for word in argv if word not in ("-h", "--help", "--debug")]
    if words:
        hint = settings.suggestion(words[0], COMMANDS)
        raise ConfigError(f"there is no command {words[0]!r}{hint or '; spcl-fast --help lists them'}")
    print("usage: spcl-fast COMMAND [--preset NAME] [--config FILE.yaml] [--key value ...]\n")
    print(
        "SPCL for domain adaptive semantic segmentation: losses at the speed of memory, and the whole method around them.\n"
    )
    width = max(map(len, COMMANDS))
    print("\n".join(f"  {name:<{width}} {command.summary}" for name, command in COMMANDS.items()))
    print("\nspcl-fast COMMAND -h explains a command and its settings.\nexample:\n  spcl-fast demo")
    return 0 if argv else ConfigError.exit_code
