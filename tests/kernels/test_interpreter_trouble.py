"""A Triton interpreter that cannot work with the numpy that is there is named before it is used."""

from __future__ import annotations

import pytest
import torch
from on_backends import asked

from spcl_fast import backends

kernels = pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0", "2.5.1", False),
        ("3.7.1", "2.5.1", True),
        ("3.10.0", "2.10.0", True),
    ],
)
def test_an_interpreter_that_cannot_work_is_named_before_it_is_used(monkeypatch, triton_version, numpy_version, works):
    monkeypatch.setattr("triton.__version__", triton_version)
    monkeypatch.setattr("importlib.metadata.version", {"numpy": numpy_version}.get)
    trouble = kernels.interpreter_trouble()
    assert (trouble is None) == works
    reason = backends.why_not("triton", asked("class_moments"))
    assert reason == trouble or torch.cuda.is_available()
    if not works:
        assert f"Triton {triton_version}" in trouble and f"numpy {numpy_version}" in trouble
