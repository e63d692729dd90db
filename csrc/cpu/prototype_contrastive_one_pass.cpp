// prototype_contrastive_loss and the features' gradient in one pass, for an incoming gradient of 1, one tile of pixels
// at a time. Compiled once per instruction set (SPCL_ISA).
//
// The features are read once and the gradient is written once; logits, their exponentials and the weights of the
// prototypes take turns in one buffer in L1. The next chunk of features is packed between the blocks of this one's
// product, and the gradient leaves the registers of its product for its own place.
#include "contrast_panel.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

constexpr int64_t kGradientBlocks = 8;  // blocks of channels that go through `rows` together, where they do
constexpr int64_t kClassChunk = 96;     // classes contracted at a time, so that their weights stay in L1
constexpr double kLog2e = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;

struct OnePassPanel : Panel {
  Span gradient_span;
  alignas(64) float inward[kPanel];  // factor of x, subtracted
};

struct OnePassBuffers {
  float* packed;  // [panels][D][kPanel]
  float* z;       // [panels][padded K][kPanel]
  float* rows;    // [kGradientBlocks * rows of a block][kPanel]
};

int64_t place(const ContrastOnePass& a, float* scratch, OnePassBuffers* to) {
  const int64_t rows[] = {a.tiles.panels * a.x.dim, a.tiles.panels * padded(a.by_class),
                          kGradientBlocks * a.by_channel.rows};
  float** parts[] = {&to->packed, &to->z, &to->rows};
  int64_t used = 0;
  for (int i = 0; i < 3; ++i) *parts[i] = scratch + used, used += rows[i] * kPanel;
  return used;
}

// ---- logits -----------------------------------------------------------------------------------------------------

// The chunks of a tile's labelled panels, in the order in which they are multiplied: all panels' first chunk, then the
// second.
struct Chunks {
  const ContrastOnePass& a;
  const OnePassBuffers& b;
  const OnePassPanel* panels;
  int64_t used[kMaxPanels], count = 0, total = 0;

  Chunks(const ContrastOnePass& problem, const TileSpan& t, const OnePassPanel* panel, const OnePassBuffers& buffers)
      : a(problem), b(buffers), panels(panel) {
    for (int64_t m = 0; m < t.panels; ++m)
      if (panel[m].labelled) used[count++] = m;
    total = count * ((a.x.dim + kChunk - 1) / kChunk);
  }
  int64_t panel(int64_t i) const { return used[i % count]; }
  int64_t first(int64_t i) const { return i / count * kChunk; }
  int64_t channels(int64_t i) const { return smaller(kChunk, a.x.dim - first(i)); }
  float* packed(int64_t i) const { return b.packed + (panel(i) * a.x.dim + first(i)) * kPanel; }
  Ahead ahead(int64_t i) const {
    return i < total ? ahead_of(a.x, panels[panel(i)].span, first(i), channels(i))
                     : Ahead{(const char*)a.x.data, 0, 0, 0};
  }
};

void accumulate(const ContrastOnePass& a, const TileSpan& t, OnePassPanel* panel, const OnePassBuffers& b) {
  const Panels by_class = of_image(a.by_class, t.image);
  const Chunks chunks(a, t, panel, b);
  for (int64_t i = 0; i < chunks.total; ++i) {
    const int64_t m = chunks.panel(i), d = chunks.first(i), n = chunks.channels(i);
    float* chunk = chunks.packed(i);
    if (i == 0) pack(a.x, panel[m].span, d, n, chunk);
    if (a.normalize) add_squares(chunk, n, panel[m].inv_norm);
    PackBetween next = {nullptr, nullptr, 0, 0, nullptr, {}, by_class.blocks * kSteps};
    if (i + 1 < chunks.total)
      next = {&a.x,
              &panel[chunks.panel(i + 1)].span,
              chunks.first(i + 1),
              chunks.channels(i + 1),
              chunks.packed(i + 1),
              chunks.ahead(i + 2),
              by_class.blocks * kSteps};
    product_between(by_class, 0, by_class.blocks, d, n, chunk, b.z + m * padded(by_class) * kPanel, d > 0, next);
  }
}

