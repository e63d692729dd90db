// prototype_contrastive_loss, forward and backward, one tile of pixels at a time. Compiled once per instruction set (SPCL_ISA).
//
// Neither unit features nor a transposed copy exist: a chunk of channels is packed into L1/L2, its logits accumulate, and the norm is
// folded into the logits afterwards. The gradient of the normalisation comes out of the softmax (c = sum_k w_k z_k), not of another pass.
#include "tile.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

constexpr int64_t kChunk = 64;         // channels packed at a time: 16 KB a panel
constexpr int64_t kGradientBlocks = 8; // blocks of channels whose gradient is formed together: 48 rows, 12 KB a panel
constexpr int64_t kClassChunk = 96;    // classes contracted at a time, so that their weights stay in L1
constexpr int64_t kSumBlock = 32;      // terms of a sum over classes before it is added to the total

int64_t padded(const Panels& p) { return p.blocks * p.rows; }

// A sum of block sums with what each addition lost carried along (Kahan): as good for 2000 classes as for 20.
struct LongSum {
  vf total = {}, lost = {};
  SPCL_INLINE_MEMBER void add(vf part) {
    vf corrected = part - lost, next = total + corrected;
    lost = (next - total) - corrected;
    total = next;
  }
};

// ---- one panel's softmax ----------------------------------------------------------------------------------------

// logits [K][kPanel]: dot products in, logits out (times inv_norm / temperature). Gives the maximum and the log of the sum of exponentials.
void finish_logits(float* z, int64_t num_classes, const float* inv_norm, float temperature, float* top, float* log_sum) {
  for (int v = 0; v < kPanel; v += V) {
    vf factor = load(inv_norm + v) / temperature;
    vf most = splat(-__builtin_inff());
    for (int64_t k = 0; k < num_classes; ++k) {
      vf value = load(z + k * kPanel + v) * factor;
      store(z + k * kPanel + v, value);
      most = larger(value, most);
    }
    LongSum sum;
    for (int64_t first = 0; first < num_classes; first += kSumBlock) {
      vf part = {};
      for (int64_t k = first; k < smaller(first + kSumBlock, num_classes); ++k) part += exp(load(z + k * kPanel + v) - most);
      sum.add(part);
    }
    store(top + v, most);
    store(log_sum + v, log(sum.total));
  }
}

// z [K][kPanel] logits -> w, in place; radial [kPanel] = sum_k w_k z_k.
// w_y is minus the sum of the others, and p is normalised again, so neither carries the rounding of lse.
void loss_weights(float* z, int64_t num_classes, const int32_t* label, const float* lse, const float* scale, float* radial) {
  float own_z[kPanel];
  for (int p = 0; p < kPanel; ++p) own_z[p] = label[p] >= 0 ? z[label[p] * kPanel + p] : 0.0f;
  for (int v = 0; v < kPanel; v += V) {
    vi own = load(label + v);
    vf zero_point = load(lse + v), own_logit = load(own_z + v);
    LongSum other_sum, slope_sum;
    for (int64_t first = 0; first < num_classes; first += kSumBlock) {
      vf part = {}, part_slope = {};
      for (int64_t k = first; k < smaller(first + kSumBlock, num_classes); ++k) {
        vf value = load(z + k * kPanel + v);
        vf e = select(own == (int32_t)k, vf{}, exp(value - zero_point));
        store(z + k * kPanel + v, e);
        part += e;
        part_slope += select(own == (int32_t)k, vf{}, e * (value - own_logit));
      }
      other_sum.add(part);
      slope_sum.add(part_slope);
    }
    const vf others = other_sum.total, slope = slope_sum.total;
    vf total = others + exp(own_logit - zero_point);
    vf factor = select(own < 0, vf{}, load(scale + v) / total);
    for (int64_t k = 0; k < num_classes; ++k) {
      vf e = load(z + k * kPanel + v);
      vf w = select(own == (int32_t)k, -others, e) * factor;
      store(z + k * kPanel + v, select(own < 0, vf{}, w));
    }
    store(radial + v, select(own < 0, vf{}, slope * factor));
  }
}

