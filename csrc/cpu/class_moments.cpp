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

// packed [channels][kPanel] -> rows [kPanel][stride]; `between` is called kTurns times at most.
constexpr int64_t kTurns = kPanel / V * (kChunk / V);
template <class Between>
void turn(const float* packed, int64_t channels, int64_t stride, float* rows, Between& between) {
  for (int p = 0; p < kPanel; p += V) {
    for (int64_t d = 0; d < channels; d += V) {
      between();
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

struct LabelledPanel {
  Span span;
  alignas(64) int32_t label[kPanel];
};

// The labelled panels of a tile, and how many there are.
int64_t read_panels(const Moments& a, int64_t tile, LabelledPanel* panels) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  int64_t count = 0;
  for (int64_t m = 0; m < t.panels; ++m) {
    LabelledPanel& panel = panels[count];
    panel.span = make_span(a.x, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    if (read_labels(a.labels, a.x, panel.span, panel.label, a.first_bad)) ++count;
  }
  return count;
}

// A panel's rows through the walk.
void add_panel(const Moments& a, const LabelledPanel& panel, const float* rows, const float* inv_norm, int64_t group) {
  const int64_t partial = group * a.num_classes;
  float weight[kPanel];
  int pixel[kPanel], count = 0;
  for (int p = 0; p < kPanel; ++p)
    if (panel.label[p] >= 0) pixel[count++] = p, ++a.counts[partial + panel.label[p]];
  if (!a.pixel_weight.data) return walk_channels<false>(a, rows, pixel, panel.label, inv_norm, nullptr, count, group);
  for (int p = 0; p < kPanel; ++p) weight[p] = 1;
  scale_by(a.pixel_weight, a.x, panel.span, panel.label, weight);
  for (int j = 0; j < count; ++j) a.weights[partial + panel.label[pixel[j]]] += weight[pixel[j]];
  walk_channels<true>(a, rows, pixel, panel.label, inv_norm, weight, count, group);
}

}  // namespace

int64_t class_moments_scratch(const Moments& a) { return 2 * kChunk * kPanel + kPanel * row_stride(a); }

// The next chunk is packed, into the other of two buffers, while this one is turned.
void class_moments(const Moments& a, int64_t tile, int64_t group, float* scratch) {
  const int64_t stride = row_stride(a), dim = a.x.dim, chunks = (dim + kChunk - 1) / kChunk;
  float* rows = scratch + 2 * kChunk * kPanel;
  LabelledPanel panels[kMaxPanels];
  const int64_t count = read_panels(a, tile, panels), total = count * chunks;
  const auto channels = [&](int64_t i) { return smaller(kChunk, dim - i % chunks * kChunk); };
  const auto packed = [&](int64_t i) { return scratch + i % 2 * kChunk * kPanel; };
  alignas(64) float inv_norm[kPanel];
  for (int64_t i = 0; i < total; ++i) {
    const int64_t d = i % chunks * kChunk, n = channels(i);
    if (i == 0) pack(a.x, panels[0].span, 0, n, packed(0));
    for (int p = 0; d == 0 && p < kPanel; ++p) inv_norm[p] = a.normalize ? 0.0f : 1.0f;
    PackBetween next = {};
    if (i + 1 < total) {
      const int64_t after = i + 2 < total ? i + 2 : i + 1;
      next = {&a.x,
              &panels[(i + 1) / chunks].span,
              (i + 1) % chunks * kChunk,
              channels(i + 1),
              packed(i + 1),
              ahead_of(a.x, panels[after / chunks].span, after % chunks * kChunk, channels(after)),
              kTurns};
    }
    if (a.normalize) add_squares(packed(i), n, inv_norm);
    turn(packed(i), n, stride, rows + d, next);
    next.finish();
    if (d + n < dim) continue;
    if (a.normalize) invert_norms(inv_norm);
    add_panel(a, panels[i / chunks], rows, inv_norm, group);
  }
}

}  // namespace SPCL_ISA
}  // namespace spcl
