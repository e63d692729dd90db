"""Commands in a process of their own with pinned arithmetic, whether this machine's arithmetic is that of a recording, and comparisons.

Used by test_runs_of_before.py, whose docstring says why.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

BEFORE = Path(__file__).parent / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "SPCL_FAST_CPU_CAPABILITY": "avx2",
}
TIMING = {"seconds", "images_per_s", "data_wait", "peak_memory_bytes", "predicted_peak_bytes", "phase_peak_bytes"}

SEVERAL = """
import contextlib, io, json, sys
from spcl_fast.cli import main
answers = []
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(words)
    answers.append([code, said.getvalue()])
print("answers", json.dumps(answers))
"""
PROBE = """
import hashlib
import numpy as np, torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.GroupNorm(2, 16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 2, 2, bias=False),
                    nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 48, 1), nn.Conv2d(48, 9, 3, 1, 1))
discriminator = nn.Sequential(nn.Conv2d(9, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 4, 2, 1))
optimizers = [torch.optim.AdamW(net.parameters(), 1e-2), torch.optim.SGD(discriminator.parameters(), 1e-2, momentum=0.9)]
for _ in range(5):
    x = torch.randn(2, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    logits = F.interpolate(net(x), (32, 48), mode="bilinear", align_corners=True)
    loss = F.cross_entropy(logits, torch.randint(9, (2, 32, 48))) + F.softplus(discriminator(logits.softmax(1))).mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step(), optimizer.zero_grad()
picture = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
pictures = [Image.fromarray(picture).resize((48, 32), how) for how in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)]
pictures.append(pictures[0].filter(ImageFilter.GaussianBlur(1.5)))
parts = [p.detach().numpy().tobytes() for p in (*net.parameters(), *discriminator.parameters())] + [p.tobytes() for p in pictures]
parts.append(np.exp(np.random.default_rng(1).normal(size=1000)).tobytes())
import spcl_fast
print("package", spcl_fast.__file__)
print("arithmetic", hashlib.sha256(b"".join(parts)).hexdigest())
"""


def python(code: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def commands(root: Path, *words: list[object]) -> list[tuple[int, str]]:
    """Several commands in one process, one after another -> the exit code and the words of each."""
    said = python(SEVERAL, json.dumps([[str(word) for word in one] for one in words]), cwd=root)
    return [(code, text) for code, text in json.loads(re.search(r"^answers (.*)$", said, re.M)[1])]


def all_done(root: Path, *words: list[object]) -> None:
    failed = [text[-3000:] for code, text in commands(root, *words) if code]
    assert not failed, "\n".join(failed)


@functools.cache
def fingerprint() -> dict[str, object]:
    """What the last bits of a training step depend on here."""
    said = dict(
        line.split(" ", 1)
        for line in python(PROBE, cwd=Path("/")).splitlines()
        if line.startswith(("package ", "arithmetic "))
    )
    libraries = [library.read_bytes() for library in Path(said["package"]).parent.glob("*.so")]
    compilers = {
        name for content in libraries for name in re.findall(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", content)
    }
    return {
        "arithmetic": said["arithmetic"],
        "compilers": sorted(name.decode() for name in compilers),
        "torch": torch.__version__.partition("+")[0],
    }


def same_arithmetic() -> bool:
    return fingerprint() == EXPECTED["fingerprint"]


# ---- comparisons ----------------------------------------------------------------------------------------------------------


def newest(folder: Path, stage: str) -> Path:
    return sorted((folder / stage / "checkpoints").glob("step_*"))[-1]


def state_of(checkpoint: Path) -> dict[str, object]:
    """Optimizers and running averages; what a clock or the machine says is left out."""
    state = json.loads((checkpoint / "state.json").read_text())
    return {"step": state["step"], **{key: state["meta"][key] for key in ("stage", "optimizers", "meter")}}


def assert_same_checkpoint(found: Path, recorded: Path, start: Path) -> None:
    files = {path.name for path in recorded.glob("*.safetensors")}
    assert {path.name for path in found.glob("*.safetensors")} == files and found.name == recorded.name
    for name in files:
        if same_arithmetic():
            assert (found / name).read_bytes() == (recorded / name).read_bytes(), f"other bits in {name}"
            continue
        new, old, before = (load_file(folder / name) for folder in (found, recorded, start))
        assert new.keys() == old.keys()
        for key, tensor in old.items():
            moved = torch.linalg.vector_norm(tensor.double() - before[key].double())
            off = torch.linalg.vector_norm(new[key].double() - tensor.double())
            assert off <= 0.05 * moved + 1e-5 * torch.linalg.vector_norm(tensor.double()) + 1e-9, f"{name}: {key}"
    assert_close(state_of(found), state_of(recorded), 1e-3)


def assert_same_movement(found: Path, recorded: Path, start: Path) -> None:
    """Of all tensors of a file together, per kind (weights, each of the optimizer's averages), what is off is at most 5 % of what moved.

    For what was trained on pseudo-labels that were made anew. torch 2.14.1 rounds other last bits than 2.13.0 (1e-6 of a step), which puts
    one pixel in a thousand on the other side of its threshold; the net then trains on other labels, and a small tensor's average of
    gradients moves by 6 to 8 % of its own step. All tensors together are off by 2 to 3 %; another batch or a lost state by 100 %.
    """
    if same_arithmetic():
        return assert_same_checkpoint(found, recorded, start)
    names = {path.name for path in recorded.glob("*.safetensors")}
    assert {path.name for path in found.glob("*.safetensors")} == names and found.name == recorded.name
    for name in names:
        new, old, before = (load_file(folder / name) for folder in (found, recorded, start))
        assert new.keys() == old.keys()
        off: dict[str, float] = {}
        moved: dict[str, float] = {}
        for key, tensor in old.items():
            kind = key.rpartition(".")[2] if name.startswith("optimizer") else "weights"
            off[kind] = off.get(kind, 0.0) + float((new[key].double() - tensor.double()).square().sum())
            moved[kind] = moved.get(kind, 0.0) + float((tensor.double() - before[key].double()).square().sum())
        for kind in off:
            assert off[kind] <= 0.05**2 * moved[kind] + 1e-18, f"{name}: {kind}"
    assert_close(state_of(found), state_of(recorded), 0.05)


def assert_close(found: object, recorded: object, rtol: float, atol: float = 1e-4) -> None:
    """Equal; where the arithmetic is another one, numbers within a tolerance."""
    if same_arithmetic() or not isinstance(recorded, dict | list | float):
        assert found == recorded
    elif isinstance(recorded, dict):
        assert found.keys() == recorded.keys()
        for key, value in recorded.items():
            assert_close(found[key], value, rtol, atol)
    elif isinstance(recorded, list):
        assert len(found) == len(recorded)
        for one, value in zip(found, recorded, strict=True):
            assert_close(one, value, rtol, atol)
    else:
        assert found == pytest.approx(recorded, rel=rtol, abs=atol)


LOGGED_SINCE = {"source_agreement"}  # what a line holds today and did not then


def lines_of(folder: Path, stage: str) -> list[dict[str, object]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key not in TIMING | LOGGED_SINCE}
        for line in lines
        if line["stage"] == stage
    ]


def assert_same_pictures(found: Path, recorded: Path) -> None:
    names = {path.name for path in recorded.glob("*.png")}
    assert names and {path.name for path in found.glob("*.png")} == names
    for name in names:
        with Image.open(found / name) as new, Image.open(recorded / name) as old:
            assert new.getpalette() == old.getpalette() and new.size == old.size
            same = np.mean(np.asarray(new) == np.asarray(old))
        assert same == 1 if same_arithmetic() else same > 0.98, f"{name}: {same:.1%} of the pixels are the same"
