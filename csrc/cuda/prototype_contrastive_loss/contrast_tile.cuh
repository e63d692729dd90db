// A tile's pixels in and out: whatever layout the features have, the arithmetic sees rows of pixels in shared memory,
// [channel][kRow].
#pragma once
#include "../matrix.cuh"
#include "../pixels.cuh"
#include "contrast_plan.h"

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
  kRows,    // pixels side by side, rows begin anywhere: words of 4 bytes, a row of half floats perhaps one element into
            // its first word
  kGather,  // any strides, one element at a time; along the channels where they lie side by side
};

inline Access access_of(const Features& x) {
  if (x.stride_w != 1 || !is_flat(x)) return kGather;
  const int64_t bytes = size_of(x.type);
  const bool aligned =
      reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_d * bytes % 16 == 0 && x.stride_b * bytes % 16 == 0;
  return aligned ? kVectors : kRows;
}

template <class T> __device__ __forceinline__ T* tile_of(const Features& x, const ContrastTile& tile) {
  return static_cast<T*>(x.data) + tile.image * x.stride_b + tile.first;
}

// Whether row d of the tile begins in the middle of a word. Even and odd rows of an odd image differ.
template <class T>
__device__ __forceinline__ int shift_of(const Features& x, Access access, const ContrastTile& tile, int64_t d) {
  if (sizeof(T) == 4 || access != kRows) return 0;
  return static_cast<int>((reinterpret_cast<uintptr_t>(tile_of<T>(x, tile)) / 2 + d * x.stride_d) & 1);
}

// Bit 0 for even rows, bit 1 for odd ones.
template <class T>
__device__ __forceinline__ int shifts_of(const Features& x, Access access, const ContrastTile& tile) {
  return shift_of<T>(x, access, tile, 0) | shift_of<T>(x, access, tile, 1) << 1;
}

// The loops of this file walk rows: a thread keeps its place in the row and steps from row to row, so that a copy costs
// an addition. A copy of which nothing is given reads nothing, wherever its address points.

// How many of the channels from d0 on are there, at most kChunk.
template <class T> __device__ __forceinline__ int channels_from(const Features& x, int64_t d0) {
  const int64_t left = x.dim - d0;
  return left < ContrastShape<sizeof(T)>::kChunk ? static_cast<int>(left) : ContrastShape<sizeof(T)>::kChunk;
}

template <class T>
__device__ __forceinline__ void stage_vectors(const Features& x, const ContrastTile& tile, int64_t d0, T* to) {
  using Shape = ContrastShape<sizeof(T)>;
  constexpr int kEach = 16 / sizeof(T), kPieces = kTile / kEach;
  const int p = threadIdx.x % kPieces * kEach, step = blockDim.x / kPieces, channels = channels_from<T>(x, d0);
  const int given = max(0, min(kEach, tile.count - p)) * static_cast<int>(sizeof(T));
  int c = threadIdx.x / kPieces;
  const T* from = tile_of<T>(x, tile) + (d0 + c) * x.stride_d + p;
  for (; c < Shape::kChunk; c += step, from += step * x.stride_d)
    copy_async<16>(to + c * Shape::kRow + p, from, c < channels ? given : 0);
}

// One warp per row, one lane per word.
__device__ __forceinline__ void stage_rows(const Features& x, const ContrastTile& tile, int64_t d0, float* to) {
  using Shape = ContrastShape<4>;
  const int lane = threadIdx.x % 32, step = blockDim.x / 32, channels = channels_from<float>(x, d0);
  int c = threadIdx.x / 32;
  const float* row = tile_of<float>(x, tile) + (d0 + c) * x.stride_d + lane;
  for (; c < Shape::kChunk; c += step, row += step * x.stride_d) {
    const int count = c < channels ? tile.count : 0;
    float* out = to + c * Shape::kRow + lane;
    copy_async<4>(out, row, lane < count ? 4 : 0);
    copy_async<4>(out + 32, row + 32, lane + 32 < count ? 4 : 0);
  }
}

