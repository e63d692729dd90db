// prototype_contrastive_loss, backward, one tile of pixels at a time. Compiled once per instruction set (SPCL_ISA).
//
// The gradient of the normalisation comes out of the softmax (c = sum_k w_k z_k), not of another pass; but of few
// channels, see project.
#include "contrast_options.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

constexpr int64_t kGradientBlocks = 8;  // blocks of channels whose gradient is formed together: 48 rows, 12 KB a panel
constexpr int64_t kFewChannels = 3;     // up to here a gradient is projected by what was computed of it
constexpr int64_t kClassChunk = 96;     // classes contracted at a time, so that their weights stay in L1

struct GradientPanel : Panel {
  Span gradient_span;
  alignas(64) float along[kPanel];   // factor of sum_k w_k P_k
  alignas(64) float inward[kPanel];  // factor of x, subtracted
};

bool has_variances(const ContrastBackward& a) { return a.options && a.options->variances_by_class.data; }

// The whole tile is packed where it is read more than once; else a chunk at a time.
bool packs_tile(const ContrastBackward& a) { return !a.logits || a.dproto || has_variances(a); }

int64_t packed_rows(const ContrastBackward& a) { return packs_tile(a) ? a.x.dim : kGradientBlocks * a.by_channel.rows; }

struct BackwardBuffers : OptionBuffers {
  float* weights;        // [panels][padded M][kPanel]
  float* packed;         // [panels][packed_rows][kPanel]
  float* rows;           // [kGradientBlocks * rows of a block][kPanel]: sum_m w_m P_m
  float* variance_rows;  // the same of the variances
  float* by_pixel;       // [kPanel][dproto_stride]
};

int64_t place(const ContrastBackward& a, float* scratch, BackwardBuffers* to) {
  const int64_t block = kGradientBlocks * a.by_channel.rows;
  const int64_t rows[] = {a.tiles.panels * padded(a.by_class), a.tiles.panels * packed_rows(a), block,
                          has_variances(a) ? block : 0, a.dproto_stride};
  float** parts[] = {&to->weights, &to->packed, &to->rows, &to->variance_rows, &to->by_pixel};
  int64_t used = 0;
  for (int i = 0; i < 5; ++i) *parts[i] = scratch + used, used += rows[i] * kPanel;
  return used + place_options(a, scratch + used, to);
}

void read_panel(const ContrastBackward& a, GradientPanel& panel, float* lse, float* scale) {
  const Span& s = panel.span;
  const int64_t at = s.image * a.x.height * a.x.width + s.first;
  for (int p = 0; p < kPanel; ++p) {
    const bool use = panel.label[p] >= 0;
    lse[p] = use ? a.lse[at + p] : 0.0f;
    panel.inv_norm[p] = use ? a.inv_norm[at + p] : 0.0f;
    scale[p] =
        use && a.denominator != 0 ? (a.class_weight ? a.class_weight[panel.label[p]] : 1.0f) / a.denominator : 0.0f;
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
    const float* from = a.logits + s.image * a.num_rows * pixels + s.first;
    for (int64_t k = 0; k < a.num_rows; ++k, from += pixels, w += kPanel) {
      if (s.count == kPanel)
        memcpy(w, from, kPanel * sizeof(float));
      else
        for (int p = 0; p < kPanel; ++p) w[p] = p < s.count ? from[p] : 0.0f;
    }
    return;
  }
  const Panels by_class = of_image(a.by_class, s.image);
  for (int64_t d = 0; d < a.x.dim; d += kChunk)
    product(by_class, 0, by_class.blocks, d, smaller(kChunk, a.x.dim - d), packed + d * kPanel, w, d > 0, {});
  for (int v = 0; v < kPanel; v += V) {
    vf factor = load(panel.inv_norm + v) / a.temperature;
    for (int64_t k = 0; k < a.num_rows; ++k) store(w + k * kPanel + v, load(w + k * kPanel + v) * factor);
  }
}

// Factors of the two terms of the features' gradient.
void set_factors(const ContrastBackward& a, const float* radial, GradientPanel& panel) {
  for (int v = 0; v < kPanel; v += V) {
    vf inv = load(panel.inv_norm + v);
    vf clamped = (vf)(inv >= kClampedInvNorm);  // a clamped norm is a constant: no radial term
    store(panel.along + v, inv / a.temperature);
    store(panel.inward + v, a.normalize ? select((vi)clamped, vf{}, load(radial + v) * inv * inv) : vf{});
  }
}

