"""prototype_contrastive_loss in CUDA C++: bugs planted in the kernels' source are seen by the emulator or by the values."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import build, emulated
from cuda_emulator.planted import Planted
from on_backends import NO_BAD_LABEL, run
from problems import CONTRAST, problem

import spcl_fast as sf
from spcl_fast.backends.labels import label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
FORWARD, SUMS = "prototype_contrastive_loss.cu", "prototype_contrastive_prototypes.cu"
ROWS = "contrast_prototypes.cuh"
TILE, DOTS, PRODUCT = "contrast_tile.cuh", "contrast_dots.cuh", "contrast_product.cuh"
# Bugs, all built into one library and taken one at a time: (file, where, what stands there, what stands there wrongly).
BUGS = {
    "wrong radial term": (PRODUCT, "{}", "s * (c * inv * inv)", "s * (c * inv)"),
    "no radial term": (PRODUCT, "{}", "along * product - inward * x", "along * product"),
    "clamped norm not constant": (PRODUCT, "a.normalize && {}", "inv < 1.0f / kNormEps", "true"),
    "missing ignore": (PRODUCT, "return {} ? 0.0f :", "along == 0", "false"),
    "own class not subtracted": (PRODUCT, "from_float<T>(({} ? -others", "k == cls", "false"),
    "weights beyond K": (PRODUCT, "{} && cls >= 0", "k < num_classes", "k < num_classes + 1"),
    "weight of another pixel": (PRODUCT, "[{}] = from_float<T>(w)", "weight_place(k, p)", "weight_place(k, p ^ 1)"),
    "logits of another image": (FORWARD, "a.logits[({} * num_classes + k)", "tile.image", "0"),
    "pixel weight in the denominator": (FORWARD, "table->weight[p] = {};", "weight", "weight * loss"),
    "bad label not seen": (FORWARD, "else if ({})", "cls == kBadLabel", "false"),
    "channels beyond D of aligned rows": (TILE, "from, {} ? given : 0", "c < channels", "c < channels + 1"),
    "pixels beyond the image of aligned rows": (TILE, "{} * static_cast<int>(sizeof(T))", "max(0, min(kEach, tile.count - p))", "kEach"),
    "channels beyond D of half rows": (TILE, "row, {} ? even_given", "c < channels", "c < channels + 1"),
    "last pixel of a shifted row": (TILE, "{} ? word_given(last", "c < channels", "c < channels && tile.count < kTile"),
    "channels beyond D of other rows": (TILE, "count = {} ? tile.count", "c < channels", "c < channels + 1"),
    "one channel too many": (TILE, "const int channels = {};", "channels_from<T>(dx, d0)", "channels_from<T>(dx, d0) + 1"),
    "wrong batch offset": (TILE, "static_cast<T*>(x.data) + {}", "tile.image * x.stride_b", "tile.image * x.stride_d"),
    "wrong shift": (TILE, "{} / 2 + d", "reinterpret_cast<uintptr_t>(tile_of<T>(x, tile))", "uintptr_t{0}"),
    "end of a shifted row": (TILE, "out[3] >> 16 | {} << 16", "next", "0u"),
    "class beyond K": (TILE, "d0 + c, {} && d0 + c < dim, to + k * Shape", "k0 + k < num_classes", "k0 + k <= num_classes"),
    "wrong row is shifted": (DOTS, "shifts >> {} & 1", "i % 2", "0"),
    "a slice is lost": (DOTS, "int half = {};", "warps.slices / 2", "warps.slices / 4"),
    "no wait": (DOTS, "stages == 3) {};", "copy_async_wait<1>()", "copy_async_wait<2>()"),
    "no barrier after a stage": (DOTS, "{};\n    load(chunk", "__syncthreads()", "(void)0"),
    "no barrier before the exchange": (DOTS, "{};\n  add_slices", "__syncthreads()", "(void)0"),
    "no barrier before the store": (PRODUCT, "{};\n    store_pixels", "__syncthreads()", "(void)0"),
    "an ignored pixel in the prototypes": (ROWS, "{} ? 0.0f : v.y", "cls.y == kNoClass", "false"),
    "own class not subtracted from the prototypes": (SUMS, "({} ? expm1f", "k0 + k == cls", "false"),
    "a group too long": (SUMS, "first + {}, tiles)", "a.groups.tiles_per_group", "a.groups.tiles_per_group + 1"),
    "the last group lost": (SUMS, "g < {}; ++g", "groups", "groups - 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted(CONTRAST, BUGS)


PROBES = [  # shape, classes, dtype, layout: aligned, odd and gathered rows; logits formed again and saved; every edge ragged
    ((2, 35, 9, 16), 5, torch.float32, torch.contiguous_format),
    ((2, 72, 9, 16), 19, torch.bfloat16, torch.contiguous_format),
    ((2, 600, 1, 75), 19, torch.float16, torch.contiguous_format),
    ((2, 35, 5, 13), 40, torch.bfloat16, torch.contiguous_format),
    ((2, 300, 5, 13), 19, torch.float32, torch.contiguous_format),
    ((2, 20, 5, 13), 2, torch.float32, torch.channels_last),
]


def differentiated(features, labels, prototypes, **settings) -> list[torch.Tensor]:
    given = {"features": features, "labels": labels, "prototypes": prototypes}
    return run(sf.prototype_contrastive_loss, given, ("features", "prototypes"), incoming=torch.ones(()), **settings)


def is_right(backend: emulated.Backend, probe, order: str, monkeypatch) -> bool:
    """Whether value and gradients are what the formula says. All memory ends where its tensor ends; one pixel's norm is under the clamp, an
    ignored pixel is NaN."""
    shape, num_classes, dtype, layout = probe
    features, labels, prototypes, *_ = problem(shape, num_classes, dtype=dtype)
    tiny = (
        (0, slice(None), 0, 0) if dtype != torch.float16 else (slice(0, 0),)
    )  # its gradient, some 1e12, is beyond float16
    features[tiny] = features[tiny] * (0.7e-12 / features[tiny].norm())
    labels[0, 0, 0], labels[1, 0, 1] = 0, 255
    settings = {"temperature": 0.2, "pixel_weight": torch.linspace(0.5, 2, labels.numel()).view(labels.shape)}
    wide = (features.double(), labels, prototypes.double())
    truth = differentiated(*wide, backend="reference", **settings)
    features[1, :, 0, 1] = torch.nan
    memory = build.Guarded(backend.handle)
    inputs = features.contiguous(memory_format=layout), labels, prototypes.to(dtype)
    given = [memory.copy(tensor, alignment=tensor.element_size()) for tensor in inputs]
    bad = labels.clone()
    bad[1, 0, 2] = num_classes
    try:
        with backend.taken(order), monkeypatch.context() as patch:
            patch.setattr(
                torch, "empty_like", lambda t: memory.empty(t.numel(), dtype=t.dtype).as_strided(t.shape, t.stride())
            )
            got = [tensor.double() for tensor in differentiated(*given, backend="cuda", **settings)]
            memory.close()
            sees_bad_label = sf.prototype_contrastive_loss(
                features, bad, prototypes, **settings, backend="cuda"
            ).isnan()
    except (RuntimeError, AssertionError):  # the emulator saw it
        return False
    finally:
        label_flag(features.device).fill_(NO_BAD_LABEL)
    got[1][tiny] *= 1e-12
    truth[1][tiny] *= 1e-12
    slack = 1e-4 if dtype == torch.float32 else 3e-2
    return bool(sees_bad_label) and all(
        (g - t).abs().max() <= slack * t.abs().max() for g, t in zip(got, truth, strict=True)
    )


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("order", ["forward", "random"])
def test_without_a_planted_bug_the_probes_are_right(planted, probe, order, monkeypatch):
    assert is_right(planted.backend, probe, order, monkeypatch)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_seen(planted, name, monkeypatch):
    orders = ("forward", "random", "reverse")
    with planted.bug(name):
        assert not all(is_right(planted.backend, probe, order, monkeypatch) for order in orders for probe in PROBES)
