"""Triton 3.7's interpreter patches all of triton.language again at each call of a device function, which takes half of a kernel's time.

Once `install()` has run, a launch patches each module once.
"""

from __future__ import annotations

import functools

import triton.language as tl
from triton.runtime import interpreter

_patched: set[str] = set()  # modules, in the running launch


@functools.cache
def _modules(function) -> frozenset[str]:
    """Those that a function's kernel language comes from."""
    return frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)


def install() -> None:
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    if patch.__name__ == "patch_once":
        return

    def patch_once(function):
        global _patched
        if _modules(function) and _modules(function) <= _patched:
            return interpreter._LangPatchScope()  # nothing to restore
        _patched |= _modules(function)
        return patch(function)

    def launch_anew(self, *arguments, **keywords):
        global _patched
        outer, _patched = _patched, set()
        try:
            return launch(self, *arguments, **keywords)
        finally:
            _patched = outer

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
