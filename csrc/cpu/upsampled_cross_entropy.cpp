// upsampled_cross_entropy and upsampled_binary_cross_entropy with their gradient, one band of cells at a time. Compiled
// once per instruction set (SPCL_ISA).
//
// The adjoint of the interpolation is separable: the gradients of a cell's rows of pixels are first summed downwards,
// at the pixels' width and in L1 or L2, and only these two sums per cell go through the adjoint along the row.
#include "upsampled_losses.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

// Two rows of nodes [K][node_stride] that are kept as long as the rows of pixels lie between them.
struct RowCache {
  float *lower, *upper, *row;
  int64_t lower_node, upper_node;
};

struct Buffers {
  float *lower, *upper;    // [K][node_stride]: packed nodes above and below the row of pixels
  float* row;              // [K + 1][node_stride]: blended
  float* e;                // [K][V]: exponentials of a vector of pixels
  float *dlower, *dupper;  // [K][kPanel]: the gradient's part of the row of nodes above and below
  float* turned;           // [nodes][V]: V classes of it
  RowCache targets;        // rows of nodes of the probabilities
  float* probabilities;    // [K][kPanel]: up-sampled
};

int64_t place(const UpsampledCrossEntropy& a, float* scratch, Buffers* to) {
  const int64_t nodes = node_stride(a), num_classes = a.logits.dim;
  const bool soft = a.options && a.options->targets.logits.data;
  const int64_t target_nodes = soft ? num_classes * node_stride(a.options->targets) : 0;
  const int64_t sizes[] = {num_classes * nodes,
                           num_classes * nodes,
                           (num_classes + 1) * nodes,
                           num_classes * V,
                           num_classes * kPanel,
                           num_classes * kPanel,
                           nodes * V,
                           target_nodes,
                           target_nodes,
                           soft ? target_nodes + node_stride(a.options->targets) : 0,
                           soft ? num_classes * kPanel : 0};
  RowCache& t = to->targets;
  float** parts[] = {&to->lower,  &to->upper, &to->row, &to->e, &to->dlower,       &to->dupper,
                     &to->turned, &t.lower,   &t.upper, &t.row, &to->probabilities};
  int64_t used = 0;
  for (int i = 0; i < 11; ++i) *parts[i] = scratch + used, used += sizes[i];
  return used;
}

// ---- one vector of pixels ---------------------------------------------------------------------------------------

void add_slopes(const float* slopes, int64_t num_classes, vf to_lower, vf to_upper, float* dlower, float* dupper) {
  for (int64_t k = 0; k < num_classes; ++k, dlower += kPanel, dupper += kPanel) {
    store(dlower, load(dlower) + load(slopes + k * V) * to_lower);
    store(dupper, load(dupper) + load(slopes + k * V) * to_upper);
  }
}

