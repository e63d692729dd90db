// upsampled_prediction, one band of cells at a time: each pixel's most likely class and its probability. Compiled once
// per instruction set.
#include "upsample.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

// The same pixels with the other of two products fused into their sum: the bits that this op has always had.
SPCL_INLINE
Taps swapped(const Taps& t) { return {t.first, t.upper, t.lower, t.of_upper, t.of_lower, t.near}; }

struct Best {
  vf logit, sum;  // the largest logit, and the sum of 2^(logit - top)
  vi label;
};

template <bool kNear, bool kLow> SPCL_INLINE
Best search(const float* rows, int64_t stride, int64_t num_classes, const Taps& t, vf top, float factor) {
  Best best = {splat(-__builtin_inff()), vf{}, vi{}};
  for (int64_t first = 0; first < num_classes; first += kTermsAtOnce) {
    vf part = {};
    for (int64_t k = first; k < smaller(first + kTermsAtOnce, num_classes); ++k) {
      vf logit = interpolate<kNear, kLow>(rows + k * stride, t);
      vi better = is_better<kLow>(logit, best.logit);
      best.logit = select(better, logit, best.logit);
      best.label = (better & (int32_t)k) | (~better & best.label);
      part += power<kLow>(logit, top, factor);
    }
    best.sum += part;
  }
  return best;
}

// By itself the loop has its label and its constants in registers, 16 of them with AVX2; as a part of its caller the
// call is saved, which a few classes feel more.
template <bool kNear, bool kLow>
__attribute__((noinline)) Best search_many(const float* rows, int64_t stride, int64_t num_classes, const Taps& t,
                                           vf top, float factor) {
  return search<kNear, kLow>(rows, stride, num_classes, t, top, factor);
}

// Stores the confidence and gives the labels.
template <bool kNear, bool kLow> SPCL_INLINE
vi predict(const UpsampledPrediction& a, const float* rows, const Taps& t, float* confidence) {
  const int64_t stride = node_stride(a), num_classes = a.logits.dim;
  vf top = interpolate<kNear, kLow>(rows + num_classes * stride, t);
  Best best = num_classes > kTermsAtOnce ? search_many<kNear, kLow>(rows, stride, num_classes, t, top, a.factor)
                                         : search<kNear, kLow>(rows, stride, num_classes, t, top, a.factor);
  if (any(~(best.sum > kSmallestSum)))
    top = best.logit, best = search_many<kNear, kLow>(rows, stride, num_classes, t, top, a.factor);
  store(confidence, power<kLow>(best.logit, top, a.factor) / best.sum);
  return best.label;
}

template <class T>
void write_labels(const UpsampledPrediction& a, int64_t at, vi label, const float* confidence, int count) {
  T* to = (T*)a.labels + at;
  alignas(64) int32_t lane[V];
  memcpy(lane, &label, sizeof lane);
  for (int i = 0; i < count; ++i) to[i] = (T)lane[i];
  for (int i = 0; a.thresholds && i < count; ++i)
    if (!(confidence[i] >= a.thresholds[lane[i]])) to[i] = (T)a.ignore_index;  // a NaN is below
}

// Not a part of its caller: there the constants of exp2 do not stay in registers.
template <bool kLow>
__attribute__((noinline)) void row_of_pixels(const UpsampledPrediction& a, const Window& window, int64_t row,
                                             const float* blended) {
  const int64_t at = (window.image * a.y.pixels + row) * a.x.pixels + window.first_pixel;
  alignas(64) float confidence[kPanel];
  for (int v = 0; v < window.count; v += V) {
    const Taps t = swapped(taps_of<kLow>(a, window, v));
    const vi label = t.near ? predict<true, kLow>(a, blended, t, confidence + v)
                            : predict<false, kLow>(a, blended, t, confidence + v);
    const int count = (int)smaller(V, window.count - v);
    if (a.wide_labels)
      write_labels<int32_t>(a, at + v, label, confidence + v, count);
    else
      write_labels<uint8_t>(a, at + v, label, confidence + v, count);
  }
  memcpy(a.confidence + at, confidence, window.count * sizeof(float));
}

// False where an extreme logit was met, which kLow takes as it is.
template <bool kLow> bool walk_band(const UpsampledPrediction& a, const Band& band, float* scratch) {
  const int64_t size = a.logits.dim * node_stride(a);
  const float factor = kLow ? 1.0f : a.factor;
  for (int64_t pixel = 0; pixel < a.x.pixels; pixel += kPanel) {
    const Window window = window_of(a, band.image, pixel);
    float *lower = scratch, *upper = scratch + size, *blended = scratch + 2 * size;
    int64_t held = -1;  // the row of nodes in `lower`
    for (int64_t cell = band.first; cell < band.last; ++cell) {
      const int64_t first = a.first_row[cell], last = a.first_row[cell + 1];
      if (first == last) continue;
      bool extreme = held != cell && pack_nodes(a, window, cell, factor, lower);
      extreme |= pack_nodes(a, window, a.y.upper[first], factor, upper);
      if (extreme && !kLow) return false;
      for (int64_t row = first; row < last; ++row) {
        blend<kLow>(a, window, lower, upper, a.y.weight[row], blended);
        row_of_pixels<kLow>(a, window, row, blended);
      }
      float* next = upper;
      upper = lower, lower = next, held = a.y.upper[first];
    }
  }
  return true;
}

}  // namespace

int64_t upsampled_prediction_scratch(const UpsampledPrediction& a) { return (3 * a.logits.dim + 1) * node_stride(a); }

void upsampled_prediction(const UpsampledPrediction& a, int64_t index, float* scratch) {
  const Band band = band_of(a, index);
  if (!walk_band<false>(a, band, scratch)) walk_band<true>(a, band, scratch);
}

}  // namespace SPCL_ISA
}  // namespace spcl
