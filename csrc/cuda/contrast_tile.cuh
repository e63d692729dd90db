// A tile's pixels in and out: whatever layout the features have, the arithmetic sees rows of pixels in shared memory, [channel][kRow].
#pragma once
#include "contrast_plan.h"
#include "pixels.cuh"

namespace spcl::gpu {

// What is known of each pixel of the tile; pixels beyond the image have kNoClass.
struct __align__(16) PixelTable {
  int64_t x_at[kTile], dx_at[kTile];  // elements from data to channel 0, where the pixels are gathered
  int cls[kTile];
  float squares[kTile];
  float along[kTile], inward[kTile];  // dx = along * sum_k w_k P_k - inward * x
  float loss[kTile], weight[kTile];
};
static_assert(sizeof(PixelTable) == kTile * kPixelBytes);

// How a layout is read. Chosen by the launcher: `access_of`.
enum Access : int {
  kVectors,  // pixels side by side, every row 16-byte aligned
  kRows,     // pixels side by side, rows begin anywhere: words of 4 bytes, a row of half floats perhaps one element into its first word
  kGather,   // any strides, one element at a time; along the channels where they lie side by side
};

inline Access access_of(const Features& x) {
  if (x.stride_w != 1 || !is_flat(x)) return kGather;
  const int64_t bytes = size_of(x.type);
  const bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_d * bytes % 16 == 0 && x.stride_b * bytes % 16 == 0;
  return aligned ? kVectors : kRows;
}

template <class T>
__device__ __forceinline__ T* tile_of(const Features& x, const ContrastTile& tile) {
  return static_cast<T*>(x.data) + tile.image * x.stride_b + tile.first;
}

// Whether row d of the tile begins in the middle of a word. Even and odd rows of an odd image differ.
template <class T>
__device__ __forceinline__ int shift_of(const Features& x, Access access, const ContrastTile& tile, int64_t d) {
  if (sizeof(T) == 4 || access != kRows) return 0;
  return static_cast<int>((reinterpret_cast<uintptr_t>(tile_of<T>(x, tile)) / 2 + d * x.stride_d) & 1);
}

template <class T>
__device__ __forceinline__ void stage_vectors(const Features& x, const ContrastTile& tile, int64_t d0, T* to) {
  using Shape = ContrastShape<sizeof(T)>;
  constexpr int kEach = 16 / sizeof(T), kPieces = kTile / kEach;
  const T* from = tile_of<T>(x, tile);
  for (int i = threadIdx.x; i < Shape::kChunk * kPieces; i += blockDim.x) {
    const int c = i / kPieces, p = i % kPieces * kEach;
    const int given = d0 + c < x.dim ? max(0, min(kEach, tile.count - p)) * static_cast<int>(sizeof(T)) : 0;
    copy_async<16>(to + c * Shape::kRow + p, given ? from + (d0 + c) * x.stride_d + p : from, given);
  }
}

template <class T>
__device__ __forceinline__ void stage_rows(const Features& x, const ContrastTile& tile, int64_t d0, T* to) {
  using Shape = ContrastShape<sizeof(T)>;
  constexpr int kWords = sizeof(T) == 4 ? kTile : kTile / 2 + 1;
  const T* from = tile_of<T>(x, tile);
  for (int i = threadIdx.x; i < Shape::kChunk * kWords; i += blockDim.x) {
    const int c = i / kWords, word = i % kWords;
    const int64_t d = d0 + c;
    int begin = word, given = word < tile.count ? 4 : 0;
    if constexpr (sizeof(T) == 2) begin = word_begin(word, shift_of<T>(x, kRows, tile, d)), given = word_given(begin, tile.count);
    if (d >= x.dim) given = 0;
    const T* at = from + (given ? d * x.stride_d + begin : -shift_of<T>(x, kRows, tile, 0));
    copy_async<4>(to + c * Shape::kRow + word * (4 / sizeof(T)), at, given);
  }
}

// Half floats cannot be copied one by one without the registers: these wait for memory here.
template <class T>
__device__ __forceinline__ void stage_gathered(const Features& x, const ContrastTile& tile, const int64_t* offset, int64_t d0, T* to) {
  using Shape = ContrastShape<sizeof(T)>;
  const T* data = static_cast<const T*>(x.data);
  const bool along_channels = x.stride_d == 1;
#pragma unroll 8
  for (int i = threadIdx.x; i < Shape::kChunk * kTile; i += blockDim.x) {
    const int c = along_channels ? i % Shape::kChunk : i / kTile, p = along_channels ? i / Shape::kChunk : i % kTile;
    const bool there = p < tile.count && d0 + c < x.dim;
    const T* from = there ? data + offset[p] + (d0 + c) * x.stride_d : data;
    if constexpr (sizeof(T) == 4) copy_async<4>(to + c * Shape::kRow + p, from, there ? 4 : 0);
    else to[c * Shape::kRow + p] = there ? *from : from_float<T>(0.0f);
  }
}

// Channels [d0, d0 + kChunk) of the tile -> to [kChunk][kRow], 0 beyond D and beyond the image. There after a wait and a barrier.
template <class T>
__device__ __forceinline__ void stage_pixels(const Features& x, Access access, const ContrastTile& tile, const int64_t* offset, int64_t d0, T* to) {
  if (access == kVectors) stage_vectors(x, tile, d0, to);
  else if (access == kRows) stage_rows(x, tile, d0, to);
  else stage_gathered(x, tile, offset, d0, to);
}

// from [channels][kRow], not shifted -> channels [d0, d0 + channels) of dx, as far as they are there.
template <class T>
__device__ __forceinline__ void store_pixels(const Features& dx, Access access, const ContrastTile& tile, const int64_t* offset, int64_t d0, const T* from) {
  using Shape = ContrastShape<sizeof(T)>;
  if (access == kVectors && tile.count == kTile) {
    constexpr int kEach = 16 / sizeof(T), kPieces = kTile / kEach;
    T* to = tile_of<T>(dx, tile);
    for (int i = threadIdx.x; i < Shape::kChunk * kPieces; i += blockDim.x) {
      const int c = i / kPieces, p = i % kPieces * kEach;
      if (d0 + c < dx.dim) *reinterpret_cast<uint4*>(to + (d0 + c) * dx.stride_d + p) = *reinterpret_cast<const uint4*>(from + c * Shape::kRow + p);
    }
    return;
  }
  const bool along_channels = access == kGather && dx.stride_d == 1;
  T* data = access == kGather ? static_cast<T*>(dx.data) : tile_of<T>(dx, tile);
  for (int i = threadIdx.x; i < Shape::kChunk * kTile; i += blockDim.x) {
    const int c = along_channels ? i % Shape::kChunk : i / kTile, p = along_channels ? i / Shape::kChunk : i % kTile;
    if (p < tile.count && d0 + c < dx.dim) data[(access == kGather ? offset[p] : p) + (d0 + c) * dx.stride_d] = from[c * Shape::kRow + p];
  }
}

// The prototypes' part of a stage -----------------------------------------------------------------------------------

// Whether rows of [K, D] can be read 16 bytes at a time.
template <class T>
__device__ __forceinline__ bool rows_aligned(const T* proto, int64_t dim) {
  return reinterpret_cast<uintptr_t>(proto) % 16 == 0 && dim * sizeof(T) % 16 == 0;
}

// Classes [k0, k0 + rows), channels [d0, d0 + kChunk) -> to [rows][kProtoRow], 0 beyond K and D.
template <class T>
__device__ __forceinline__ void stage_prototypes(const T* proto, int64_t num_classes, int64_t dim, int64_t k0, int rows, int64_t d0, T* to) {
  using Shape = ContrastShape<sizeof(T)>;
  if (rows_aligned(proto, dim)) {
    constexpr int kEach = 16 / sizeof(T), kPieces = Shape::kChunk / kEach;
    for (int i = threadIdx.x; i < rows * kPieces; i += blockDim.x) {
      const int k = i / kPieces, c = i % kPieces * kEach;
      const bool there = k0 + k < num_classes && d0 + c < dim;
      copy_async<16>(to + k * Shape::kProtoRow + c, there ? proto + (k0 + k) * dim + d0 + c : proto, there ? 16 : 0);
    }
    return;
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * Shape::kChunk; i += blockDim.x) {
    const int k = i / Shape::kChunk, c = i % Shape::kChunk;
    const bool there = k0 + k < num_classes && d0 + c < dim;
    const T* from = there ? proto + (k0 + k) * dim + d0 + c : proto;
    if constexpr (sizeof(T) == 4) copy_async<4>(to + k * Shape::kProtoRow + c, from, there ? 4 : 0);
    else to[k * Shape::kProtoRow + c] = there ? *from : from_float<T>(0.0f);
  }
}

// The same, transposed: -> to [kChunk][rows].
__device__ __forceinline__ void stage_prototype_columns(const float* proto, int64_t num_classes, int64_t dim, int64_t k0, int rows, int64_t d0, float* to) {
  constexpr int kChunk = ContrastShape<4>::kChunk;
  for (int i = threadIdx.x; i < rows * kChunk; i += blockDim.x) {
    const int k = i / kChunk, c = i % kChunk;
    const bool there = k0 + k < num_classes && d0 + c < dim;
    copy_async<4>(to + c * rows + k, there ? proto + (k0 + k) * dim + d0 + c : proto, there ? 4 : 0);
  }
}

// Pixels in registers ----------------------------------------------------------------------------------------------

// 8 half floats of a staged row from pixel p (a multiple of 8) on; `shifted` as by shift_of.
template <class T>
__device__ __forceinline__ void read_eight(uint32_t (&out)[4], const T* row, int p, int shifted) {
  const uint4 v = *reinterpret_cast<const uint4*>(row + p);
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  if (shifted) {
    const uint32_t next = *reinterpret_cast<const uint32_t*>(row + p + 8);
    out[0] = out[0] >> 16 | out[1] << 16, out[1] = out[1] >> 16 | out[2] << 16;
    out[2] = out[2] >> 16 | out[3] << 16, out[3] = out[3] >> 16 | next << 16;
  }
}

template <class T>
__device__ __forceinline__ float2 to_floats(uint32_t word) {
  T pair[2];
  memcpy(pair, &word, 4);
  return {to_float(pair[0]), to_float(pair[1])};
}

template <class T>
__device__ __forceinline__ uint32_t to_halves(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}

}  // namespace spcl::gpu
