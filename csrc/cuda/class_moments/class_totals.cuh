// The end of class_moments and of what is built on it: the partial sums of the ranges, added in a fixed order.
#pragma once
#include "../launch.h"
#include "class_moments.h"

namespace spcl::gpu {

constexpr int kTotalWarps = 8;

// 32 channels of a class: one warp, or all warps of a block where there are many ranges.
struct TotalPlace {
  int64_t k, d;
  int part, parts;  // which of the warps that share it
  bool inside;
};

SPCL_BOTH int total_parts(const Moments& a) { return a.plan.ranges >= kTotalWarps ? kTotalWarps : 1; }
SPCL_BOTH int64_t total_rows(const Moments& a) { return a.num_classes * ceil_div(a.x.dim, 32); }

SPCL_BOTH TotalPlace total_place(const Moments& a, int64_t block, int thread) {
  const int parts = total_parts(a), warp = thread / 32;
  const int64_t row = block * (kTotalWarps / parts) + warp / parts, chunks = ceil_div(a.x.dim, 32), k = row / chunks;
  const int64_t d = (row - k * chunks) * 32 + thread % 32;
  return {k, d, warp % parts, parts, k < a.num_classes && d < a.x.dim};
}

// The ranges of one class, added in a fixed order; only ranges that have the class were written.
__device__ __forceinline__ float add_ranges(const Moments& a, const float* from, const TotalPlace& t, double* shared) {
  double sum = 0;
#pragma unroll 4
  for (int64_t g = t.part; g < a.plan.ranges; g += t.parts)
    if (t.inside && a.partial_counts[g * a.num_classes + t.k] > 0)
      sum += from[(g * a.num_classes + t.k) * a.x.dim + t.d];
  if (t.parts == 1) return static_cast<float>(sum);
  shared[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kTotalWarps; ++w) sum += shared[w * 32 + threadIdx.x % 32];
  __syncthreads();
  return static_cast<float>(sum);
}

inline unsigned total_blocks(const Moments& a) {
  return static_cast<unsigned>(ceil_div(total_rows(a), kTotalWarps / total_parts(a)));
}

// Everything but the total: the norms, where they are a pass of their own, and the ranges.
Status launch_ranges(const Moments& a, Stream stream);

// Pixels of a class, the same in every lane.
__device__ __forceinline__ int64_t add_counts(const Moments& a, int64_t k) {
  long long sum = 0;
  for (int64_t g = threadIdx.x % 32; g < a.plan.ranges; g += 32) sum += a.partial_counts[g * a.num_classes + k];
  for (int lanes = 16; lanes; lanes >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  return sum;
}

__device__ __forceinline__ float add_weights(const Moments& a, int64_t k) {
  double sum = 0;
  for (int64_t g = threadIdx.x % 32; g < a.plan.ranges; g += 32) sum += a.partial_weights[g * a.num_classes + k];
  for (int lanes = 16; lanes; lanes >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  return static_cast<float>(sum);
}

}  // namespace spcl::gpu