// A warp an even row and the odd one after it, a lane a word of each; then the last half float of each shifted row, in
// a word of its own.
template <class T>
__device__ __forceinline__ void stage_rows(const Features& x, const ContrastTile& tile, int64_t d0, T* to) {
  using Shape = ContrastShape<2>;
  const int lane = threadIdx.x % 32, step = blockDim.x / 32 * 2, shifts = shifts_of<T>(x, kRows, tile),
            channels = channels_from<T>(x, d0);
  const int even = word_begin(lane, shifts & 1), odd = word_begin(lane, shifts >> 1);
  const int even_given = word_given(even, tile.count), odd_given = word_given(odd, tile.count);
  int c = threadIdx.x / 32 * 2;
  const T* row = tile_of<T>(x, tile) + (d0 + c) * x.stride_d + even;
  const int64_t next = x.stride_d + odd - even;
  for (; c < Shape::kChunk; c += step, row += step * x.stride_d) {
    T* out = to + c * Shape::kRow + 2 * lane;
    copy_async<4>(out, row, c < channels ? even_given : 0);
    copy_async<4>(out + Shape::kRow, row + next, c + 1 < channels ? odd_given : 0);
  }
  c = threadIdx.x;
  if (c >= Shape::kChunk || !(shifts >> (c & 1) & 1)) return;
  const int last = word_begin(32, 1);
  copy_async<4>(to + c * Shape::kRow + 64, tile_of<T>(x, tile) + (d0 + c) * x.stride_d + last,
                c < channels ? word_given(last, tile.count) : 0);
}

// Half floats cannot be copied one by one without the registers: these wait for memory here.
template <class T> __device__ __forceinline__ void stage_one(const T* from, bool there, T* to) {
  if constexpr (sizeof(T) == 4)
    copy_async<4>(to, from, there ? 4 : 0);
  else
    *to = there ? *from : from_float<T>(0.0f);
}

// Channels side by side, and pairs of half floats of a pixel in words of memory.
template <class T> __device__ __forceinline__ bool channel_words(const Features& x) {
  return sizeof(T) == 2 && reinterpret_cast<uintptr_t>(x.data) % 4 == 0 &&
         (x.dim | x.stride_b | x.stride_h | x.stride_w) % 2 == 0;
}

// The part of lane `i` of 32 in piece `piece` of a chunk whose channels lie side by side: a sector of channels of a few
// pixels, that meet in 32 different banks of shared memory. Half floats: two channels of two pixels a lane.
template <class T> struct ChannelPiece {
  static constexpr int kEach = 4 / sizeof(T), kSector = 32 / sizeof(T),
                       kAcross = ContrastShape<sizeof(T)>::kChunk / kSector;
  static constexpr int kCount = kAcross * kTile / (4 * kEach);
  int c, p;
  __device__ __forceinline__ ChannelPiece(int piece, int lane)
      : c(piece % kAcross * kSector + lane % 8 * kEach), p((piece / kAcross * 4 + lane / 8) * kEach) {}
};

// 2 x 2 half floats from rows to columns, and back. Of the two rows in shared memory half of the lanes take the second
// one first, or they would meet the others in their banks.
template <class T>
__device__ __forceinline__ void stage_words(const Features& x, const ContrastTile& tile, const int64_t* offset,
                                            int64_t d0, T* to) {
  using Shape = ContrastShape<2>;
  const int lane = threadIdx.x % 32, second = lane % 8 / 4, channels = channels_from<T>(x, d0);
  const T* data = static_cast<const T*>(x.data) + d0;
#pragma unroll 4
  for (int piece = threadIdx.x / 32; piece < ChannelPiece<T>::kCount; piece += blockDim.x / 32) {
    const ChannelPiece<T> at(piece, lane);
    const bool there = at.c < channels;
    const uint32_t a = there && at.p < tile.count ? *reinterpret_cast<const uint32_t*>(data + offset[at.p] + at.c) : 0;
    const uint32_t b =
        there && at.p + 1 < tile.count ? *reinterpret_cast<const uint32_t*>(data + offset[at.p + 1] + at.c) : 0;
    const uint32_t low = low_halves(a, b), high = high_halves(a, b);
    T* row = to + at.c * Shape::kRow + at.p;
    *reinterpret_cast<uint32_t*>(row + second * Shape::kRow) = second ? high : low;
    *reinterpret_cast<uint32_t*>(row + (1 - second) * Shape::kRow) = second ? low : high;
  }
}

