// The two ways through a window of pixels, for upsampled_cross_entropy.cu: from logits to losses, and from there to the
// gradient.
#pragma once
#include "../upsampled_cell.cuh"

namespace spcl::gpu {

constexpr int kNoMore = 1 << 30;  // beyond every class
// A narrow window's sums are one float32 chain over the classes: with more of them it would lose more than eager
// PyTorch.
constexpr int kNarrowClasses = 512;

struct CrossEntropyTask : UpsamplingTask {
  Labels labels;
  const float* class_weight;  // [K] or nullptr
  PixelMap pixel_weight;
  float* loss_map;  // [B, H, W] or nullptr
  float* dlogits;   // [B, K, h, w]
  float inv_temperature;
  const double* partial_denominator;  // its sum is what the gradient is divided by; nullptr: nothing
  const float* denominator;           // [] instead of it, or nullptr
  int denominators;
  double* partial;  // [2][blocks]: losses, class weights
};

// Where a lane finds what belongs to its window's pixels. Shared memory, since it is seldom looked at; pixel n at [n *
// kUpThreads].
struct PixelPlace {
  int64_t image;
  int row, column;
  float* values;   // the exponential of the pixel's own class, then the sum of the others
  int16_t* codes;  // its class, kNoClass or kBadLabel
  __device__ __forceinline__ float& value(int n) const { return values[n * kUpThreads]; }
  __device__ __forceinline__ int code(int n) const { return codes[n * kUpThreads]; }
};

__device__ __forceinline__ float pixel_weight_at(const CrossEntropyTask& task, const PixelPlace& place, int i, int j) {
  return pixel_value(task.pixel_weight, place.image, place.row + i, place.column + j);
}

__device__ __forceinline__ float class_weight_of(const CrossEntropyTask& task, int k) {
  return task.class_weight ? __ldg(task.class_weight + k) : 1.0f;
}

// Classes are walked upwards, and a lane waits for the next one that a pixel of its window is labelled with: seldom,
// since maps are piecewise constant. Until then labels cost one comparison a class.
template <int kPixels> __device__ __forceinline__ int next_code(const PixelPlace& place, int after) {
  int next = kNoMore;
#pragma unroll
  for (int n = 0; n < kPixels; ++n) {
    const int code = place.code(n);
    if (code > after && code < next) next = code;
  }
  return next;
}

// A pixel's loss in the reduction's units and its weight in the gradient. Writes the loss map.
__device__ __forceinline__ float settle_pixel(const CrossEntropyTask& task, const PixelPlace& place, int code, int i,
                                              int j, bool mine, float loss, float weight) {
  loss = code >= 0 ? weight * loss : code == kBadLabel ? NAN : 0.0f;
  if (!mine) return 0.0f;
  if (task.loss_map) task.loss_map[(place.image * task.y.out + place.row + i) * task.x.out + place.column + j] = loss;
  return loss;
}

__device__ __forceinline__ float weight_of(const CrossEntropyTask& task, const PixelPlace& place, int code, int i,
                                           int j) {
  return code >= 0 ? class_weight_of(task, code) * pixel_weight_at(task, place, i, j) : 0.0f;
}

// Pixels of a narrow cell: one bound for all of them, geometric sequences.
template <int kRows_, int kColumns_> struct NarrowWindow {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static __device__ __forceinline__ float factor(const UpsamplingTask& task) { return task.factor; }
  template <class T>
  static __device__ __forceinline__ Corners load(const UpsamplingTask&, const T* plane, const CornerOffsets& at) {
    return load_corners(plane, at);
  }
  float scale[kRows][kColumns];  // the sum of exponentials; after `losses` what an exponential is multiplied by for the
                                 // gradient

  // Returns the loss of the lane's own pixels. num_classes: 0 where no pixel of the warp has a class.
  template <class T>
  __device__ __forceinline__ float losses(const CrossEntropyTask& task, const T* plane, const CornerOffsets& at,
                                          const Window& window, const PixelPlace& place, int num_classes, float bound,
                                          float gradient_scale, bool mine) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) scale[i][j] = 0.0f;
    int next = next_code<kRows * kColumns>(place, -1);
#pragma unroll 1
    for (int k = 0; k < num_classes; ++k, plane += task.stride_k) {
      const Exponents e = exponents(load_corners(plane, at), window, task.factor, bound);
      const float down = exp2_fast(e.down);
      float first = exp2_fast(e.first);
      const bool labelled = k == next;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= window.rows) continue;
        float value[kColumns];
        geometric_row(first, exp2_fast(e.across_at(i)), value);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) scale[i][j] += value[j];
        if (labelled) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j)
            if (place.code(i * kColumns + j) == k) place.value(i * kColumns + j) = value[j];
        }
        first *= down;
      }
      if (labelled) next = next_code<kRows * kColumns>(place, k);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      __syncwarp();  // else the compiler would load all rows' weights first, and have no registers left
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int n = i * kColumns + j, code = place.code(n);
        const float weight = weight_of(task, place, code, i, j), total = scale[i][j], of_label = place.value(n);
        if (i < window.rows && j < window.columns)
          sum += settle_pixel(task, place, code, i, j, mine, logf(total / of_label), weight);
        place.value(n) = total - of_label;
        scale[i][j] = code >= 0 ? __fdividef(weight * gradient_scale, total) : 0.0f;
      }
    }
    return sum;
  }

  // The sums of a class's gradient. A pixel of that class has -(all other exponentials) in place of its own: p - 1
  // without cancellation.
  __device__ __forceinline__ Moments2 moments(const UpsamplingTask&, const Exponents& e, const Window& window,
                                              const PixelPlace& place, int k, bool labelled) const {
    if (!labelled) return geometric_moments(e, window.rows, scale);
    const float down = exp2_fast(e.down);
    float first = exp2_fast(e.first);
    Moments2 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= window.rows) continue;
      float value[kColumns];
      geometric_row(first, exp2_fast(e.across_at(i)), value);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int n = i * kColumns + j, code = place.code(n);
        const float g = code < 0 ? 0.0f : scale[i][j] * (code == k ? -place.value(n) : value[j]);
        sum.all += g, sum.column += g * j, sum.row += g * i, sum.both += g * (i * j);
      }
      first *= down;
    }
    return sum;
  }
};