void add_gradient(const float* e, int64_t num_classes, vi own, vf sum, vf to_lower, vf to_upper, float* dlower,
                  float* dupper) {
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

// The probabilities of a row of pixels: [K][V] of each vector of them; label [kPanel]: 0 where they do not sum to 0,
// else -1. How many do not.
int read_probabilities(const UpsampledOptions& o, const Window& pixels, int64_t row, const Buffers& b, RowCache* cache,
                       int32_t* label) {
  const Upsampled& t = o.targets;
  const Window window = window_of(t, pixels.image, pixels.first_pixel);
  const int64_t num_classes = t.logits.dim, lower = t.y.lower[row], upper = t.y.upper[row];
  if (cache->upper_node == lower) {
    float* next = cache->lower;
    cache->lower = cache->upper, cache->upper = next, cache->lower_node = lower, cache->upper_node = -1;
  }
  if (cache->lower_node != lower) pack_nodes(t, window, lower, 1.0f, cache->lower), cache->lower_node = lower;
  if (cache->upper_node != upper) pack_nodes(t, window, upper, 1.0f, cache->upper), cache->upper_node = upper;
  blend<false>(t, window, cache->lower, cache->upper, t.y.weight[row], cache->row);
  int labelled = 0;
  for (int v = 0; v < kPanel; v += V) {
    vf sum = {};
    for (int64_t k = 0; v < window.count && k < num_classes; ++k) {
      const Taps taps = taps_of(t, window, v);
      const float* row_of_class = cache->row + k * node_stride(t);
      const vf value =
          taps.near ? interpolate<true, false>(row_of_class, taps) : interpolate<false, false>(row_of_class, taps);
      store(b.probabilities + v * num_classes + k * V, value);
      sum += value;
    }
    for (int i = 0; i < V; ++i)
      label[v + i] = v + i < window.count && sum[i] != 0 ? 0 : -1, labelled += label[v + i] == 0;
  }
  return labelled;
}

// Labels and what a pixel's loss is multiplied by; how many pixels have a label.
int read_pixels(const UpsampledCrossEntropy& a, const Window& window, int64_t row, const Span& span, Buffers& b,
                int32_t* label, float* scale, Totals* totals) {
  const int labelled = a.options && a.options->targets.logits.data
                           ? read_probabilities(*a.options, window, row, b, &b.targets, label)
                           : read_labels(a.labels, a.pixels, span, label, a.first_bad);
  if (!labelled) return 0;
  for (int p = 0; p < kPanel; ++p) scale[p] = label[p] < 0 ? 0.0f : a.class_weight ? a.class_weight[label[p]] : 1.0f;
  if (a.class_weight)
    for (int p = 0; p < kPanel; ++p) totals->weight += scale[p];
  else
    totals->weight += labelled;
  if (a.options)
    for (int p = 0; p < kPanel; ++p) scale[p] = label[p] < 0 ? 0.0f : 1.0f;  // class weights are in the shares
  scale_by(a.pixel_weight, a.pixels, span, label, scale);
  return labelled;
}

// One vector of pixels from `rows`, V pixels from the panel's pixel v on: their losses; their gradient to dlower and
// dupper.
template <bool kLow>
vf plain_vector(const UpsampledCrossEntropy& a, const Window& window, int v, vi own, vf factor, float weight,
                const Buffers& b) {
  const Taps t = taps_of<kLow>(a, window, v);
  vf top;
  const Softmax s =
      t.near ? softmax<true, kLow>(a, b.row, t, own, b.e, &top) : softmax<false, kLow>(a, b.row, t, own, b.e, &top);
  if (a.dlogits) {
    const vf slope = select(own < 0, vf{}, factor / s.sum);
    add_gradient(b.e, a.logits.dim, own, s.sum, slope * (1.0f - weight), slope * weight, b.dlower + v, b.dupper + v);
  }
  return select(own < 0, vf{}, s.loss * factor);
}

template <bool kLow>
vf vector_with_options(const UpsampledCrossEntropy& a, const Window& window, int v, vi own, vf factor, float weight,
                       const Buffers& b) {
  const UpsampledOptions& o = *a.options;
  const int64_t num_classes = a.logits.dim;
  const Taps t = taps_of<kLow>(a, window, v);
  const VectorTargets targets = {own, o.targets.logits.data ? b.probabilities + v * num_classes : nullptr};
  const vf loss = o.binary ? (t.near ? binary_cross_entropy<true, kLow>(a, o, b.row, t, targets, b.e)
                                     : binary_cross_entropy<false, kLow>(a, o, b.row, t, targets, b.e))
                           : (t.near ? soft_cross_entropy<true, kLow>(a, o, b.row, t, targets, b.e)
                                     : soft_cross_entropy<false, kLow>(a, o, b.row, t, targets, b.e));
  if (a.dlogits) {
    for (int64_t k = 0; k < num_classes; ++k)
      store(b.e + k * V, select(own < 0, vf{}, load(b.e + k * V)));  // an ignored NaN goes nowhere
    const vf slope = select(own < 0, vf{}, factor);
    add_slopes(b.e, num_classes, slope * (1.0f - weight), slope * weight, b.dlower + v, b.dupper + v);
  }
  return select(own < 0, vf{}, loss * factor);
}

template <bool kLow>
void row_of_pixels(const UpsampledCrossEntropy& a, const Window& window, int64_t row, Buffers& b, Totals* totals) {
  alignas(64) int32_t label[kPanel];
  alignas(64) float scale[kPanel], map[kPanel] = {};
  Span span;
  span.image = window.image, span.first = row * a.x.pixels + window.first_pixel, span.count = window.count;
  if (read_pixels(a, window, row, span, b, label, scale, totals)) {
    const float weight = a.y.weight[row];
    blend<kLow>(a, window, b.lower, b.upper, weight, b.row);
    vf losses = {};
    for (int v = 0; v < window.count; v += V) {
      const vi own = load(label + v);
      if (!any(own >= 0)) continue;
      const vf loss = a.options ? vector_with_options<kLow>(a, window, v, own, load(scale + v), weight, b)
                                : plain_vector<kLow>(a, window, v, own, load(scale + v), weight, b);
      store(map + v, loss);
      losses += loss;
    }
    for (int i = 0; i < V; ++i) totals->loss += losses[i];
  }
  if (a.loss_map)
    memcpy(a.loss_map + window.image * a.y.pixels * a.x.pixels + span.first, map, window.count * sizeof(float));
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
  if (node + 1 < window.nodes)
    store(turned + (node + 1) * V, load(turned + (node + 1) * V) + high);  // else its weight is 0
}

// d [K][kPanel] through the adjoint along the row, added to a row of nodes of every class.
void add_to_nodes(const Upsampled& a, const Window& window, const float* d, float* turned, float* nodes,
                  int64_t stride_k) {
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

// False where an extreme logit was met, which kLow takes as it is.
template <bool kLow>
bool walk_panel(const UpsampledCrossEntropy& a, const Band& band, int64_t index, const Window& window, Buffers b,
                Totals* totals) {
  const int64_t d_bytes = a.logits.dim * kPanel * sizeof(float);
  const float factor = kLow ? 1.0f : a.factor;
  auto give = [&](int64_t row) {
    if (!a.dlogits) return;
    const GradientRow to = gradient_row(a, band, index, row);
    add_to_nodes(a, window, b.dlower, b.turned, to.data, to.stride_k);
  };
  b.targets.lower_node = b.targets.upper_node = -1;
  bool carried = false;  // whether `lower` holds this cell's upper row of nodes from the cell before
  for (int64_t cell = band.first; cell < band.last; ++cell) {
    const int64_t first = a.first_row[cell], last = a.first_row[cell + 1];
    if (first == last) {
      if (carried) give(cell);
      carried = false;
      continue;
    }
    bool extreme = false;
    if (!carried) {
      extreme = pack_nodes(a, window, cell, factor, b.lower);
      memset(b.dlower, 0, d_bytes);
    }
    extreme |= pack_nodes(a, window, a.y.upper[first], factor, b.upper);
    if (extreme && !kLow) return false;
    memset(b.dupper, 0, d_bytes);
    for (int64_t row = first; row < last; ++row) row_of_pixels<kLow>(a, window, row, b, totals);
    give(cell);
    float *lower = b.lower, *dlower = b.dlower;
    b.lower = b.upper, b.dlower = b.dupper, b.upper = lower, b.dupper = dlower;
    carried = true;
  }
  if (carried && band.last < a.logits.height) give(band.last);  // the row beyond the last node has weight 0
  return true;
}

template <bool kLow>
bool walk_band(const UpsampledCrossEntropy& a, const Band& band, int64_t index, const Buffers& buffers) {
  const int64_t num_classes = a.logits.dim, height = a.logits.height, width = a.logits.width;
  const size_t rows_bytes = (band.last - band.first) * width * sizeof(float);
  if (a.dlogits) {
    for (int64_t k = 0; k < num_classes; ++k)
      memset(a.dlogits + ((band.image * num_classes + k) * height + band.first) * width, 0, rows_bytes);
    memset(a.overlap + index * num_classes * width, 0, num_classes * width * sizeof(float));
  }
  Totals totals;
  for (int64_t pixel = 0; pixel < a.x.pixels; pixel += kPanel)
    if (!walk_panel<kLow>(a, band, index, window_of(a, band.image, pixel), buffers, &totals)) return false;
  a.partial_loss[index] = totals.loss;
  a.partial_weight[index] = totals.weight;
  return true;
}

}  // namespace

int64_t upsampled_cross_entropy_scratch(const UpsampledCrossEntropy& a) {
  Buffers none;
  return place(a, nullptr, &none);
}

void upsampled_cross_entropy(const UpsampledCrossEntropy& a, int64_t index, float* scratch) {
  const Band band = band_of(a, index);
  Buffers buffers;
  place(a, scratch, &buffers);
  if (!walk_band<false>(a, band, index, buffers)) walk_band<true>(a, band, index, buffers);
}

}  // namespace SPCL_ISA
}  // namespace spcl
