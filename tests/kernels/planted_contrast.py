"""The bugs that the tests plant in the CUDA kernels of prototype_contrastive_loss: all of them in one library, taken one at a time.

(file, where, what stands there, what stands there wrongly); in `where` the place is {}.
"""

from __future__ import annotations

import functools

from cuda_emulator.planted import Planted
from problems import CONTRAST

FORWARD, SUMS = "prototype_contrastive_loss.cu", "prototype_contrastive_prototypes.cu"
GENERAL, BACKWARD, GENERAL_SUMS = (
    f"prototype_contrastive_general{part}.cu" for part in ("", "_backward", "_prototypes")
)
ONE_PASS = "prototype_contrastive_one_pass.cu"
ROWS, PIXELS = "contrast_prototypes.cuh", "contrast_general.cuh"
TILE, DOTS, PRODUCT = "contrast_tile.cuh", "contrast_dots.cuh", "contrast_product.cuh"
GROUP, CLUSTER = "a.plan.groups.tiles_per_group", "blockIdx.x / a.plan.blocks"

WITHOUT_OPTIONS = {
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

WITH_OPTIONS = {
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
    "last class of a block not seen": (GENERAL, "min({}, a.num_classes - k0)", "int64_t{a.block_classes}", "int64_t{a.block_classes} - 1"),
    "a class counted twice": (GENERAL, "k0 += {}) {", "a.block_classes", "a.block_classes - 1"),
    "no barrier between blocks": (GENERAL, "k0, p, part); });\n    {};", "__syncthreads()", "(void)0"),
    "weight of probabilities": (GENERAL, "!a.options.sigmoid && {} ? a.class_weight[cls]", "!a.options.targets.data", "true"),
    "bad probability not seen": (GENERAL, "a.options.target_sums[n] = {} ? NAN", "bad", "false"),
    "divided twice": (GENERAL, "blocks, {}, from.loss", "from.mean && !divides", "from.mean"),
    "denominator not kept": (GENERAL, "? NAN : {};\n}", "*given", "1.0f"),
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
    "weights beyond the last block's K": (BACKWARD, "if ({} && cls >= 0)", "k < count", "k < count + 1"),
    "sums of the last block alone": (BACKWARD, "slopes.along += {}, slopes", "sums.along", "sums.along - slopes.along"),
    "sums of the last classes alone": (BACKWARD, "sums.along += {}, sums", "along", "along - static_cast<float>(sums.along)"),
    "a slice of the first": (BACKWARD, "first = {} * a.slice_chunks", "blockIdx.y", "0"),
    "a chunk of a slice lost": (BACKWARD, "min(a.slice_chunks, {})", "all.chunks - first", "all.chunks - first - 1"),
    "sums not cleared": (BACKWARD, "sums[i] = {};", "0", "sums[i]"),
    "prototypes of the first block": (BACKWARD, "a.x.dim, {} + piece * kPiece", "k0", "0"),
    "no barrier before the products": (BACKWARD, "wait_for_stage(a.shared.stages);\n    {};", "__syncthreads()", "(void)0"),
    "a block's temperature lost": (BACKWARD, "i < {}; i += kSumThreads) sum", "count", "count - 1"),
    "temperature of the wrong sign": (BACKWARD, "static_cast<float>({} / a.temperature())", "-sums[0]", "sums[0]"),
    "images mixed": (GENERAL_SUMS, "contrast_tile({} + t, a.pixels)", "image * tiles", "0"),
    "a group of an image too long": (GENERAL_SUMS, "end = min(begin + {}, tiles)", GROUP, f"{GROUP} + 1"),
    "bias of four lanes": (GENERAL_SUMS, "lanes = {}; lanes < 32", "4", "8"),
    "bias of a warp lost": (GENERAL_SUMS, "warp < {}; ++warp) sum", "kWarps", "kWarps - 1"),
    "bias of the last class lost": (GENERAL_SUMS, "static_cast<int>(threadIdx.x) >= {}) return;", "classes", "classes - 1"),
    "gradient of one image alone": (SUMS, "partial += {} * groups * size", "blockIdx.y", "0"),
}  # fmt: skip

IN_ONE_PASS = {
    "label not counted": (ONE_PASS, "if ({}) sum +=", "cls >= 0", "cls > 0"),
    "bad label not counted": (ONE_PASS, "else if ({}) sum = NAN", "cls == kBadLabel", "false"),
    "a block counts too far": (ONE_PASS, "min({}, a.all)", "first + a.each", "first + a.each + 1"),
    "labels of another image": (ONE_PASS, "read_class(a.labels, {}, n", "image", "0"),
    "sum divided": (ONE_PASS, "return {} || isnan", "a.mean", "true"),
    "a rank is lost": (ONE_PASS, "rank < {}; ++rank", "a.plan.blocks", "(a.plan.blocks + 1) / 2"),
    "the squares are not added": (ONE_PASS, "i < {} * own.each", "(num_classes + 1)", "num_classes"),
    "another block's pixels": (ONE_PASS, "i / own.each, p = {}", "own.first() + i % own.each", "i % own.each"),
    "norm although not asked": (ONE_PASS, "inv = {} ? inverse", "a.normalize", "true"),
    "weight of a pixel forgotten": (ONE_PASS, "[cls] : 1.0f) * {};", "pixel_weight_at(a.pixel_weight, tile, p, a.x.width)", "1.0f"),
    "loss of a bad label": (ONE_PASS, "float loss = {} ?", "cls == kBadLabel", "false"),
    "weights are not gathered": (ONE_PASS, "p < kTile && {}", "owner != own.rank", "false"),
    "factors of the own block": (ONE_PASS, "table->inward[p] = *shared_of(table->inward + p, {});", "owner", "own.rank"),
    "channels of another rank": (ONE_PASS, "a.x.dim, {});", "own.rank", "0"),
    "tile of another cluster": (ONE_PASS, "contrast_tile({}, a.pixels)", CLUSTER, "blockIdx.x % contrast_tiles(a.pixels)"),
    "gradient not placed": (ONE_PASS, "if ({}) place_gradient", "threadIdx.x < kTile", "threadIdx.x < 8"),
    "no barrier before the sums": (ONE_PASS, "denominator_of(a);\n  {};", "cluster_barrier()", "(void)0"),
    "no barrier before the softmax": (ONE_PASS, "add_ranks(a, table, own);\n  {};", "__syncthreads()", "(void)0"),
    "no barrier before the gathering": (ONE_PASS, "denominator, p, part); });\n  {};", "cluster_barrier()", "(void)0"),
    "no barrier before the end": (ONE_PASS, "write_gradient<T>(a, tile, channels, table);\n  {};", "cluster_barrier()", "(void)0"),
    "losses of half the pixels": (ONE_PASS, "p < {}; p += 32) loss", "own.each", "own.each / 2"),
    "scaled by the wrong end": (ONE_PASS, "i = {} + thread; i < count", "count / kEach * kEach", "count / kEach"),
    "not scaled": (ONE_PASS, "if ({}) return;", "by == 1", "true"),
}  # fmt: skip


@functools.cache
def planted() -> Planted:
    """Built by the first test that asks: three libraries would take three times as long."""
    bugs = WITHOUT_OPTIONS, WITH_OPTIONS, IN_ONE_PASS
    assert len(set().union(*bugs)) == sum(map(len, bugs)), "two bugs of one name"
    return Planted(CONTRAST, bugs=WITHOUT_OPTIONS | WITH_OPTIONS | IN_ONE_PASS, header="contrast_plan.h")
