"""The one-pass kernel of prototype_contrastive_loss: bugs planted in its source are seen by the emulator or by the values."""

from __future__ import annotations

import oracle
import pytest
import torch
from cuda_emulator import build
from cuda_emulator.planted import Planted
from on_backends import NO_BAD_LABEL
from problems import CONTRAST, problem
from test_cuda_one_pass import run, taken, value_and_gradient

from spcl_fast.backends.labels import label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
# Bugs, all built into one library and taken one at a time: (where, what stands there, what stands there wrongly).
BUGS = {
    "label not counted": ("if ({}) sum +=", "cls >= 0", "cls > 0"),
    "bad label not counted": ("else if ({}) sum = NAN", "cls == kBadLabel", "false"),
    "a block counts too far": ("min({}, a.all)", "first + a.each", "first + a.each + 1"),
    "labels of another image": ("read_class(a.labels, {}, n", "image", "0"),
    "sum divided": ("return {} || isnan", "a.mean", "true"),
    "a rank is lost": ("rank < {}; ++rank", "a.plan.blocks", "(a.plan.blocks + 1) / 2"),
    "the squares are not added": ("i < {} * own.each", "(num_classes + 1)", "num_classes"),
    "another block's pixels": ("i / own.each, p = {}", "own.first() + i % own.each", "i % own.each"),
    "norm although not asked": ("inv = {} ? inverse", "a.normalize", "true"),
    "pixel weight forgotten": ("[cls] : 1.0f) * {};", "pixel_weight_at(a.pixel_weight, tile, p, a.x.width)", "1.0f"),
    "loss of a bad label": ("float loss = {} ?", "cls == kBadLabel", "false"),
    "weights are not gathered": ("p < kTile && {}", "owner != own.rank", "false"),
    "factors of the own block": ("table->inward[p] = *shared_of(table->inward + p, {});", "owner", "own.rank"),
    "channels of another rank": ("a.x.dim, {});", "own.rank", "0"),
    "tile of another cluster": ("contrast_tile({}, a.pixels)", "blockIdx.x / a.plan.blocks", "blockIdx.x % contrast_tiles(a.pixels)"),
    "gradient not placed": ("if ({}) place_gradient", "threadIdx.x < kTile", "threadIdx.x < 8"),
    "no barrier before the sums": ("denominator_of(a);\n  {};", "cluster_barrier()", "(void)0"),
    "no barrier before the softmax": ("add_ranks(a, table, own);\n  {};", "__syncthreads()", "(void)0"),
    "no barrier before the gathering": ("denominator, p, part); });\n  {};", "cluster_barrier()", "(void)0"),
    "no barrier before the end": ("write_gradient<T>(a, tile, channels, table);\n  {};", "cluster_barrier()", "(void)0"),
    "losses of half the pixels": ("p < {}; p += 32) loss", "own.each", "own.each / 2"),
    "scaled by the wrong end": ("i = {} + thread; i < count", "count / kEach * kEach", "count / kEach"),
    "not scaled": ("if ({}) return;", "by == 1", "true"),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted() -> Planted:
    file = "prototype_contrastive_one_pass.cu"
    return Planted(CONTRAST, {name: (file, *bug) for name, bug in BUGS.items()})


PROBES = [  # shape, classes, dtype, layout, settings: clusters of 1, 4 and 8
    ((2, 33, 5, 13), 5, torch.float32, torch.channels_last, {"reduction": "sum", "normalize": False}),
    ((2, 1030, 9, 8), 3, torch.bfloat16, torch.contiguous_format, {}),
    ((2, 2050, 1, 75), 19, torch.float32, torch.contiguous_format, {}),
    ((3, 2, 121, 117), 2, torch.float32, torch.contiguous_format, {}),
]


def is_right(backend, probe, order: str, monkeypatch) -> bool:
    """Whether value and gradient are what the formula says; all memory ends where its tensor ends; a bad label is seen."""
    shape, num_classes, dtype, layout, settings = probe
    features, labels, prototypes = problem(shape, num_classes, dtype=dtype)[:3]
    weights = {"pixel_weight": torch.linspace(0.5, 2, labels.numel()).view(labels.shape)}
    settings = {"temperature": 0.2, **weights, **settings}
    truth = value_and_gradient(oracle.contrast, features.double(), labels, prototypes.double(), -2.0, **settings)
    memory = build.Guarded(backend.handle)
    inputs = features.contiguous(memory_format=layout), labels, prototypes.to(dtype)
    given = [memory.copy(tensor, alignment=tensor.element_size()) for tensor in inputs]
    bad = labels.clone()
    bad[1, 0, 2] = num_classes
    try:
        with taken(backend, order), monkeypatch.context() as patch:
            patch.setattr(
                torch, "empty_like", lambda t: memory.empty(t.numel(), dtype=t.dtype).as_strided(t.shape, t.stride())
            )
            got = [tensor.double() for tensor in run(*given, -2.0, **settings)]
            memory.close()
            loss, grad = run(features, bad, prototypes, **settings)
            seen = (
                loss.isnan()
                and torch.equal(grad.isnan().all(1), bad != 255)
                and torch.equal((grad == 0).all(1), bad == 255)
            )
    except (RuntimeError, AssertionError):  # the emulator saw it
        return False
    finally:
        label_flag(features.device).fill_(NO_BAD_LABEL)
    slack = 1e-4 if dtype == torch.float32 else 3e-2
    return bool(seen) and all((g - t).abs().max() <= slack * t.abs().max() for g, t in zip(got, truth, strict=True))


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("order", ["forward", "random", "block by block"])
def test_without_a_planted_bug_the_one_pass_probes_are_right(planted, probe, order, monkeypatch):
    assert is_right(planted.backend, probe, order, monkeypatch)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_of_the_one_pass_is_seen(planted, name, monkeypatch):
    orders = ("forward", "random", "block by block")
    with planted.bug(name):
        assert not all(is_right(planted.backend, probe, order, monkeypatch) for order in orders for probe in PROBES)
