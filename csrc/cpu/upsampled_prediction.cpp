// upsampled_prediction, one band of cells at a time: each pixel's most likely class and its probability. Compiled once per instruction set.
#include "upsample.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

struct Best {
  vf logit, sum;  // the largest logit, and the sum of 2^(logit - top)
  vi label;
};

template <bool kNear>
SPCL_INLINE Best search(const float* rows, int64_t stride, int64_t num_classes, const Taps& t, vf top) {
  Best best = {splat(-__builtin_inff()), vf{}, vi{}};
  for (int64_t first = 0; first < num_classes; first += kTermsAtOnce) {
    vf part = {};
    for (int64_t k = first; k < smaller(first + kTermsAtOnce, num_classes); ++k) {
      vf logit = interpolate<kNear>(rows + k * stride, t);
      vi better = logit > best.logit;
      best.logit = select(better, logit, best.logit);
      best.label = (better & (int32_t)k) | (~better & best.label);
      part += exp2(logit - top);
    }
    best.sum += part;
  }
  return best;
}

// Stores the confidence and gives the labels.
template <bool kNear>
vi predict(const float* rows, int64_t stride, int64_t num_classes, const Taps& t, float* confidence) {
  vf top = interpolate<kNear>(rows + num_classes * stride, t);
  Best best = search<kNear>(rows, stride, num_classes, t, top);
  if (any(~(best.sum > kSmallestSum))) top = best.logit, best = search<kNear>(rows, stride, num_classes, t, top);
  store(confidence, exp2(best.logit - top) / best.sum);
  return best.label;
}

void row_of_pixels(const UpsampledPrediction& a, const Window& window, int64_t row, const float* blended) {
  const int64_t at = (window.image * a.y.pixels + row) * a.x.pixels + window.first_pixel;
  alignas(64) float confidence[kPanel];
  for (int v = 0; v < window.count; v += V) {
    const Taps t = taps_of(a, window, v);
    const vi label = t.near ? predict<true>(blended, node_stride(a), a.logits.dim, t, confidence + v)
                            : predict<false>(blended, node_stride(a), a.logits.dim, t, confidence + v);
    for (int i = 0; i < V && v + i < window.count; ++i) {
      const bool below = a.thresholds && confidence[v + i] < a.thresholds[label[i]];
      a.labels[at + v + i] = below ? a.ignore_index : (uint8_t)label[i];
    }
  }
  memcpy(a.confidence + at, confidence, window.count * sizeof(float));
}

}  // namespace

int64_t upsampled_prediction_scratch(const UpsampledPrediction& a) { return (3 * a.logits.dim + 1) * node_stride(a); }

void upsampled_prediction(const UpsampledPrediction& a, int64_t index, float* scratch) {
  const Band band = band_of(a, index);
  const int64_t size = a.logits.dim * node_stride(a);
  for (int64_t pixel = 0; pixel < a.x.pixels; pixel += kPanel) {
    const Window window = window_of(a, band.image, pixel);
    float *lower = scratch, *upper = scratch + size, *blended = scratch + 2 * size;
    int64_t held = -1;  // the row of nodes in `lower`
    for (int64_t cell = band.first; cell < band.last; ++cell) {
      const int64_t first = a.first_row[cell], last = a.first_row[cell + 1];
      if (first == last) continue;
      if (held != cell) pack_nodes(a, window, cell, lower);
      pack_nodes(a, window, a.y.upper[first], upper);
      for (int64_t row = first; row < last; ++row) {
        blend(a, window, lower, upper, a.y.weight[row], blended);
        row_of_pixels(a, window, row, blended);
      }
      float* next = upper;
      upper = lower, lower = next, held = a.y.upper[first];
    }
  }
}

}  // namespace SPCL_ISA
}  // namespace spcl