// The labelled pixels' parts of the temperature's gradient: radial, less what a margin took off.
void add_temperature(const ContrastBackward& a, const GradientPanel& panel, const float* radial, const float* margin,
                     int64_t group) {
  for (int p = 0; a.dtemperature && p < kPanel; ++p)
    if (panel.label[p] >= 0) a.dtemperature[group] += (double)radial[p] - (margin ? margin[p] : 0.0f);
}

void weigh_panel(const ContrastBackward& a, GradientPanel& panel, const float* packed, float* w, int64_t group) {
  alignas(64) float lse[kPanel], scale[kPanel], radial[kPanel];
  read_panel(a, panel, lse, scale);
  recall_logits(a, panel, packed, w);
  loss_weights(w, a.num_rows, panel.label, lse, scale, radial);
  add_temperature(a, panel, radial, nullptr, group);
  set_factors(a, radial, panel);
}

// ---- weights with options ---------------------------------------------------------------------------------------

// Their norms are known only from the features: the incoming gradient is all that the forward of logits leaves.
void measure_norms(const ContrastBackward& a, GradientPanel& panel, const float* packed) {
  for (int p = 0; p < kPanel; ++p) panel.inv_norm[p] = a.normalize ? 0.0f : 1.0f;
  for (int64_t d = 0; a.normalize && d < a.x.dim; d += kChunk)
    add_squares(packed + d * kPanel, smaller(kChunk, a.x.dim - d), panel.inv_norm);
  if (a.normalize) invert_norms(panel.inv_norm);
}

// The incoming gradient of the class logits, 0 beyond the panel's pixels -> z.
void take_gradient(const ContrastOptions& o, const GradientPanel& panel, const float* gradient, float* z) {
  for (int v = 0; v < kPanel; v += V)
    for (int64_t k = 0; k < o.num_classes; ++k)
      store(z + k * kPanel + v, select(load(panel.label + v) >= 0, load(gradient + k * kPanel + v), vf{}));
}

// Adds the variance term's part to radial, and turns the terms into their weights: those of the rows, and the share of
// a label that the numerator does without.
void weigh_variance(const ContrastBackward& a, const GradientPanel& panel, const Aims& aims, const float* scale,
                    const float* weights, float* variance, float* radial) {
  const bool in_numerator = a.options->positive_variance;
  for (int v = 0; v < kPanel; v += V) {
    const vi label = load(panel.label + v);
    const vf own = load(aims.own + v) * load(scale + v);
    vf slope = {};
    for (int64_t m = 0; m < a.num_rows; ++m) {
      vf w = load(weights + m * kPanel + v);
      if (!in_numerator) w += select(label == (int32_t)m, own, vf{});
      slope += w * load(variance + m * kPanel + v);
      store(variance + m * kPanel + v, w);
    }
    store(radial + v, load(radial + v) + 2.0f * slope);
  }
}

void add_bias(const ContrastBackward& a, const float* weights, int64_t group) {
  for (int64_t m = 0; a.dbias && m < a.num_rows; ++m) {
    vf sum = {};
    for (int v = 0; v < kPanel; v += V) sum += load(weights + m * kPanel + v);
    for (int i = 0; i < V; ++i) a.dbias[group * a.num_rows + m] += sum[i];
  }
}

// dots of a panel -> weights of its rows.
void weigh_panel_with_options(const ContrastBackward& a, GradientPanel& panel, const float* packed, int64_t m,
                              const BackwardBuffers& b, int64_t group) {
  const ContrastOptions& o = *a.options;
  float* dots = b.weights + m * padded(a.by_class) * kPanel;
  float* variance = has_variances(a) ? b.variance + m * padded(a.by_class) * kPanel : nullptr;
  const float* targets = b.targets + m * o.num_classes * kPanel;
  alignas(64) float lse[kPanel], scale[kPanel] = {}, radial[kPanel], off_margin[kPanel] = {};
  if (o.loss == kLogits)
    measure_norms(a, panel, packed);
  else
    read_panel(a, panel, lse, scale);
  recall_logits(a, panel, packed, dots);
  if (variance) {
    for (int64_t d = 0; d < a.x.dim; d += kChunk)
      add_variance_product(o, panel.span.image, d, smaller(kChunk, a.x.dim - d), packed + d * kPanel, b.squared,
                           variance);
    scale_variance(a.num_rows, panel.inv_norm, a.temperature, variance);
  }
  if (o.loss != kLogits || o.first_row) class_logits(a, panel, dots, variance, b);
  Aims aims;
  set_aims(o, panel, targets, b.z, nullptr, &aims);
  if (o.loss == kLogits)
    take_gradient(o, panel, targets, b.z);
  else if (o.loss == kSoftmax)
    softmax_weights(o, panel.label, aims, lse, scale, b.z);
  else
    sigmoid_weights(o, panel.label, aims, scale, b.z);
  for (int p = 0; o.margin != 0 && p < kPanel; ++p)
    if (panel.label[p] >= 0) off_margin[p] = o.margin * b.z[panel.label[p] * kPanel + p];
  spread_weights(a, b, dots, radial);
  if (variance) weigh_variance(a, panel, aims, scale, dots, variance, radial);
  add_bias(a, dots, group);
  add_temperature(a, panel, radial, off_margin, group);
  set_factors(a, radial, panel);
}

