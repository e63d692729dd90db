// upsampled_cross_entropy with its gradient, one band of cells at a time. Compiled once per instruction set (SPCL_ISA).
//
// The adjoint of the interpolation is separable: the gradients of a cell's rows of pixels are first summed downwards, at the pixels' width
// and in L1 or L2, and only these two sums per cell go through the adjoint along the row.
#include "upsample.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

struct Buffers {
  float *lower, *upper;    // [K][node_stride]: packed nodes above and below the row of pixels
  float* row;              // [K + 1][node_stride]: blended
  float* e;                // [K][V]: exponentials of a vector of pixels
  float *dlower, *dupper;  // [K][kPanel]: the gradient's part of the row of nodes above and below
  float* turned;           // [nodes][V]: V classes of it
};

int64_t place(const Upsampled& a, float* scratch, Buffers* to) {
  const int64_t nodes = node_stride(a), num_classes = a.logits.dim;
  const int64_t sizes[] = {num_classes * nodes, num_classes * nodes, (num_classes + 1) * nodes, num_classes * V,
                           num_classes * kPanel, num_classes * kPanel, nodes * V};
  float** parts[] = {&to->lower, &to->upper, &to->row, &to->e, &to->dlower, &to->dupper, &to->turned};
  int64_t used = 0;
  for (int i = 0; i < 7; ++i) *parts[i] = scratch + used, used += sizes[i];
  return used;
}

// ---- one vector of pixels ---------------------------------------------------------------------------------------

struct Softmax {
  vf sum, loss;
};

// e [K][V] = 2^(logit - top); their sum, and the logit of each pixel's own class.
template <bool kNear>
SPCL_INLINE void exponentials(const float* rows, int64_t stride, int64_t num_classes, const Taps& t, vf top, vi own, float* e, vf* sum,
                              vf* own_logit) {
  *sum = vf{}, *own_logit = vf{};
  for (int64_t first = 0; first < num_classes; first += kTermsAtOnce) {
    vf part = {};
    for (int64_t k = first; k < smaller(first + kTermsAtOnce, num_classes); ++k) {
      vf logit = interpolate<kNear>(rows + k * stride, t);
      *own_logit = select(own == (int32_t)k, logit, *own_logit);
      vf term = exp2(logit - top);
      store(e + k * V, term);
      part += term;
    }
    *sum += part;
  }
}

template <bool kNear>
Softmax softmax(const float* rows, int64_t stride, int64_t num_classes, const Taps& t, vi own, float* e) {
  vf top = interpolate<kNear>(rows + num_classes * stride, t), sum, own_logit;
  exponentials<kNear>(rows, stride, num_classes, t, top, own, e, &sum, &own_logit);
  if (any(~(sum > kSmallestSum))) {  // the bound lies far above the largest logit, or something is not finite
    top = largest<kNear>(rows, stride, num_classes, t);
    exponentials<kNear>(rows, stride, num_classes, t, top, own, e, &sum, &own_logit);
    for (int64_t k = 0; k < num_classes; ++k) store(e + k * V, select(own < 0, vf{}, load(e + k * V)));  // an ignored NaN goes nowhere
  }
  return {sum, (top - own_logit) * kLn2 + log(sum)};
}

void add_gradient(const float* e, int64_t num_classes, vi own, vf sum, vf to_lower, vf to_upper, float* dlower, float* dupper) {
  for (int64_t k = 0; k < num_classes; ++k, dlower += kPanel, dupper += kPanel) {
    vf slope = load(e + k * V) - select(own == (int32_t)k, sum, vf{});
    store(dlower, load(dlower) + slope * to_lower);
    store(dupper, load(dupper) + slope * to_upper);
  }
}

// ---- one row of a panel -----------------------------------------------------------------------------------------

struct Totals {
  double loss = 0, weight = 0;
};

// Labels and what a pixel's loss is multiplied by; how many pixels have a label.
int read_pixels(const UpsampledCrossEntropy& a, const Span& span, int32_t* label, float* scale, Totals* totals) {
  const int labelled = read_labels(a.labels, a.pixels, span, label, a.first_bad);
  if (!labelled) return 0;
  for (int p = 0; p < kPanel; ++p) scale[p] = label[p] < 0 ? 0.0f : a.class_weight ? a.class_weight[label[p]] : 1.0f;
  if (a.class_weight) for (int p = 0; p < kPanel; ++p) totals->weight += scale[p];
  else totals->weight += labelled;
  scale_by(a.pixel_weight, a.pixels, span, label, scale);
  return labelled;
}

void row_of_pixels(const UpsampledCrossEntropy& a, const Window& window, int64_t row, const Buffers& b, Totals* totals) {
  const int64_t stride = node_stride(a), num_classes = a.logits.dim;
  alignas(64) int32_t label[kPanel];
  alignas(64) float scale[kPanel], map[kPanel] = {};
  Span span;
  span.image = window.image, span.first = row * a.x.pixels + window.first_pixel, span.count = window.count;
  if (read_pixels(a, span, label, scale, totals)) {
    const float weight = a.y.weight[row];
    blend(a, window, b.lower, b.upper, weight, b.row);
    vf losses = {};
    for (int v = 0; v < window.count; v += V) {
      const vi own = load(label + v);
      if (!any(own >= 0)) continue;
      const Taps t = taps_of(a, window, v);
      const Softmax s = t.near ? softmax<true>(b.row, stride, num_classes, t, own, b.e)
                               : softmax<false>(b.row, stride, num_classes, t, own, b.e);
      const vf factor = load(scale + v), loss = select(own < 0, vf{}, s.loss * factor);
      store(map + v, loss);
      losses += loss;
      if (!a.dlogits) continue;
      const vf slope = select(own < 0, vf{}, factor / s.sum);
      add_gradient(b.e, num_classes, own, s.sum, slope * (1.0f - weight), slope * weight, b.dlower + v, b.dupper + v);
    }
    for (int i = 0; i < V; ++i) totals->loss += losses[i];
  }
  if (a.loss_map) memcpy(a.loss_map + window.image * a.y.pixels * a.x.pixels + span.first, map, window.count * sizeof(float));
}

