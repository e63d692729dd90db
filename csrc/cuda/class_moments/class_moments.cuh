// class_moments, one range of tiles per block: the label walk.
//
// A tile is [slice of channels][M pixels] in shared memory. A thread owns channels and walks the pixels of its own rows
// with the sums in registers; all threads of a block meet the same labels at the same time, so a change of class (flush
// to the block's own partial sums) diverges nobody. A warp loads only rows that it walks itself: the next tile's loads
// start as soon as the warp has walked this one's. No one-hot matrix, no float atomics, no sort; the cost does not grow
// with K. Reads the features once where the block forms the norms.
#pragma once
#include "../matrix.cuh"
#include "../pixels.cuh"
#include "class_moments.h"

namespace spcl::gpu {

template <class T> struct MomentsBlock {
  static constexpr int kUnit = kUnitBytes / sizeof(T);  // pixels of a unit
  const Moments& a;
  const MomentsMemory m;
  unsigned char* rows;
  float *inv, *squares, *weights, *weight_sums;
  int *classes, *codes, *counts;
  unsigned* marks;
  const int64_t range, d0;
  const int channels;  // of this slice
  const int warp, lane;

  __device__ __forceinline__ MomentsBlock(const Moments& args)
      : a(args),
        m(moments_memory(args.plan, sizeof(T), args.num_classes)),
        range(range_of_block(args.plan, blockIdx.x)),
        d0(blockIdx.x % args.plan.slices * args.plan.slice),
        channels(static_cast<int>(min(args.plan.slice, args.x.dim - d0))),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32) {
    rows = shared_memory<unsigned char>();
    inv = reinterpret_cast<float*>(rows + m.inv);
    squares = reinterpret_cast<float*>(rows + m.squares);
    classes = reinterpret_cast<int*>(rows + m.classes);
    codes = reinterpret_cast<int*>(rows + m.codes);
    marks = reinterpret_cast<unsigned*>(rows + m.marks) + warp * m.mark_words;
    counts = m.mark_words ? reinterpret_cast<int*>(rows + m.counts) : a.partial_counts + range * a.num_classes;
    weights = reinterpret_cast<float*>(rows + m.weights);
    weight_sums =
        m.mark_words ? reinterpret_cast<float*>(rows + m.weight_sums) : a.partial_weights + range * a.num_classes;
  }

  __device__ __forceinline__ int first_row(int own) const { return own * static_cast<int>(blockDim.x) + warp * 32; }
  __device__ __forceinline__ int tile_pixels() const { return static_cast<int>(a.plan.tile_pixels); }
  __device__ __forceinline__ T* row(int r) const { return reinterpret_cast<T*>(rows + r * m.row_bytes); }

  // Of a lane: which 16 bytes of which of 32 / units rows. The eight lanes that are served together meet in 32 banks: a
  // row of 128 bytes, or the same 16 bytes of eight shorter ones.
  __device__ __forceinline__ int lane_unit() const { return m.units < 8 ? lane / (32 / m.units) : lane % 8; }
  __device__ __forceinline__ int lane_row() const { return m.units < 8 ? lane % (32 / m.units) : lane / 8; }

  // ---- loading: what this warp walks --------------------------------------------------------------------------

  __device__ __forceinline__ const T* pixel_data(const TilePlace& t, int p) const {
    const int64_t at =
        is_flat(a.x) ? t.image * a.x.stride_b + (t.first + p) * a.x.stride_w : pixel_offset(a.x, t.image, t.first + p);
    return static_cast<const T*>(a.x.data) + at + d0 * a.x.stride_d;
  }

  __device__ __forceinline__ bool aligned() const {
    const int64_t size = sizeof(T);
    return is_flat(a.x) && a.x.stride_w == 1 && a.x.stride_d * size % 16 == 0 && a.x.stride_b * size % 16 == 0 &&
           reinterpret_cast<uintptr_t>(a.x.data) % 16 == 0;
  }

  // 16 bytes of pixels a lane.
  __device__ __forceinline__ void load_units(const TilePlace& t) const {
    const int unit = lane_unit(), given = min(kUnit, t.pixels - unit * kUnit) * static_cast<int>(sizeof(T));
    if (given <= 0) return;
    const T* from = pixel_data(t, unit * kUnit);
    for (int own = 0; own < kThreadChannels; ++own)
      for (int r = lane_row(); r < 32; r += 32 / m.units) {
        const int d = first_row(own) + r;
        if (d < channels) copy_async<16>(row(d) + unit * kUnit, from + d * a.x.stride_d, given);
      }
  }

