"""Triton 3.7's interpreter spends most of a kernel's time on Python objects that are the same at every call; here they are made once.

Once `install()` has run, a launch patches each module of the kernel language once instead of at each call of a device function; a block's
type, its shape and numpy's dtype for it are looked up; and the sums that look for integer overflows, whose results the interpreter throws
away unless its option `debug` is set, are left out. No number that a kernel computes is another one.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patched: set[str] = set()  # modules, in the running launch


@functools.cache
def _modules(function) -> frozenset[str]:
    """Those that a function's kernel language comes from."""
    return frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)


def install() -> None:
    if interpreter._patch_lang.__name__ == "patch_once":
        return
    _patch_each_module_once()
    _call_the_language_directly()
    _look_up_numpy_dtypes()
    _look_up_blocks()
    _pass_equal_types_through()
    _look_at_sizes_once()
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_each_module_once() -> None:
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

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


def _call_the_language_directly() -> None:
    """Without the wrapper that only looks whether a function of the language got its `_semantic`."""

    def patch(obj, name, member, builder, scope) -> None:
        function = getattr(member, "__wrapped__", member)

        def called(*arguments, _semantic=None, **keywords):
            return function(*arguments, **keywords, _semantic=interpreter.interpreter_semantic)

        scope.set_attr(obj, name, called)

    interpreter._patch_attr = patch


def _look_up_numpy_dtypes() -> None:
    of, known = interpreter._get_np_dtype, {}

    def looked_up(dtype: tl.dtype):
        if dtype.name not in known:
            known[dtype.name] = of(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = looked_up


def _look_up_blocks() -> None:
    """One type for each element and shape of a block, and one shape for all tensors of a type."""
    made, of_type, equal, unwrap = (
        core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__, core._unwrap_if_constexpr,
    )  # fmt: skip
    blocks: dict[tuple, core.block_type] = {}
    single = {int, float, bool, str, type(None), slice, core.dtype, core.block_type, core.pointer_type, core.tensor}

    def block(cls, element_ty, shape):
        sizes = [
            size.value if type(size) is core.constexpr else size
            for size in (shape.values if type(shape) is core.tuple else shape)
        ]
        key = element_ty.name, getattr(element_ty, "address_space", None), *sizes
        if key not in blocks:
            blocks[key] = object.__new__(cls)
            made(blocks[key], element_ty, sizes)
            blocks[key].sizes = tuple(sizes)
        return blocks[key]

    def tensor(self, handle, type) -> None:
        known = type.__dict__.get("of_tensors")
        if known is None:
            of_type(self, handle, type)
            type.of_tensors = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = known

    def unwrapped(value):
        if type(value) is core.constexpr:
            return value.value
        return value if type(value) in single else unwrap(value)

    def same(self, other) -> bool:
        return self is other or (self.name == other.name if type(other) is core.dtype else equal(self, other))

    core._unwrap_if_constexpr = unwrapped
    core.block_type.__new__, core.block_type.__init__ = block, lambda *_: None
    core.tensor.__init__ = tensor
    core.dtype.__eq__, core.block_type.__eq__ = same, lambda self, other: self is other


def _pass_equal_types_through() -> None:
    """Operands of one type are not cast, those of one shape are not broadcast, and a number becomes a block at once."""
    check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value

    def checked(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        alike = type(lhs) is type(rhs) is core.tensor and lhs.dtype is rhs.dtype and type(lhs.dtype) is core.dtype
        if alike and not (div_or_mod or arithmetic_check and lhs.dtype is core.int1):
            return broadcast_unless_equal(self, lhs, rhs)
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def broadcast_unless_equal(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block():
            return (lhs, rhs) if a.sizes == b.sizes else broadcast(self, lhs, rhs)
        if a.is_block():
            return lhs, filled(rhs, a)
        return (filled(lhs, b), rhs) if b.is_block() else (lhs, rhs)

    def filled(number, block):
        given = number.handle
        array = np.empty(block.sizes, interpreter._get_np_dtype(given.dtype))
        np.copyto(array, given.data, casting="unsafe")
        handle = interpreter.TensorHandle(array, given.dtype.scalar)
        return core.tensor(handle, core.block_type(number.type.scalar, block.sizes))

    TritonSemantic.binary_op_type_checking_impl = checked
    TritonSemantic.broadcast_impl_value = broadcast_unless_equal


def _look_at_sizes_once() -> None:
    """Of an array and its type: no more bits than the type has."""
    fits, handle, fit = interpreter._validate_np_data_size, interpreter.TensorHandle, set()

    def looked_up(array, dtype) -> bool:
        key = array.dtype.itemsize, dtype.name
        if key not in fit and fits(array, dtype):
            fit.add(key)
        return key in fit

    def made(self, data, dtype, attr=None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        if (data.dtype.itemsize, dtype.name) not in fit:
            self.__post_init__()

    interpreter._validate_np_data_size, handle.__init__ = looked_up, made