// ---- loss and weights -------------------------------------------------------------------------------------------

// What a pixel's loss is multiplied by, but for the denominator; 0 where there is no label.
void set_scale(const ContrastOnePass& a, const Panel& panel, float* scale) {
  for (int v = 0; v < kPanel; v += V) store(scale + v, select(load(panel.label + v) >= 0, splat(1.0f), vf{}));
  if (a.class_weight)
    for (int p = 0; p < kPanel; ++p)
      if (panel.label[p] >= 0) scale[p] = a.class_weight[panel.label[p]];
  scale_by(a.pixel_weight, a.x, panel.span, panel.label, scale);
}

// The label's row of z, or the first where there is no label.
vf own_of(const float* z, vi label, int v) {
  vi lane;
  for (int i = 0; i < V; ++i) lane[i] = i;
  return gather(z + v, (label & (label >= 0)) * kPanel + lane);
}

// Dot products z [K][kPanel] -> weights of the prototypes in the gradient, in place; the panel's `inward`; the losses'
// sum. Logits are in units of log 2. As in loss_weights, w_y is minus the sum of the others, and p is normalised by
// its own sum. Lanes without a label hold anything.
double weigh(const ContrastOnePass& a, OnePassPanel& panel, float* z) {
  const double unit = kLog2e / a.temperature;
  const float high = (float)unit, low = (float)(unit - high), share = a.denominator != 0 ? 1.0f / a.denominator : 0.0f;
  alignas(64) float scale[kPanel], map[kPanel];
  set_scale(a, panel, scale);
  for (int v = 0; v < kPanel; v += V) {
    const vi own = load(panel.label + v);
    const vf inv = load(panel.inv_norm + v), factor = fused(inv, splat(high), inv * low);
    vf top = splat(-__builtin_inff());
    for (int64_t k = 0; k < a.num_rows; ++k) {
      const vf value = load(z + k * kPanel + v) * factor;
      store(z + k * kPanel + v, value);
      top = larger(value, top);
    }
    const vf own_logit = own_of(z, own, v);
    LongSum other_sum, slope_sum;
    for (int64_t first = 0; first < a.num_rows; first += kSumBlock) {
      vf part = {}, part_slope = {};
      for (int64_t k = first; k < smaller(first + kSumBlock, a.num_rows); ++k) {
        const vf value = load(z + k * kPanel + v);
        const vf e = select(own == (int32_t)k, vf{}, exp2(value - top));
        store(z + k * kPanel + v, e);
        part += e;
        part_slope += e * (value - own_logit);
      }
      other_sum.add(part);
      slope_sum.add(part_slope);
    }
    const vf others = other_sum.total, total = others + exp2(own_logit - top), weight = load(scale + v);
    store(map + v, select(own >= 0, ((top - own_logit) * kLn2 + log(total)) * weight, vf{}));
    const vf of_pixel = weight * share / total, along = of_pixel * (inv / a.temperature);
    for (int64_t k = 0; k < a.num_rows; ++k) {
      const vf e = load(z + k * kPanel + v);
      store(z + k * kPanel + v, select(own == (int32_t)k, -others, e) * along);
    }
    const vi clamped = inv >= kClampedInvNorm;  // a clamped norm is a constant: no radial term
    store(panel.inward + v, select(clamped, vf{}, slope_sum.total * kLn2 * of_pixel * inv * inv));
  }
  double sum[8] = {};
  for (int p = 0; p < kPanel; ++p) sum[p % 8] += map[p];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// ---- gradient ---------------------------------------------------------------------------------------------------

// Rows of pixels that stay where they are: stride between rows of channels.
template <class T> struct Rows {
  T* data;
  int64_t stride;
};

// Channels of one block, M or fewer: to = a[n][M]^T w[n][kPanel] + begun - inward * x, exactly 0 where there is no
// label. begun == nullptr stands for zeros, x [channels][kPanel] == nullptr for no last term.
template <int M, bool kPastCache, class T> SPCL_INLINE
void gradient_block(const OnePassPanel& panel, const float* __restrict a, int64_t n, const float* __restrict w,
                    const float* begun, int64_t channels, const float* x, Rows<T> to) {
  for (int s = 0; s < kPanel; s += kStep * V) {
    vf acc[M][kStep];
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < kStep; ++v) acc[i][v] = vf{};
    for (int64_t j = 0; j < n; ++j) {
      vf row[kStep];
      for (int v = 0; v < kStep; ++v) row[v] = load(w + j * kPanel + s + v * V);
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < kStep; ++v) acc[i][v] += a[j * M + i] * row[v];
    }
    for (int i = 0; i < M; ++i) {
      if (i >= channels) break;
      for (int v = 0; v < kStep; ++v) {
        const int p = s + v * V;
        vf value = acc[i][v];
        if (begun) value += load(begun + i * kPanel + p);
        if (x) value -= load(x + i * kPanel + p) * load(panel.inward + p);
        value = select(load(panel.label + p) >= 0, value, vf{});
        if constexpr (kPastCache)
          store_past_cache(to.data + i * to.stride + p, value);
        else
          store(to.data + i * to.stride + p, value);
      }
    }
  }
}