  // Lanes along pixels; rows of any alignment, pixels of any stride.
  __device__ __forceinline__ void load_pixels(const TilePlace& t) const {
    // shorter rows go in fours: of the two that are written together, one begins 16 banks after the other
    const int lanes = min(tile_pixels(), 32), step = 32 / lanes, each = step == 1 ? 32 : 4;
    for (int p = lane & (lanes - 1); p < t.pixels; p += lanes) {
      const T* data = pixel_data(t, p);
      for (int own = 0; own < kThreadChannels; ++own)
        for (int r = lane / lanes * each; r < 32; r += each * step) {
          const int first = first_row(own) + r;
          copy_each<T>(
              min(each, channels - first), [&](int i) { return row(first + i) + p; },
              [&](int i) { return data + (first + i) * a.x.stride_d; });
        }
    }
  }

  // Channels that are neighbours in memory: a warp takes a sector of channels of 4 pixels (half floats: of 8, in words
  // of two channels), which meet in 32 different banks.
  __device__ __forceinline__ void load_channels(const TilePlace& t) const {
    const T* data = pixel_data(t, 0);
    if constexpr (sizeof(T) == 2)
      if ((a.x.dim | a.x.stride_w) % 2 == 0 && reinterpret_cast<uintptr_t>(data) % 4 == 0) return load_words(t, data);
    constexpr int kPixels = sizeof(T) == 4 ? 4 : 1;
    const int p = lane / (32 / kPixels);
    for (int own = 0; own < kThreadChannels; ++own)
      for (int r = lane % (32 / kPixels); r < 32; r += 32 / kPixels) {
        const int d = first_row(own) + r;
        if (d >= channels) continue;
        copy_each<T>((t.pixels - p + kPixels - 1) / kPixels, [&](int i) { return row(d) + p + i * kPixels; },
                     [&](int i) { return data + (p + i * kPixels) * a.x.stride_w + d; });
      }
  }

  // Two channels of two pixels a lane, turned from words of channels to words of pixels; half of the lanes write the
  // second of the two rows first.
  __device__ __forceinline__ void load_words(const TilePlace& t, const T* data) const {
    constexpr int kBatch = 4;
    const int second = lane % 8 / 4, first_pixel = lane / 8 * 2;
    for (int own = 0; own < kThreadChannels; ++own)
      for (int r = lane % 8 * 2; r < 32; r += 16) {
        const int d = first_row(own) + r;
        if (d >= channels) continue;
        for (int start = first_pixel; start < t.pixels; start += 8 * kBatch) {
          uint32_t low[kBatch], high[kBatch];
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int p = start + 8 * i;
            const T* from = data + p * a.x.stride_w + d;
            low[i] = p < t.pixels ? __ldg(reinterpret_cast<const uint32_t*>(from)) : 0;
            high[i] = p + 1 < t.pixels ? __ldg(reinterpret_cast<const uint32_t*>(from + a.x.stride_w)) : 0;
          }
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int p = start + 8 * i;
            if (p >= t.pixels) break;
            const uint32_t even = low_halves(low[i], high[i]), odd = high_halves(low[i], high[i]);
            *reinterpret_cast<uint32_t*>(row(d + second) + p) = second ? odd : even;
            *reinterpret_cast<uint32_t*>(row(d + 1 - second) + p) = second ? even : odd;
          }
        }
      }
  }

  __device__ __forceinline__ void load(const TilePlace& t) const {
    if (aligned())
      load_units(t);
    else if (a.x.stride_d == 1 && a.x.stride_w != 1 && is_flat(a.x))
      load_channels(t);
    else
      load_pixels(t);
    copy_async_commit();
  }

  // ---- labels -------------------------------------------------------------------------------------------------

  // Class of this thread's pixel of a tile.
  __device__ __forceinline__ int class_of(int64_t tile) const {
    const int p = threadIdx.x;
    if (p >= tile_pixels()) return kNoClass;
    const TilePlace t = tile_place(a.plan, a.x.height * a.x.width, tile);
    return p < t.pixels ? read_class(a.labels, t.image, t.first + p, a.x.width) : kNoClass;
  }

  // The first warp counts a tile's classes: one lane for each class that occurs. Weights are added in the lanes' order.
  template <bool kWeighted> __device__ __forceinline__ void count(const int* cls) const {
    for (int p = lane; p - lane < tile_pixels(); p += 32) {
      const int mine = p < tile_pixels() ? cls[p] : kNoClass;
      const unsigned same = __match_any_sync(kAllLanes, mine);
      if (mine >= 0 && __ffs(static_cast<int>(same)) - 1 == lane) {
        counts[mine] += __popc(same);
        if constexpr (kWeighted) {
          float sum = 0;
          for (unsigned left = same; left; left &= left - 1)
            sum += weights[p - lane + __ffs(static_cast<int>(left)) - 1];
          weight_sums[mine] += sum;
        }
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ float weight_of(int64_t tile, int p) const {
    const int64_t pixels = a.x.height * a.x.width;
    const TilePlace t = tile_place(a.plan, pixels, tile);
    return p < t.pixels ? a.pixel_weight[t.image * pixels + t.first + p] : 0.0f;
  }

  // ---- norms --------------------------------------------------------------------------------------------------

  // squares[warp][p]: sum over this warp's rows.
  __device__ __forceinline__ void square_rows() const {
    const int unit = lane_unit();
    float sum[kUnit] = {};
    for (int own = 0; own < kThreadChannels; ++own)
      for (int r = lane_row(); r < 32; r += 32 / m.units) {
        const int d = first_row(own) + r;
        if (d >= channels) continue;
        float x[kUnit];
        unpack<T>(*reinterpret_cast<const uint4*>(row(d) + unit * kUnit), x);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) sum[i] += x[i] * x[i];
      }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int next = m.units < 8 ? 1 : 8;  // between two lanes of a unit
      for (int by = next; by < next * (32 / m.units); by <<= 1) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], by);
      if (lane_row() == 0) squares[warp * tile_pixels() + unit * kUnit + i] = sum[i];
    }
  }

  __device__ __forceinline__ float inverse_norm_of(int64_t tile, int p) const {
    if (!a.normalize) return 1.0f;
    const TilePlace t = tile_place(a.plan, a.x.height * a.x.width, tile);
    if (!a.plan.own_norms) return p < t.pixels ? a.norms[t.image * a.x.height * a.x.width + t.first + p] : 0.0f;
    float sum = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum += squares[w * tile_pixels() + p];
    return inverse_norm(sum);
  }
};