// ---- forward ----------------------------------------------------------------------------------------------------

struct Panel {
  Span span;
  int labelled;
  alignas(64) int32_t label[kPanel];
  alignas(64) float inv_norm[kPanel];
};

}  // namespace

int64_t contrast_forward_scratch(const ContrastForward& a) { return a.tiles.panels * kPanel * (kChunk + padded(a.by_class)); }

namespace {

void write_skipped(const ContrastForward& a, const Span& s) {
  const int64_t pixels = a.x.height * a.x.width, at = s.image * pixels + s.first;
  for (int p = 0; p < s.count; ++p) {
    if (a.loss_map) a.loss_map[at + p] = 0;
    if (a.lse) a.lse[at + p] = 0, a.inv_norm[at + p] = 0;
  }
  if (a.logits)
    for (int64_t k = 0; k < a.num_classes; ++k) memset(a.logits + (s.image * a.num_classes + k) * pixels + s.first, 0, s.count * sizeof(float));
}

void write_panel(const ContrastForward& a, const Panel& panel, float* z, double* loss, double* weight) {
  const Span& s = panel.span;
  const int64_t pixels = a.x.height * a.x.width, at = s.image * pixels + s.first;
  alignas(64) float top[kPanel], log_sum[kPanel], scale[kPanel], map[kPanel];
  finish_logits(z, a.num_classes, panel.inv_norm, a.temperature, top, log_sum);
  for (int p = 0; p < kPanel; ++p) scale[p] = panel.label[p] < 0 ? 0.0f : a.class_weight ? a.class_weight[panel.label[p]] : 1.0f;
  for (int p = 0; p < kPanel; ++p) *weight += scale[p];
  scale_by(a.pixel_weight, a.x, s, panel.label, scale);
  for (int p = 0; p < s.count; ++p) {
    map[p] = panel.label[p] < 0 ? 0.0f : ((top[p] - z[panel.label[p] * kPanel + p]) + log_sum[p]) * scale[p];
    *loss += map[p];
  }
  if (a.loss_map) memcpy(a.loss_map + at, map, s.count * sizeof(float));
  if (a.lse) {
    memcpy(a.inv_norm + at, panel.inv_norm, s.count * sizeof(float));
    for (int p = 0; p < s.count; ++p) a.lse[at + p] = top[p] + log_sum[p];
  }
  if (a.logits)
    for (int64_t k = 0; k < a.num_classes; ++k)
      memcpy(a.logits + (s.image * a.num_classes + k) * pixels + s.first, z + k * kPanel, s.count * sizeof(float));
}

}  // namespace

void contrast_forward(const ContrastForward& a, int64_t tile, float* scratch) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  const int64_t logits_size = padded(a.by_class) * kPanel;
  float *packed = scratch, *logits = scratch + a.tiles.panels * kChunk * kPanel;
  Panel panel[kMaxPanels];
  for (int64_t m = 0; m < t.panels; ++m) {
    panel[m].span = make_span(a.x, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    panel[m].labelled = read_labels(a.labels, a.x, panel[m].span, panel[m].label, a.first_bad);
    for (int p = 0; p < kPanel; ++p) panel[m].inv_norm[p] = 0;
  }
  for (int64_t d = 0; d < a.x.dim; d += kChunk) {
    const int64_t n = smaller(kChunk, a.x.dim - d);
    for (int64_t m = 0; m < t.panels; ++m) {
      if (!panel[m].labelled) continue;
      float* chunk = packed + m * kChunk * kPanel;
      pack(a.x, panel[m].span, d, n, chunk);
      if (a.normalize) add_squares(chunk, n, panel[m].inv_norm);
      Ahead ahead = {};
      if (m + 1 < t.panels) ahead = ahead_of(a.x, panel[m + 1].span, d, n);
      else if (d + n < a.x.dim) ahead = ahead_of(a.x, panel[0].span, d + n, smaller(kChunk, a.x.dim - d - n));
      product(a.by_class, 0, a.by_class.blocks, d, n, chunk, logits + m * logits_size, d > 0, ahead);
    }
  }
  double loss = 0, weight = 0;
  for (int64_t m = 0; m < t.panels; ++m) {
    if (!panel[m].labelled) {
      write_skipped(a, panel[m].span);
      continue;
    }
    if (a.normalize) invert_norms(panel[m].inv_norm);
    else for (int p = 0; p < kPanel; ++p) panel[m].inv_norm[p] = 1;
    write_panel(a, panel[m], logits + m * logits_size, &loss, &weight);
  }
  a.partial_loss[tile] = loss;
  a.partial_weight[tile] = weight;
}

