"""From preset, files, overlays and command line to one `Config`: merging, names, types. What a Config must obey is in rules.py.

Later wins: defaults < preset < config files < overlays (`--set`) < `--key value`. Every value keeps where it came from, so that an
error names the place to change. YAML is read with the safe loader, so a config file can hold values but run nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import schema as _schema
from .schema import Config

PRESETS = Path(__file__).parent / "presets"

# Names that other code's users know. The released script sets CPA_LOSS, its defaults file has CL_LOSS: both mean the contrast weight.
ALIASES = {
    name: "adapt.contrast_weight"
    for name in ("CPA_LOSS", "SOLVER.CPA_LOSS", "adapt.CPA_LOSS", "CL_LOSS", "SOLVER.CL_LOSS", "adapt.CL_LOSS")
} | {
    "resume": "loop.resume",
    "device": "loop.device",
    "precision": "loop.precision",
    "workers": "loop.workers",
    "skip_bad_files": "loop.skip_bad_files",
    "tta": "evaluate.tta",
    "selection": "evaluate.selection",
    "weights": "model.weights",
}


@dataclasses.dataclass(frozen=True)
class Given:
    """A value somebody gave, and where."""

    value: Any
    origin: str


@cache
def setting_types() -> dict[str, Any]:
    """Dotted name of every setting -> its type hint."""
    return dict(_walk(Config, ""))


def _walk(cls: type, prefix: str) -> Iterable[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hint


def sections() -> set[str]:
    """`adapt`, `adapt.augment`, ...: names that hold settings and are none."""
    return {key[:i] for key in setting_types() for i, char in enumerate(key) if char == "."}


@cache
def setting_docs() -> dict[str, tuple[str, str]]:
    """Dotted name -> (default as text, the comment beside the field in config.py): what `--help` shows."""
    comments = _field_comments()
    default = flatten(dataclasses.asdict(Config()))
    docs = {}
    for key in setting_types():
        *path, name = key.split(".")
        cls: Any = Config
        for part in path:
            cls = typing.get_type_hints(cls)[part]
        text = next((comments[base.__name__, name] for base in cls.__mro__ if (base.__name__, name) in comments), "")
        docs[key] = (as_text(default[key]), text)
    return docs


def _field_comments() -> dict[tuple[str, str], str]:
    found, cls = {}, ""
    for line in Path(_schema.__file__).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"class (\w+)", line):
            cls = match[1]
        elif match := re.match(r"    (\w+): .*?  # (.*)$", line):
            found[cls, match[1]] = match[2]
    return found


# ---------------------------------------------------------------------------------------------- names


def canonical(name: str) -> str:
    """`--adapt.contrast-temperature` and `CPA_LOSS` under the names of config.py; an unknown name comes back as it is."""
    if name in ALIASES:
        return ALIASES[name]
    name = name.replace("-", "_")
    return ALIASES.get(name, name)


def suggestion(name: str, among: Iterable[str]) -> str:
    """'; did you mean ...?' or nothing."""
    among = list(among)
    close = difflib.get_close_matches(name, among, n=1, cutoff=0.75) if "." in name else []
    if not close:  # the right leaf under the wrong section, or with none: --contrast_temperatur
        leaf = name.rpartition(".")[2]
        leaves = {key.rpartition(".")[2] for key in among}
        best = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
        close = [key for key in among if best and key.rpartition(".")[2] == best[0]][:3]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def check_name(key: str, origin: str) -> None:
    """Raise ConfigError unless `key` is a setting."""
    if key in setting_types():
        return
    if key in sections():
        raise ConfigError(
            f"{key} ({origin}) is a group of settings, not a setting: name one of them, such as {_first_of(key)}"
        )
    hint = suggestion(key, setting_types())
    raise ConfigError(f"unknown setting {key!r} ({origin}){hint or '; spcl-fast run --help lists all of them'}")


def _first_of(section: str) -> str:
    return next(key for key in setting_types() if key.startswith(section + "."))


# ---------------------------------------------------------------------------------------------- merging


def load_config(
    preset: str | None = None,
    files: Iterable[str | Path] = (),
    sets: Iterable[str] = (),
    overrides: Iterable[tuple[str, Any]] = (),
) -> Config:
    """One Config from all places; raises ConfigError that names key, value, place and what was expected. Reads no dataset."""
    given: dict[str, Given] = {}
    if preset is not None:
        given |= read_settings(_named(preset, PRESETS, "preset"), f"preset {preset}")
    for file in files:
        given |= read_settings(Path(file), str(file))
    for name in sets:
        given |= read_settings(_named(name, PRESETS / "sets", "set"), f"--set {name}")
    for name, value in overrides:
        key = canonical(name)
        check_name(key, "command line")
        given[key] = Given(_from_text(key, value), "command line")
    return build_config(given)


def available(kind: str) -> list[str]:
    """Names of the presets (`preset`) or overlays (`set`) that come with the package."""
    folder = PRESETS if kind == "preset" else PRESETS / "sets"
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _named(name: str, folder: Path, kind: str) -> Path:
    names = available(kind)
    if name not in names:
        raise ConfigError(
            f"--{kind} {name}: there is no such {kind}{suggestion(name, names)} (there are {', '.join(names)})"
        )
    return folder / f"{name}.yaml"


def read_settings(path: Path, origin: str) -> dict[str, Given]:
    """The settings of a YAML file under their canonical names."""
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{origin}: expected settings as `key: value` lines, got {type(content).__name__}")
    given = {}
    for name, value in flatten(content).items():
        key = canonical(name)
        if key in sections() and value is None:  # `adapt:` with every line below it commented out
            continue
        check_name(key, origin)
        given[key] = Given(value, origin)
    return given


@cache
def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader; a key given twice is an error, because the first one would be lost in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [child.value for child, _ in node.value]
            for i, key in enumerate(keys):
                if key in keys[:i]:
                    raise yaml.YAMLError(
                        f"{key!r} is given twice, the second time in line {node.value[i][0].start_mark.line + 1}"
                    )
            return super().construct_mapping(node, deep)

    return Loader


def flatten(content: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'adapt': {'lr': 1}} -> {'adapt.lr': 1}."""
    flat = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