// ---- gradients --------------------------------------------------------------------------------------------------

// dproto [D][stride] += unit features x weights, over the labelled pixels only: an ignored NaN goes nowhere.
template <int M, int N> SPCL_INLINE
void outer_block(const float* x, const int* pixel, int count, const float* weight, int64_t stride, float* out) {
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

void add_prototype_gradient(const ContrastBackward& a, const GradientPanel& panel, const float* packed, const float* w,
                            float* weight, float* out) {
  int pixel[kPanel], count = 0;
  for (int p = 0; p < kPanel; ++p)
    if (panel.label[p] >= 0) {
      float* row = weight + count * a.dproto_stride;
      const float factor = panel.inv_norm[p] / a.temperature;
      for (int64_t k = 0; k < a.dproto_stride; ++k) row[k] = k < a.num_rows ? w[k * kPanel + p] * factor : 0.0f;
      pixel[count++] = p;
    }
  constexpr int N = 32 / V < 2 ? 2 : 32 / V > kStep ? kStep : 32 / V;
  for (int64_t k = 0; k < a.dproto_stride; k += N * V) {
    int64_t d = 0;
    for (; d + 6 <= a.x.dim; d += 6)
      outer_block<6, N>(packed + d * kPanel, pixel, count, weight + k, a.dproto_stride, out + d * a.dproto_stride + k);
    for (; d < a.x.dim; ++d)
      outer_block<1, N>(packed + d * kPanel, pixel, count, weight + k, a.dproto_stride, out + d * a.dproto_stride + k);
  }
}

// Rows of pixels that stay where they are: stride between rows of channels.
template <class T> struct Rows {
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
      if constexpr (kPastCache)
        store_past_cache(to.data + d * to.stride + v, value);
      else
        store(to.data + d * to.stride + v, value);
    }
}

template <class X, class T>
void combine_into(const ContrastBackward& a, const GradientPanel& panel, int64_t channels, const float* rows,
                  Rows<const X> x, Rows<T> to) {
  if constexpr (sizeof(T) == 4) {
    if (a.past_cache && (uintptr_t)to.data % 64 == 0 && to.stride % 16 == 0)
      return combine<true, X, T>(panel, channels, rows, x, to);
  }
  combine<false, X, T>(panel, channels, rows, x, to);
}

template <class T>
void write_rows_of_pixels(const ContrastBackward& a, const GradientPanel& panel, int64_t d, int64_t channels,
                          const float* rows, const float* packed) {
  const Rows<T> to = {(T*)a.dx.data + panel.gradient_span.offset[0] + d * a.dx.stride_d, a.dx.stride_d};
  if (packed || !a.normalize)
    return combine_into<float, T>(a, panel, channels, rows, {a.normalize ? packed : nullptr, kPanel}, to);
  combine_into<T, T>(a, panel, channels, rows,
                     {(const T*)a.x.data + panel.span.offset[0] + d * a.x.stride_d, a.x.stride_d}, to);
}

