// class_moments: how the pixels and channels are cut, and where things lie. Plain arithmetic, for the host, the device
// and the tests.
#pragma once
#include "../kernels.h"
#include "../sizes.h"

namespace spcl::gpu {

constexpr int kThreadChannels = 4;  // channels that a thread walks at once
constexpr int kMostThreads = 512;
constexpr int64_t kMarkedClasses =
    2048;  // up to here a block notes in shared memory which classes it has met, and counts them there
constexpr int kUnitBytes = 16;  // pixels of one channel are walked 16 bytes at a time
constexpr int64_t kBlocks =
    132;  // aimed at, times the blocks that fit a multiprocessor: a constant, so the bits depend on no GPU's size
constexpr int64_t kEnoughRanges =
    64;  // with fewer, blocks take slices of the channels and the norms are a pass of their own
constexpr int64_t kMostHeld =
    256;  // pixels added up in a register before they go to the partial sum: short chains lose less

// Shared memory of a block: rows [slice][row_bytes], then inv [M], classes [2][M], codes [2][units], squares
// [warps][M], marks, counts; with weights weights [M] and their sums.
struct MomentsMemory {
  int row_bytes, units;
  int inv, classes, codes, squares, marks, counts, weights, weight_sums, bytes;
  int mark_words;  // of a warp
};

SPCL_BOTH MomentsMemory moments_memory(const MomentsPlan& plan, int type_bytes, int64_t num_classes) {
  MomentsMemory m{};
  const int pixels = static_cast<int>(plan.tile_pixels), warps = plan.threads / 32;
  const bool marked = num_classes <= kMarkedClasses;
  m.units = pixels * type_bytes / kUnitBytes;
  m.row_bytes = pixels * type_bytes + kUnitBytes;  // eight neighbouring rows lie in different banks
  m.mark_words = marked ? static_cast<int>((num_classes + 31) / 32) : 0;
  m.inv = static_cast<int>(plan.slice) * m.row_bytes;
  m.classes = m.inv + 4 * pixels;
  m.codes = m.classes + 8 * pixels;
  m.squares = m.codes + 8 * m.units;
  m.marks = m.squares + (plan.own_norms ? 4 * warps * pixels : 0);
  m.counts = m.marks + 4 * warps * m.mark_words;
  const int count_bytes = marked ? 4 * static_cast<int>(num_classes) : 0;
  m.weights = m.counts + count_bytes;
  m.weight_sums = m.weights + (plan.weighted ? 4 * pixels : 0);
  m.bytes = m.weight_sums + (plan.weighted ? count_bytes : 0);
  return m;
}

SPCL_BOTH void cut_channels(MomentsPlan& plan, const Features& x, int type_bytes, int64_t slice) {
  plan.slice = slice;
  plan.slices = ceil_div(x.dim, slice);
  plan.threads = static_cast<int>(
      between(ceil_div(ceil_div(slice, kThreadChannels), 32) * 32, slice <= 64 ? 64 : 128, kMostThreads));
  plan.tile_pixels = (slice > 1024 ? 64 : 128) / type_bytes;
  plan.tiles_per_image = ceil_div(x.height * x.width, plan.tile_pixels);
  plan.tiles = plan.tiles_per_image * x.batch;
}

SPCL_BOTH void cut_pixels(MomentsPlan& plan, int64_t ranges) {
  plan.tiles_per_range = ceil_div(plan.tiles > 0 ? plan.tiles : 1, between(ranges, 1, plan.tiles > 0 ? plan.tiles : 1));
  plan.ranges = ceil_div(plan.tiles, plan.tiles_per_range);
}

// Partial sums stay below a quarter of the features' elements (or are one range).
SPCL_BOTH MomentsPlan moments_plan(const Features& x, int64_t num_classes, bool normalize, int64_t shared_limit,
                                   bool weighted = false) {
  const int type_bytes = x.type == kFloat32 ? 4 : 2;
  const int64_t pixels = x.batch * x.height * x.width, affordable = pixels / (4 * num_classes);
  MomentsPlan plan{};
  plan.weighted = weighted;
  cut_channels(plan, x, type_bytes, x.dim);
  plan.own_norms = normalize;
  const MomentsMemory whole = moments_memory(plan, type_bytes, num_classes);
  const bool parallel = affordable >= (plan.tiles < kEnoughRanges ? plan.tiles : kEnoughRanges);
  if (normalize && x.dim <= kThreadChannels * kMostThreads && whole.bytes <= shared_limit && parallel) {
    const int64_t resident = between(shared_limit / whole.bytes, 1, 4);
    cut_pixels(plan, affordable < kBlocks * resident ? affordable : kBlocks * resident);
  } else {
    plan.own_norms = false;
    const int64_t ranges = between(affordable, 1, 4 * kBlocks);
    cut_channels(plan, x, type_bytes, between(ceil_div(ceil_div(x.dim * ranges, 4 * kBlocks), 32) * 32, 32, 256));
    cut_pixels(plan, ranges);
    plan.norms_floats = normalize ? pixels : 0;
  }
  plan.sums_floats = plan.ranges * num_classes * x.dim;
  plan.counts_ints = plan.ranges * num_classes;
  return plan;
}

// The last range first: whoever reads the features from the front next finds the front in the L2 cache.
SPCL_BOTH int64_t range_of_block(const MomentsPlan& plan, int64_t block) {
  return plan.ranges - 1 - block / plan.slices;
}

// ---- the label walk ---------------------------------------------------------------------------------------------

constexpr int kEmptyUnit = -1;  // no pixel of the unit has a class
constexpr int kMixedUnit = -2;  // pixel by pixel

// What a walk does with a unit of `count` pixels: all of one class (>= 0), nothing, or one pixel after the other.
SPCL_BOTH int unit_code(const int* classes, int count) {
  bool same = true, none = true;
  for (int i = 0; i < count; ++i) {
    same = same && classes[i] == classes[0];
    none = none && classes[i] < 0;
  }
  return none ? kEmptyUnit : same ? classes[0] : kMixedUnit;
}

struct TilePlace {
  int64_t image, first;  // first pixel within the image
  int pixels;            // of the tile that are in the image
};

SPCL_BOTH TilePlace tile_place(const MomentsPlan& plan, int64_t pixels_per_image, int64_t tile) {
  const int64_t image = tile / plan.tiles_per_image, first = (tile - image * plan.tiles_per_image) * plan.tile_pixels;
  const int64_t left = pixels_per_image - first;
  return {image, first, static_cast<int>(left < plan.tile_pixels ? left : plan.tile_pixels)};
}

}  // namespace spcl::gpu
