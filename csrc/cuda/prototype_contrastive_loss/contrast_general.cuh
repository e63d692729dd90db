// What the kernels with options do once per pixel: its class or its probabilities, its softmax or sigmoids, its loss,
// its weights.
//
//   z_k = x̂·P_k / tau + b_k, minus margin / tau where k is the label       a_k = w_k ((1 - e) t_k + e / K),  A = sum_k
//   a_k softmax  loss sum_k a_k (lse - z_k),  dz_k = A (p_k - a_k / A)          sigmoid  sum_k w_k BCE(z_k, y_k),  dz_k
//   = w_k (sigma(z_k) - y_k)
//
// Four lanes share a pixel, every fourth class each, and classes may come in blocks: what is known so far is kept, and
// is rescaled where a block has a larger logit. t is the label's one-hot or the given probabilities; A leaves the
// weights of the products and is part of the pixel's scale, so that they stay within [-1, 1].
#pragma once
#include "contrast_pixels.cuh"

namespace spcl::gpu {

// Terms of a sum in float before it joins one in double: of thousands of classes a sum in float alone loses digits.
constexpr int kTerms = 8;

__device__ __forceinline__ double quad_sum(double v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

struct GeneralInput : ContrastInput {
  Labels labels;
  const float* class_weight;
  PixelMap pixel_weight;
  float host_temperature;
  ContrastOptions options;

  __device__ __forceinline__ float temperature() const {
    return options.temperature ? *options.temperature : host_temperature;
  }
};

inline void set_general(GeneralInput& to, const Contrast& from) {
  static_cast<ContrastInput&>(to) = input_of(from);
  to.labels = from.labels, to.class_weight = from.class_weight, to.pixel_weight = from.pixel_weight;
  to.host_temperature = from.temperature, to.options = from.options;
}

template <class T> __device__ __forceinline__ const T* prototypes_of(const GeneralInput& a, const ContrastTile& tile) {
  return static_cast<const T*>(a.prototypes) + tile.image * a.options.prototypes_stride_b;
}

template <class T> __device__ __forceinline__ const T* variances_of(const GeneralInput& a, const ContrastTile& tile) {
  return static_cast<const T*>(a.options.variances) + tile.image * a.options.prototypes_stride_b;
}

// ---- what a pixel should be -------------------------------------------------------------------------------------

// In options.target_sums: sum_k w_k t_k, or one of these two.
constexpr float kNoTarget = -INFINITY;
__device__ __forceinline__ bool is_bad_target(float sum) { return isnan(sum); }

struct Targets {
  const void* probabilities;  // of the pixel's class 0, or nullptr: a label
  FloatType type;
  int64_t stride;
  const float* class_weight;
  int cls;
  float keep, floor;  // 1 - e, e / K
  float sum;          // A; 1 for sigmoids

  __device__ __forceinline__ float weight(int64_t k) const { return class_weight ? class_weight[k] : 1.0f; }
  __device__ __forceinline__ float wanted(int64_t k) const {
    return keep * (probabilities ? probability(k) : k == cls ? 1.0f : 0.0f) + floor;
  }
  // a_k / A
  __device__ __forceinline__ float share(float wanted, float weight) const {
    return sum == 0 ? 0.0f : weight * wanted / sum;
  }
  __device__ __forceinline__ float probability(int64_t k) const {
    switch (type) {
      case kFloat32: return static_cast<const float*>(probabilities)[k * stride];
      case kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(probabilities)[k * stride]);
      default: return to_float(static_cast<const __half*>(probabilities)[k * stride]);
    }
  }
};

__device__ __forceinline__ Targets targets_of(const GeneralInput& a, const ContrastTile& tile, int p, int cls) {
  const ContrastOptions& o = a.options;
  Targets t{nullptr, o.targets.type, o.targets.stride_d, a.class_weight, cls, 1.0f - o.label_smoothing, 0.0f, 1.0f};
  const float classes = static_cast<float>(a.num_classes);
  t.floor = o.label_smoothing / classes;
  float sum = 1.0f;
  if (o.targets.data) {
    const Place at = place_of(tile, min(p, tile.count - 1), a.x.width);
    const int64_t offset = tile.image * o.targets.stride_b + at.i * o.targets.stride_h + at.j * o.targets.stride_w;
    t.probabilities = static_cast<const char*>(o.targets.data) + offset * size_of(o.targets.type);
    sum = o.target_sums[tile.image * a.pixels + tile.first + min(p, tile.count - 1)];
  } else if (cls >= 0) {
    sum = t.weight(cls);
  }
  if (!o.sigmoid) t.sum = t.keep * sum + (t.floor == 0 ? 0.0f : t.floor * (a.class_weight ? *o.weight_sum : classes));
  return t;
}

// Classes of the tile's pixels, as read_pixels; with probabilities 0 stands for a pixel that has some. Ends with a
// barrier.
__device__ __forceinline__ void read_general_pixels(const GeneralInput& a, const ContrastTile& tile,
                                                    PixelTable* table) {
  if (!a.options.targets.data) return read_pixels(a, a.labels, tile, table);
  const int p = threadIdx.x;
  if (p < kTile) {
    const Place at = place_of(tile, min(p, tile.count - 1), a.x.width);
    const float sum = a.options.target_sums[tile.image * a.pixels + tile.first + min(p, tile.count - 1)];
    table->cls[p] = p >= tile.count || sum == kNoTarget ? kNoClass : is_bad_target(sum) ? kBadLabel : 0;
    table->x_at[p] = tile.image * a.x.stride_b + at.i * a.x.stride_h + at.j * a.x.stride_w;
  }
  __syncthreads();
}

// ---- logits of a block of classes -------------------------------------------------------------------------------

// Of the classes from k0 on: x̂·P_k / tau, and z_k.
struct GeneralLogits {
  Logits dots;        // formed: the dots; saved: z without the margin, and then there is no bias
  const float* bias;  // of class k0, or nullptr
  int own;            // cls - k0
  float margin;       // over tau
  Logits squares;     // 1/2 x̂²·V_k / tau²; first == nullptr: none