// What is written soon comes from far away, row by row.
template <class T> SPCL_INLINE
void fetch_rows(T* to, int64_t stride, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t line = 0; line < kPanel * (int64_t)sizeof(T); line += 64)
      __builtin_prefetch((char*)(to + i * stride) + line, 1, 3);
}

struct Blocks {
  const Panels& matrix;  // prototypes transposed
  int64_t first, last;
  const float* w;
  float* rows;
};

// Blocks of channels [blocks.first, blocks.last) of a panel's gradient.
template <int M, bool kPastCache, class T>
void gradient_blocks(const ContrastOnePass& a, const OnePassPanel& panel, const Blocks& blocks, const float* x,
                     Rows<T> to) {
  const Panels& matrix = blocks.matrix;
  const int64_t chunks = (a.num_rows + kClassChunk - 1) / kClassChunk, step = (a.num_rows + chunks - 1) / chunks;
  const int64_t begun = (chunks - 1) * step;
  for (int64_t k = 0; k < begun; k += step)
    product(matrix, blocks.first, blocks.last, k, step, blocks.w + k * kPanel, blocks.rows, k > 0, {});
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t channels = smaller(M, a.x.dim - block * M);
    if (!kPastCache && to.stride != kPanel) fetch_rows(to.data + 2 * M * to.stride, to.stride, M);
    gradient_block<M, kPastCache, T>(
        panel, matrix.data + (block * matrix.length + begun) * M, a.num_rows - begun, blocks.w + begun * kPanel,
        begun ? blocks.rows + (block - blocks.first) * M * kPanel : nullptr, channels, x, to);
    if (x) x += M * kPanel;
    to.data += M * to.stride;
  }
}

template <bool kPastCache, class T>
void gradient_blocks(const ContrastOnePass& a, const OnePassPanel& panel, const Blocks& blocks, const float* x,
                     Rows<T> to) {
  switch (blocks.matrix.rows) {
    case 1: return gradient_blocks<1, kPastCache, T>(a, panel, blocks, x, to);
    case 2: return gradient_blocks<2, kPastCache, T>(a, panel, blocks, x, to);
    case 3: return gradient_blocks<3, kPastCache, T>(a, panel, blocks, x, to);
    case 4: return gradient_blocks<4, kPastCache, T>(a, panel, blocks, x, to);
    case 5: return gradient_blocks<5, kPastCache, T>(a, panel, blocks, x, to);
    default: return gradient_blocks<6, kPastCache, T>(a, panel, blocks, x, to);
  }
}

