"""The authors' code, taken from clones of their repositories and run as it stands, on the CPU of one process.

Nothing of it is part of this repository. A file is executed under the name that its imports expect; what it imports and the measured part
does not use (registries, data sets, loggers, torchvision) is a `Nothing`, so their requirements need not be installed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# folder below --authors -> where it is cloned from, and the commit that was measured
REPOSITORIES = {
    "SePiCo": ("BIT-DA/SePiCo", "bce38ed"),
    "SDCA": ("BIT-DA/SDCA", "d00e7ba"),
    "ProCA": ("jiangzhengkai/ProCA", "572e4f3"),
    "ContrastiveSeg": ("tfzhou/ContrastiveSeg", "287e5d3"),
    "GMMSeg": ("leonnnop/GMMSeg", "74f882e"),
    "ProtoSeg": ("tfzhou/ProtoSeg", "1c4a778"),
    "dino": ("facebookresearch/dino", "7c446df"),
    "ibot": ("bytedance/ibot", "da316d8"),
    "swav": ("facebookresearch/swav", "06b1b7c"),
    "capi": ("facebookresearch/capi", "98b4fa1"),
    "PANet": ("kaixin96/PANet", "1695bf3"),
}


class Missing(Exception):
    """A repository that is not there; says why."""


class Nothing:
    """Stands for what is imported and not used: any attribute, call or subscript is another; a decorator that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_decorated = len(args) == 1 and not kwargs and isinstance(args[0], type | types.FunctionType)
        return args[0] if is_decorated else Nothing()

    def __getitem__(self, key: Any) -> Nothing:
        return self

    def __or__(self, other: Any) -> Nothing:
        return self

    __ror__ = __or__


class Authors:
    """The clones below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def repository(self, name: str) -> Path:
        found = self.folder / name
        if not found.is_dir():
            raise Missing(f"no {name} in the folder of the authors' code: git clone {REPOSITORIES[name][0]}")
        return found

    def commit(self, name: str) -> str:
        command = ["git", "-C", str(self.repository(name)), "rev-parse", "--short=7", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True)
        return found.stdout.strip() or "not a git clone"

    def load(self, name: str, file: str, imports: Mapping[str, Any] | None = None, as_module: str = "") -> Any:
        """The module of a file. imports: what its import lines get, by module; a value that is a module or a dict has those names alone."""
        path = self.repository(name) / file
        title = as_module or f"authors_{name}_{path.stem}"
        spec = importlib.util.spec_from_file_location(title, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with _importable({title: module} | dict(imports or {})):
            spec.loader.exec_module(module)
        return module


def _module(name: str, value: Any) -> types.ModuleType:
    if isinstance(value, types.ModuleType):
        return value
    found = types.ModuleType(name)
    found.__path__ = []  # a package: modules below it may be imported
    if isinstance(value, dict):
        found.__dict__.update(value)
    found.__getattr__ = lambda attribute: Nothing()  # type: ignore[method-assign]
    return found


@contextmanager
def _importable(modules: Mapping[str, Any]) -> Iterator[None]:
    """These modules, and the packages that they lie in, for the import lines of one file; afterwards what was there before."""
    names = {".".join(name.split(".")[:n]) for name in modules for n in range(1, name.count(".") + 2)}
    before = {name: sys.modules.get(name) for name in names}
    try:
        for name in sorted(names):
            sys.modules[name] = _module(name, modules.get(name))
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def stay_on_the_cpu() -> None:
    """`.cuda()` is where a tensor is already, in this process."""
    Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


class OneProcess:
    """torch.distributed of one process, for code that calls it without asking."""

    @staticmethod
    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> None: ...

    @staticmethod
    def get_world_size() -> int:
        return 1

    is_available = is_initialized = staticmethod(lambda: False)


class With:
    """A module of which some names are others: With(torch.nn.functional, interpolate=...)."""

    def __init__(self, module: Any, **others: Any) -> None:
        self.__dict__.update(others)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