namespace {

// ---- backward ---------------------------------------------------------------------------------------------------

struct GradientPanel : Panel {
  Span gradient_span;
  alignas(64) float along[kPanel];   // factor of sum_k w_k P_k
  alignas(64) float inward[kPanel];  // factor of x, subtracted
};

// The whole tile is packed where it is read more than once; else a chunk at a time.
bool packs_tile(const ContrastBackward& a) { return !a.logits || a.dproto; }

int64_t packed_rows(const ContrastBackward& a) { return packs_tile(a) ? a.x.dim : kGradientBlocks * a.by_channel.rows; }

}  // namespace

int64_t contrast_backward_scratch(const ContrastBackward& a) {
  const int64_t rows = a.tiles.panels * (padded(a.by_class) + packed_rows(a)) + kGradientBlocks * a.by_channel.rows;
  return rows * kPanel + kPanel * a.dproto_stride;
}

namespace {

void read_panel(const ContrastBackward& a, GradientPanel& panel, float* lse, float* scale) {
  const Span& s = panel.span;
  const int64_t at = s.image * a.x.height * a.x.width + s.first;
  for (int p = 0; p < kPanel; ++p) {
    const bool use = panel.label[p] >= 0;
    lse[p] = use ? a.lse[at + p] : 0.0f;
    panel.inv_norm[p] = use ? a.inv_norm[at + p] : 0.0f;
    scale[p] = use && a.denominator != 0 ? (a.class_weight ? a.class_weight[panel.label[p]] : 1.0f) / a.denominator : 0.0f;
  }
  scale_by(a.pixel_weight, a.x, s, panel.label, scale);
  scale_by(a.grad, a.x, s, panel.label, scale);
  if (a.denominator == 0)
    for (int p = 0; p < kPanel; ++p) scale[p] = 0;  // an infinite or NaN incoming gradient too
}

// Logits of a panel into w [padded K][kPanel]: those that the forward saved, or computed again from the packed pixels.
void recall_logits(const ContrastBackward& a, const GradientPanel& panel, const float* packed, float* w) {
  const Span& s = panel.span;
  if (a.logits) {
    const int64_t pixels = a.x.height * a.x.width;
    const float* from = a.logits + s.image * a.num_classes * pixels + s.first;
    for (int64_t k = 0; k < a.num_classes; ++k, from += pixels, w += kPanel) {
      if (s.count == kPanel) memcpy(w, from, kPanel * sizeof(float));
      else for (int p = 0; p < kPanel; ++p) w[p] = p < s.count ? from[p] : 0.0f;
    }
    return;
  }
  for (int64_t d = 0; d < a.x.dim; d += kChunk)
    product(a.by_class, 0, a.by_class.blocks, d, smaller(kChunk, a.x.dim - d), packed + d * kPanel, w, d > 0, {});
  for (int v = 0; v < kPanel; v += V) {
    vf factor = load(panel.inv_norm + v) / a.temperature;
    for (int64_t k = 0; k < a.num_classes; ++k) store(w + k * kPanel + v, load(w + k * kPanel + v) * factor);
  }
}

void weigh_panel(const ContrastBackward& a, GradientPanel& panel, const float* packed, float* w) {
  alignas(64) float lse[kPanel], scale[kPanel], radial[kPanel];
  read_panel(a, panel, lse, scale);
  recall_logits(a, panel, packed, w);
  loss_weights(w, a.num_classes, panel.label, lse, scale, radial);
  for (int v = 0; v < kPanel; v += V) {
    vf inv = load(panel.inv_norm + v);
    vf clamped = (vf)(inv >= kClampedInvNorm);  // a clamped norm is a constant: no radial term
    store(panel.along + v, inv / a.temperature);
    store(panel.inward + v, a.normalize ? select((vi)clamped, vf{}, load(radial + v) * inv * inv) : vf{});
  }
}

// dproto [D][stride] += unit features x weights, over the labelled pixels only: an ignored NaN goes nowhere.
template <int M, int N>
SPCL_INLINE void outer_block(const float* x, const int* pixel, int count, const float* weight, int64_t stride, float* out) {
  vf acc[M][N];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < N; ++v) acc[i][v] = vf{};
  for (int j = 0; j < count; ++j) {
    vf row[N];
    for (int v = 0; v < N; ++v) row[v] = load(weight + j * stride + v * V);
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < N; ++v) acc[i][v] += x[i * kPanel + pixel[j]] * row[v];
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < N; ++v) store(out + i * stride + v * V, load(out + i * stride + v * V) + acc[i][v]);
}

