"""class_moments of unit features in Triton, with more channels than a one-hot product holds: one read, any number of classes."""

from __future__ import annotations

import oracle
import pytest
import torch
from problems import problem

import spcl_fast as sf

kernels = pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")
from spcl_fast.kernels import class_moments as moments  # noqa: E402
from spcl_fast.kernels import launch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
if not kernels.INTERPRETED or kernels.interpreter_trouble():
    pytest.skip("counts what Triton's interpreter reads", allow_module_level=True)


def features_and_labels(dim: int, num_classes: int, dtype=torch.float32):
    drawn = problem((2, dim, 5, 7), num_classes, dtype=dtype)
    return drawn.features, drawn.labels.where(drawn.labels != 255, -1)


def bytes_read(monkeypatch, tensor: torch.Tensor, call) -> int:
    """By Triton kernels within `call`, of `tensor`."""
    from triton.runtime import interpreter

    owner, counted = interpreter._interpreter, 0
    load, first = owner.load, tensor.data_ptr()

    def counting(pointers, mask, other, dtype):
        nonlocal counted
        offsets = pointers.astype("int64") - first
        counted += int(((offsets >= 0) & (offsets < tensor.nbytes) & mask).sum()) * tensor.element_size()
        return load(pointers, mask, other, dtype)

    monkeypatch.setattr(owner, "load", counting, raising=False)
    call()
    return counted


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dim", [16, 40, 1000])
def test_features_are_read_once_at_any_number_of_channels(monkeypatch, dim, normalize):
    features, labels = features_and_labels(dim, 5)

    def run():
        sf.class_moments(features, labels, 5, ignore_index=-1, normalize=normalize, squares=True, backend="triton")

    assert bytes_read(monkeypatch, features, run) == features.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("dim", "num_classes", "ranges", "pixels"), [(300, 6, 1, 8), (300, 40, 3, 4), (2048, 3, 2, 1), (33, 500, 64, 2)]
)
def test_shared_out_classes_and_few_pixels_follow_the_formula(
    monkeypatch, dtype, weighted, dim, num_classes, ranges, pixels
):
    features, labels = features_and_labels(dim, num_classes, dtype)
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) if weighted else None
    monkeypatch.setattr(moments, "unit_groups", lambda tiles, *_: (5, -(-tiles // 5), ranges))
    with launch.override({"kernel": "unit_moments", "launch": {"BLOCK_N": pixels}}):
        got = sf.class_moments(
            features, labels, num_classes, squares=True, ignore_index=-1, pixel_weight=weight, backend="triton"
        )
    rows = torch.nn.functional.normalize(features.double().permute(0, 2, 3, 1).flatten(0, 2), dim=1)
    hit = torch.nn.functional.one_hot(labels.flatten() + 1, num_classes + 1)[:, 1:].double()
    hit = hit if weight is None else hit * weight.double().flatten()[:, None]
    torch.testing.assert_close(got.counts.double(), hit.sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(got.sums.double(), hit.T @ rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.squares.double(), hit.T @ rows.square(), rtol=1e-5, atol=1e-6)
    eager = oracle.moments(features, labels.where(labels >= 0, 255), num_classes, dtype=torch.float32)
    if weight is None and num_classes <= 255:
        truth = oracle.moments(features, labels.where(labels >= 0, 255), num_classes)
        oracle.assert_as_accurate(got.sums, eager[0], truth[0])


@pytest.mark.parametrize(
    ("tiles", "floats", "feature_bytes"),
    [
        (3663, 19 * 2048, 120 << 20),
        (16384, 150 * 512, 512 << 20),
        (4096, 1900 * 256, 256 << 20),
        (1, 19 * 8192, 1 << 15),
    ],
)
def test_groups_cover_all_tiles_and_their_workspace_is_small(tiles, floats, feature_bytes):
    per_group, groups, ranges = moments.unit_groups(tiles, floats, feature_bytes)
    assert (groups - 1) * per_group < tiles <= groups * per_group and 1 <= ranges <= 128
    assert groups == 1 or 4 * groups * floats <= max(32 << 20, feature_bytes // 8)
