"""prototype_contrastive_loss with options in CUDA C++: bugs planted in the kernels' source are seen by the emulator or by the values."""

from __future__ import annotations

import oracle
import pytest
import torch
from cuda_contrast import error_at_large_logits
from cuda_emulator import build, emulated
from cuda_emulator.planted import Planted
from on_backends import NO_BAD_LABEL, run
from problems import CONTRAST, OPTIONS, named, problem

import spcl_fast as sf
from spcl_fast.backends.labels import label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
FORWARD, BACKWARD, SUMS = (f"prototype_contrastive_general{part}.cu" for part in ("", "_backward", "_prototypes"))
PIXELS, DOTS, PLAIN = "contrast_general.cuh", "contrast_dots.cuh", "prototype_contrastive_prototypes.cu"
# Bugs, all built into one library and taken one at a time: (file, where, what stands there, what stands there wrongly).
BUGS = {
    "prototypes of the first image": (PIXELS, "{} * a.options.prototypes_stride_b", "tile.image", "0"),
    "bias of the first image": (PIXELS, "a.options.bias + {} * a.options", "tile.image", "0"),
    "bias of another block": (PIXELS, "a.options.bias_stride_b + {} : nullptr", "k0", "0"),
    "temperature of the host": (PIXELS, "return {} ? *options.temperature", "options.temperature", "(const float*)nullptr"),
    "smoothed by one class less": (PIXELS, "t.floor = o.label_smoothing / {};", "classes", "(classes - 1)"),
    "smoothing keeps the label whole": (PIXELS, "cls, {}, 0.0f, 1.0f}", "1.0f - o.label_smoothing", "1.0f"),
    "weights forgotten where smoothed": (PIXELS, "t.floor * ({} ?", "a.class_weight", "(const float*)nullptr"),
    "probabilities of the first image": (PIXELS, "offset = {} * o.targets", "tile.image", "0"),
    "probabilities of another row": (PIXELS, "{} * o.targets.stride_h", "at.i", "at.j"),
    "half probabilities read as another kind": (PIXELS, "switch ({}) {", "type", "type == kFloat16 ? kBFloat16 : type"),
    "an unlabelled pixel counts": (PIXELS, "p >= tile.count || {} ?", "sum == kNoTarget", "false"),
    "margin of every class": (PIXELS, "plain(k) - ({} ? margin", "k == own", "true"),
    "margin of the label of another block": (PIXELS, "labelled ? static_cast<int>({}) : -1", "cls - k0", "cls"),
    "a larger logit does not rescale": (PIXELS, "total = total == 0 ? 0.0 : {};", "total * expf(top - to)", "total"),
    "a larger logit does not raise the loss": (PIXELS, "below + {} * (static_cast<double>(to)", "mass", "0.0"),
    "a lane's sum lost": (PIXELS, "{seen.top, {}, quad_sum(seen.below)", "quad_sum(seen.total)", "seen.total"),
    "softmax where sigmoid": (PIXELS, "if ({}) return weight *", "sigmoid", "false"),
    "sigmoid upside down": (PIXELS, "(1.0f + {}) - wanted", "expf(-z)", "expf(z)"),
    "low part of logsumexp added": ("contrast_pixels.cuh", "(z - high) - {};", "low", "(-low)"),
    "own part not subtracted": (PIXELS, "expm1f(d) + {} :", "(1.0f - share)", "0.0f"),
    "pixel weight forgotten": (PIXELS, "return {} * pixel_weight_at(grad", "pixel_weight_at(a.pixel_weight, tile, p, a.x.width)", "1.0f"),
    "few classes seen of many": (PIXELS, "first = part; {} < count; first += kStep)\n    see_few", "first", "first + kStep"),
    "last class of a block not seen": (FORWARD, "min({}, a.num_classes - k0)", "int64_t{a.block_classes}", "int64_t{a.block_classes} - 1"),
    "a class counted twice": (FORWARD, "k0 += {}) {", "a.block_classes", "a.block_classes - 1"),
    "no barrier between blocks": (FORWARD, "k0, p, part); });\n    {};", "__syncthreads()", "(void)0"),
    "weight of probabilities": (FORWARD, "!a.options.sigmoid && {} ? a.class_weight[cls]", "!a.options.targets.data", "true"),
    "bad probability not seen": (FORWARD, "a.options.target_sums[n] = {} ? NAN", "bad", "false"),
    "divided twice": (FORWARD, "blocks, {}, from.loss", "from.mean && !divides", "from.mean"),
    "denominator not kept": (FORWARD, "? NAN : {};\n}", "*given", "1.0f"),
    "target of another block": (BACKWARD, "wanted = t.wanted({}), weight", "k0 + k", "k"),
    "dots of the bias, too": (BACKWARD, "along += w * {};\n        all", "z.dot(k)", "z.plain(k)"),
    "margin not in the temperature": (BACKWARD, "{} ? z.margin : 0.0f", "k == z.own", "false"),
    "another class left out in each block": (BACKWARD, "a.options.sigmoid ? 0.0f : {} ? z.dot(0)", "k0 == 0", "true"),
    "variances of the first image": (PIXELS, "a.options.variances) + {} * a.options", "tile.image", "0"),
    "variances of the prototypes": (DOTS, "proto = {};\n  else", "variances_of<T>(a, tile)", "prototypes_of<T>(a, tile)"),
    "not squared": (DOTS, "v = make_float4({}, v.y * v.y", "v.x * v.x", "v.x"),
    "half floats not squared": (DOTS, "v[i] = to_halves<T>({}, pair.y * pair.y)", "pair.x * pair.x", "pair.x"),
    "norms of the squares": (DOTS, "if (!kSquare && {})", "part.group == 0", "part.group == 1"),
    "squares of twice the size": (PIXELS, "z.squares.factor = {} * scale * scale", "0.5f", "1.0f"),
    "dots not kept": (PIXELS, "i < {}; i += blockDim.x) reinterpret_cast<float4*>(kept)", "count", "count / 2"),
    "no barrier before the squares": (PIXELS, "(kept)[i] = from[i];\n  {};", "__syncthreads()", "(void)0"),
    "variance in the label's numerator": (PIXELS, "own = {} && k == z.own", "lacks_own", "false"),
    "own weight of another product": (BACKWARD, "static_cast<int>(own), p, {});", "table->squares[p]", "0.0f"),
    "a shifted row of squares": (BACKWARD, "p + ({})]);", "shifts >> c % 2 & 1", "0"),
    "squares of another pixel": (BACKWARD, "value * {} *", "table->loss[p]", "table->loss[0]"),
    "weights beyond K": (BACKWARD, "if ({} && cls >= 0)", "k < count", "k < count + 1"),
    "sums of the last block alone": (BACKWARD, "slopes.along += {}, slopes", "sums.along", "sums.along - slopes.along"),
    "sums of the last classes alone": (BACKWARD, "sums.along += {}, sums", "along", "along - static_cast<float>(sums.along)"),
    "a slice of the first": (BACKWARD, "first = {} * a.slice_chunks", "blockIdx.y", "0"),
    "a chunk of a slice lost": (BACKWARD, "min(a.slice_chunks, {})", "all.chunks - first", "all.chunks - first - 1"),
    "sums not cleared": (BACKWARD, "sums[i] = {};", "0", "sums[i]"),
    "prototypes of the first block": (BACKWARD, "a.x.dim, {} + piece * kPiece", "k0", "0"),
    "no barrier before the products": (BACKWARD, "wait_for_stage(a.shared.stages);\n    {};", "__syncthreads()", "(void)0"),
    "a block's temperature lost": (BACKWARD, "i < {}; i += kSumThreads) sum", "count", "count - 1"),
    "temperature of the wrong sign": (BACKWARD, "static_cast<float>({} / a.temperature())", "-sums[0]", "sums[0]"),
    "images mixed": (SUMS, "contrast_tile({} + t, a.pixels)", "image * tiles", "0"),
    "a group too long": (SUMS, "end = min(begin + {}, tiles)", "a.plan.groups.tiles_per_group", "a.plan.groups.tiles_per_group + 1"),
    "bias of four lanes": (SUMS, "lanes = {}; lanes < 32", "4", "8"),
    "bias of a warp lost": (SUMS, "warp < {}; ++warp) sum", "kWarps", "kWarps - 1"),
    "bias of the last class lost": (SUMS, "static_cast<int>(threadIdx.x) >= {}) return;", "classes", "classes - 1"),
    "gradient of one image alone": (PLAIN, "partial += {} * groups * size", "blockIdx.y", "0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted(CONTRAST, BUGS)


# Shape, classes, dtype, option, other arguments: every option; classes in one block and in several, channels in one slice and in two.
PROBES = [
    ((2, 37, 5, 13), 23, torch.float32, "all but variances", {}),
    ((2, 37, 3, 9), 330, torch.float32, "all but variances", {}),
    ((2, 70, 5, 13), 300, torch.bfloat16, "probabilities, weights, smoothing", {}),
    ((2, 20, 5, 13), 5, torch.float32, "sigmoid, probabilities, weights, bias", {"labels": torch.float16}),
    ((1, 300, 5, 9), 260, torch.float32, "temperature", {"temperature": torch.tensor(0.05)}),
    ((2, 37, 5, 13), 100, torch.float32, "variances with the rest", {}),
    ((2, 71, 5, 13), 140, torch.bfloat16, "no positive variance, class weight", {"variances": 11.0}),
]


def _changed(tensor: torch.Tensor, change: torch.Tensor | torch.dtype | float) -> torch.Tensor:
    """In another dtype, multiplied, or another one."""
    if isinstance(change, torch.dtype):
        return tensor.to(change)
    return change * tensor if isinstance(change, float) else change


def is_right(backend: emulated.Backend, probe, order: str) -> bool:
    """Whether value and gradients are what the formula says, and a bad probability is seen."""
    shape, num_classes, dtype, name, change = probe
    (case,) = named(OPTIONS, name)
    given = case.given(problem(shape, num_classes, dtype=dtype, patch=(1, 1)))
    given |= {key: _changed(given[key], value) for key, value in change.items()}
    truth = run(oracle.contrast, given, case.leaves, leaf_dtype=torch.float64, incoming=torch.ones(()))
    try:
        with backend.taken(order):
            got = run(sf.prototype_contrastive_loss, given, case.leaves, "cuda", incoming=torch.ones(()))
            seen = error_at_large_logits() < 1e-5
            if given["labels"].is_floating_point():
                given["labels"][0, 1, 2, 2] = -1
                seen &= bool(sf.prototype_contrastive_loss(**given, backend="cuda").isnan())
    except (RuntimeError, AssertionError):  # the emulator saw it
        return False
    finally:
        label_flag(torch.device("cpu")).fill_(NO_BAD_LABEL)
    slack = 1e-4 if dtype == torch.float32 else 3e-2
    return bool(seen) and all(
        (g.double() - t).abs().max() <= slack * t.abs().max() for g, t in zip(got, truth, strict=True)
    )


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("order", ["forward", "random"])
def test_without_a_planted_bug_the_option_probes_are_right(planted, probe, order):
    assert is_right(planted.backend, probe, order)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_of_an_option_is_seen(planted, name):
    with planted.bug(name):
        assert not all(is_right(planted.backend, probe, order) for order in ("forward", "random") for probe in PROBES)


def test_an_element_that_no_thread_writes_is_seen_right_after_the_right_result(planted, monkeypatch):
    """The allocator hands out the memory of the call before, which held the right result."""
    probe = next(p for p in PROBES if p[3] == "temperature")  # more channels than one slice has
    kept = {}
    real = torch.empty_like

    def reused(like, **options):
        return kept.setdefault((like.shape, like.dtype), real(like, **options))

    monkeypatch.setattr(torch, "empty_like", reused)
    assert is_right(planted.backend, probe, "forward") and kept
    with planted.bug("a slice of the first"):
        assert not is_right(planted.backend, probe, "forward")