void add_prototype_gradient(const ContrastBackward& a, const GradientPanel& panel, const float* packed, const float* w, float* weight, float* out) {
  int pixel[kPanel], count = 0;
  for (int p = 0; p < kPanel; ++p)
    if (panel.label[p] >= 0) {
      float* row = weight + count * a.dproto_stride;
      const float factor = panel.inv_norm[p] / a.temperature;
      for (int64_t k = 0; k < a.dproto_stride; ++k) row[k] = k < a.num_classes ? w[k * kPanel + p] * factor : 0.0f;
      pixel[count++] = p;
    }
  constexpr int N = 32 / V < 2 ? 2 : 32 / V > kStep ? kStep : 32 / V;
  for (int64_t k = 0; k < a.dproto_stride; k += N * V) {
    int64_t d = 0;
    for (; d + 6 <= a.x.dim; d += 6) outer_block<6, N>(packed + d * kPanel, pixel, count, weight + k, a.dproto_stride, out + d * a.dproto_stride + k);
    for (; d < a.x.dim; ++d) outer_block<1, N>(packed + d * kPanel, pixel, count, weight + k, a.dproto_stride, out + d * a.dproto_stride + k);
  }
}

// Rows of pixels that stay where they are: stride between rows of channels.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

// to = along * rows - inward * x, exactly 0 where there is no label; x.data == nullptr stands for no second term.
template <bool kPastCache, class X, class T>
void combine(const GradientPanel& panel, int64_t channels, const float* rows, Rows<const X> x, Rows<T> to) {
  for (int64_t d = 0; d < channels; ++d, rows += kPanel)
    for (int v = 0; v < kPanel; v += V) {
      vf value = load(rows + v) * load(panel.along + v);
      if (x.data) value -= load(x.data + d * x.stride + v) * load(panel.inward + v);
      value = select(load(panel.label + v) >= 0, value, vf{});
      if constexpr (kPastCache) store_past_cache(to.data + d * to.stride + v, value);
      else store(to.data + d * to.stride + v, value);
    }
}

template <class X, class T>
void combine_into(const ContrastBackward& a, const GradientPanel& panel, int64_t channels, const float* rows, Rows<const X> x, Rows<T> to) {
  if constexpr (sizeof(T) == 4) {
    if (a.past_cache && (uintptr_t)to.data % 64 == 0 && to.stride % 16 == 0) return combine<true, X, T>(panel, channels, rows, x, to);
  }
  combine<false, X, T>(panel, channels, rows, x, to);
}

template <class T>
void write_rows_of_pixels(const ContrastBackward& a, const GradientPanel& panel, int64_t d, int64_t channels, const float* rows, const float* packed) {
  const Rows<T> to = {(T*)a.dx.data + panel.gradient_span.offset[0] + d * a.dx.stride_d, a.dx.stride_d};
  if (packed || !a.normalize) return combine_into<float, T>(a, panel, channels, rows, {a.normalize ? packed : nullptr, kPanel}, to);
  combine_into<T, T>(a, panel, channels, rows, {(const T*)a.x.data + panel.span.offset[0] + d * a.x.stride_d, a.x.stride_d}, to);
}

