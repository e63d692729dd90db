// How prototype_contrastive_loss is cut into blocks, warps and shared memory: sizes only, for host and device, read by
// any C++ compiler.
#pragma once
#include "../kernels.h"
#include "../sizes.h"

namespace spcl::gpu {

constexpr int kTile = 64;   // pixels of one image that a block works on
constexpr int kPiece = 32;  // classes of the gradient's product that are staged together
constexpr int kLogitsRow =
    72;  // floats between two classes of a tile's logits: 8 pixels x 4 classes meet in 32 different banks
constexpr int kContrastThreads =
    384;  // of a block at most: with more, a thread could not have the 160 registers that it needs
constexpr int kMaxContrastClasses = 240;  // whose logits a block holds at once: 12 warps of 20

// What depends on the size of a feature: 4 bytes (FMA) or 2 (tensor core).
template <int kBytes> struct ContrastShape {
  static constexpr bool kHalf = kBytes == 2;
  static constexpr int kClasses = kHalf ? 32 : 20;  // classes whose logits a warp accumulates
  static constexpr int kChunk = kHalf ? 64 : 32;    // channels that are staged together
  static constexpr int kRow =
      kHalf ? 72 : 68;  // elements of a staged row of pixels: 64, one more where it is shifted, and padding
  static constexpr int kProtoRow = kHalf ? 72 : 36;   // elements of a staged row of channels of a prototype
  static constexpr int kWeightRow = kHalf ? 32 : 72;  // 4-byte words that the weights of one class need
  static constexpr int kSums =
      kClasses * (kHalf ? 2 : 4) + (kHalf ? 8 : 4);  // floats that a lane accumulates: logits, squares
};

// The warps of a block: `groups` of classes, each done by `slices` warps that share the channels of a chunk out.
struct ContrastWarps {
  int groups, slices, count;
};

SPCL_BOTH ContrastWarps contrast_warps(int64_t num_classes, int classes_of_warp) {
  const int groups = static_cast<int>(ceil_div(num_classes, classes_of_warp));
  return {groups, groups == 1 ? 4 : groups == 2 ? 2 : 1, groups < 4 ? 4 : groups};
}

SPCL_BOTH int64_t pieces_of(int64_t num_classes) { return ceil_div(num_classes, kPiece); }

// Shared memory of a block, in bytes from its beginning. Streamed: stages (a chunk of pixels, then the prototypes'
// part); over them, once they are done with, what the slices exchange and the logits; then the weights; then what is
// known of each pixel. Resident: every chunk of pixels in a slot of its own, where it stays; the prototypes' stages,
// and over them what the slices exchange; then logits, weights, pixels.
struct ContrastShared {
  int stages;
  bool resident;
  int64_t x_step, proto_at, proto_step;  // from one slot of pixels to the next; the same of the prototypes' part
  int64_t exchange_at, logits_at, weights_at, pixels_at, bytes;
};

// Where the pixels of a chunk lie; `item` counts what is staged.
SPCL_BOTH int64_t x_slot(const ContrastShared& shared, int64_t chunk, int64_t item) {
  return (shared.resident ? chunk : item % shared.stages) * shared.x_step;
}
SPCL_BOTH int64_t proto_slot(const ContrastShared& shared, int64_t item) {
  return shared.proto_at + item % shared.stages * shared.proto_step;
}

constexpr int64_t kPixelBytes = 40;  // of a pixel in PixelTable, contrast_tile.cuh

template <int kBytes> SPCL_BOTH int64_t pixels_bytes() {
  return int64_t{ContrastShape<kBytes>::kChunk} * ContrastShape<kBytes>::kRow * kBytes;
}
template <int kBytes> SPCL_BOTH int64_t padded_classes(const ContrastWarps& warps) {
  return warps.groups * ContrastShape<kBytes>::kClasses;
}
// Floats between two channels of the prototypes' columns: a multiple of 4, as they are read, but not of 8: where they
// are written, 8 channels x 4 classes meet in 32 different banks.
SPCL_BOTH int column_row(int classes) { return classes % 8 ? classes : classes + 4; }

template <int kBytes> SPCL_BOTH int64_t prototypes_bytes(const ContrastWarps& warps) {
  using Shape = ContrastShape<kBytes>;
  const int64_t classes = padded_classes<kBytes>(warps);
  return kBytes *
         (Shape::kHalf ? classes * Shape::kProtoRow : int64_t{column_row(static_cast<int>(classes))} * Shape::kChunk);
}
template <int kBytes> SPCL_BOTH int64_t exchange_bytes(const ContrastWarps& warps) {
  return warps.slices / 2 * static_cast<int64_t>(warps.groups) * ContrastShape<kBytes>::kSums * 32 * 4;
}
template <int kBytes> SPCL_BOTH int64_t logits_bytes(const ContrastWarps& warps) {
  return padded_classes<kBytes>(warps) * kLogitsRow * 4;
}
template <int kBytes> SPCL_BOTH int64_t weights_bytes(int64_t classes) {
  return pieces_of(classes) * kPiece * ContrastShape<kBytes>::kWeightRow * 4;
}

// classes: rows of logits that are formed here (0: they are read); gradient: whether the gradient's product is.
template <int kBytes> SPCL_BOTH ContrastShared contrast_shared(int64_t classes, int64_t gradient_classes) {
  using Shape = ContrastShape<kBytes>;
  const ContrastWarps warps = contrast_warps(classes, Shape::kClasses);
  const int64_t pixels = pixels_bytes<kBytes>(), piece = gradient_classes ? kPiece * Shape::kProtoRow * kBytes : 0;
  const int stages = classes <= 64 ? 3 : 2;
  const int64_t stage = pixels + larger_of(prototypes_bytes<kBytes>(warps), piece);
  const int64_t region =
      larger_of(stages * stage, larger_of(exchange_bytes<kBytes>(warps), logits_bytes<kBytes>(warps)));
  const int64_t weights = weights_bytes<kBytes>(gradient_classes);
  return {stages, false, stage, pixels, stage, 0, 0, region, region + weights, region + weights + kTile * kPixelBytes};
}

constexpr int64_t kSlopesBytes = 4 * 8 * kTile;  // of a tile's sums over the classes, in double

// Whether a block may hold the weights of all classes; else they are streamed.
template <int kBytes> SPCL_BOTH bool fits_without_streaming(int64_t classes, bool saved_logits, int64_t limit) {
  return classes <= kMaxContrastClasses &&
         contrast_shared<kBytes>(saved_logits ? 0 : classes, classes).bytes + kSlopesBytes <= limit;
}

constexpr int64_t kSeenBytes = 4 * 32 * kTile;  // of what four lanes of each pixel have seen of the classes

// A forward of many classes takes so many at a time: as a block may hold, less where its memory is small.
template <int kBytes> SPCL_BOTH int64_t forward_classes(int64_t limit) {
  constexpr int64_t kClasses = ContrastShape<kBytes>::kClasses;
  int64_t classes = kMaxContrastClasses;
  while (classes > 3 * kClasses && contrast_shared<kBytes>(classes, 0).bytes + kSeenBytes > limit)
    classes = (ceil_div(classes, kClasses) - 1) * kClasses;
  return classes;
}

// Streamed: blocks of the classes of so many warps, all of which work on the products, too.
constexpr int kStreamedWarps = 4;
constexpr int kSumsRow = 68;  // floats of a channel's sums

// Three warps' where the memory of four leaves no room for the sums of one chunk of channels; with fewer, warps would
// share channels out, and the logits would not be the forward's to the last bit.
template <int kBytes> SPCL_BOTH int streamed_warps(bool saved_logits, int64_t limit) {
  const int64_t classes = kStreamedWarps * ContrastShape<kBytes>::kClasses;
  const int64_t used = contrast_shared<kBytes>(saved_logits ? 0 : classes, classes).bytes + kSlopesBytes;
  return used + ContrastShape<kBytes>::kChunk * kSumsRow * 4 <= limit ? kStreamedWarps : kStreamedWarps - 1;
}
constexpr int64_t kStreamedChannels = 256;  // of a slice at most: their sums take 68 KB

// Chunks of channels of a slice, whose sums `left` bytes have to hold: no more than there are, a power of two.
template <int kBytes> SPCL_BOTH int64_t streamed_chunks(int64_t dim, int64_t left) {
  constexpr int64_t kChunk = ContrastShape<kBytes>::kChunk;
  int64_t chunks = kStreamedChannels / kChunk;
  while (chunks > 1 && (chunks * kChunk * kSumsRow * 4 > left || chunks / 2 * kChunk >= dim)) chunks /= 2;
  return chunks;
}

// The same for the prototypes' gradient: a block owns kBlockChannels channels and the classes of `groups` warps, which
// form the logits as the forward did, channel by channel in the same order: logsumexp fits the logits to the last bit.
constexpr int kBlockChannels = 64;
constexpr int kOwnRow = 72;  // floats between two classes' weights

SPCL_BOTH int prototype_groups(int64_t num_classes, int classes_of_warp) {
  const int groups = contrast_warps(num_classes, classes_of_warp).groups;
  return groups < 3 ? groups : 4;
}
// Rows of their weights.
template <int kBytes> SPCL_BOTH int own_classes(int groups) {
  return groups == 1 ? kPiece : groups * ContrastShape<kBytes>::kClasses;
}

template <int kBytes> SPCL_BOTH ContrastShared prototype_shared(bool forms_logits, int groups) {
  using Shape = ContrastShape<kBytes>;
  const ContrastShared dots = contrast_shared<kBytes>(forms_logits ? groups * Shape::kClasses : 0, 0);
  const int64_t region = larger_of(dots.weights_at, kBlockChannels * Shape::kRow * kBytes),
                weights = int64_t{own_classes<kBytes>(groups)} * kOwnRow * 4;
  return {dots.stages, false, dots.x_step, dots.proto_at,    dots.proto_step,
          0,           0,     region,      region + weights, region + weights + kTile * kPixelBytes};
}

// Channels of a block, in chunks.
struct ContrastChannels {
  int64_t first, chunks;
};

template <int kBytes> SPCL_BOTH int64_t chunks_of(int64_t dim) { return ceil_div(dim, ContrastShape<kBytes>::kChunk); }

// One pass: the D channels of a tile of pixels stay in the shared memory of a cluster of `blocks`, `chunks` in each
// block but the last ones. Each block finishes the softmax of kTile / blocks of the pixels.
struct OnePassPlan {
  int blocks;
  int64_t chunks;
  ContrastShared shared;
};

constexpr int kMaxCluster = 8;  // what every device with clusters can schedule
constexpr int kMaxOnePassClasses = kPiece;
constexpr int64_t kHalfShared =
    113 << 10;  // bytes of which two blocks fit into a multiprocessor's 228 KB, with 1 KB a block for the system

template <int kBytes> SPCL_BOTH OnePassPlan one_pass_of(int64_t classes, int64_t dim, int blocks) {
  const ContrastWarps warps = contrast_warps(classes, ContrastShape<kBytes>::kClasses);
  const int64_t chunks = ceil_div(chunks_of<kBytes>(dim), blocks), pixels = pixels_bytes<kBytes>();
  const int stages = 4;
  const int64_t proto =
      larger_of(prototypes_bytes<kBytes>(warps), int64_t{kPiece} * ContrastShape<kBytes>::kProtoRow * kBytes);
  const int64_t proto_at = chunks * pixels,
                logits_at = proto_at + larger_of(stages * proto, exchange_bytes<kBytes>(warps));
  const int64_t weights_at = logits_at + logits_bytes<kBytes>(warps),
                pixels_at = weights_at + weights_bytes<kBytes>(classes);
  return {blocks,
          chunks,
          {stages, true, pixels, proto_at, proto, proto_at, logits_at, weights_at, pixels_at,
           pixels_at + kTile * kPixelBytes}};
}

// The smallest cluster of which two blocks fit into a multiprocessor: one loads while the other computes. By the sizes
// alone.
template <int kBytes> SPCL_BOTH OnePassPlan one_pass_plan(int64_t classes, int64_t dim) {
  int blocks = 1;
  while (blocks < kMaxCluster && one_pass_of<kBytes>(classes, dim, blocks).shared.bytes > kHalfShared) blocks *= 2;
  return one_pass_of<kBytes>(classes, dim, blocks);
}

template <int kBytes> SPCL_BOTH ContrastChannels channels_of_rank(const OnePassPlan& plan, int64_t dim, int rank) {
  const int64_t first = rank * plan.chunks, left = chunks_of<kBytes>(dim) - first;
  return {first * ContrastShape<kBytes>::kChunk, left < 0 ? 0 : left < plan.chunks ? left : plan.chunks};
}

// The labels are counted before the one pass by so many blocks, `each` pixels of the batch a block.
struct OnePassCount {
  int64_t each, blocks;
};

constexpr int kCountThreads = 256;

SPCL_BOTH OnePassCount one_pass_count(int64_t pixels) {
  const int64_t most = 128, steps = ceil_div(pixels, most * kCountThreads), each = steps * kCountThreads;
  return {each, ceil_div(pixels, each)};
}

// Tile t of the batch: pixels [first, first + count) of an image.
struct ContrastTile {
  int64_t image, first;
  int count;
};

SPCL_BOTH int64_t contrast_tiles(int64_t pixels) { return ceil_div(pixels, kTile); }

SPCL_BOTH ContrastTile contrast_tile(int64_t tile, int64_t pixels) {
  const int64_t each = contrast_tiles(pixels), image = tile / each, first = (tile - image * each) * kTile;
  return {image, first, pixels - first < kTile ? static_cast<int>(pixels - first) : kTile};
}

// Where word w (two half floats) of a row begins, in elements from its first pixel: rows that begin in the middle of a
// word are read from its beginning. And how many of its bytes belong to the `count` pixels (the one before them is
// another's and is not looked at).
SPCL_BOTH int word_begin(int word, int shifted) { return 2 * word - shifted; }
SPCL_BOTH int word_given(int begin, int count) { return begin + 1 < count ? 4 : begin < count ? 2 : 0; }

// Tensor core, forward: pixel of column n of product j. A lane's 8 pixels of a row lie side by side: one 16-byte read
// serves 8 products.
SPCL_BOTH int forward_pixel(int product, int column) { return column * 8 + product; }
// Tensor core, backward: the 16 pixels that a lane gets, columns 2q and 2q + 1 of 8 products, lie side by side.
SPCL_BOTH int backward_pixel(int product, int column) { return column / 2 * 16 + product * 2 + column % 2; }
// Its inverse, as the place of the weight of (class, pixel) among the half floats that a lane reads as its part of the
// second factor.
SPCL_BOTH int weight_place(int cls, int pixel) {
  const int product = pixel % 16 / 2, column = pixel / 16 * 2 + pixel % 2;
  const int in_step = cls % 16, lane = column * 4 + in_step % 8 / 2, word = (product % 2) * 2 + in_step / 8;
  return (((cls / 16 * 4 + product / 2) * 32 + lane) * 4 + word) * 2 + in_step % 2;
}

// The pixel whose weight is in this 4-byte word of the weights, kTile or more where none is.
template <int kBytes> SPCL_BOTH int pixel_of_word(int word) {
  if (kBytes == 4) return word % ContrastShape<4>::kWeightRow;
  return backward_pixel(word / 128 % 4 * 2 + word % 4 / 2, word / 16 % 8);
}

// The tiles are added up in `groups` of `tiles_per_group`, by the sizes alone: as many as give some 1024 blocks and 32
// MB of partial sums.
struct ContrastGroups {
  int64_t tiles_per_group, groups;
};

SPCL_BOTH ContrastGroups contrast_groups(int64_t tiles, int64_t blocks, int64_t floats) {
  int64_t groups = ceil_div(1024, blocks);
  const int64_t affordable = larger_of(1, (int64_t{8} << 20) / floats);
  if (groups > affordable) groups = affordable;
  if (groups > tiles) groups = tiles;
  const int64_t each = ceil_div(tiles, groups);
  return {each, ceil_div(tiles, each)};
}

}  // namespace spcl::gpu
