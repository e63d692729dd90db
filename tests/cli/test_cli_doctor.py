"""`spcl-fast doctor`: says what is there, and fails when a backend computes something else than the formula."""

from __future__ import annotations

import sys
import types

import pytest
import stand_ins
import torch

from spcl_fast import backends
from spcl_fast.backends import built, cuda, reference
from spcl_fast.backends.contract import Ask
from spcl_fast.cli import doctor, main


@pytest.fixture(scope="module")
def healthy():
    lines: list[str] = []
    return doctor.examine(lines.append), lines


def test_it_names_versions_devices_and_every_backend_of_every_op(healthy):
    code, lines = healthy
    text = "\n".join(lines)
    assert code == 0 and lines[-1] == "Everything that is there works."
    assert f"torch {torch.__version__}" in text and "device cpu" in text and "cpu backend" in text
    for op in backends.OPS:
        for backend in backends.NAMES:
            assert any(line.split()[:2] == [op, backend] for line in lines), (op, backend)


def test_it_names_the_libraries_that_nets_are_taken_from_and_how_to_get_them(monkeypatch):
    stand_ins.forget(monkeypatch)
    lines: list[str] = []
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor._catalog(lines.append) == []
    assert any(
        "timm/NAME (needs timm), transformers/NAME (needs transformers), MODULE:NAME, tiny" in line for line in lines
    )

    def not_there(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", not_there)
    doctor._libraries(lines.append)
    assert 'missing: timm (for model.name timm/NAME: pip install "spcl_fast[timm]")' in lines


def test_what_is_not_usable_has_its_reason(healthy):
    for line in healthy[1]:
        if "not usable" in line:
            assert len(line.partition("not usable: ")[2]) > 10


def test_exactly_one_backend_of_an_op_is_marked_as_taken(healthy):
    for op in backends.OPS:
        assert (
            sum(line.startswith(f"  {op}") and " * " in line for line in healthy[1] if "cuda" not in line.split()[:1])
            == 1 + torch.cuda.is_available()
        )


def test_a_backend_with_a_planted_bug_fails_the_doctor(monkeypatch, capsys):
    true = reference.class_moments

    def slightly_wrong(problem):
        sums, counts, squares = true(problem)
        return sums * (1.001 if problem.features.dtype == torch.float32 else 1), counts, squares

    monkeypatch.setattr(reference, "class_moments", slightly_wrong)
    monkeypatch.setattr(doctor, "available_backends", lambda device: {"class_moments": {"reference": None}})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN class_moments on backend reference, cpu: error 1.0e-03 against float64" in out


def test_a_backend_that_raises_fails_the_doctor(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(reference, "upsampled_prediction", broken)
    assert "no kernel image" in doctor.self_test("upsampled_prediction", "reference", torch.device("cpu"))[1]


def test_a_compiled_part_that_was_built_and_does_not_load_is_broken_and_one_never_built_is_not(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "spcl_fast._cpu", None)
    monkeypatch.setattr(built, "FOLDER", tmp_path)
    (tmp_path / "cpu_build.txt").write_text("no compiler was found")
    lines: list[str] = []
    assert doctor._compiled_part(lines.append) == [] and "no compiler was found" in lines[0]
    (tmp_path / "cpu_build.txt").write_text("built\n")
    assert "build it again" in doctor._compiled_part(lines.append)[0]


def test_a_cuda_part_that_does_not_load_is_broken_and_one_never_built_is_not(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "spcl_fast._cuda", None)
    monkeypatch.setattr(built, "FOLDER", tmp_path)
    (tmp_path / "cuda_build.txt").write_text("nvcc was not found")
    lines: list[str] = []
    assert doctor._cuda_part(lines.append) == [] and "nvcc was not found" in lines[0]
    (tmp_path / "cuda_build.txt").write_text("built\n")
    assert "build it again" in doctor._cuda_part(lines.append)[0] and "Triton" in lines[1]


def test_a_cuda_part_that_does_not_load_warns_once_and_leaves_the_work_to_triton(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "spcl_fast._cuda", None)
    monkeypatch.setattr(built, "FOLDER", tmp_path)
    monkeypatch.setattr(cuda, "_DEVICES", ("cpu",))
    (tmp_path / "cuda_build.txt").write_text("built\n")
    ask = Ask("class_moments", torch.device("cpu"), torch.float32, num_classes=19, dim=8)
    cuda.missing.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Triton kernels are used instead") as seen:
            reasons = {cuda.why_not(ask) for _ in range(3)}
        assert len(seen) == 1 and len(reasons) == 1 and "built and does not load" in reasons.pop()
    finally:
        cuda.missing.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("op", backends.OPS)
def test_the_cuda_kernels_agree_with_float64_on_a_gpu(op):
    device = torch.device("cuda")
    reason = backends.why_not("cuda", Ask(op, device, torch.float32, num_classes=7, dim=24))
    if reason is not None:
        pytest.skip(reason)
    assert doctor.self_test(op, "cuda", device)[1] is None


def test_a_torchvision_that_does_not_import_is_named(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.27.0")
    finder = types.SimpleNamespace(find_spec=lambda name, *rest: _fail() if name == "torchvision" else None)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    lines: list[str] = []
    doctor._torchvision(lines.append)
    assert "WARNING torchvision 0.27.0" in lines[0] and "operator torchvision::nms does not exist" in lines[0]


def _fail():
    raise RuntimeError("operator torchvision::nms does not exist\nmore")
