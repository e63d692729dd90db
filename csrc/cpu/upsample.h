// Up-sampled logits, a vector of pixels at a time: never a map of them.
//
// A thread walks a panel of kPanel columns of pixels down the rows of a band. The nodes it lies between are packed once
// a row of nodes, times log2(e) / temperature; a row of pixels blends two such rows into one, in L1; a vector of pixels
// is then two permutations of that row's nodes.
#pragma once
#include "tile.h"

namespace spcl {
namespace SPCL_ISA {

constexpr float kLn2 = 0.693147180559945f;
constexpr float kSmallestSum = 0x1p-60f;  // of powers of two that exp2 cuts off at 2^-100: a larger sum has not felt it
constexpr int64_t kTermsAtOnce = 32;  // a sum over classes is a sum of such sums, which loses less than one long chain

// Such a sum of sums, and what rounding took from it so far: beyond a thousand classes that is seen. Infinite stays so.
struct SumOfSums {
  vf total, lost;
};

SPCL_INLINE
SumOfSums added(const SumOfSums& to, vf part) {
  const vf term = part - to.lost, total = to.total + term;
  return {total, select(magnitude(total) < __builtin_inff(), (total - to.total) - term, vf{})};
}

// The sum of what each class gives.
template <class Term> SPCL_INLINE
vf sum_over_classes(int64_t num_classes, const Term& term) {
  SumOfSums sum = {};
  for (int64_t first = 0; first < num_classes; first += kTermsAtOnce) {
    vf part = {};
    for (int64_t k = first; k < smaller(first + kTermsAtOnce, num_classes); ++k) part += term(k);
    sum = added(sum, part);
  }
  return sum.total;
}

struct Band {
  int64_t image, first, last;  // cells [first, last)
};

SPCL_LOCAL
Band band_of(const Upsampled& a, int64_t band) {
  const int64_t i = band % a.bands, height = a.logits.height;
  return {band / a.bands, i * height / a.bands, (i + 1) * height / a.bands};
}

// The nodes that pixels [first_pixel, first_pixel + count) of a row lie between.
struct Window {
  int64_t image, first_pixel;
  int count;
  int64_t first, nodes;
};

SPCL_LOCAL
Window window_of(const Upsampled& a, int64_t image, int64_t first_pixel) {
  const int count = (int)smaller(kPanel, a.x.pixels - first_pixel);
  const int64_t first = a.x.lower[first_pixel];
  return {image, first_pixel, count, first, a.x.upper[first_pixel + count - 1] - first + 1};
}

// Between the rows of packed nodes: a vector may be loaded from any node.
SPCL_INLINE
int64_t node_stride(const Upsampled& a) { return (a.panel_nodes + V - 1) / V * V + V; }

// ---- nodes in ---------------------------------------------------------------------------------------------------

// Beyond this a logit times log2(e) / temperature, or a difference of two such, may not be finite. Where one is met,
// the band is computed once more with logits as they are (kLow): the factor comes after the maximum is taken off, and a
// node of weight 0 gives nothing, so that masked classes (-inf, or the lowest float) have probability 0 and all else is
// as F.cross_entropy has it.
constexpr float kExtreme = 1e37f;

template <class T> SPCL_LOCAL
bool pack_nodes(const Upsampled& a, const Window& window, int64_t row, float factor, float* out) {
  const Features& x = a.logits;
  const T* from = (const T*)x.data + window.image * x.stride_b + row * x.stride_h + window.first * x.stride_w;
  const int64_t stride = node_stride(a);
  vi extreme = {};
  for (int64_t k = 0; k < x.dim; ++k, from += x.stride_d, out += stride) {
    int64_t n = 0;
    auto put = [&](vf value) {
      store(out + n, value);
      extreme |= ~(magnitude(value) <= kExtreme);
    };
    if (x.stride_w == 1) {
      for (; n + V <= window.nodes; n += V) put(load(from + n) * factor);
      if (n < window.nodes) put(load_first(from + n, window.nodes - n) * factor);
      continue;
    }
    for (; n < window.nodes; ++n) out[n] = load_one(from + n * x.stride_w) * factor;
    for (; n % V; ++n) out[n] = 0;
    for (n = 0; n < window.nodes; n += V) extreme |= ~(magnitude(load(out + n)) <= kExtreme);
  }
  return any(extreme);
}

// The window's nodes of one row -> out [K][node_stride], times the factor, zero up to a whole vector. Whether one is
// extreme.
SPCL_LOCAL
bool pack_nodes(const Upsampled& a, const Window& window, int64_t row, float factor, float* out) {
  switch (a.logits.type) {
    case kFloat32: return pack_nodes<float>(a, window, row, factor, out);
    case kBFloat16: return pack_nodes<bfloat16>(a, window, row, factor, out);
    default: return pack_nodes<float16>(a, window, row, factor, out);
  }
}

// Two values by their weights; kLow: -inf of weight 0 gives nothing, while NaN and inf do, as in F.interpolate.
template <bool kLow> SPCL_INLINE
vf mix(vf lower, vf upper, vf of_lower, vf of_upper) {
  if constexpr (!kLow) return fused(upper, of_upper, lower * of_lower);
  const auto part = [](vf value, vf weight) {
    return select((weight == 0.0f) & (value == -__builtin_inff()), vf{}, value * weight);
  };
  return part(lower, of_lower) + part(upper, of_upper);
}

// Which logits argmax takes instead of the largest ones so far: NaN is the largest, inf is as NaN, and both are met
// where kLow alone.
template <bool kLow> SPCL_INLINE
vi is_better(vf logit, vf most) {
  if constexpr (!kLow) return logit > most;
  return ~(logit <= most) & (most < __builtin_inff());
}

// Two rows of nodes -> the row between them, [K + 1][node_stride]: the last holds each node's largest logit.
// Interpolated as the logits are, these are an upper bound of a pixel's logits.
template <bool kLow> SPCL_LOCAL
void blend(const Upsampled& a, const Window& window, const float* lower, const float* upper, float weight, float* out) {
  const int64_t stride = node_stride(a), num_classes = a.logits.dim;
  if (kLow && a.y.nodes == a.y.pixels) upper = lower;  // nothing is mixed: not another row's NaN, either
  const vf of_upper = splat(weight), of_lower = splat(1.0f - weight);
  for (int64_t n = 0; n < window.nodes; n += V) {
    vf top = splat(-__builtin_inff());
    for (int64_t k = 0; k < num_classes; ++k) {
      vf value = mix<kLow>(load(upper + k * stride + n), load(lower + k * stride + n), of_upper, of_lower);
      store(out + k * stride + n, value);
      top = larger(value, top);
    }
    store(out + num_classes * stride + n, top);
  }
}

// ---- a vector of pixels -----------------------------------------------------------------------------------------

// Where V consecutive pixels lie in a row of nodes.
struct Taps {
  int64_t first;    // the first pixel's lower node, counted from the window's first
  vi lower, upper;  // counted from there
  vf of_lower, of_upper;
  bool near;  // all within a vector
};

template <bool kLow = false> SPCL_INLINE
Taps taps_of(const Upsampled& a, const Window& window, int64_t pixel) {
  const int64_t at = window.first_pixel + pixel;
  const int32_t first = a.x.lower[at];
  vf weight = load(a.x.weight + at);
  const bool near = a.x.upper[at + V - 1] - first < V;
  const bool mixed = !kLow || a.x.nodes != a.x.pixels;  // as in `blend`
  return {first - window.first,
          load(a.x.lower + at) - first,
          load((mixed ? a.x.upper : a.x.lower) + at) - first,
          1.0f - weight,
          weight,
          near};
}

template <bool kNear, bool kLow> SPCL_INLINE
vf interpolate(const float* row, const Taps& t) {
  if constexpr (kNear) {
    vf nodes = load(row + t.first);
    return mix<kLow>(permute(nodes, t.lower), permute(nodes, t.upper), t.of_lower, t.of_upper);
  } else {
    return mix<kLow>(gather(row + t.first, t.lower), gather(row + t.first, t.upper), t.of_lower, t.of_upper);
  }
}

// 2^(logit - top), of logits that have their factor already, or (kLow) times it.
template <bool kLow> SPCL_INLINE
vf power(vf logit, vf top, float factor) {
  if constexpr (!kLow) return exp2(logit - top);
  return select(logit == -__builtin_inff(), vf{}, exp2((logit - top) * factor));
}

// The true largest logit of each pixel.
template <bool kNear, bool kLow> SPCL_LOCAL
vf largest(const float* rows, int64_t stride, int64_t num_classes, const Taps& t) {
  vf most = splat(-__builtin_inff());
  for (int64_t k = 0; k < num_classes; ++k) most = larger(interpolate<kNear, kLow>(rows + k * stride, t), most);
  return most;
}

}  // namespace SPCL_ISA
}  // namespace spcl