// The sums that a thread carries along the walk.
template <class T, bool kSquares, bool kWeighted> struct MomentsWalk {
  static constexpr int kUnit = MomentsBlock<T>::kUnit;
  const MomentsBlock<T>& block;
  float sum[kThreadChannels], square[kSquares ? kThreadChannels : 1];
  int current = kNoClass, held = 0;

  __device__ __forceinline__ explicit MomentsWalk(const MomentsBlock<T>& b) : block(b) { clear(); }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int own = 0; own < kThreadChannels; ++own) {
      sum[own] = 0;
      if constexpr (kSquares) square[own] = 0;
    }
    held = 0;
  }

  // Whether this warp adds to class `current` for the first time: then its partial sum is stored, not added to.
  __device__ __forceinline__ bool is_new() const {
    if (!block.m.mark_words) return false;
    unsigned* word = block.marks + current / 32;
    const bool fresh = (*word >> (current % 32) & 1) == 0;
    __syncwarp();
    if (block.lane == 0 && fresh) *word |= 1u << (current % 32);
    __syncwarp();
    return fresh;
  }

  __device__ __forceinline__ void flush() {
    if (current < 0 || held == 0) return;
    const bool fresh = is_new();
    const int64_t at = (block.range * block.a.num_classes + current) * block.a.x.dim + block.d0;
#pragma unroll
    for (int own = 0; own < kThreadChannels; ++own) {
      const int d = block.first_row(own) + block.lane;
      if (d >= block.channels) continue;
      float* to = block.a.partial_sums + at + d;
      *to = fresh ? sum[own] : *to + sum[own];
      if constexpr (kSquares) {
        to = block.a.partial_squares + at + d;
        *to = fresh ? square[own] : *to + square[own];
      }
    }
    clear();
  }

  __device__ __forceinline__ void turn_to(int cls) {
    if (cls == current) return;
    flush();
    current = cls;
  }

  __device__ __forceinline__ void add(int own, float unit, int p) {
    const float weighted = kWeighted ? unit * block.weights[p] : unit;
    sum[own] += weighted;
    if constexpr (kSquares) square[own] += unit * weighted;
  }

  __device__ __forceinline__ void walk(const int* cls, const int* codes) {
    for (int u = 0; u < block.m.units; ++u) {
      const int code = codes[u], p = u * kUnit;
      if (code == kEmptyUnit) continue;
      if (code != kMixedUnit)
        walk_unit(code, p);
      else
        for (int i = 0; i < kUnit; ++i) walk_pixel(cls[p + i], p + i);
    }
    if (held >= kMostHeld) flush();
  }

  __device__ __forceinline__ void walk_unit(int cls, int p) {
    turn_to(cls);
    held += kUnit;
    float inv[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(block.inv + p + i);
      inv[i] = four.x, inv[i + 1] = four.y, inv[i + 2] = four.z, inv[i + 3] = four.w;
    }
#pragma unroll
    for (int own = 0; own < kThreadChannels; ++own) {
      const int d = block.first_row(own) + block.lane;
      if (d >= block.channels) continue;
      float x[kUnit];
      unpack<T>(*reinterpret_cast<const uint4*>(block.row(d) + p), x);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) add(own, x[i] * inv[i], p + i);
    }
  }

  __device__ __forceinline__ void walk_pixel(int cls, int p) {
    if (cls < 0) return;
    turn_to(cls);
    ++held;
#pragma unroll
    for (int own = 0; own < kThreadChannels; ++own) {
      const int d = block.first_row(own) + block.lane;
      if (d < block.channels) add(own, to_float(block.row(d)[p]) * block.inv[p], p);
    }
  }
};

