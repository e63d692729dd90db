"""The checks of the Triton kernels themselves: planted bugs are caught, every kernel compiles for two architectures, tables are read."""

# ruff: noqa: E501 - a planted bug is one line of the table
from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F

kernels = pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")
from spcl_fast.backends.contract import Contrast, Moments, Saved, UpsampledLoss, Wanted  # noqa: E402
from spcl_fast.kernels import launch  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SOURCE = Path(kernels.__file__).parent
_TROUBLE = kernels.interpreter_trouble() if DEVICE.type == "cpu" else None
runs_kernels = pytest.mark.skipif(_TROUBLE is not None, reason=str(_TROUBLE))


def close(got, expected, tolerance=1e-4) -> bool:
    return bool((got.double().cpu() - expected).norm() <= tolerance * expected.norm())


def launcher(module, name: str):
    return importlib.import_module(f"{module.__name__}.{name}")


def contrast_is_right(module) -> bool:
    generator = torch.Generator().manual_seed(0)
    for dim, classes in ((33, 5), (9, 40)):  # logits saved, logits computed again
        shape = (2, dim, 5, 7)
        features = torch.randn(shape, generator=generator)
        labels = torch.randint(0, classes, (2, 7, 5), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
        prototypes = torch.randn(classes, dim, generator=generator)
        weight = torch.rand(classes, generator=generator), torch.rand(2, 5, 7, generator=generator)
        contrast = launcher(module, "prototype_contrastive_loss.contrast")
        flag, wanted = torch.zeros((), dtype=torch.int64, device=DEVICE), Wanted(features=True, prototypes=True)
        inputs = (t.to(DEVICE) for t in (features, labels, prototypes, *weight))
        problem = Contrast(*inputs, None, 0.5, True, 255, "mean")
        loss, *saved = contrast.contrast_forward(problem, wanted, flag, 0)
        saved = Saved(*saved, features.new_empty(0))
        one = torch.ones((), device=DEVICE)
        dfeatures, dprototypes, *_ = contrast.contrast_backward(one, problem, saved, wanted, flag, 0)
        features, prototypes = features.double().requires_grad_(), prototypes.double().requires_grad_()
        truth = oracle.contrast(
            features, labels, prototypes, temperature=0.5, class_weight=weight[0], pixel_weight=weight[1]
        )
        truth.backward()
        if not (
            close(loss, truth.detach()) and close(dfeatures, features.grad) and close(dprototypes, prototypes.grad)
        ):
            return False
    return True


def moments_are_right(module) -> bool:
    generator = torch.Generator().manual_seed(0)
    features, labels = (
        torch.randn(3, 12, 5, 9, generator=generator),
        torch.randint(0, 40, (3, 5, 9), generator=generator),
    )
    labels[:, 1:3, :4] = 255
    problem = Moments(features.to(DEVICE), labels.to(DEVICE), 40, True, 255, squares=True)
    got = launcher(module, "class_moments").class_moments(problem, torch.zeros((), dtype=torch.int64, device=DEVICE))
    truth = oracle.moments(features, labels, 40)
    return close(got[0], truth[0]) and torch.equal(got[1].cpu(), truth[1]) and close(got[2], truth[2])


def unit_moments_are_right(module) -> bool:
    """More channels than one program of the one-hot kernel holds, in ranges of classes, with memory that is not zero."""
    moments, empty = launcher(module, "class_moments"), torch.Tensor.new_empty
    moments.unit_groups = lambda tiles, floats, feature_bytes: (4, -(-tiles // 4), 3)
    generator = torch.Generator().manual_seed(0)
    features, labels = (
        torch.randn(2, 300, 5, 9, generator=generator),
        torch.randint(0, 40, (2, 5, 9), generator=generator),
    )
    problem = Moments(features.to(DEVICE), labels.to(DEVICE), 40, True, 255, squares=True)
    torch.Tensor.new_empty = lambda *a, **k: empty(*a, **k).fill_(7)
    try:
        got = moments.class_moments(problem, torch.zeros((), dtype=torch.int64, device=DEVICE))
    finally:
        torch.Tensor.new_empty = empty
    truth = oracle.moments(features, labels, 40)
    return close(got[0], truth[0]) and torch.equal(got[1].cpu(), truth[1]) and close(got[2], truth[2])


def upsampling_is_right(module) -> bool:
    cross_entropy = launcher(module, "upsampled_cross_entropy")
    launcher(module, "cells").PROGRAMS = 1 << 30  # one band of nodes a program: every halo is used
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 3, 35, generator=generator)
    labels = torch.randint(0, 3, (2, 8, 71), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    problem = UpsampledLoss(logits.to(DEVICE), labels.to(DEVICE), None, None, 0.5, False, 255, "mean")
    flag = torch.zeros((), dtype=torch.int64, device=DEVICE)
    loss, dlogits = cross_entropy.upsampled_cross_entropy(problem, True, flag, 0)
    exact = logits.double().requires_grad_()
    truth = oracle.upsampled(exact, labels, temperature=0.5, align_corners=False)
    truth.backward()
    return close(loss, truth.detach()) and close(dlogits, exact.grad)


def options_are_right(module) -> bool:
    """Own prototypes per image with a bias and smoothing; rows with variances that are pooled by their maximum."""
    generator = torch.Generator().manual_seed(0)
    contrast = launcher(module, "prototype_contrastive_loss.contrast")
    flag, wanted = torch.zeros((), dtype=torch.int64, device=DEVICE), Wanted(True, True, True, True)
    features = torch.randn(2, 160, 3, 5, generator=generator)  # logits are saved
    labels = torch.randint(0, 3, (2, 3, 5), generator=generator)
    owner = torch.arange(40) % 3
    for case in (
        {"prototypes": torch.randn(2, 40, 160, generator=generator), "bias": torch.randn(2, 40, generator=generator), "label_smoothing": 0.3},
        {"prototypes": torch.randn(40, 160, generator=generator), "variances": 60 * torch.rand(40, 160, generator=generator),
         "prototype_class": owner, "classes": 3, "pool": "max"},
    ):  # fmt: skip
        c = Contrast(features, labels, None, None, None, None, torch.tensor(3.0), True, 255, "mean")._replace(**case)
        leaves = [t.double().requires_grad_() for t in (features, c.prototypes, c.temperature)]
        leaves += [] if c.bias is None else [c.bias.double().requires_grad_()]
        rows = F.normalize(leaves[0].flatten(2).mT, dim=2)
        z = rows @ leaves[1].mT / leaves[2] + (0 if c.bias is None else leaves[3][:, None])
        if c.variances is not None:
            z = z + 0.5 * rows.square() @ c.variances.double().mT / leaves[2] ** 2
            z = torch.stack([z[..., owner == k].amax(2) for k in range(3)], 2)
        truth = F.cross_entropy(z.flatten(0, 1), labels.flatten(), label_smoothing=c.label_smoothing)
        truth.backward()
        c = Contrast(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in c))
        asked = wanted._replace(bias=c.bias is not None)
        loss, *saved = contrast.contrast_forward(c, asked, flag, 0)
        saved = Saved(*saved, features.new_empty(0))
        got = contrast.contrast_backward(torch.ones((), device=DEVICE), c, saved, asked, flag, 0)
        got = [got[0], got[1], got[3], *([got[2]] if c.bias is not None else [])]
        if not (
            close(loss, truth.detach()) and all(close(g, leaf.grad, 1e-3) for g, leaf in zip(got, leaves, strict=True))
        ):
            return False
    return True


def upsampled_targets_are_right(module) -> bool:
    generator = torch.Generator().manual_seed(0)
    cross_entropy = launcher(module, "upsampled_cross_entropy")
    logits, soft = torch.randn(2, 3, 3, 5, generator=generator), torch.rand(2, 3, 2, 4, generator=generator)
    labels = torch.randint(0, 3, (2, 7, 9), generator=generator)
    flag = torch.zeros((), dtype=torch.int64, device=DEVICE)
    exact = logits.double().requires_grad_()
    z, t = (F.interpolate(part, (7, 9), mode="bilinear") for part in (exact, soft.double()))
    truth = F.cross_entropy(z, t)
    truth.backward()
    plain = UpsampledLoss(logits.to(DEVICE), soft.to(DEVICE), None, None, 1.0, False, 255, "mean", size=(7, 9))
    loss, dlogits = cross_entropy.upsampled_cross_entropy(plain, True, flag, 0)
    own = z.detach() * (2 * F.one_hot(labels, 3).permute(0, 3, 1, 2) - 1)
    focal = -((-own).sigmoid() ** 2 * F.logsigmoid(own)).sum(1).mean()
    binary, _ = cross_entropy.upsampled_binary_cross_entropy(
        plain._replace(labels=labels.to(DEVICE), size=None, gamma=2.0), False, flag, 0
    )
    return close(loss, truth.detach()) and close(dlogits, exact.grad) and close(binary, focal)


# what is broken, in which file, which text becomes which, and the check that must see it
PLANTED = [
    ("radial term of the wrong sign", "prototype_contrastive_loss/backward", "out = out - radial", "out = out + radial", contrast_is_right),
    ("radial term without the norm", "prototype_contrastive_loss/backward", "c * inv, 0.0)", "c, 0.0)", contrast_is_right),
    ("channel mask off by one", "prototype_contrastive_loss/logits", "mask_d = offs_d < D - d", "mask_d = offs_d < D - d - 1", contrast_is_right),
    ("channel mask of the output off by one", "prototype_contrastive_loss/backward", "(offs_d < size.D - d)[None, :]\n", "(offs_d < size.D - d - 1)[None, :]\n", contrast_is_right),
    ("ignored pixels counted", "pixels", "labelled = mask & (value != labels.ignore_index)", "labelled = mask & (value != labels.ignore_index + 1)", contrast_is_right),
    ("batch offset of the features forgotten", "prototype_contrastive_loss/forward", " + b * features.stride_b\n", "\n", contrast_is_right),
    ("batch offset in the backward forgotten", "prototype_contrastive_loss/backward", " + b * features.stride_b\n", "\n", contrast_is_right),
    ("batch offset of the labels forgotten", "pixels", "offs = b * labels.stride_b + i", "offs = i", contrast_is_right),
    ("rows of labels read too low", "pixels", "i = nearest(i, labels.scale_h, labels.height)", "i = tl.minimum(nearest(i, labels.scale_h, labels.height) + 1, labels.height - 1)", contrast_is_right),
    ("prototypes beyond K in the softmax", "prototype_contrastive_loss/forward", "z = tl.where((offs_k < size.K)[None, :], z, -float(\"inf\"))", "z = z", contrast_is_right),
    ("pixel weights in the denominator", "prototype_contrastive_loss/forward", "value, class_weight, bad, inv, top, log_total)", "value, class_weight * pixel_weight, bad, inv, top, log_total)", contrast_is_right),
    ("one group too long", "prototype_contrastive_loss/prototypes", "tl.minimum((group + 1) * tiles_per_group, tiles)", "tl.minimum((group + 1) * tiles_per_group + 1, tiles)", contrast_is_right),
    ("last group forgotten", "prototype_contrastive_loss/prototypes", "for _ in range(0, groups)", "for _ in range(0, groups - 1)", contrast_is_right),
    ("edge pixels counted in the moments", "class_moments", "cls, _ = read_class(labels, b, n, n < size.P,", "cls, _ = read_class(labels, b, n, n < size.P + 2,", moments_are_right),
    ("squares of raw features", "class_moments", "unit * value, squares", "x * value, squares", moments_are_right),
    ("batch offset in the moments forgotten", "class_moments", "x = tl.load(features.ptr + b * features.stride_b + offs_n", "x = tl.load(features.ptr + offs_n", moments_are_right),
    ("what a row holds forgotten", "class_moments", "mask=mask & is_there", "mask=mask & (is_there == 0)", unit_moments_are_right),
    ("rows never written are added", "class_moments", "other=0) > 0", "other=-1) >= 0", unit_moments_are_right),
    ("classes of other programs counted", "class_moments", "cls < first + classes", "cls < first + classes + 1", unit_moments_are_right),
    ("raw features summed", "class_moments", "scale * weight, 0.0)", "weight, 0.0)", unit_moments_are_right),
    ("halo cell not shifted", "windows", "tl.gather(upper_right, previous, 0)", "upper_right", upsampling_is_right),
    ("halo column forgotten", "cells", "columns_of(tile * (CELLS - HALO) - 1,", "columns_of(tile * CELLS - 1,", upsampling_is_right),
    ("halo's loss counted twice", "upsampled_cross_entropy", "mine = owned & ((index >= first + HALO) | (place.strip == 0))", "mine = owned", upsampling_is_right),
    ("halo band forgotten", "upsampled_cross_entropy", "range(first, first + tiling.bands + HALO)", "range(first + HALO, first + tiling.bands + HALO)", upsampling_is_right),
    ("lower row of nodes overwritten by the neighbour's", "upsampled_cross_entropy", "(index + 1 <= first + tiling.bands)", "(index <= first + tiling.bands)", upsampling_is_right),
    ("tail of a cell forgotten", "upsampled_cross_entropy", "if full < widest:", "if full + 1 < widest:", upsampling_is_right),
    ("batch offset of the logits forgotten", "upsampled_cross_entropy", "logits.ptr + b * logits.stride_b\n", "logits.ptr\n", upsampling_is_right),
    ("bias forgotten next to saved dots", "prototype_contrastive_loss/logits", "            z = z + read_bias(prototypes, b, offs_k, size.K)[None, :]", "            z = z", options_are_right),
    ("bias taken for a part of the dots", "prototype_contrastive_loss/contrast", "problem.variances is None and problem.bias is None", "True", options_are_right),
    ("variance left out of the logit", "prototype_contrastive_loss/logits", "z = z + variance", "z = z", options_are_right),
    ("share of smoothing forgotten", "prototype_contrastive_loss/targets", "return target.keep * t + target.share", "return target.keep * t", options_are_right),
    ("sum so far not moved to the new maximum", "prototype_contrastive_loss/forward_targets", "mass * (top - base)", "0.0 * (top - base)", options_are_right),
    ("variance once in the radial part", "prototype_contrastive_loss/backward", "c += 2 * tl.sum(exact * variance, 1)", "c += tl.sum(exact * variance, 1)", options_are_right),
    ("every image's prototypes the first one's", "prototype_contrastive_loss/logits", "offset = b * prototypes.stride_b", "offset = 0 * prototypes.stride_b", options_are_right),
    ("images' gradients written over each other", "prototype_contrastive_loss/prototypes", "group = group * tl.num_programs(2) + tl.program_id(2)", "group = group * tl.num_programs(2)", options_are_right),
    ("last row instead of the largest", "prototype_contrastive_loss/pool", "new_top = tl.maximum(top, z)", "new_top = z", options_are_right),
    ("gradient of an unnormalised target", "windows_of_targets", "(mass * p - q) * scale", "(p - q) * scale", upsampled_targets_are_right),
    ("soft target's upper row forgotten", "windows_of_targets", "top + y * (c + x * (d - c) - top)", "top", upsampled_targets_are_right),
    ("focal modulation of the wrong side", "windows_of_targets", "tl.exp(-gamma * softplus(-s))", "tl.exp(-gamma * softplus(s))", upsampled_targets_are_right),
]  # fmt: skip


def mutant(folder: Path, file: str, old: str, new: str):
    """A copy of the kernels with one text changed, imported under a name of its own."""
    package = folder / "kernels_mutant"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / f"{file}.py"
    text = path.read_text()
    assert old in text, f"the text to break is no longer in {path.name}: {old!r}"
    path.write_text(text.replace(old, new))
    name = f"kernels_mutant_{abs(hash((file, old, new)))}"
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@runs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_unbroken_copies_are_right(tmp_path):
    module = mutant(tmp_path, "pixels", "import torch", "import torch")
    checks = (
        contrast_is_right,
        moments_are_right,
        unit_moments_are_right,
        upsampling_is_right,
        options_are_right,
        upsampled_targets_are_right,
    )
    assert all(is_right(module) for is_right in checks)


@runs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("file", "old", "new", "is_right"), [p[1:] for p in PLANTED], ids=[p[0] for p in PLANTED])
def test_planted_bug_is_caught(file, old, new, is_right, tmp_path):
    assert not is_right(mutant(tmp_path, file, old, new))


def test_every_kernel_compiles_without_a_spill_for_two_architectures():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels_check.triton_kernels", "--quick"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no spills" in done.stdout and "wgmma" in done.stdout and "sm_80" in done.stdout


def test_kernels_check_refuses_to_compile_for_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels_check.triton_kernels"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize("arch", sorted(launch.TABLES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_table_answers_for_every_size(arch, dtype):
    kernels_ = (
        "contrast_forward",
        "contrast_backward_split",
        "contrast_prototypes",
        "contrast_prototypes_target",
        "moments",
    )
    for kernel in (*kernels_, "unit_moments"):
        for dim in (1, 64, 2048, 8192):
            for num_classes in (1, 19, 150, 1900, 100_000):
                assert launch.find(arch, kernel, dtype, dim, num_classes)["BLOCK_N"] >= (1 if "unit" in kernel else 16)


def test_a_users_table_comes_first_and_a_broken_one_is_named(tmp_path, monkeypatch):
    path = tmp_path / "launch.json"
    monkeypatch.setenv("SPCL_FAST_LAUNCH_TABLE", str(path))
    row = {
        "kernel": "unit_moments",
        "dtype": "half",
        "max_dim": 300,
        "launch": {"num_warps": 2, "num_stages": 5, "BLOCK_N": 256, "BLOCK_D": 16},
    }
    path.write_text(json.dumps({"sm_90": [row]}))
    launch.forget()
    try:
        assert launch.find("sm_90", "unit_moments", torch.float16, 256, 1) == row["launch"]
        assert launch.find("sm_90", "unit_moments", torch.float16, 301, 1)["BLOCK_N"] == 16
        assert launch.find("sm_80", "unit_moments", torch.float16, 256, 1)["BLOCK_N"] == 32
        path.write_text('{"sm_90": [{"kernel": "unit_moments", "launch": {"BLOCK_N": 100}}]}')
        launch.forget()
        with pytest.raises(ValueError, match="launch.json.*delete it"):
            launch.find("sm_90", "unit_moments", torch.float16, 256, 1)
    finally:
        monkeypatch.undo()
        launch.forget()


@runs_kernels
def test_tune_keeps_what_is_faster_and_right_and_writes_it(tmp_path, monkeypatch, capsys):
    """With a clock that prefers two stages: found, written for exactly these sizes, and read by the next launch."""
    from spcl_fast.kernels import tune

    monkeypatch.setenv("SPCL_FAST_LAUNCH_TABLE", str(tmp_path / "cache" / "launch.json"))
    launch.forget()
    arch = "interpreter" if kernels.pixels.INTERPRETED else launch.architecture(0)

    def clock(call):
        call()
        settings = launch.find(arch, "contrast_forward", torch.float32, 20, 3)
        return 1.0 if settings["num_stages"] == 2 else 2.0

    monkeypatch.setattr(tune, "_median_us", clock)
    tune.run((1, 20, 3, 5), 3, "float32", "pixels", 20)
    rows = json.loads((tmp_path / "cache" / "launch.json").read_text())[arch]
    (row,) = [row for row in rows if row["kernel"] == "contrast_forward"]
    assert row["launch"]["num_stages"] == 2 and (row["dim"], row["num_classes"], row["layout"]) == (20, 3, "pixels")
    assert "rows written" in capsys.readouterr().out
    assert launch.find(arch, "contrast_forward", torch.float32, 20, 3)["num_stages"] == 2
    assert launch.find(arch, "contrast_forward", torch.float32, 21, 3)["num_stages"] != 2
    monkeypatch.undo()
    launch.forget()


def test_architecture_without_a_table_takes_the_default():
    assert launch.find("default", "moments", torch.float32, 64, 19) is not None


def test_a_kernel_that_no_row_is_for_is_named_with_its_sizes():
    with pytest.raises(LookupError, match="sm_90 has no row of nothing for torch.float32, 64 channels and 19 classes"):
        launch.settings_of("sm_90", "nothing", torch.float32, 64, 19)