template <class T>
__device__ __forceinline__ void store_words(const Features& dx, const ContrastTile& tile, const int64_t* offset,
                                            int64_t d0, const T* from) {
  using Shape = ContrastShape<2>;
  const int lane = threadIdx.x % 32, second = lane % 8 / 4, channels = channels_from<T>(dx, d0);
  T* data = static_cast<T*>(dx.data) + d0;
#pragma unroll 2
  for (int piece = threadIdx.x / 32; piece < ChannelPiece<T>::kCount; piece += blockDim.x / 32) {
    const ChannelPiece<T> at(piece, lane);
    const T* row = from + at.c * Shape::kRow + at.p;
    const uint32_t one = *reinterpret_cast<const uint32_t*>(row + second * Shape::kRow),
                   two = *reinterpret_cast<const uint32_t*>(row + (1 - second) * Shape::kRow);
    const uint32_t low = second ? two : one, high = second ? one : two;
    if (at.c >= channels || at.p >= tile.count) continue;
    *reinterpret_cast<uint32_t*>(data + offset[at.p] + at.c) = low_halves(low, high);
    if (at.p + 1 < tile.count) *reinterpret_cast<uint32_t*>(data + offset[at.p + 1] + at.c) = high_halves(low, high);
  }
}

template <class T>
__device__ __forceinline__ void stage_gathered(const Features& x, const ContrastTile& tile, const int64_t* offset,
                                               int64_t d0, T* to) {
  using Shape = ContrastShape<sizeof(T)>;
  const T* data = static_cast<const T*>(x.data);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, step = blockDim.x / 32,
            channels = channels_from<T>(x, d0);
  if constexpr (sizeof(T) == 2)
    if (x.stride_d == 1 && channel_words<T>(x)) return stage_words(x, tile, offset, d0, to);
  if (x.stride_d == 1) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll 4
      for (int piece = warp; piece < ChannelPiece<T>::kCount; piece += step) {
        const ChannelPiece<T> at(piece, lane);
        stage_one(data + offset[at.p] + d0 + at.c, at.p < tile.count && at.c < channels,
                  to + at.c * Shape::kRow + at.p);
      }
    } else {
      for (int c = lane; c < Shape::kChunk; c += 32)
#pragma unroll 8
        for (int p = warp; p < kTile; p += step)
          stage_one(data + offset[p] + d0 + c, p < tile.count && c < channels, to + c * Shape::kRow + p);
    }
    return;
  }
  for (int p = lane; p < kTile; p += 32) {
    const T* from = data + offset[p] + d0 * x.stride_d;
#pragma unroll 8
    for (int c = warp; c < Shape::kChunk; c += step)
      stage_one(from + c * x.stride_d, p < tile.count && c < channels, to + c * Shape::kRow + p);
  }
}

// Channels [d0, d0 + kChunk) of the tile -> to [kChunk][kRow], 0 beyond D and beyond the image. There after a wait and
// a barrier.
template <class T>
__device__ __forceinline__ void stage_pixels(const Features& x, Access access, const ContrastTile& tile,
                                             const int64_t* offset, int64_t d0, T* to) {
  if (access == kVectors)
    stage_vectors(x, tile, d0, to);
  else if (access == kRows)
    stage_rows(x, tile, d0, to);
  else
    stage_gathered(x, tile, offset, d0, to);
}

// from [kChunk][kRow], not shifted -> channels [d0, d0 + kChunk) of dx, as far as they are there.
template <class T>
__device__ __forceinline__ void store_pixels(const Features& dx, Access access, const ContrastTile& tile,
                                             const int64_t* offset, int64_t d0, const T* from) {
  using Shape = ContrastShape<sizeof(T)>;
  const int channels = channels_from<T>(dx, d0);
  if (access == kVectors && tile.count == kTile) {
    constexpr int kEach = 16 / sizeof(T), kPieces = kTile / kEach;
    const int p = threadIdx.x % kPieces * kEach, step = blockDim.x / kPieces;
    int c = threadIdx.x / kPieces;
    T* to = tile_of<T>(dx, tile) + (d0 + c) * dx.stride_d + p;
    for (; c < channels; c += step, to += step * dx.stride_d)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from + c * Shape::kRow + p);
    return;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, step = blockDim.x / 32;
  if (access == kGather && dx.stride_d == 1) {
    if constexpr (sizeof(T) == 2) {
      if (channel_words<T>(dx)) return store_words(dx, tile, offset, d0, from);
      for (int p = warp; p < tile.count; p += step)
        for (int c = lane; c < channels; c += 32)
          static_cast<T*>(dx.data)[offset[p] + d0 + c] = from[c * Shape::kRow + p];
    } else {
      for (int piece = warp; piece < ChannelPiece<T>::kCount; piece += step) {
        const ChannelPiece<T> at(piece, lane);
        if (at.p < tile.count && at.c < channels)
          static_cast<T*>(dx.data)[offset[at.p] + d0 + at.c] = from[at.c * Shape::kRow + at.p];
      }
    }
    return;
  }
  T* first = access == kGather ? static_cast<T*>(dx.data) : tile_of<T>(dx, tile);
  for (int p = lane; p < tile.count; p += 32) {
    T* to = first + (access == kGather ? offset[p] : p) + (d0 + warp) * dx.stride_d;
    for (int c = warp; c < channels; c += step, to += step * dx.stride_d) *to = from[c * Shape::kRow + p];
  }
}