  __device__ __forceinline__ float dot(int k) const { return dots[k]; }
  __device__ __forceinline__ float square(int k) const { return squares.first ? squares[k] : 0.0f; }
  __device__ __forceinline__ float plain(int k) const {
    const float z = squares.first ? dots[k] + squares[k] : dots[k];
    return bias ? z + bias[k] : z;
  }
  __device__ __forceinline__ float operator[](int k) const { return plain(k) - (k == own ? margin : 0.0f); }
};

__device__ __forceinline__ GeneralLogits logits_of(const GeneralInput& a, const ContrastTile& tile, const Logits& dots,
                                                   int64_t k0, int cls, float temperature) {
  const float* bias = a.options.bias ? a.options.bias + tile.image * a.options.bias_stride_b + k0 : nullptr;
  const bool labelled = !a.options.targets.data && cls >= 0;
  return {dots, bias, labelled ? static_cast<int>(cls - k0) : -1, a.options.margin / temperature, {nullptr, 0, 0.0f}};
}

// ---- variances ---------------------------------------------------------------------------------------------------

// Bytes of the dot products of a block of classes, kept while those of the squares are formed.
SPCL_BOTH int64_t kept_bytes(int64_t block_classes) { return block_classes * kLogitsRow * 4; }

// Both products of a block of classes: with the prototypes -> kept [class][kLogitsRow], with the variances -> the
// logits' place.
template <class T>
__device__ void quadratic_dots(const GeneralInput& a, const ContrastTile& tile, int64_t k0, const ContrastWarps& warps,
                               const ContrastShared& shared, PixelTable* table, float* kept) {
  const float4* from = reinterpret_cast<const float4*>(shared_memory<unsigned char>() + shared.logits_at);
  tile_dots<T>(a, tile, all_channels<T>(a.x), k0, warps, shared, table);
  const int count = warps.groups * ContrastShape<sizeof(T)>::kClasses * kLogitsRow / 4;
  for (int i = threadIdx.x; i < count; i += blockDim.x) reinterpret_cast<float4*>(kept)[i] = from[i];
  __syncthreads();
  tile_dots<T, true>(a, tile, all_channels<T>(a.x), k0, warps, shared, table);
}

// The logits of both.
__device__ __forceinline__ GeneralLogits quadratic_logits(const GeneralInput& a, const ContrastTile& tile,
                                                          const ContrastShared& shared, const float* kept, int64_t k0,
                                                          int cls, int p, float inv, float temperature) {
  const float scale = inv / temperature;
  GeneralLogits z = logits_of(a, tile, {kept + p, kLogitsRow, scale}, k0, cls, temperature);
  z.squares = formed_logits(shared, p, inv, temperature);
  z.squares.factor = 0.5f * scale * scale;
  return z;
}

// ---- the loss ---------------------------------------------------------------------------------------------------

// Of the classes that a lane has seen: their largest z, sum exp(z - top), sum a_k (top - z_k) and sum a_k. Sigmoids:
// only `below`, the loss itself.
struct Seen {
  float top;
  double total, below, mass;

