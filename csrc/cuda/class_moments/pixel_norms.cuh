// class_moments where blocks take slices of the channels: the norms as a pass of their own.
#pragma once
#include "../pixels.cuh"

namespace spcl::gpu {

constexpr int kNormThreads = 256;

// norms [B * P]: 1 / |x|. A block takes 32 pixels, its warps every eighth channel; where channels are neighbours, a
// warp takes a pixel.
template <class T> __global__ void __launch_bounds__(kNormThreads) norms_kernel(const Features x, float* norms) {
  float* partial = shared_memory<float>();  // [warps][32]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = kNormThreads / 32;
  const int64_t pixels = x.height * x.width, first = static_cast<int64_t>(blockIdx.x) * 32, total = x.batch * pixels;
  const bool by_channel = x.stride_d == 1 && x.stride_w != 1;
  for (int i = by_channel ? warp : lane; i < 32; i += by_channel ? warps : 32) {
    const int64_t n = first + i;
    float sum = 0;
    if (n < total) {
      const T* data = static_cast<const T*>(x.data) + pixel_offset(x, n / pixels, n % pixels);
#pragma unroll 8
      for (int64_t d = by_channel ? lane : warp; d < x.dim; d += by_channel ? 32 : warps) {
        const float v = to_float(data[d * x.stride_d]);
        sum += v * v;
      }
    }
    if (by_channel) sum = warp_sum(sum);
    if (by_channel && lane == 0 && n < total) norms[n] = inverse_norm(sum);
    if (!by_channel) partial[warp * 32 + lane] = sum;
  }
  if (by_channel) return;
  __syncthreads();
  if (warp != 0 || first + lane >= total) return;
  float sum = 0;
  for (int w = 0; w < warps; ++w) sum += partial[w * 32 + lane];
  norms[first + lane] = inverse_norm(sum);
}

}  // namespace spcl::gpu
