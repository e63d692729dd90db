// upsampled_confusion, one band of cells at a time: counts of each pixel's label and the class of its largest logit,
// without a map of either. Compiled once per instruction set.
#include "upsample.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

constexpr int64_t kOwnCounts = 256;  // up to that many classes a band counts on its own: 512 KB

// The first class of those whose logit is the largest; one of logit -inf never is.
template <bool kNear, bool kLow> SPCL_INLINE
vi largest_class(const float* rows, int64_t stride, int64_t num_classes, const Taps& t) {
  vf most = splat(-__builtin_inff());
  vi label = {};
  for (int64_t k = 0; k < num_classes; ++k) {
    vf logit = interpolate<kNear, kLow>(rows + k * stride, t);
    vi better = is_better<kLow>(logit, most);
    most = select(better, logit, most);
    label = (better & (int32_t)k) | (~better & label);
  }
  return label;
}

void count(const UpsampledConfusion& a, const int32_t* label, vi predicted, int pixels, int64_t* own) {
  const int64_t num_classes = a.logits.dim;
  for (int i = 0; i < pixels; ++i) {
    if (label[i] < 0) continue;
    const int64_t at = label[i] * num_classes + predicted[i];
    if (own)
      ++own[at];
    else
      __atomic_fetch_add(a.counts + at, 1, __ATOMIC_RELAXED);
  }
}

template <bool kLow>
void row_of_pixels(const UpsampledConfusion& a, const Window& window, int64_t row, const float* lower,
                   const float* upper, float* blended, int64_t* own) {
  alignas(64) int32_t label[kPanel];
  Span span;
  span.image = window.image, span.first = row * a.x.pixels + window.first_pixel, span.count = window.count;
  if (!read_labels(a.labels, a.pixels, span, label, a.first_bad)) return;
  blend<kLow>(a, window, lower, upper, a.y.weight[row], blended);
  const int64_t stride = node_stride(a);
  for (int v = 0; v < window.count; v += V) {
    const Taps t = taps_of<kLow>(a, window, v);
    const vi predicted = t.near ? largest_class<true, kLow>(blended, stride, a.logits.dim, t)
                                : largest_class<false, kLow>(blended, stride, a.logits.dim, t);
    count(a, label + v, predicted, (int)smaller(V, window.count - v), own);
  }
}

// False where an extreme logit was met, which kLow takes as it is.
template <bool kLow> bool walk_band(const UpsampledConfusion& a, const Band& band, float* scratch, int64_t* own) {
  const int64_t size = a.logits.dim * node_stride(a);
  for (int64_t pixel = 0; pixel < a.x.pixels; pixel += kPanel) {
    const Window window = window_of(a, band.image, pixel);
    float *lower = scratch, *upper = scratch + size, *blended = scratch + 2 * size;
    int64_t held = -1;  // the row of nodes in `lower`
    for (int64_t cell = band.first; cell < band.last; ++cell) {
      const int64_t first = a.first_row[cell], last = a.first_row[cell + 1];
      if (first == last) continue;
      bool extreme = held != cell && pack_nodes(a, window, cell, 1.0f, lower);
      extreme |= pack_nodes(a, window, a.y.upper[first], 1.0f, upper);
      if (extreme && !kLow) return false;
      for (int64_t row = first; row < last; ++row) row_of_pixels<kLow>(a, window, row, lower, upper, blended, own);
      float* next = upper;
      upper = lower, lower = next, held = a.y.upper[first];
    }
  }
  return true;
}

int64_t own_counts(const UpsampledConfusion& a) { return a.logits.dim <= kOwnCounts ? a.logits.dim * a.logits.dim : 0; }

}  // namespace

int64_t upsampled_confusion_scratch(const UpsampledConfusion& a) {
  return 2 * own_counts(a) + (3 * a.logits.dim + 1) * node_stride(a);
}

void upsampled_confusion(const UpsampledConfusion& a, int64_t index, float* scratch) {
  const Band band = band_of(a, index);
  const int64_t size = own_counts(a);
  int64_t* own = size ? (int64_t*)scratch : nullptr;
  float* rest = scratch + 2 * size;
  if (!own) return (void)walk_band<true>(a, band, rest, own);  // what is counted straight away cannot be counted again
  memset(own, 0, size * sizeof(int64_t));
  if (!walk_band<false>(a, band, rest, own)) {
    memset(own, 0, size * sizeof(int64_t));
    walk_band<true>(a, band, rest, own);
  }
  for (int64_t i = 0; i < size; ++i)
    if (own[i]) __atomic_fetch_add(a.counts + i, own[i], __ATOMIC_RELAXED);
}

}  // namespace SPCL_ISA
}  // namespace spcl
