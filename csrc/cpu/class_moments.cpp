// class_moments, a tile of pixels at a time: the label walk. Compiled once per instruction set (SPCL_ISA).
//
// A tile is packed into L2 while its norms accumulate. Then each block of V channels is turned in registers and walks
// the pixels with its sums, which go to memory only where the label changes. As soon as a block is summed, the same
// block of the next tile is packed into its place: memory hides behind the arithmetic. No one-hot matrix, no atomics;
// the cost does not grow with K.
#include "tile.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

constexpr int64_t kChunk = 64;  // channels whose squares are summed before they are added to the rest

struct MomentPanel {
  Span span;
  alignas(64) int32_t label[kPanel];
  alignas(64) float inv_norm[kPanel];  // the sum of squares until the tile is packed
  alignas(64) float squares[kPanel];   // of the chunk that is being packed
  float weight[kPanel];
};

struct MomentTile {
  MomentPanel panel[kMaxPanels];
  int64_t count;
};

// The labelled panels of a tile.
void read_tile(const Moments& a, int64_t tile, MomentTile* to) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  to->count = 0;
  for (int64_t m = 0; m < t.panels; ++m) {
    MomentPanel& panel = to->panel[to->count];
    panel.span = make_span(a.x, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    if (!read_labels(a.labels, a.x, panel.span, panel.label, a.first_bad)) continue;
    for (int p = 0; p < kPanel; ++p) panel.inv_norm[p] = panel.squares[p] = 0;
    ++to->count;
  }
}

// ---- packing ----------------------------------------------------------------------------------------------------

// Where the block of channels [d, d + V) of a panel lies: the panels of a tile follow each other.
float* slot(const Moments& a, float* packed, int64_t d, int64_t panel) {
  return packed + (d * a.tiles.panels + panel * V) * kPanel;
}

// What is packed one round of the tile's panels after channel d of this one: early enough for memory, and no earlier,
// since rows that are far apart may all fall on few sets of a cache. After the last channel: the first ones of the tile
// that lies behind.
Ahead ahead_of_block(const Moments& a, const Span& span, int64_t d) {
  const int64_t next = d + V < a.x.dim ? d + V : 0;
  Ahead ahead = ahead_of(a.x, span, next, smaller(V, a.x.dim - next));
  const int64_t behind = span.first + a.tiles.panels * kPanel;
  if (next == 0) ahead.from += a.tiles.panels * kPanel * a.x.stride_w * size_of(a.x.type);
  if (next == 0 && behind + kPanel > a.x.height * a.x.width) ahead.rows = 0;
  return ahead;
}

// A chunk's squares are added up across its blocks, then to the others': as add_squares does it.
void add_squares_of_block(const float* rows, int64_t channels, bool chunk_ends, MomentPanel& panel) {
  for (int v = 0; v < kPanel; v += V) {
    vf sum = load(panel.squares + v);
    for (int64_t d = 0; d < channels; ++d) {
      const vf x = load(rows + d * kPanel + v);
      sum += x * x;
    }
    if (chunk_ends) store(panel.inv_norm + v, load(panel.inv_norm + v) + sum);
    store(panel.squares + v, chunk_ends ? vf{} : sum);
  }
}

void pack_block(const Moments& a, MomentPanel& panel, int64_t d, float* to) {
  const int64_t n = smaller(V, a.x.dim - d);
  pack(a.x, panel.span, d, n, to);
  if (a.normalize) add_squares_of_block(to, n, (d + n) % kChunk == 0 || d + n == a.x.dim, panel);
  const Ahead ahead = ahead_of_block(a, panel.span, d);
  Fetch fetch = {ahead, 1};
  fetch();
}

// After the tile is packed: norms, weights, counts.
void finish_panel(const Moments& a, MomentPanel& panel, int64_t group) {
  const int64_t partial = group * a.num_classes;
  if (a.normalize) invert_norms(panel.inv_norm);
  for (int p = 0; p < kPanel; ++p) {
    if (!a.normalize) panel.inv_norm[p] = 1;
    panel.weight[p] = 1;
    if (panel.label[p] >= 0) ++a.counts[partial + panel.label[p]];
  }
  if (!a.pixel_weight.data) return;
  scale_by(a.pixel_weight, a.x, panel.span, panel.label, panel.weight);
  for (int p = 0; p < kPanel; ++p)
    if (panel.label[p] >= 0) a.weights[partial + panel.label[p]] += panel.weight[p];
}

// ---- sums -------------------------------------------------------------------------------------------------------

// The first `channels` lanes.
SPCL_INLINE
void add_to(float* to, vf sums, int64_t channels) {
  if (channels >= V) return store(to, load(to) + sums);
  for (int i = 0; i < channels; ++i) to[i] += sums[i];
}

// rows [V][kPanel] of a block of channels through the labelled pixels of a panel.
template <bool kSquare, bool kWeighted>
void walk(const MomentPanel& panel, const float* rows, int64_t channels, int64_t dim, float* sums) {
  vf acc = {};
  int32_t label = -1;
  for (int p = 0; p < kPanel; p += V) {
    vf pixel[V];
    for (int c = 0; c < V; ++c) pixel[c] = load(rows + c * kPanel + p);
    transpose(pixel);
    for (int i = 0; i < V; ++i) {
      const int32_t own = panel.label[p + i];
      if (own < 0) continue;
      if (own != label) {
        if (label >= 0) add_to(sums + label * dim, acc, channels);
        acc = vf{}, label = own;
      }
      const vf unit = pixel[i] * panel.inv_norm[p + i];
      if constexpr (kWeighted)
        acc += kSquare ? unit * unit * panel.weight[p + i] : unit * panel.weight[p + i];
      else
        acc += kSquare ? unit * unit : unit;
    }
  }
  if (label >= 0) add_to(sums + label * dim, acc, channels);
}

void walk(const Moments& a, const MomentPanel& panel, const float* rows, int64_t d, int64_t group) {
  const int64_t dim = a.x.dim, channels = dim - d, at = group * a.num_classes * dim + d;
  if (a.pixel_weight.data) {
    walk<false, true>(panel, rows, channels, dim, a.sums + at);
    if (a.squares) walk<true, true>(panel, rows, channels, dim, a.squares + at);
    return;
  }
  walk<false, false>(panel, rows, channels, dim, a.sums + at);
  if (a.squares) walk<true, false>(panel, rows, channels, dim, a.squares + at);
}

}  // namespace

int64_t class_moments_scratch(const Moments& a) { return a.tiles.panels * ((a.x.dim + V - 1) / V * V) * kPanel; }

// Block by block of channels: this tile is summed and the next one is packed, panel after panel.
void class_moments(const Moments& a, int64_t group, float* packed) {
  const int64_t first = group * a.tiles.count / a.groups, last = (group + 1) * a.tiles.count / a.groups;
  MomentTile tile[2];
  tile[0].count = 0;
  for (int64_t t = first; t <= last; ++t) {
    MomentTile &now = tile[(t - first) % 2], &next = tile[(t - first + 1) % 2];
    for (int64_t m = 0; m < now.count; ++m) finish_panel(a, now.panel[m], group);
    next.count = 0;
    if (t < last) read_tile(a, t, &next);
    for (int64_t d = 0; d < a.x.dim; d += V)
      for (int64_t m = 0; m < now.count || m < next.count; ++m) {
        float* rows = slot(a, packed, d, m);
        if (m < now.count) walk(a, now.panel[m], rows, d, group);
        if (m < next.count) pack_block(a, next.panel[m], d, rows);
      }
  }
}

}  // namespace SPCL_ISA
}  // namespace spcl
