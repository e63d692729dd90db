"""help() of each public loss and estimator is enough to call it: shapes and the paper, without opening the source."""

from __future__ import annotations

import inspect

import pytest

from spcl_fast import estimators, losses

NAMES = [(package, name) for package in (losses, estimators) for name in package.__all__]


def shown(item):
    """The docstrings that help() prints: of the name, and of a class's own public methods."""
    methods = vars(item).items() if inspect.isclass(item) else ()
    found = [inspect.getdoc(item)] + [value.__doc__ for name, value in methods if inspect.isfunction(value)]
    return "\n".join(text for text in found if text)


@pytest.mark.parametrize(("package", "name"), NAMES, ids=lambda value: value if isinstance(value, str) else "")
def test_help_without_shapes_or_a_source_sends_the_reader_to_the_code(package, name):
    text = shown(getattr(package, name))
    is_module_of_an_op = "with its settings fixed" in text
    assert is_module_of_an_op or "[" in text, text
    assert is_module_of_an_op or "arXiv" in text, text
