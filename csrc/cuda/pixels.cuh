// What every kernel does for its pixels: find the address, read the class, read the weights.
//
// A label is read in place, in its own dtype and at its own size, compared as int64 and never used as an index before
// it is known to be in [0, K). A bad label raises the device flag (an integer maximum: the order cannot be seen) and is
// kBadLabel to the caller, whose loss becomes NaN.
#pragma once
#include "launch.h"

namespace spcl::gpu {

constexpr int kNoClass = -1;   // ignored
constexpr int kBadLabel = -2;  // outside of [0, K) and not ignored

// The index that F.interpolate(mode="nearest") reads for `i`, in its own float32 arithmetic. A grid of the labels' own
// size is read as it is: float32 does not hold every index beyond 2^24, which the rows of an [N, D] matrix may pass.
SPCL_BOTH int64_t nearest(int64_t i, float scale, int64_t size) {
  const int64_t at = scale == 1.0f ? i : static_cast<int64_t>(static_cast<float>(i) * scale);
  return at < size - 1 ? at : size - 1;
}

// Elements from data to pixel (i, j) of image b, in a grid of the features' size.
SPCL_BOTH int64_t label_offset(const Labels& labels, int64_t b, int64_t i, int64_t j) {
  return b * labels.stride_b + nearest(i, labels.scale_h, labels.height) * labels.stride_h +
         nearest(j, labels.scale_w, labels.width) * labels.stride_w;
}

// Elements from data to channel 0 of pixel n of image b.
SPCL_BOTH int64_t pixel_offset(const Features& x, int64_t b, int64_t n) {
  const int64_t i = n / x.width;
  return b * x.stride_b + i * x.stride_h + (n - i * x.width) * x.stride_w;
}

// Whether pixel n of an image lies n * stride_w from the first.
SPCL_BOTH bool is_flat(const Features& x) { return x.height == 1 || x.stride_h == x.width * x.stride_w; }

SPCL_BOTH int size_of(FloatType type) { return type == kFloat32 ? 4 : 2; }

// value: as stored, widened; huge: an unsigned value that int64 cannot hold.
SPCL_BOTH int classify(int64_t value, bool huge, int64_t ignore_index, int64_t num_classes) {
  if (!huge && value == ignore_index) return kNoClass;
  return !huge && value >= 0 && value < num_classes ? static_cast<int>(value) : kBadLabel;
}

__device__ __forceinline__ int64_t label_value(const Labels& labels, int64_t at) {
  switch (labels.type) {
    case kUInt8: return static_cast<const uint8_t*>(labels.data)[at];
    case kInt8: return static_cast<const int8_t*>(labels.data)[at];
    case kUInt16: return static_cast<const uint16_t*>(labels.data)[at];
    case kInt16: return static_cast<const int16_t*>(labels.data)[at];
    case kUInt32: return static_cast<const uint32_t*>(labels.data)[at];
    case kInt32: return static_cast<const int32_t*>(labels.data)[at];
    default: return static_cast<const int64_t*>(labels.data)[at];
  }
}

// Class of the label at an offset, kNoClass or kBadLabel; a bad one raises the flag.
__device__ __forceinline__ int class_at(const Labels& labels, int64_t at) {
  const int64_t value = label_value(labels, at);
  const bool huge = labels.type == kUInt64 && value < 0;
  const int found = classify(value, huge, labels.ignore_index, labels.num_classes);
  if (found == kBadLabel)
    atomicMax(reinterpret_cast<long long*>(labels.flag), static_cast<long long>(huge ? INT64_MAX - 1 : value));
  return found;
}

// Class of pixel n of image b, n counted in rows of `width` pixels (the features' grid).
__device__ __forceinline__ int read_class(const Labels& labels, int64_t b, int64_t n, int64_t width) {
  const int64_t i = n / width;
  return class_at(labels, label_offset(labels, b, i, n - i * width));
}

__device__ __forceinline__ float pixel_value(const PixelMap& map, int64_t b, int64_t i, int64_t j) {
  return map.data ? map.data[b * map.stride_b + i * map.stride_h + j * map.stride_w] : 1.0f;
}

// 1 / max(norm, eps) from a sum of squares; NaN stays NaN.
__device__ __forceinline__ float inverse_norm(float squares) {
  const float norm = sqrtf(squares);
  return 1.0f / (norm < kNormEps ? kNormEps : norm);
}

// The same bits in every lane, whichever lanes hold what: a fixed tree.
template <typename T> __device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// to(i) <- from(i) for i < count: 4-byte ones by cp.async, 2-byte ones (which it cannot) through registers, kBatch on
// their way at once.
template <class T, class To, class From>
__device__ __forceinline__ void copy_each(int count, const To& to, const From& from) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll 4
    for (int i = 0; i < count; ++i) copy_async<4>(to(i), from(i));
  } else {
    constexpr int kBatch = 16;
    int i = 0;
    for (T batch[kBatch]; i + kBatch <= count; i += kBatch) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) batch[j] = __ldg(from(i + j));
#pragma unroll
      for (int j = 0; j < kBatch; ++j) *to(i + j) = batch[j];
    }
#pragma unroll 1
    for (; i < count; ++i) *to(i) = __ldg(from(i));
  }
}

}  // namespace spcl::gpu