// Channels [d, d + channels) of the gradient. `rows`: sum_k w_k P_k; `packed`: the features, or nullptr where they are
// not packed yet; `spare`: room to pack them.
void write_gradient(const ContrastBackward& a, const GradientPanel& panel, int64_t d, int64_t channels, float* rows,
                    const float* packed, float* spare) {
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

int64_t contrast_backward_scratch(const ContrastBackward& a) {
  BackwardBuffers none;
  return place(a, nullptr, &none);
}

namespace {

// rows += variance_rows * x * along: the variance term's slope by a unit feature is that feature times sum_m w_m V_m /
// temperature^2.
void add_variance_rows(const GradientPanel& panel, int64_t channels, const float* variance_rows, const float* x,
                       float* rows) {
  for (int64_t i = 0; i < channels * kPanel; i += V)
    store(rows + i, load(rows + i) + load(variance_rows + i) * load(x + i) * load(panel.along + i % kPanel));
}

// Blocks [first, last) of `matrix`, contracted with a panel's weights over all rows, a few at a time.
void contract(const ContrastBackward& a, const Panels& matrix, int64_t first, int64_t last, const float* weights,
              float* rows, Ahead ahead) {
  const int64_t chunks = (a.num_rows + kClassChunk - 1) / kClassChunk, step = (a.num_rows + chunks - 1) / chunks;
  for (int64_t m = 0; m < a.num_rows; m += step, ahead.rows = 0)
    product(matrix, first, last, m, smaller(step, a.num_rows - m), weights + m * kPanel, rows, m > 0, ahead);
}

// `inward` out of the gradient itself, all of whose channels are in `rows`. What the softmax gives differs from that by
// the rounding of both, and lies along x: in one dimension of D, so most of the error where D is 1 or 2.
void project(int64_t channels, const float* rows, const float* x, GradientPanel& panel) {
  for (int v = 0; v < kPanel; v += V) {
    const vf inv = load(panel.inv_norm + v), along = load(panel.along + v);
    vf radial = {};
    for (int64_t d = 0; d < channels; ++d)
      radial += load(rows + d * kPanel + v) * along * (load(x + d * kPanel + v) * inv);
    store(panel.inward + v, select((vi)(inv >= kClampedInvNorm), vf{}, radial * inv));  // as in set_factors
  }
}

// The features' gradient of a tile whose panels are weighed.
void write_gradients(const ContrastBackward& a, const TileSpan& t, GradientPanel* panel, const BackwardBuffers& b) {
  const int64_t weights_size = padded(a.by_class) * kPanel, packed_size = packed_rows(a) * kPanel;
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
      const float* x = packs_tile(a) ? b.packed + m * packed_size + d * kPanel : nullptr;
      Ahead ahead = {};
      if (a.normalize && !x) ahead = ahead_of(a.x, panel[m].span, d, n);
      contract(a, by_channel, block, last, b.weights + m * weights_size, b.rows, ahead);
      if (has_variances(a)) {
        contract(a, of_image(a.options->variances_by_channel, t.image), block, last, b.variance + m * weights_size,
                 b.variance_rows, {});
        add_variance_rows(panel[m], n, b.variance_rows, x, b.rows);
      }
      if (a.normalize && a.x.dim <= kFewChannels) {
        if (!x) pack(a.x, panel[m].span, d, n, b.packed), x = b.packed;
        project(n, b.rows, x, panel[m]);
      }
      write_gradient(a, panel[m], d, n, b.rows, x, b.packed);
    }
  }
  finish_stores();
}

}  // namespace

void contrast_backward(const ContrastBackward& a, int64_t tile, int64_t group, float* scratch) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  const int64_t packed_size = packed_rows(a) * kPanel;
  BackwardBuffers b = {};
  place(a, scratch, &b);
  GradientPanel panel[kMaxPanels];
  for (int64_t m = 0; m < t.panels; ++m) {
    panel[m].span = make_span(a.x, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    if (a.dx.data) panel[m].gradient_span = make_span(a.dx, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    panel[m].labelled = a.options ? read_aims(a, panel[m].span, panel[m].label,
                                              b.targets + m * a.options->num_classes * kPanel, nullptr)
                                  : read_labels(a.labels, a.x, panel[m].span, panel[m].label, nullptr);
    if (!panel[m].labelled) continue;
    float *x = b.packed + m * packed_size, *w = b.weights + m * padded(a.by_class) * kPanel;
    if (packs_tile(a)) pack(a.x, panel[m].span, 0, a.x.dim, x);
    if (a.options)
      weigh_panel_with_options(a, panel[m], x, m, b, group);
    else
      weigh_panel(a, panel[m], x, w, group);
    if (a.dproto) add_prototype_gradient(a, panel[m], x, w, b.by_pixel, a.dproto + group * a.x.dim * a.dproto_stride);
  }
  if (a.dx.data) write_gradients(a, t, panel, b);
}

}  // namespace SPCL_ISA
}  // namespace spcl
