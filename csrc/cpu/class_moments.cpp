// class_moments, one tile of pixels at a time: the label walk. Compiled once per instruction set (SPCL_ISA).
//
// A tile is turned into rows of channels (one row a pixel) in L2 while its norms accumulate; then each block of
// channels walks the pixels with its sums in registers and goes to memory only where the label changes. No one-hot
// matrix, no atomics; the cost does not grow with K.
#include "tile.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

constexpr int64_t kChunk = 64;  // channels packed at a time: 16 KB
constexpr int kWalk = 4;        // vectors of channels that walk together

// A row of channels is padded so that consecutive pixels do not fall on the same cache sets.
int64_t row_stride(const Moments& a) { return (a.x.dim + kWalk * V - 1) / (kWalk * V) * (kWalk * V) + 16; }

// packed [channels][kPanel] -> rows [kPanel][stride]
void turn(const float* packed, int64_t channels, int64_t stride, float* rows) {
  for (int p = 0; p < kPanel; p += V) {
    for (int64_t d = 0; d < channels; d += V) {
      vf block[V];
      for (int i = 0; i < V; ++i) block[i] = d + i < channels ? load(packed + (d + i) * kPanel + p) : vf{};
      transpose(block);
      for (int i = 0; i < V; ++i) store(rows + (p + i) * stride + d, block[i]);
    }
  }
}

void flush(vf (&acc)[kWalk], float* to, int64_t channels) {
  for (int v = 0; v < kWalk; ++v) {
    if ((v + 1) * V <= channels)
      store(to + v * V, load(to + v * V) + acc[v]);
    else
      for (int i = 0; v * V + i < channels; ++i) to[v * V + i] += acc[v][i];
    acc[v] = vf{};
  }
}

// One block of channels through the labelled pixels of a panel. weight: of a pixel, where the moments are weighted.
template <bool kSquare, bool kWeighted>
void walk(const float* rows, int64_t stride, const int* pixel, const int32_t* label, const float* inv_norm,
          const float* weight, int count, int64_t channels, int64_t dim, float* sums) {
  vf acc[kWalk] = {};
  for (int j = 0; j < count; ++j) {
    const float* row = rows + pixel[j] * stride;
    for (int v = 0; v < kWalk; ++v) {
      vf unit = load(row + v * V) * inv_norm[pixel[j]];
      if constexpr (kWeighted)
        acc[v] += kSquare ? unit * unit * weight[pixel[j]] : unit * weight[pixel[j]];
      else
        acc[v] += kSquare ? unit * unit : unit;
    }
    if (j + 1 == count || label[pixel[j + 1]] != label[pixel[j]]) flush(acc, sums + label[pixel[j]] * dim, channels);
  }
}

template <bool kWeighted>
void walk_channels(const Moments& a, const float* rows, const int* pixel, const int32_t* label, const float* inv_norm,
                   const float* weight, int count, int64_t group) {
  const int64_t stride = row_stride(a), dim = a.x.dim, at = group * a.num_classes * dim;
  for (int64_t d = 0; d < dim; d += kWalk * V) {
    walk<false, kWeighted>(rows + d, stride, pixel, label, inv_norm, weight, count, dim - d, dim, a.sums + at + d);
    if (a.squares)
      walk<true, kWeighted>(rows + d, stride, pixel, label, inv_norm, weight, count, dim - d, dim, a.squares + at + d);
  }
}

}  // namespace

int64_t class_moments_scratch(const Moments& a) { return kChunk * kPanel + kPanel * row_stride(a); }

void class_moments(const Moments& a, int64_t tile, int64_t group, float* scratch) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  const int64_t stride = row_stride(a), dim = a.x.dim, partial = group * a.num_classes;
  float *packed = scratch, *rows = scratch + kChunk * kPanel;
  alignas(64) int32_t label[kPanel];
  alignas(64) float inv_norm[kPanel];
  float weight[kPanel];
  int pixel[kPanel];
  for (int64_t m = 0; m < t.panels; ++m) {
    const Span span = make_span(a.x, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    if (!read_labels(a.labels, a.x, span, label, a.first_bad)) continue;
    int count = 0;
    for (int p = 0; p < kPanel; ++p) {
      inv_norm[p] = 0;
      if (label[p] >= 0) pixel[count++] = p, ++a.counts[partial + label[p]];
    }
    for (int64_t d = 0; d < dim; d += kChunk) {
      const int64_t n = smaller(kChunk, dim - d);
      pack(a.x, span, d, n, packed);
      if (a.normalize) add_squares(packed, n, inv_norm);
      turn(packed, n, stride, rows + d);
    }
    if (a.normalize)
      invert_norms(inv_norm);
    else
      for (int p = 0; p < kPanel; ++p) inv_norm[p] = 1;
    if (!a.pixel_weight.data) {
      walk_channels<false>(a, rows, pixel, label, inv_norm, nullptr, count, group);
      continue;
    }
    for (int p = 0; p < kPanel; ++p) weight[p] = 1;
    scale_by(a.pixel_weight, a.x, span, label, weight);
    for (int j = 0; j < count; ++j) a.weights[partial + label[pixel[j]]] += weight[pixel[j]];
    walk_channels<true>(a, rows, pixel, label, inv_norm, weight, count, group);
  }
}

}  // namespace SPCL_ISA
}  // namespace spcl