// What a block finds in its memory: nothing met, nothing counted.
template <class T> __device__ __forceinline__ void clear_block(const MomentsBlock<T>& b) {
  const int thread = threadIdx.x, threads = blockDim.x;
  for (int i = b.lane; i < b.m.mark_words; i += 32) b.marks[i] = 0;
  if (b.m.mark_words || b.d0 == 0)  // counts in global memory belong to the range's first slice alone
    for (int64_t k = thread; k < b.a.num_classes; k += threads) {
      b.counts[k] = 0;
      if (b.a.plan.weighted) b.weight_sums[k] = 0;
    }
  if (b.m.mark_words) return;
  // too many classes for marks: every sum starts at 0, each set by the thread that adds to it
  for (int own = 0; own < kThreadChannels; ++own) {
    const int d = b.first_row(own) + b.lane;
    if (d >= b.channels) continue;
    for (int64_t k = 0; k < b.a.num_classes; ++k) {
      const int64_t at = (b.range * b.a.num_classes + k) * b.a.x.dim + b.d0 + d;
      b.a.partial_sums[at] = 0;
      if (b.a.partial_squares) b.a.partial_squares[at] = 0;
    }
  }
}

template <class T, bool kSquares, bool kWeighted>
__global__ void __launch_bounds__(kMostThreads, 1) moments_kernel(const __grid_constant__ Moments a) {
  const MomentsBlock<T> b(a);
  MomentsWalk<T, kSquares, kWeighted> sums(b);
  const int pixels = b.tile_pixels(), thread = threadIdx.x;
  const int64_t end = min((b.range + 1) * a.plan.tiles_per_range, a.plan.tiles), image = a.x.height * a.x.width;
  clear_block(b);

  // Of tile t: classes and codes in half t & 1, rows on their way.
  int64_t tile = b.range * a.plan.tiles_per_range;
  int half = 0;
  int mine = b.class_of(tile);
  if (thread < pixels) b.classes[thread] = mine;
  bool any = __syncthreads_or(mine >= 0);
  if (any) b.load(tile_place(a.plan, image, tile));
  if (thread < b.m.units) b.codes[thread] = unit_code(b.classes + thread * b.kUnit, b.kUnit);
  for (; tile < end; ++tile, half ^= 1) {
    const int* classes = b.classes + half * pixels;
    const int* codes = b.codes + half * b.m.units;
    mine = tile + 1 < end ? b.class_of(tile + 1) : kNoClass;
    copy_async_wait<0>();
    __syncwarp();
    if (any && a.plan.own_norms && a.normalize) b.square_rows();
    __syncthreads();
    if (any && thread < pixels) {
      b.inv[thread] = b.inverse_norm_of(tile, thread);
      if constexpr (kWeighted) b.weights[thread] = b.weight_of(tile, thread);
    }
    if (thread < pixels) b.classes[(half ^ 1) * pixels + thread] = mine;
    const bool more = __syncthreads_or(mine >= 0);
    if (thread < b.m.units)
      b.codes[(half ^ 1) * b.m.units + thread] = unit_code(b.classes + (half ^ 1) * pixels + thread * b.kUnit, b.kUnit);
    if (any) {
      if (b.warp == 0 && b.d0 == 0) b.template count<kWeighted>(classes);
      sums.walk(classes, codes);
    }
    __syncwarp();
    if (more) b.load(tile_place(a.plan, image, tile + 1));
    any = more;
  }
  sums.flush();
  __syncthreads();
  if (b.m.mark_words && b.d0 == 0)
    for (int k = thread; k < a.num_classes; k += blockDim.x) {
      a.partial_counts[b.range * a.num_classes + k] = b.counts[k];
      if constexpr (kWeighted) a.partial_weights[b.range * a.num_classes + k] = b.weight_sums[k];
    }
}

}  // namespace spcl::gpu
