// The losses beyond the plain one, a panel at a time: bias, probabilities, smoothing, margin, variances, pooled rows,
// sigmoid, and logits alone. All of it works on the dot products of one panel, in L1 or L2: no option costs a pass over
// the features.
//
// "Dots" are <x̂, P_m> / temperature; a row's logit adds its bias and its variance term; a class's logit z pools its
// rows.
#pragma once
#include "contrast_panel.h"

namespace spcl {
namespace SPCL_ISA {

struct OptionBuffers {
  float* z;         // [K][kPanel]: class logits, in the backward then their weights
  float* shares;    // [M][kPanel]: a row's part in its class's logit
  float* variance;  // [panels][padded M][kPanel]: variance terms, in the backward then their weights
  float* targets;   // [panels][K][kPanel]
  float* squared;   // [kChunk][kPanel]
};

// Where there are no options nothing is placed. Returns the floats in use.
SPCL_LOCAL
int64_t place_options(const Contrast& a, float* scratch, OptionBuffers* to) {
  if (!a.options) return 0;
  const ContrastOptions& o = *a.options;
  const int64_t variance_rows = o.variances_by_class.data ? a.tiles.panels * padded(a.by_class) : 0;
  const int64_t rows[] = {o.num_classes, o.first_row ? a.num_rows : 0, variance_rows,
                          o.targets.data ? a.tiles.panels * o.num_classes : 0, variance_rows ? kChunk : 0};
  float** parts[] = {&to->z, &to->shares, &to->variance, &to->targets, &to->squared};
  int64_t used = 0;
  for (int i = 0; i < 5; ++i) *parts[i] = scratch + used, used += rows[i] * kPanel;
  return used;
}

SPCL_INLINE
const float* bias_of(const ContrastOptions& o, int64_t image) { return o.bias + image * o.bias_stride; }

// ---- targets in -------------------------------------------------------------------------------------------------

SPCL_LOCAL
void note_bad(int64_t* first_bad, int64_t here) {
  int64_t seen = __atomic_load_n(first_bad, __ATOMIC_RELAXED);
  while (here < seen &&
         !__atomic_compare_exchange_n(first_bad, &seen, here, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Probabilities of a panel -> share_k t_k + background_k; label [kPanel]: 0 where they do not sum to 0, else -1. How
// many do not.
SPCL_LOCAL
int read_probabilities(const Contrast& a, const Span& at, float* out, int32_t* label, int64_t* first_bad) {
  const ContrastOptions& o = *a.options;
  pack(o.targets, make_span(o.targets, at.image, at.first, at.count), 0, o.num_classes, out);
  int labelled = 0;
  for (int v = 0; v < kPanel; v += V) {
    vf sum = {};
    vi good = splat((int32_t)-1);
    for (int64_t k = 0; k < o.num_classes; ++k) {
      vf t = load(out + k * kPanel + v);
      good &= (t >= 0.0f) & (t < __builtin_inff());
      sum += t;
      store(out + k * kPanel + v, t * o.share[k] + o.background[k]);
    }
    vi used = sum != 0.0f;
    for (int i = 0; i < V; ++i) {
      const bool inside = v + i < at.count;
      label[v + i] = inside && used[i] ? 0 : -1;
      labelled += inside && used[i];
      if (inside && !good[i] && first_bad) note_bad(first_bad, at.image * a.x.height * a.x.width + at.first + v + i);
    }
  }
  return labelled;
}

// What a panel is held against: label [kPanel], and `targets` where there are probabilities. How many pixels count.
SPCL_LOCAL
int read_aims(const Contrast& a, const Span& at, int32_t* label, float* targets, int64_t* first_bad) {
  if (!a.options || (a.options->loss != kLogits && !a.options->targets.data))
    return read_labels(a.labels, a.x, at, label, first_bad);
  if (a.options->loss != kLogits) return read_probabilities(a, at, targets, label, first_bad);
  if (a.options->targets.data)
    pack(a.options->targets, make_span(a.options->targets, at.image, at.first, at.count), 0, a.options->num_classes,
         targets);
  for (int p = 0; p < kPanel; ++p) label[p] = p < at.count ? 0 : -1;
  return at.count;
}

// Adds the product of a packed chunk's squares with the variances; `squared` is room for them.
SPCL_LOCAL
void add_variance_product(const ContrastOptions& o, int64_t image, int64_t d, int64_t n, const float* chunk,
                          float* squared, float* out) {
  const Panels by_class = of_image(o.variances_by_class, image);
  for (int64_t i = 0; i < n * kPanel; i += V) store(squared + i, load(chunk + i) * load(chunk + i));
  product(by_class, 0, by_class.blocks, d, n, squared, out, d > 0, {});
}

// ---- class logits -----------------------------------------------------------------------------------------------

// Dot products -> dots.
SPCL_LOCAL
void scale_dots(int64_t num_rows, const float* inv_norm, float temperature, float* dots) {
  for (int v = 0; v < kPanel; v += V) {
    const vf factor = load(inv_norm + v) / temperature;
    for (int64_t m = 0; m < num_rows; ++m) store(dots + m * kPanel + v, load(dots + m * kPanel + v) * factor);
  }
}

// Products of the variances with the features' squares -> variance terms.
SPCL_LOCAL
void scale_variance(int64_t num_rows, const float* inv_norm, float temperature, float* variance) {
  for (int v = 0; v < kPanel; v += V) {
    const vf factor = load(inv_norm + v) / temperature;
    for (int64_t m = 0; m < num_rows; ++m)
      store(variance + m * kPanel + v, load(variance + m * kPanel + v) * (0.5f * factor * factor));
  }
}

struct RowLogits {
  const float *dots, *variance, *bias;
  SPCL_INLINE_MEMBER vf at(int64_t m, int v) const {
    vf s = load(dots + m * kPanel + v) + bias[m];
    return variance ? s + load(variance + m * kPanel + v) : s;
  }
};

// One class's rows [first, last) -> its logit, and each row's part in it: softmax within the class, or 1 for the first
// of the largest. A class without a row has logit -inf.
template <bool kMax> SPCL_INLINE
vf pool(const RowLogits& s, int64_t first, int64_t last, int v, float* shares) {
  vf top = splat(-__builtin_inff()), sum = {};
  vi found = {};
  for (int64_t m = first; m < last; ++m) {
    vf value = s.at(m, v);
    top = select((value > top) | (value != value), value, top);
  }
  for (int64_t m = first; m < last; ++m) {
    vf value = s.at(m, v);
    vi hit = (value == top) & ~found;
    vf part = kMax ? select(hit, splat(1.0f), vf{}) : select(top == -__builtin_inff(), vf{}, exp(value - top));
    found |= hit, sum += part;
    store(shares + m * kPanel + v, part);
  }
  if constexpr (kMax) return top;
  vf inverse = select(sum > 0.0f, 1.0f / sum, sum);
  for (int64_t m = first; m < last; ++m) store(shares + m * kPanel + v, load(shares + m * kPanel + v) * inverse);
  return select(top == -__builtin_inff(), top, top + log(sum));
}

// dots [M][kPanel] (with variance terms, or nullptr) of an image -> z [K][kPanel], the label's less the margin.
SPCL_LOCAL
void class_logits(const Contrast& a, const Panel& panel, const float* dots, const float* variance,
                  const OptionBuffers& b) {
  const ContrastOptions& o = *a.options;
  const RowLogits s = {dots, variance, bias_of(o, panel.span.image)};
  for (int v = 0; v < kPanel; v += V)
    for (int64_t k = 0; k < o.num_classes; ++k) {
      vf z = !o.first_row ? s.at(k, v)
             : o.pool_max ? pool<true>(s, o.first_row[k], o.first_row[k + 1], v, b.shares)
                          : pool<false>(s, o.first_row[k], o.first_row[k + 1], v, b.shares);
      store(b.z + k * kPanel + v, z);
    }
  for (int p = 0; o.margin != 0 && p < kPanel; ++p)
    if (panel.label[p] >= 0) b.z[panel.label[p] * kPanel + p] -= o.margin;
}

// ---- losses -----------------------------------------------------------------------------------------------------

// Of probabilities: everything is in `targets` [K][kPanel]; of labels (nullptr): share [label] at the label, background
// elsewhere, too.
struct Aims {
  const float* targets;
  alignas(64) float own[kPanel];
  alignas(64) float own_z[kPanel];  // the label's logit as the numerator has it
};

// variance: nullptr where the numerator has the variance term, too.
SPCL_LOCAL
void set_aims(const ContrastOptions& o, const Panel& panel, const float* targets, const float* z, const float* variance,
              Aims* aims) {
  aims->targets = o.targets.data ? targets : nullptr;
  for (int p = 0; p < kPanel; ++p) {
    const int64_t label = panel.label[p], at = label * kPanel + p;
    aims->own[p] = label < 0 || aims->targets ? 0.0f : o.share[label];
    aims->own_z[p] = label < 0 ? 0.0f : variance ? z[at] - variance[at] : z[at];
  }
}

SPCL_LOCAL
void log_sum_exp(const float* z, int64_t num_classes, float* top, float* log_sum) {
  for (int v = 0; v < kPanel; v += V) {
    vf most = splat(-__builtin_inff());
    for (int64_t k = 0; k < num_classes; ++k) most = larger(load(z + k * kPanel + v), most);
    LongSum sum;
    for (int64_t first = 0; first < num_classes; first += kSumBlock) {
      vf part = {};
      for (int64_t k = first; k < smaller(first + kSumBlock, num_classes); ++k)
        part += exp(load(z + k * kPanel + v) - most);
      sum.add(part);
    }
    store(top + v, most);
    store(log_sum + v, log(sum.total));
  }
}

// -sum_k t_k log softmax(z)_k -> loss [kPanel].
SPCL_LOCAL
void softmax_loss(const ContrastOptions& o, const float* z, const Aims& aims, const float* top, const float* log_sum,
                  float* loss) {
  const int64_t terms = aims.targets || o.background_sum != 0 ? o.num_classes : 0;
  for (int v = 0; v < kPanel; v += V) {
    const vf most = load(top + v), rest = load(log_sum + v);
    LongSum sum;
    vf rough = {};  // an infinite loss, of which the corrections of LongSum would make NaN
    if (!aims.targets) {
      const vf own = load(aims.own + v), term = own * ((most - load(aims.own_z + v)) + rest);
      // a label of weight 0 and infinite loss: NaN, as in F.cross_entropy; nothing where it is one target of many
      sum.add(rough = terms ? select(own == 0.0f, vf{}, term) : term);
    }
    for (int64_t first = 0; first < terms; first += kSumBlock) {
      vf part = {};
      for (int64_t k = first; k < smaller(first + kSumBlock, terms); ++k) {
        vf t = aims.targets ? load(aims.targets + k * kPanel + v) : splat(o.background[k]);
        vf term = t * ((most - load(z + k * kPanel + v)) + rest);
        part += select(t == 0.0f, vf{}, term);  // a class of logit -inf that nobody aims at
      }
      sum.add(part), rough += part;
    }
    store(loss + v, select(rough == __builtin_inff(), rough, sum.total));
  }
}

SPCL_INLINE
vf target_of(const ContrastOptions& o, const Aims& aims, vi label, int64_t k, int v) {
  if (aims.targets) return load(aims.targets + k * kPanel + v);
  return select(label == (int32_t)k, load(aims.own + v), vf{}) + o.background[k];
}

// sum_k scale_k (log(1 + exp(z_k)) - t_k z_k) -> loss [kPanel].
SPCL_LOCAL
void sigmoid_loss(const ContrastOptions& o, const float* z, const int32_t* label, const Aims& aims, float* loss) {
  for (int v = 0; v < kPanel; v += V) {
    LongSum sum;
    vf rough = {};  // as in softmax_loss
    for (int64_t k = 0; k < o.num_classes; ++k) {
      vf value = load(z + k * kPanel + v), t = target_of(o, aims, load(label + v), k, v);
      vf linear = select(value > 0.0f, (1.0f - t) * value, -t * value);
      linear = select((value == -__builtin_inff()) & (t == 0.0f), vf{}, linear);
      vf term = o.class_scale[k] * (linear + log1p(exp(-magnitude(value))));
      sum.add(term), rough += term;
    }
    store(loss + v, select(rough == __builtin_inff(), rough, sum.total));
  }
}

// ---- weights: the loss's slopes by the class logits -------------------------------------------------------------

// T / sum of e as two floats: what all weights have alike is not seen in their sum.
struct Shares {
  alignas(64) float high[V];
  alignas(64) float low[V];

  SPCL_INLINE_MEMBER Shares(const LongSum& e, vf own_e, const LongSum& t, vf own_t) {
    for (int i = 0; i < V; ++i) {
      const double share = ((double)t.total[i] - t.lost[i] + own_t[i]) / ((double)e.total[i] - e.lost[i] + own_e[i]);
      high[i] = (float)share, low[i] = (float)(share - high[i]);
    }
  }
  // share e - t
  SPCL_INLINE_MEMBER vf less(vf e, vf t) const { return fused(e, load(high), -t) + e * load(low); }
};

// z -> w, in place: scale (T p_k - t_k), T = sum of t. A label's that is most of T is minus the sum of the others; p is
// normalised again, so neither carries the rounding of lse.
SPCL_LOCAL
void softmax_weights(const ContrastOptions& o, const int32_t* label, const Aims& aims, const float* lse,
                     const float* scale, float* z) {
  for (int v = 0; v < kPanel; v += V) {
    const vi own = aims.targets ? splat((int32_t)-1) : load(label + v);
    const vf zero_point = load(lse + v);
    LongSum other_sum, target_sum;
    for (int64_t first = 0; first < o.num_classes; first += kTerms) {
      vf part = {}, part_target = {};
      for (int64_t k = first; k < smaller(first + kTerms, o.num_classes); ++k) {
        vf e = select(own == (int32_t)k, vf{}, exp(load(z + k * kPanel + v) - zero_point));
        store(z + k * kPanel + v, e);
        part += e;
        part_target += aims.targets ? load(aims.targets + k * kPanel + v)
                                    : select(own == (int32_t)k, vf{}, splat(o.background[k]));
      }
      other_sum.add(part);
      target_sum.add(part_target);
    }
    vf own_e = {}, own_t = {};
    for (int i = 0; i < V && !aims.targets; ++i) {
      if (label[v + i] < 0) continue;
      own_e[i] = aims.own_z[v + i], own_t[i] = aims.own[v + i] + o.background[label[v + i]];
    }
    if (!aims.targets) own_e = exp(own_e - zero_point);
    const Shares share(other_sum, own_e, target_sum, own_t);
    const vf factor = load(scale + v);
    const vf own_weight =
        select(own_t > target_sum.total, -share.less(other_sum.total, target_sum.total), share.less(own_e, own_t));
    const vi used = load(label + v) >= 0;
    for (int64_t k = 0; k < o.num_classes; ++k) {
      vf t = aims.targets ? load(aims.targets + k * kPanel + v) : splat(o.background[k]);
      vf w = select(own == (int32_t)k, own_weight, share.less(load(z + k * kPanel + v), t)) * factor;
      store(z + k * kPanel + v, select(used, w, vf{}));
    }
  }
}

// z -> w, in place: scale scale_k (sigmoid(z_k) - t_k), without cancellation where t_k is 0 or 1.
SPCL_LOCAL
void sigmoid_weights(const ContrastOptions& o, const int32_t* label, const Aims& aims, const float* scale, float* z) {
  for (int v = 0; v < kPanel; v += V)
    for (int64_t k = 0; k < o.num_classes; ++k) {
      vf value = load(z + k * kPanel + v), t = target_of(o, aims, load(label + v), k, v);
      vf e = exp(-magnitude(value)), small = e / (1.0f + e);
      vf w = select(value > 0.0f, (1.0f - t) - small, small - t) * (load(scale + v) * o.class_scale[k]);
      w = select(value != value, value, w);
      store(z + k * kPanel + v, select(load(label + v) >= 0, w, vf{}));
    }
}

// Weights of classes -> weights of rows, over `dots`; radial [kPanel] = sum_m w_m dots_m. Softmax weights sum to 0, so
// there any one dot may be taken off all of them first; unless a class without a row keeps its weight to itself.
SPCL_LOCAL
void spread_weights(const Contrast& a, const OptionBuffers& b, float* dots, float* radial) {
  const ContrastOptions& o = *a.options;
  bool sums_to_0 = o.loss == kSoftmax;
  for (int64_t k = 0; o.first_row && k < o.num_classes; ++k) sums_to_0 &= o.first_row[k] < o.first_row[k + 1];
  for (int v = 0; v < kPanel; v += V) {
    const vf zero_point = sums_to_0 ? load(dots + v) : vf{};
    LongSum slope;
    for (int64_t k = 0; k < o.num_classes; ++k) {
      const vf of_class = load(b.z + k * kPanel + v);
      const int64_t first = o.first_row ? o.first_row[k] : k, last = o.first_row ? o.first_row[k + 1] : k + 1;
      vf part = {};
      for (int64_t m = first; m < last; ++m) {
        vf w = o.first_row ? select(of_class == 0.0f, vf{}, of_class * load(b.shares + m * kPanel + v))
                           : of_class;  // an ignored NaN goes nowhere
        part += w * (load(dots + m * kPanel + v) - zero_point);
        store(dots + m * kPanel + v, w);
      }
      slope.add(part);
    }
    store(radial + v, slope.total);
  }
}

}  // namespace SPCL_ISA
}  // namespace spcl
