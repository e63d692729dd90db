"""From preset, files, overlays and command line to one `Config`: merging, names, types. What a Config must obey is in rules.py.

Later wins: defaults < preset < config files < overlays (`--set`) < `--key value`. Every value keeps where it came from, so that an
error names the place to change. YAML is read with the safe loader, so a config file can hold values but run nothing; model.name MODULE:NAME
names a module that is imported when the net is built.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .. import catalog
from ..errors import ConfigError
from .schema import About, Config
from .text import read_text
from .values import Setting, plain

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
    "follow_links": "loop.follow_links",
    "tta": "evaluate.tta",
    "selection": "evaluate.selection",
    "weights": "model.weights",
}


_EVERY_STAGE = ("iterations", "batch_size")  # --iterations 100 is that of every stage


@dataclasses.dataclass(frozen=True)
class GivenValue:
    """A value somebody gave, and where."""

    value: Any
    origin: str


@cache
def all_settings() -> dict[str, Setting]:
    """Dotted name -> the setting, in the order of the schema."""
    return dict(_walk(Config(), ""))


def _walk(section: Any, prefix: str) -> Iterator[tuple[str, Setting]]:
    hints = typing.get_type_hints(type(section))
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, Setting(hints[item.name], value, _about(type(section), item.name))


def _about(section: type, name: str) -> About:
    """Of the nearest class that says it: a class that gives another default says no more."""
    own = (vars(base).get("__dataclass_fields__", {}).get(name) for base in section.__mro__)
    return next((item.metadata["about"] for item in own if item is not None and "about" in item.metadata), About())


def sections() -> set[str]:
    """`adapt`, `adapt.augment`, ...: names that hold settings and are none."""
    return {key[:i] for key in all_settings() for i, char in enumerate(key) if char == "."}


# ---------------------------------------------------------------------------------------------- names


def canonical(name: str) -> str:
    """`--adapt.contrast-temperature` and `CPA_LOSS` under the names of schema.py; an unknown name comes back as it is."""
    if name in ALIASES:
        return ALIASES[name]
    name = name.replace("-", "_")
    return ALIASES.get(name, name)


def of_every_stage(key: str) -> list[str]:
    """`iterations` -> `source_only.iterations`, `head.iterations`, ...: what all have that train; nothing for other names."""
    if "." in key or key not in _EVERY_STAGE:
        return []
    stages = dict.fromkeys(stage.section for stage in (*catalog.trained(), catalog.HEAD))
    return [name for section in stages if (name := f"{section}.{key}") in all_settings()]


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


def check_setting(key: str, origin: str) -> None:
    """Raise ConfigError unless `key` is a setting."""
    if key in all_settings():
        return
    if key in sections():
        raise ConfigError(
            f"{key} ({origin}) is a group of settings, not a setting: name one of them, such as {_first_of(key)}"
        )
    hint = suggestion(key, all_settings())
    raise ConfigError(f"unknown setting {key!r} ({origin}){hint or '; spcl-fast run --help lists all of them'}")


def _first_of(section: str) -> str:
    return next(key for key in all_settings() if key.startswith(section + "."))


# ---------------------------------------------------------------------------------------------- merging


def load_config(
    preset: str | None = None,
    files: Iterable[str | Path] = (),
    sets: Iterable[str] = (),
    overrides: Iterable[tuple[str, Any]] = (),
) -> Config:
    """One Config from all places; raises ConfigError that names key, value, place and what was expected. Reads no dataset."""
    given: dict[str, GivenValue] = {}
    if preset is not None:
        given |= read_settings(_named(preset, PRESETS, "preset"), f"preset {preset}")
    for file in files:
        given |= read_settings(Path(file), str(file))
    for name in sets:
        given |= read_settings(_named(name, PRESETS / "sets", "set"), f"--set {name}")
    for name, value in overrides:
        key = canonical(name)
        check_setting(key, "command line")
        given[key] = GivenValue(value, "command line")
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


def read_settings(path: Path, origin: str) -> dict[str, GivenValue]:
    """The settings of a YAML file under their canonical names."""
    import yaml

    try:
        content = yaml.load(read_text(path), Loader=_loader())
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {_what_is_wrong(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{origin}: expected settings as `key: value` lines, got {type(content).__name__}")
    try:
        flat = dotted(content)
    except RecursionError:
        raise ConfigError(f"{origin}: an alias (*name) stands inside of what it names") from None
    given = {}
    for name, value in flat.items():
        key = canonical(name)
        if key in given:
            raise ConfigError(f"{origin}: {key} is given twice, once as {name!r}. Remove one of them.")
        if key in sections() and value is None:  # `adapt:` with every line below it commented out
            continue
        check_setting(key, origin)
        given[key] = GivenValue(value, origin)
    return given


def _what_is_wrong(error: Exception) -> str:
    """The reader's finding and the line, without its excerpt and its names for where the text came from."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    what = " ".join((problem or str(error).partition(chr(10))[0]).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark is not None else what


@cache
def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, but plain scalars stay text, except null: 017, 12:30 and yes mean what they mean on the command line.

        A key given twice is an error, because the first one would be lost silently.
        """

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [child.value for child, _ in node.value]
            for i, key in enumerate(keys):
                if key in keys[:i]:
                    raise yaml.YAMLError(
                        f"{key!r} is given twice, the second time in line {node.value[i][0].start_mark.line + 1}"
                    )
            return super().construct_mapping(node, deep)

    kept = {"tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in kept]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def dotted(content: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'adapt': {'lr': 1}} -> {'adapt.lr': 1}."""
    flat = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            inner = dotted(value, f"{prefix}{name}.")
        else:
            inner = {f"{prefix}{name}": value}
        twice = next((key for key in inner if key in flat), None)
        if twice is not None:
            raise ConfigError(f"{twice} is given twice, with and without dots. Remove one of them.")
        flat |= inner
    return flat


# ---------------------------------------------------------------------------------------------- types


def build_config(given: Mapping[str, GivenValue]) -> Config:
    """Every value as the type of its setting, the others at their defaults. Raises ConfigError that names all that do not fit."""
    values, problems = {}, []
    for key, item in given.items():
        try:
            values[key] = all_settings()[key].read(item.value)
        except ValueError as error:
            shown = "null" if item.value is None else repr(item.value)
            problems.append(f"{key} ({item.origin}): got {shown}, expected {error}")
    if problems:
        raise ConfigError("\n  ".join(problems))
    return with_values(Config(), values)


def with_values(section: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """`section` with the values, of the right types, whose dotted names begin with `prefix`."""
    changed = {}
    for item in dataclasses.fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            changed[item.name] = with_values(value, values, f"{key}.")
        elif key in values:
            changed[item.name] = values[key]
    return dataclasses.replace(section, **changed)


def is_flag(key: str) -> bool:
    """Whether `--key` may stand without a value."""
    return key in all_settings() and all_settings()[key].hint is bool


# ---------------------------------------------------------------------------------------------- back to text


def dump_config(config: Config) -> str:
    """The whole Config as YAML: what --print-config prints and what a run folder keeps; `--config` reads it back."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Block style for sections, [1280, 720] for lists."""

    Dumper.add_representer(
        list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
    )
    return yaml.dump(plain(dataclasses.asdict(config)), Dumper=Dumper, sort_keys=False, width=140)