# ---------------------------------------------------------------------------------------------- types


def build_config(given: Mapping[str, Given]) -> Config:
    """Check every value against the type of its setting (jsonargparse does it) and make the Config."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="spcl-fast", exit_on_error=False)
    parser.add_class_arguments(Config)
    try:
        parsed = parser.parse_object({key: item.value for key, item in given.items()})
    except (argparse.ArgumentError, TypeError, ValueError, KeyError) as error:
        raise _type_error(str(error), given) from None
    # `instantiate` replaced `instantiate_classes` in jsonargparse 4.49
    make = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return Config(**vars(make(parsed)))


def _type_error(text: str, given: Mapping[str, Given]) -> ConfigError:
    match = re.search(r'key "([\w.]+)"', text)
    if match is None or match[1] not in given:
        return ConfigError(" ".join(text.split()))
    item = given[match[1]]
    return ConfigError(
        f"{match[1]} ({item.origin}): got {item.value!r}, expected {expected(setting_types()[match[1]])}"
    )


def expected(hint: Any) -> str:
    """A type hint in words."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(expected(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if Ellipsis in parts:
            return "a list such as [a, b]"
        return "two whole numbers such as 1280,720" if parts[0] is int else "two numbers such as 0.5,1.5"
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, str(hint))


def _from_text(key: str, value: Any) -> Any:
    """Let a shell write sizes and lists without brackets: 1280x720, 0.5,1.5, warmup,adapt."""
    hint = setting_types()[key]
    parts = typing.get_args(hint) if typing.get_origin(hint) is not tuple else (hint,)
    tuples = [part for part in parts if typing.get_origin(part) is tuple]
    if not tuples or not isinstance(value, str) or value.startswith("[") or value == "null":
        return value
    if typing.get_args(tuples[0])[0] is str:
        return [item.strip() for item in value.split(",") if item.strip()]
    return "[" + ", ".join(re.split(r"[x,]", value)) + "]"


def is_flag(key: str) -> bool:
    """Whether `--key` may stand without a value."""
    return setting_types().get(key) is bool


# ---------------------------------------------------------------------------------------------- back to text


def dump_config(config: Config) -> str:
    """The whole Config as YAML: what --print-config prints and what a run folder keeps; `--config` reads it back."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Block style for sections, [1280, 720] for lists."""

    Dumper.add_representer(
        list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
    )
    return yaml.dump(_plain(dataclasses.asdict(config)), Dumper=Dumper, sort_keys=False, width=140)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def as_text(value: Any) -> str:
    """A value as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)
