"""Every instruction set of the C++ backend: the same drawn problems, in a process that is made to use a lower one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from on_backends import asked

from spcl_fast.backends import cpu

REASON = cpu.why_not(asked("class_moments"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ORDER = ["baseline", "avx2", "avx512"]
FILES = (
    *(f"tests/kernels/test_cpu_{part}.py" for part in ("drawn", "contrast_options", "upsampled_options", "streamed")),
    "tests/ops/prototype_contrastive_loss/test_contrast_values.py",
    "tests/ops/upsampled_cross_entropy/test_upsampled_values.py",
    "tests/ops/test_prototype_logits.py",
)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_build_info_names_what_was_built():
    from spcl_fast import _cpu

    info = _cpu.build_info()
    assert set(info) == {
        "compiler",
        "flags",
        "cpu_levels",
        "torch_target",
    }  # the CUDA part has a module of its own, which names its own
    assert info["cpu_levels"][0] == "baseline" and set(info["cpu_levels"]) <= set(ORDER)
    assert "-ffast-math" not in info["flags"]
    assert _cpu.cpu_capability() in info["cpu_levels"]


def test_the_processor_is_asked_for_everything_that_the_kernels_are_compiled_with():
    from spcl_fast import _cpu

    levels = re.findall(r"\[(\w+): ([^\]]*)\]", _cpu.build_info()["flags"])
    if not levels:
        pytest.skip("only the baseline was built")
    used = {flag.removeprefix("-m") for _, flags in levels for flag in flags.split() if "=" not in flag}
    source = (Path(__file__).parents[2] / "csrc" / "cpu" / "bind_levels.cpp").read_text()
    asked = {(a or b).lower() for a, b in re.findall(r'cpu_supports\("(\w+)"\)|& bit_(\w+)', source)}
    assert used == asked


@pytest.mark.parametrize("level", ORDER[:-1])
def test_a_lower_instruction_set_passes_the_same_tests(level):
    from spcl_fast import _cpu

    if ORDER.index(_cpu.cpu_capability()) < ORDER.index(level):
        pytest.skip(f"this processor has only {_cpu.cpu_capability()}")
    # of the ops' tests every option, with logits kept and computed again, over several panels and bands; what a large head takes is no
    # other at another level
    chosen = "(test_cpu or (cpu and (few or saved or panels or bands or logits))) and not a_head_of_65536"
    code = (
        "import sys, pytest; from spcl_fast import _cpu; print('level', _cpu.cpu_capability());"
        f"sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '-k', {chosen!r}, *{FILES}]))"
    )
    out = run_python(code, SPCL_FAST_CPU_CAPABILITY=level, SPCL_FAST_TEST_EXAMPLES="60", OMP_NUM_THREADS="1")
    assert f"level {level}" in out


def test_an_unknown_or_higher_level_changes_nothing():
    from spcl_fast import _cpu

    code = "import torch; from spcl_fast import _cpu; print(_cpu.cpu_capability())"
    best = run_python(code, SPCL_FAST_CPU_CAPABILITY="").strip()
    assert run_python(code, SPCL_FAST_CPU_CAPABILITY="avx1024").strip() == best
    assert ORDER.index(_cpu.cpu_capability()) <= ORDER.index(best)


MEMORY = """
import resource, torch
import spcl_fast as sf

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

shape, layout = (1, 256, 320, 400), "{layout}"
features = torch.empty(shape)
if layout == "channels_last":
    features = features.contiguous(memory_format=torch.channels_last)
if layout == "cropped":
    features = torch.empty(1, 256, 322, 402)[:, :, 1:-1, 1:-1]
for image in features:
    for channel in image:
        channel.normal_()
labels = torch.randint(0, 19, (1, 320, 400), dtype=torch.uint8)
prototypes = torch.nn.functional.normalize(torch.randn(19, 256), dim=1).requires_grad_()
small = torch.randn(1, 256, 5, 5, requires_grad=True)
sf.prototype_contrastive_loss(small, labels, prototypes, temperature=0.1, backend="cpu").backward()
sf.class_moments(small, labels, 19, backend="cpu")
features.requires_grad_()
before = peak_mb()
sf.class_moments(features, labels, 19, squares=True, backend="cpu")
moments = peak_mb()
loss = sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.1, backend="cpu")
forward = peak_mb()
loss.backward()
print(features.numel() * 4 / 2**20, moments - before, forward - before, peak_mb() - before)
"""


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "cropped"])
def test_nothing_of_the_features_size_is_allocated_but_the_gradient(layout):
    size, moments, forward, backward = map(float, run_python(MEMORY.format(layout=layout), OMP_NUM_THREADS="2").split())
    logits = size * 19 / 256
    assert size == 125
    assert moments < 12, f"class_moments took {moments:.0f} MB next to features of {size:.0f} MB"
    assert forward < logits + 12, f"the forward took {forward:.0f} MB next to features of {size:.0f} MB"
    assert backward < size + logits + 16, (
        f"with its gradient the loss took {backward:.0f} MB next to features of {size:.0f} MB"
    )