template <class T>
void gradient_in_place(const ContrastOnePass& a, const OnePassPanel& panel, const Blocks& blocks, int64_t d,
                       const float* x) {
  const Rows<T> to = {(T*)a.dx.data + panel.gradient_span.offset[0] + d * a.dx.stride_d, a.dx.stride_d};
  if constexpr (sizeof(T) == 4) {
    if (a.past_cache && (uintptr_t)to.data % 64 == 0 && to.stride % 16 == 0)
      return gradient_blocks<true, T>(a, panel, blocks, x, to);
  }
  gradient_blocks<false, T>(a, panel, blocks, x, to);
}

// Of n channels from d; packed: their features.
void write_gradient(const ContrastOnePass& a, const OnePassPanel& panel, const Blocks& blocks, int64_t d, int64_t n,
                    const float* packed) {
  const float* x = a.normalize ? packed : nullptr;
  if (panel.gradient_span.rows_of_pixels && panel.span.count == kPanel) {
    if (a.x.type == kFloat32) return gradient_in_place<float>(a, panel, blocks, d, x);
    return gradient_in_place<bfloat16>(a, panel, blocks, d, x);
  }
  gradient_blocks<false, float>(a, panel, blocks, x, {blocks.rows, kPanel});
  unpack(a.dx, panel.gradient_span, d, n, blocks.rows);
}

void write_gradients(const ContrastOnePass& a, const TileSpan& t, const OnePassPanel* panel, const OnePassBuffers& b) {
  const Panels by_channel = of_image(a.by_channel, t.image);
  for (int64_t block = 0; block < by_channel.blocks; block += kGradientBlocks) {
    const int64_t last = smaller(block + kGradientBlocks, by_channel.blocks), d = block * by_channel.rows;
    const int64_t n = smaller(last * by_channel.rows, a.x.dim) - d;
    for (int64_t m = 0; m < t.panels; ++m) {
      if (!panel[m].labelled) {
        memset(b.rows, 0, n * kPanel * sizeof(float));
        unpack(a.dx, panel[m].gradient_span, d, n, b.rows);
        continue;
      }
      const Blocks blocks = {by_channel, block, last, b.z + m * padded(a.by_class) * kPanel, b.rows};
      write_gradient(a, panel[m], blocks, d, n, b.packed + (m * a.x.dim + d) * kPanel);
    }
  }
  finish_stores();
}

}  // namespace

// What the labelled pixels of a tile add to the denominator, and whether their labels are good.
void contrast_weight(const ContrastOnePass& a, int64_t tile) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  int32_t label[kPanel];
  double weight = 0;
  for (int64_t m = 0; m < t.panels; ++m) {
    const Span span = make_span(a.x, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    const int labelled = read_labels(a.labels, a.x, span, label, a.first_bad);
    if (!a.class_weight) weight += labelled;
    for (int p = 0; a.class_weight && p < span.count; ++p)
      if (label[p] >= 0) weight += a.class_weight[label[p]];
  }
  a.partial_weight[tile] = weight;
}

int64_t contrast_one_pass_scratch(const ContrastOnePass& a) {
  OnePassBuffers none;
  return place(a, nullptr, &none);
}

void contrast_one_pass(const ContrastOnePass& a, int64_t tile, float* scratch) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  OnePassBuffers b;
  place(a, scratch, &b);
  OnePassPanel panel[kMaxPanels];
  for (int64_t m = 0; m < t.panels; ++m) {
    panel[m].span = make_span(a.x, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    panel[m].gradient_span = make_span(a.dx, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    panel[m].labelled = read_labels(a.labels, a.x, panel[m].span, panel[m].label, nullptr);
    for (int p = 0; p < kPanel; ++p) panel[m].inv_norm[p] = 0;
  }
  accumulate(a, t, panel, b);
  double loss = 0;
  for (int64_t m = 0; m < t.panels; ++m) {
    if (!panel[m].labelled) continue;
    if (a.normalize)
      invert_norms(panel[m].inv_norm);
    else
      for (int p = 0; p < kPanel; ++p) panel[m].inv_norm[p] = 1;
    loss += weigh(a, panel[m], b.z + m * padded(a.by_class) * kPanel);
  }
  a.partial_loss[tile] = loss;
  write_gradients(a, t, panel, b);
}

}  // namespace SPCL_ISA
}  // namespace spcl