// Pixels of any cell: each has its own maximum and its own exponentials. One row at a time. Exponents are logits here,
// and scaled once the maximum is off: at a low temperature they are in the thousands, and rounded accordingly.
template <int kColumns_> struct WideWindow {
  static constexpr int kRows = 1, kColumns = kColumns_;
  static __device__ __forceinline__ float factor(const UpsamplingTask&) { return 1.0f; }
  template <class T>
  static __device__ __forceinline__ Corners load(const UpsamplingTask& task, const T* plane, const CornerOffsets& at) {
    return load_any_corners(task, plane, at);
  }
  // The scaled exponent of a label's class in column j. Where `load` raises a corner: -inf where a corner that counts
  // is (the loss is infinite), else finite, however low.
  template <class T>
  static __device__ __forceinline__ float label_at(const UpsamplingTask& task, const T* plane, const CornerOffsets& at,
                                                   const Window& window, int j, float bound) {
    const Corners v = load_corners(plane, at);
    if (fminf(fminf(v.a, v.b), fminf(v.c, v.d)) >= task.lowest)
      return (exponent_at(exponents(v, window, 1.0f, 0.0f), j) - bound) * task.factor;
    const float x = fmaf(j, window.x.slope, window.x.start), y = window.y.start;
    const auto part = [](float corner, float share) { return share > 0.0f ? corner * share : 0.0f; };
    const float logit =
        part(v.a, (1.0f - x) * (1.0f - y)) + part(v.b, x * (1.0f - y)) + part(v.c, (1.0f - x) * y) + part(v.d, x * y);
    if (logit == -INFINITY || logit != logit) return logit;
    return fmaxf((logit - bound) * task.factor, -3.4028234e38f);
  }
  float scale[kColumns], largest[kColumns];

  template <class T>
  __device__ __forceinline__ float losses(const CrossEntropyTask& task, const T* image, const CornerOffsets& at,
                                          const Window& window, const PixelPlace& place, int num_classes, float,
                                          float gradient_scale, bool mine) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) largest[j] = -INFINITY, scale[j] = 0.0f;
    const T* plane = image;
#pragma unroll 1
    for (int k = 0; k < num_classes; ++k, plane += task.stride_k) {
      const Exponents e = exponents(load(task, plane, at), window, factor(task), 0.0f);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) largest[j] = fmaxf(largest[j], exponent_at(e, j));
    }
    plane = image;
    float lost[kColumns] = {};  // what rounding took from a sum so far: it would grow with the number of classes
#pragma unroll 1
    for (int k = 0; k < num_classes; ++k, plane += task.stride_k) {
      const Exponents e = exponents(load(task, plane, at), window, factor(task), 0.0f);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float term = __fadd_rn(exp2_fast((exponent_at(e, j) - largest[j]) * task.factor), -lost[j]);
        const float sum = __fadd_rn(scale[j], term);
        lost[j] = __fadd_rn(__fadd_rn(sum, -scale[j]), -term);
        scale[j] = sum;
      }
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      __syncwarp();  // as in a narrow window
      const int code = place.code(j);
      const float of_label = code < 0 ? 0.0f : label_at(task, image + code * task.stride_k, at, window, j, largest[j]);
      const bool nothing = of_label == -INFINITY && largest[j] <= task.lowest;  // all classes are -inf
      const float weight = weight_of(task, place, code, 0, j), total = nothing ? NAN : scale[j];
      if (window.rows && j < window.columns)
        sum += settle_pixel(task, place, code, 0, j, mine, (log2f(total) - of_label) * kLn2, weight);
      place.value(j) = total - exp2_fast(of_label);
      scale[j] = weight * gradient_scale / total;
    }
    return sum;
  }

  __device__ __forceinline__ Moments2 moments(const UpsamplingTask& task, const Exponents& e, const Window&,
                                              const PixelPlace& place, int k, bool) const {
    Moments2 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int code = place.code(j);
      const float p = exp2_fast((exponent_at(e, j) - largest[j]) * task.factor);
      const float g = code < 0 ? 0.0f : scale[j] * (code == k ? -place.value(j) : p);
      sum.all += g, sum.column += g * j;
    }
    return sum;
  }
};

}  // namespace spcl::gpu
