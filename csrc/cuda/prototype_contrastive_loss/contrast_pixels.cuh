// What happens once per pixel of a tile: its class, its softmax, its loss, its weights. Four lanes share a pixel, every
// fourth class each.
#pragma once
#include "contrast_dots.cuh"

namespace spcl::gpu {

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}

// call(p, part) for every pixel of [first, end), multiples of 8, whole warps at a time: lane `part` of 4 that share
// pixel p.
template <class Call> __device__ __forceinline__ void for_each_pixel(int first, int end, const Call& call) {
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  for (int eight = first / 8 + threadIdx.x / 32; eight < end / 8; eight += warps) call(eight * 8 + lane / 4, lane % 4);
}
template <class Call> __device__ __forceinline__ void for_each_pixel(const Call& call) {
  for_each_pixel(0, kTile, call);
}

// A pixel's logits: k * stride apart, times factor.
struct Logits {
  const float* first;
  int64_t stride;
  float factor;
  __device__ __forceinline__ float operator[](int k) const { return first[k * stride] * factor; }
};

// Those that tile_dots left in shared memory.
__device__ __forceinline__ Logits formed_logits(const ContrastShared& shared, int p, float inv, float temperature) {
  return {reinterpret_cast<const float*>(shared_memory<unsigned char>() + shared.logits_at) + p, kLogitsRow,
          inv / temperature};
}

// Those that the forward saved, from class k0 on; a pixel beyond the image reads the last one's.
__device__ __forceinline__ Logits saved_logits(const float* logits, const ContrastInput& a, const ContrastTile& tile,
                                               int64_t k0, int p) {
  return {logits + (tile.image * a.num_classes + k0) * a.pixels + tile.first + min(p, tile.count - 1), a.pixels, 1.0f};
}

// log sum exp(z) = top + log_total, apart: a loss (top - z) + log_total does not lose what top has too much.
struct Softmax {
  float top, log_total;
};

__device__ __forceinline__ Softmax softmax_of(const Logits& z, int num_classes, int part) {
  float top = -INFINITY, total = 0;
  for (int k = part; k < num_classes; k += 4) top = fmaxf(top, z[k]);
  top = quad_max(top);
  for (int k = part; k < num_classes; k += 4) total += expf(z[k] - top);
  return {top, logf(quad_sum(total))};
}

// logsumexp as two floats: z - lse without its rounding.
struct LogSum {
  float high, low;
  __device__ __forceinline__ explicit LogSum(double lse)
      : high(static_cast<float>(lse)), low(isinf(lse) ? 0.0f : static_cast<float>(lse - high)) {}
  __device__ __forceinline__ float below(float z) const { return (z - high) - low; }
};

// Row and column of pixel p of the tile; an image has fewer than 2^31 pixels, so the division is a short one.
struct Place {
  int64_t i, j;
};
__device__ __forceinline__ Place place_of(const ContrastTile& tile, int p, int64_t width) {
  const unsigned n = static_cast<unsigned>(tile.first) + p, i = n / static_cast<unsigned>(width);
  return {i, n - i * static_cast<unsigned>(width)};
}

// Classes and addresses of the tile's pixels. One thread per pixel; ends with a barrier.
__device__ __forceinline__ void read_pixels(const ContrastInput& a, const Labels& labels, const ContrastTile& tile,
                                            PixelTable* table) {
  const int p = threadIdx.x;
  if (p < kTile) {
    const Place at = place_of(tile, min(p, tile.count - 1), a.x.width);
    table->cls[p] = p < tile.count ? class_at(labels, label_offset(labels, tile.image, at.i, at.j)) : kNoClass;
    table->x_at[p] = tile.image * a.x.stride_b + at.i * a.x.stride_h + at.j * a.x.stride_w;
  }
  __syncthreads();
}

__device__ __forceinline__ float pixel_weight_at(const PixelMap& map, const ContrastTile& tile, int p, int64_t width) {
  if (!map.data) return 1.0f;
  const Place at = place_of(tile, p, width);
  return pixel_value(map, tile.image, at.i, at.j);
}

// s = grad * class weight * pixel weight / denominator of a labelled pixel; 0 where nothing is labelled at all,
// whatever grad is.
__device__ __forceinline__ float pixel_scale(const float* class_weight, const PixelMap& pixel_weight,
                                             const PixelMap& grad, float denominator, const ContrastTile& tile, int p,
                                             int cls, int64_t width) {
  if (denominator == 0) return 0;
  const float weight = (class_weight ? class_weight[cls] : 1.0f) * pixel_weight_at(pixel_weight, tile, p, width);
  return weight * pixel_weight_at(grad, tile, p, width) / denominator;
}

}  // namespace spcl::gpu