// The prototypes' part of a stage -----------------------------------------------------------------------------------

// Whether rows of [K, D] can be read 16 bytes at a time.
template <class T> __device__ __forceinline__ bool rows_aligned(const T* proto, int64_t dim) {
  return reinterpret_cast<uintptr_t>(proto) % 16 == 0 && dim * sizeof(T) % 16 == 0;
}

// Classes [k0, k0 + rows), channels [d0, d0 + kChunk) -> to [rows][kProtoRow], 0 beyond K and D.
template <class T>
__device__ __forceinline__ void stage_prototypes(const T* proto, int64_t num_classes, int64_t dim, int64_t k0, int rows,
                                                 int64_t d0, T* to) {
  using Shape = ContrastShape<sizeof(T)>;
  if (rows_aligned(proto, dim)) {
    constexpr int kEach = 16 / sizeof(T), kPieces = Shape::kChunk / kEach;
    const int c = threadIdx.x % kPieces * kEach, step = blockDim.x / kPieces;
    int k = threadIdx.x / kPieces;
    const T* from = proto + (k0 + k) * dim + d0 + c;
    for (; k < rows; k += step, from += step * dim)
      copy_async<16>(to + k * Shape::kProtoRow + c, from, k0 + k < num_classes && d0 + c < dim ? 16 : 0);
    return;
  }
  for (int c = threadIdx.x % 32; c < Shape::kChunk; c += 32)
#pragma unroll 4
    for (int k = threadIdx.x / 32; k < rows; k += blockDim.x / 32)
      stage_one(proto + (k0 + k) * dim + d0 + c, k0 + k < num_classes && d0 + c < dim, to + k * Shape::kProtoRow + c);
}

// The same, transposed: -> to [kChunk][column_row(rows)]. A warp takes 8 channels (a sector) of 4 classes at once.
__device__ __forceinline__ void stage_prototype_columns(const float* proto, int64_t num_classes, int64_t dim,
                                                        int64_t k0, int rows, int64_t d0, float* to) {
  static_assert(ContrastShape<4>::kChunk == 32 && ContrastShape<4>::kClasses % 4 == 0);
  const int lane = threadIdx.x % 32, row = column_row(rows);
  for (int piece = threadIdx.x / 32; piece < rows; piece += blockDim.x / 32) {
    const int c = piece % 4 * 8 + lane % 8, k = piece / 4 * 4 + lane / 8;
    stage_one(proto + (k0 + k) * dim + d0 + c, k0 + k < num_classes && d0 + c < dim, to + c * row + k);
  }
}

// Pixels in registers ----------------------------------------------------------------------------------------------

// 8 half floats of a staged row from pixel p (a multiple of 8) on; `shifted` as by shift_of.
template <class T> __device__ __forceinline__ void read_eight(uint32_t (&out)[4], const T* row, int p, int shifted) {
  const uint4 v = *reinterpret_cast<const uint4*>(row + p);
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  if (shifted) {
    const uint32_t next = *reinterpret_cast<const uint32_t*>(row + p + 8);
    out[0] = out[0] >> 16 | out[1] << 16, out[1] = out[1] >> 16 | out[2] << 16;
    out[2] = out[2] >> 16 | out[3] << 16, out[3] = out[3] >> 16 | next << 16;
  }
}

template <class T> __device__ __forceinline__ float2 to_floats(uint32_t word) {
  T pair[2];
  memcpy(pair, &word, 4);
  return {to_float(pair[0]), to_float(pair[1])};
}

template <class T> __device__ __forceinline__ uint32_t to_halves(float low, float high) {
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
