"""Nested optimiser state as JSON plus a flat dict of tensors, and back, exactly.

Plain JSON would turn the integer keys of `state_dict()["state"]` into strings and tuples into lists; such containers are tagged instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError

_TAG = "$"


def flatten(tree: Any, tensors: dict[str, Tensor], prefix: str) -> Any:
    """JSON form of `tree` (dicts, lists, tuples, tensors, numbers, str, None); its tensors are put into `tensors` under `prefix`.

    Raises CheckpointError for anything else: it could not be restored without running code.
    """
    if isinstance(tree, Tensor):
        tensors[prefix] = tree
        return {_TAG: "tensor", "name": prefix}
    if isinstance(tree, float):
        return tree if tree - tree == 0 else {_TAG: "float", "value": repr(tree)}
    if tree is None or isinstance(tree, bool | int | str):
        return tree
    if isinstance(tree, dict):
        items = [(key, flatten(value, tensors, f"{prefix}.{key}")) for key, value in tree.items()]
        if all(isinstance(key, str) and key != _TAG for key in tree):
            return dict(items)
        if all(isinstance(key, str | int) for key in tree):
            return {_TAG: "dict", "items": [[key, value] for key, value in items]}
    if isinstance(tree, list):
        return [flatten(value, tensors, f"{prefix}.{i}") for i, value in enumerate(tree)]
    if isinstance(tree, tuple):
        return {_TAG: "tuple", "items": [flatten(value, tensors, f"{prefix}.{i}") for i, value in enumerate(tree)]}
    expected = "tensors, numbers, strings, None, dicts, lists and tuples"
    raise CheckpointError(f"State {prefix!r} of type {type(tree).__name__} cannot be stored; expected {expected}.")


def unflatten(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `flatten` was given. Raises CheckpointError if `node` is not of its making."""
    try:
        return _unflatten(node, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"The stored optimiser state is malformed: {error!r}.") from error


def _unflatten(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unflatten(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    if _TAG not in node:
        return {key: _unflatten(value, tensors) for key, value in node.items()}
    kind = node[_TAG]
    if kind == "tensor":
        return tensors[node["name"]]
    if kind == "float":
        return float(node["value"])
    if kind == "dict":
        return {key: _unflatten(value, tensors) for key, value in node["items"]}
    if kind == "tuple":
        return tuple(_unflatten(value, tensors) for value in node["items"])
    raise ValueError(f"unknown tag {kind!r}")