// ---- gradient out -----------------------------------------------------------------------------------------------

// d [kPanel] of V classes, turned to a pixel a vector, summed into their nodes: turned [nodes][V].
void sum_into_nodes(const Upsampled& a, const Window& window, const float* d, int64_t classes, float* turned) {
  for (int64_t n = 0; n < window.nodes; ++n) store(turned + n * V, vf{});
  int64_t node = 0;
  vf low = {}, high = {};
  for (int64_t first = 0; first < window.count; first += V) {
    vf block[V];
    for (int i = 0; i < V; ++i) block[i] = i < classes ? load(d + i * kPanel + first) : vf{};
    transpose(block);
    for (int i = 0; i < V; ++i) {
      const int64_t at = window.first_pixel + first + i, lower = a.x.lower[at] - window.first;
      if (lower != node) {
        store(turned + node * V, load(turned + node * V) + low);
        store(turned + (node + 1) * V, load(turned + (node + 1) * V) + high);
        node = lower, low = vf{}, high = vf{};
      }
      low += block[i] * (1.0f - a.x.weight[at]);
      high += block[i] * a.x.weight[at];
    }
  }
  store(turned + node * V, load(turned + node * V) + low);
  if (node + 1 < window.nodes) store(turned + (node + 1) * V, load(turned + (node + 1) * V) + high);  // else its weight is 0
}

// d [K][kPanel] through the adjoint along the row, added to a row of nodes of every class.
void add_to_nodes(const Upsampled& a, const Window& window, const float* d, float* turned, float* nodes, int64_t stride_k) {
  for (int64_t k = 0; k < a.logits.dim; k += V) {
    const int64_t classes = smaller(V, a.logits.dim - k);
    sum_into_nodes(a, window, d + k * kPanel, classes, turned);
    for (int64_t i = 0; i < classes; ++i) {
      float* to = nodes + (k + i) * stride_k + window.first;
      for (int64_t n = 0; n < window.nodes; ++n) to[n] += turned[n * V + i];
    }
  }
}

// ---- one panel of a band ----------------------------------------------------------------------------------------

// Where the gradient of node row `row` goes: the band's own rows, or what it hands to the next band.
struct GradientRow {
  float* data;
  int64_t stride_k;
};

GradientRow gradient_row(const UpsampledCrossEntropy& a, const Band& band, int64_t index, int64_t row) {
  const int64_t num_classes = a.logits.dim, height = a.logits.height, width = a.logits.width;
  if (row == band.last) return {a.overlap + index * num_classes * width, width};
  return {a.dlogits + (band.image * num_classes * height + row) * width, height * width};
}

void walk_panel(const UpsampledCrossEntropy& a, const Band& band, int64_t index, const Window& window, Buffers b, Totals* totals) {
  const int64_t d_bytes = a.logits.dim * kPanel * sizeof(float);
  auto give = [&](int64_t row) {
    if (!a.dlogits) return;
    const GradientRow to = gradient_row(a, band, index, row);
    add_to_nodes(a, window, b.dlower, b.turned, to.data, to.stride_k);
  };
  bool carried = false;  // whether `lower` holds this cell's upper row of nodes from the cell before
  for (int64_t cell = band.first; cell < band.last; ++cell) {
    const int64_t first = a.first_row[cell], last = a.first_row[cell + 1];
    if (first == last) {
      if (carried) give(cell);
      carried = false;
      continue;
    }
    if (!carried) {
      pack_nodes(a, window, cell, b.lower);
      memset(b.dlower, 0, d_bytes);
    }
    pack_nodes(a, window, a.y.upper[first], b.upper);
    memset(b.dupper, 0, d_bytes);
    for (int64_t row = first; row < last; ++row) row_of_pixels(a, window, row, b, totals);
    give(cell);
    float *lower = b.lower, *dlower = b.dlower;
    b.lower = b.upper, b.dlower = b.dupper, b.upper = lower, b.dupper = dlower;
    carried = true;
  }
  if (carried && band.last < a.logits.height) give(band.last);  // the row beyond the last node has weight 0
}

}  // namespace

int64_t upsampled_cross_entropy_scratch(const UpsampledCrossEntropy& a) {
  Buffers none;
  return place(a, nullptr, &none);
}

void upsampled_cross_entropy(const UpsampledCrossEntropy& a, int64_t index, float* scratch) {
  const Band band = band_of(a, index);
  const int64_t num_classes = a.logits.dim, height = a.logits.height, width = a.logits.width;
  const size_t rows_bytes = (band.last - band.first) * width * sizeof(float);
  Buffers buffers;
  place(a, scratch, &buffers);
  if (a.dlogits) {
    for (int64_t k = 0; k < num_classes; ++k)
      memset(a.dlogits + ((band.image * num_classes + k) * height + band.first) * width, 0, rows_bytes);
    memset(a.overlap + index * num_classes * width, 0, num_classes * width * sizeof(float));
  }
  Totals totals;
  for (int64_t pixel = 0; pixel < a.x.pixels; pixel += kPanel)
    walk_panel(a, band, index, window_of(a, band.image, pixel), buffers, &totals);
  a.partial_loss[index] = totals.loss;
  a.partial_weight[index] = totals.weight;
}

}  // namespace SPCL_ISA
}  // namespace spcl
