// The loss of a vector of pixels and its slopes, for upsampled_cross_entropy and upsampled_binary_cross_entropy.
#pragma once
#include "upsample.h"

namespace spcl {
namespace SPCL_ISA {

// ---- the plain cross-entropy ------------------------------------------------------------------------------------

constexpr int64_t kClassesAsTheyAre = 4096;  // up to here the sum of sums below is as exact as eager's without a carry

struct Softmax {
  vf sum, loss;
};

// e [K][V] = 2^(logit - top); their sum, and the logit of each pixel's own class.
template <bool kNear, bool kLow> SPCL_INLINE
void exponentials(const Upsampled& a, const float* rows, const Taps& t, vf top, vi own, float* e, vf* sum,
                  vf* own_logit) {
  const int64_t stride = node_stride(a), num_classes = a.logits.dim;
  const bool carries = num_classes > kClassesAsTheyAre;
  SumOfSums total = {};
  *own_logit = vf{};
  for (int64_t first = 0; first < num_classes; first += kTermsAtOnce) {
    vf part = {};
    for (int64_t k = first; k < smaller(first + kTermsAtOnce, num_classes); ++k) {
      vf logit = interpolate<kNear, kLow>(rows + k * stride, t);
      *own_logit = select(own == (int32_t)k, logit, *own_logit);
      vf term = power<kLow>(logit, top, a.factor);
      store(e + k * V, term);
      part += term;
    }
    if (carries)
      total = added(total, part);
    else
      total.total += part;
  }
  *sum = total.total;
}

// log(2^(top - logit)), the factor as in `power`.
template <bool kLow> SPCL_INLINE
vf log_ratio(vf top, vf logit, float factor) { return kLow ? (top - logit) * kLn2 * factor : (top - logit) * kLn2; }

// Of pixels whose class is `own` (-1: none), or -2 where no class is anybody's own.
template <bool kNear, bool kLow> SPCL_INLINE
Softmax softmax(const Upsampled& a, const float* rows, const Taps& t, vi own, float* e, vf* top) {
  const int64_t stride = node_stride(a), num_classes = a.logits.dim;
  vf sum, own_logit;
  *top = interpolate<kNear, kLow>(rows + num_classes * stride, t);
  exponentials<kNear, kLow>(a, rows, t, *top, own, e, &sum, &own_logit);
  if (any(~(sum > kSmallestSum))) {  // the bound lies far above the largest logit, or something is not finite
    *top = largest<kNear, kLow>(rows, stride, num_classes, t);
    exponentials<kNear, kLow>(a, rows, t, *top, own, e, &sum, &own_logit);
    for (int64_t k = 0; k < num_classes; ++k)
      store(e + k * V, select(own == -1, vf{}, load(e + k * V)));  // an ignored NaN goes nowhere
  }
  return {sum, log_ratio<kLow>(*top, own_logit, a.factor) + log(sum)};
}

// ---- any target -------------------------------------------------------------------------------------------------

// share_k t_k + background_k of a vector of pixels, t the one-hot of `own` or the up-sampled probabilities.
struct VectorTargets {
  vi own;
  const float* probabilities;  // [K][V] or nullptr
};

SPCL_INLINE
vf target_of(const UpsampledOptions& o, const VectorTargets& t, int64_t k) {
  if (t.probabilities) return load(t.probabilities + k * V) * o.share[k] + o.background[k];
  return select(t.own == (int32_t)k, splat(o.share[k]), vf{}) + o.background[k];
}

// e becomes the slopes by the logits (in natural logarithms). Returns the loss.
template <bool kNear, bool kLow>
vf soft_cross_entropy(const Upsampled& a, const UpsampledOptions& o, const float* rows, const Taps& taps,
                      const VectorTargets& targets, float* e) {
  vf top;
  const Softmax s = softmax<kNear, kLow>(a, rows, taps, splat((int32_t)-2), e, &top);
  const vf rest = log(s.sum), inverse = 1.0f / s.sum;
  const vf whole = sum_over_classes(a.logits.dim, [&](int64_t k) { return target_of(o, targets, k); });
  return sum_over_classes(a.logits.dim, [&](int64_t k) {
    const vf target = target_of(o, targets, k), logit = interpolate<kNear, kLow>(rows + k * node_stride(a), taps);
    store(e + k * V, whole * (load(e + k * V) * inverse) - target);
    return select(target == 0.0f, vf{}, target * (log_ratio<kLow>(top, logit, a.factor) + rest));
  });
}

// As soft_cross_entropy; of each class's own decision: scale_k (1 - p_t)^gamma BCE(z_k, t_k), 1 - p_t = p (1 - t) + (1
// - p) t.
template <bool kNear, bool kLow>
vf binary_cross_entropy(const Upsampled& a, const UpsampledOptions& o, const float* rows, const Taps& taps,
                        const VectorTargets& targets, float* e) {
  return sum_over_classes(a.logits.dim, [&](int64_t k) {
    const vf t = target_of(o, targets, k);
    vf z = interpolate<kNear, kLow>(rows + k * node_stride(a), taps) * kLn2;
    if constexpr (kLow) z = z * a.factor;
    const vf power_of = exp(-magnitude(z)), small = power_of / (1.0f + power_of), large = 1.0f / (1.0f + power_of);
    const vi positive = z > 0.0f;
    const vf p = select(positive, large, small), rest = select(positive, small, large);
    vf linear = select(positive, (1.0f - t) * z, -t * z);
    linear = select((z == -__builtin_inff()) & (t == 0.0f), vf{}, linear);
    vf loss = linear + log1p(power_of), slope = p * (1.0f - t) - rest * t;
    if (o.gamma != 0) {
      const vf wrong = p * (1.0f - t) + rest * t, far = select(wrong < 1e-37f, splat(1e-37f), wrong);
      const vf focus = exp(o.gamma * log(far));
      const vf finite = select(loss == __builtin_inff(), vf{}, loss);  // with p (1 - p) = 0 the limit is 0
      slope = focus * (slope + o.gamma * finite * (1.0f - 2.0f * t) * (p * rest / far));
      loss = loss * focus;
    }
    store(e + k * V, slope * o.class_scale[k]);
    return loss * o.class_scale[k];
  });
}

}  // namespace SPCL_ISA
}  // namespace spcl