// Channels [d, d + channels) of the gradient. `rows`: sum_k w_k P_k; `packed`: the features, or nullptr where they are not packed yet;
// `spare`: room to pack them.
void write_gradient(const ContrastBackward& a, const GradientPanel& panel, int64_t d, int64_t channels, float* rows, const float* packed,
                    float* spare) {
  if (panel.span.rows_of_pixels && panel.gradient_span.rows_of_pixels && panel.span.count == kPanel) {
    switch (a.x.type) {
      case kFloat32: return write_rows_of_pixels<float>(a, panel, d, channels, rows, packed);
      case kBFloat16: return write_rows_of_pixels<bfloat16>(a, panel, d, channels, rows, packed);
      default: return write_rows_of_pixels<float16>(a, panel, d, channels, rows, packed);
    }
  }
  if (a.normalize && !packed) pack(a.x, panel.span, d, channels, spare), packed = spare;
  combine<false, float, float>(panel, channels, rows, {a.normalize ? packed : nullptr, kPanel}, {rows, kPanel});
  unpack(a.dx, panel.gradient_span, d, channels, rows);
}

}  // namespace

void contrast_backward(const ContrastBackward& a, int64_t tile, int64_t group, float* scratch) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  const int64_t weights_size = padded(a.by_class) * kPanel, packed_size = packed_rows(a) * kPanel;
  float *weights = scratch, *packed = weights + a.tiles.panels * weights_size, *rows = packed + a.tiles.panels * packed_size;
  float* by_pixel = rows + kGradientBlocks * a.by_channel.rows * kPanel;
  GradientPanel panel[kMaxPanels];
  for (int64_t m = 0; m < t.panels; ++m) {
    panel[m].span = make_span(a.x, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    if (a.dx.data) panel[m].gradient_span = make_span(a.dx, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    panel[m].labelled = read_labels(a.labels, a.x, panel[m].span, panel[m].label, nullptr);
    if (!panel[m].labelled) continue;
    float *x = packed + m * packed_size, *w = weights + m * weights_size;
    if (packs_tile(a)) pack(a.x, panel[m].span, 0, a.x.dim, x);
    weigh_panel(a, panel[m], x, w);
    if (a.dproto) add_prototype_gradient(a, panel[m], x, w, by_pixel, a.dproto + group * a.x.dim * a.dproto_stride);
  }
  if (!a.dx.data) return;
  const int64_t class_chunks = (a.num_classes + kClassChunk - 1) / kClassChunk, classes = (a.num_classes + class_chunks - 1) / class_chunks;
  for (int64_t block = 0; block < a.by_channel.blocks; block += kGradientBlocks) {
    const int64_t last = smaller(block + kGradientBlocks, a.by_channel.blocks), d = block * a.by_channel.rows;
    const int64_t n = smaller(last * a.by_channel.rows, a.x.dim) - d;
    for (int64_t m = 0; m < t.panels; ++m) {
      if (!panel[m].labelled) {
        memset(rows, 0, n * kPanel * sizeof(float));
        unpack(a.dx, panel[m].gradient_span, d, n, rows);
        continue;
      }
      Ahead ahead = {};
      if (a.normalize && !packs_tile(a)) ahead = ahead_of(a.x, panel[m].span, d, n);
      for (int64_t k = 0; k < a.num_classes; k += classes, ahead.rows = 0)
        product(a.by_channel, block, last, k, smaller(classes, a.num_classes - k), weights + m * weights_size + k * kPanel, rows, k > 0, ahead);
      write_gradient(a, panel[m], d, n, rows, packs_tile(a) ? packed + m * packed_size + d * kPanel : nullptr, packed);
    }
  }
  finish_stores();
}

}  // namespace SPCL_ISA
}  // namespace spcl