  // Now relative to a larger top.
  __device__ __forceinline__ void raise(float to) {
    if (!(to > top)) return;
    total = total == 0 ? 0.0 : total * expf(top - to);
    below = mass == 0 ? below : below + mass * (static_cast<double>(to) - top);
    top = to;
  }
};

// log(total), whose last digits in float would be seen in every probability; exactly 0 of 1.
__device__ __forceinline__ double log_of(double total) {
  int exponent;
  float fraction = frexpf(static_cast<float>(total), &exponent);
  if (fraction < 0.70710678f) fraction *= 2, --exponent;
  return exponent * 0.6931471805599453 + logf(fraction);
}

// log(1 + exp(z)) - y z; 0 where z is -inf and y 0.
__device__ __forceinline__ float binary_cross_entropy(float z, float y) {
  return fmaxf(z, 0.0f) - (y == 0 ? 0.0f : y * z) + log1pf(expf(-fabsf(z)));
}

// The classes [first, end) of a block, every fourth one: few, and in float.
__device__ __forceinline__ void see_few(Seen& seen, const GeneralLogits& z, const Targets& t, int64_t k0, int first,
                                        int end, bool lacks_own) {
  const bool is_hard = !t.probabilities && t.floor == 0;
  float total = 0, below = 0, mass = 0;
  for (int k = first; k < end; k += 4) {
    const float value = z[k], wanted = t.wanted(k0 + k), a = t.weight(k0 + k) * wanted;
    if (value != -INFINITY) total += expf(value - seen.top);
    const float own = lacks_own && k == z.own ? value - z.square(k) : value;  // in the numerator
    // what adds nothing, however low its logit; a label of weight 0 makes NaN of an infinite loss, as in
    // F.cross_entropy
    if (a != 0 || (is_hard && wanted != 0)) below += a * (own == -INFINITY ? INFINITY : seen.top - own);
    mass += a;
  }
  seen.total += total, seen.below += below, seen.mass += mass;
}

__device__ __forceinline__ void see_classes(Seen& seen, const GeneralLogits& z, const Targets& t, int64_t k0, int count,
                                            int part, bool sigmoid, bool lacks_own) {
  constexpr int kStep = 4 * kTerms;
  if (sigmoid) {
    for (int first = part; first < count; first += kStep) {
      float below = 0;
      for (int k = first; k < min(count, first + kStep); k += 4)
        below += t.weight(k0 + k) * binary_cross_entropy(z[k], t.wanted(k0 + k));
      seen.below += below;
    }
    return;
  }
  float top = seen.top;
  for (int k = part; k < count; k += 4) top = fmaxf(top, z[k]);
  seen.raise(top);
  for (int first = part; first < count; first += kStep)
    see_few(seen, z, t, k0, first, min(count, first + kStep), lacks_own);
}

// Of the four lanes of a pixel: the same in all of them.
__device__ __forceinline__ Seen merged(Seen seen, bool sigmoid) {
  if (!sigmoid) seen.raise(quad_max(seen.top));
  return {seen.top, quad_sum(seen.total), quad_sum(seen.below), quad_sum(seen.mass)};
}

// ---- the weights ------------------------------------------------------------------------------------------------

// dz_k without the pixel's scale.
__device__ __forceinline__ float weight_of(float z, float wanted, float weight, const Targets& t, const LogSum& lse,
                                           bool sigmoid) {
  if (sigmoid)
    return weight * (wanted > 0.5f ? (1.0f - wanted) - 1.0f / (1.0f + expf(z)) : 1.0f / (1.0f + expf(-z)) - wanted);
  const float share = t.share(wanted, weight), d = lse.below(z);
  return share > 0.5f ? expm1f(d) + (1.0f - share) : expf(d) - share;
}

// s = grad * pixel weight * A / denominator of a labelled pixel; 0 where nothing is labelled at all, whatever grad is.
__device__ __forceinline__ float general_scale(const GeneralInput& a, const PixelMap& grad, float denominator,
                                               const ContrastTile& tile, int p, float sum) {
  if (denominator == 0) return 0;
  return pixel_weight_at(a.pixel_weight, tile, p, a.x.width) * pixel_weight_at(grad, tile, p, a.x.width) * sum /
         denominator;
}

}  // namespace spcl::gpu
