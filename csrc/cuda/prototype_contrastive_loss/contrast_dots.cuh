// x·P_k of a tile's pixels and the squares of their norms, D streamed through shared memory once.
//
// float: IEEE FMA. A half warp owns 64 pixels, 4 a lane, and every second channel; prototypes come by broadcast, 16
// bytes for 16 FMA. half floats: tensor core, prototypes [classes x channels] times pixels [channels x pixels]. The
// pixels of a row lie along the columns, so neither factor is transposed; a lane reads 8 pixels of a row at once and
// they are the same column of 8 products.
#pragma once
#include "../matrix.cuh"
#include "contrast_tile.cuh"

namespace spcl::gpu {

// What the three kernels of the op have in common; by value, with what the launcher found about it.
struct ContrastInput {
  Features x;
  Access access;
  const void* prototypes;  // [K, D], x's type
  int64_t num_classes, pixels;
  bool normalize;
};

// Where the prototypes of the tile's image begin. The general kernels have another of their own.
template <class T> __device__ __forceinline__ const T* prototypes_of(const ContrastInput& a, const ContrastTile&) {
  return static_cast<const T*>(a.prototypes);
}

inline ContrastInput input_of(const Contrast& a) {
  return {a.x, access_of(a.x), a.prototypes, a.num_classes, a.x.height * a.x.width, a.normalize};
}

// This thread's part in the dot products.
struct ContrastPart {
  int group, slice;  // of the warp; group >= groups: none
  int lane;
};

__device__ __forceinline__ ContrastPart part_of(const ContrastWarps& warps) {
  const int warp = threadIdx.x / 32;
  return {warp / warps.slices, warp % warps.slices, static_cast<int>(threadIdx.x % 32)};
}

template <class T> struct ContrastDots;

template <> struct ContrastDots<float> {
  using Shape = ContrastShape<4>;
  float sums[Shape::kSums];  // [class][pixel of 4], then squares [4]

  // Channels of one stage: x [kChunk][kRow], proto [kChunk][row of classes]. kSquare: of x² instead of x, and no norms.
  template <bool kSquare>
  __device__ __forceinline__ void add(const float* x, const float* proto, int row, const ContrastWarps& warps,
                                      const ContrastPart& part, int) {
    const int own = Shape::kChunk / warps.slices, first = part.slice * own;
#pragma unroll 2
    for (int c = first + part.lane / 16; c < first + own; c += 2) {
      float4 v = *reinterpret_cast<const float4*>(x + c * Shape::kRow + part.lane % 16 * 4);
      if constexpr (kSquare) v = make_float4(v.x * v.x, v.y * v.y, v.z * v.z, v.w * v.w);
      const float4* p = reinterpret_cast<const float4*>(proto + c * row + part.group * Shape::kClasses);
#pragma unroll
      for (int k = 0; k < Shape::kClasses; k += 4) {
        const float4 q = p[k / 4];
        add_class(k, q.x, v), add_class(k + 1, q.y, v), add_class(k + 2, q.z, v), add_class(k + 3, q.w, v);
      }
      if constexpr (kSquare) continue;
      constexpr int s = Shape::kSums - 4;
      sums[s] += v.x * v.x, sums[s + 1] += v.y * v.y, sums[s + 2] += v.z * v.z, sums[s + 3] += v.w * v.w;
    }
  }

  __device__ __forceinline__ void add_class(int k, float p, const float4& v) {
    sums[4 * k] += p * v.x, sums[4 * k + 1] += p * v.y, sums[4 * k + 2] += p * v.z, sums[4 * k + 3] += p * v.w;
  }

  // After the slices are added: the group's classes -> logits [class][kLogitsRow] and, of the first group, the squares.
  template <bool kSquare>
  __device__ __forceinline__ void write(float* logits, float* squares, const ContrastPart& part) {
#pragma unroll
    for (int i = 0; i < Shape::kSums; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], 16);
    if (part.lane >= 16) return;
    const int p = part.lane * 4;
#pragma unroll
    for (int k = 0; k < Shape::kClasses; ++k)
      *reinterpret_cast<float4*>(logits + (part.group * Shape::kClasses + k) * kLogitsRow + p) =
          make_float4(sums[4 * k], sums[4 * k + 1], sums[4 * k + 2], sums[4 * k + 3]);
    constexpr int s = Shape::kSums - 4;
    if (!kSquare && part.group == 0)
      *reinterpret_cast<float4*>(squares + p) = make_float4(sums[s], sums[s + 1], sums[s + 2], sums[s + 3]);
  }
};

template <class T> struct ContrastDots {
  using Shape = ContrastShape<2>;
  static constexpr int kSteps = Shape::kClasses / 16;
  float sums[Shape::kSums];  // [step of 16 classes][product of 8 pixels][fragment of 4], then squares [8]

  // Channels of one stage: x [kChunk][kRow], proto [padded classes][kProtoRow]. shifts: see shifts_of. kSquare: as
  // above.
  template <bool kSquare>
  __device__ __forceinline__ void add(const T* x, const T* proto, int, const ContrastWarps& warps,
                                      const ContrastPart& part, int shifts) {
    const int own = Shape::kChunk / warps.slices, q = part.lane % 4, g = part.lane / 4;
    for (int c = part.slice * own; c < (part.slice + 1) * own; c += 16) {
      uint32_t a[kSteps][4], v[4][4];
#pragma unroll
      for (int m = 0; m < kSteps; ++m) {
        const T* row = proto + (part.group * Shape::kClasses + m * 16 + g) * Shape::kProtoRow + c + 2 * q;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m][i] = *reinterpret_cast<const uint32_t*>(row + i % 2 * 8 * Shape::kProtoRow + i / 2 * 8);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        read_eight(v[i], x + (c + 2 * q + i % 2 + i / 2 * 8) * Shape::kRow, g * 8, shifts >> i % 2 & 1);
        if constexpr (kSquare)
          square(v[i]);
        else
          add_squares(v[i]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t b0 = j % 2 ? high_halves(v[0][j / 2], v[1][j / 2]) : low_halves(v[0][j / 2], v[1][j / 2]);
        const uint32_t b1 = j % 2 ? high_halves(v[2][j / 2], v[3][j / 2]) : low_halves(v[2][j / 2], v[3][j / 2]);
#pragma unroll
        for (int m = 0; m < kSteps; ++m)
          multiply_add<T>(*reinterpret_cast<float (*)[4]>(sums + (m * 8 + j) * 4), a[m], b0, b1);
      }
    }
  }

  static __device__ __forceinline__ void square(uint32_t (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_floats<T>(v[i]);
      v[i] = to_halves<T>(pair.x * pair.x, pair.y * pair.y);
    }
  }

  __device__ __forceinline__ void add_squares(const uint32_t (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_floats<T>(v[i]);
      sums[Shape::kSums - 8 + 2 * i] += pair.x * pair.x, sums[Shape::kSums - 8 + 2 * i + 1] += pair.y * pair.y;
    }
  }

  template <bool kSquare>
  __device__ __forceinline__ void write(float* logits, float* squares, const ContrastPart& part) {
    const int q = part.lane % 4, g = part.lane / 4;
    const bool swaps = q >= 2;
#pragma unroll
    for (int i = 0; i < Shape::kClasses / 4;
         ++i) {  // half a fragment: 8 pixels of a class, side by side, in two writes
      const int m = i / 4, lower = i / 2 % 2, column = i % 2, k = part.group * Shape::kClasses + m * 16 + lower * 8 + g;
      const float* sum = sums + m * 32 + lower * 2 + column;
      const float4 first = make_float4(sum[0], sum[4], sum[8], sum[12]),
                   second = make_float4(sum[16], sum[20], sum[24], sum[28]);
      // half of the lanes write the second one first: eight lanes meet in 32 different banks
      float* to = logits + k * kLogitsRow + forward_pixel(0, 2 * q + column);
      *reinterpret_cast<float4*>(to + (swaps ? 4 : 0)) = swaps ? second : first;
      *reinterpret_cast<float4*>(to + (swaps ? 0 : 4)) = swaps ? first : second;
    }
    if constexpr (kSquare) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float square = sums[Shape::kSums - 8 + i];
      square += __shfl_xor_sync(kAllLanes, square, 1);
      square += __shfl_xor_sync(kAllLanes, square, 2);
      if (part.group == 0 && q == 0) squares[forward_pixel(i, g)] = square;
    }
  }
};

// Adds the slices up, pair by pair, into slice 0. All threads come here; `exchange` is free to be written.
template <int kSums>
__device__ __forceinline__ void add_slices(float (&sums)[kSums], float* exchange, const ContrastWarps& warps,
                                           const ContrastPart& part) {
  for (int half = warps.slices / 2; half; half /= 2) {
    float* mine = exchange + static_cast<int64_t>(part.group * half + part.slice % half) * kSums * 32 + part.lane;
    const bool works = part.group < warps.groups;
    if (works && part.slice >= half && part.slice < 2 * half)
#pragma unroll
      for (int i = 0; i < kSums; ++i) mine[i * 32] = sums[i];
    __syncthreads();
    if (works && part.slice < half)
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += mine[i * 32];
    __syncthreads();
  }
}

template <class T> __device__ __forceinline__ ContrastChannels all_channels(const Features& x) {
  return {0, chunks_of<sizeof(T)>(x.dim)};
}

// Until the oldest of the stages under way is there, of this thread's copies.
__device__ __forceinline__ void wait_for_stage(int stages) {
  if (stages == 4)
    copy_async_wait<2>();
  else if (stages == 3)
    copy_async_wait<1>();
  else
    copy_async_wait<0>();
}

// Dot products of the tile, over these channels, with the classes [k0, k0 + classes that `shared` was made for) ->
// logits [class][kLogitsRow], not yet scaled; |x|^2 -> table->squares. kSquare: of x^2 with the variances. Ends with a
// barrier.
template <class T, bool kSquare = false, class Input>
__device__ void tile_dots(const Input& a, const ContrastTile& tile, const ContrastChannels& channels, int64_t k0,
                          const ContrastWarps& warps, const ContrastShared& shared, PixelTable* table) {
  using Shape = ContrastShape<sizeof(T)>;
  unsigned char* memory = shared_memory<unsigned char>();
  const ContrastPart part = part_of(warps);
  const int padded = warps.groups * Shape::kClasses;
  const T* proto;
  if constexpr (kSquare)
    proto = variances_of<T>(a, tile);
  else
    proto = prototypes_of<T>(a, tile);
  auto load = [&](int64_t chunk) {
    if (chunk < channels.chunks) {
      const int64_t d0 = channels.first + chunk * Shape::kChunk;
      stage_pixels<T>(a.x, a.access, tile, table->x_at, d0,
                      reinterpret_cast<T*>(memory + x_slot(shared, chunk, chunk)));
      T* to = reinterpret_cast<T*>(memory + proto_slot(shared, chunk));
      if constexpr (sizeof(T) == 4)
        stage_prototype_columns(proto, a.num_classes, a.x.dim, k0, padded, d0, to);
      else
        stage_prototypes<T>(proto, a.num_classes, a.x.dim, k0, padded, d0, to);
    }
    copy_async_commit();
  };

  ContrastDots<T> dots;
#pragma unroll
  for (int i = 0; i < Shape::kSums; ++i) dots.sums[i] = 0;
  for (int64_t s = 0; s < shared.stages - 1; ++s) load(s);
  const int shifts = shifts_of<T>(a.x, a.access, tile);
  for (int64_t chunk = 0; chunk < channels.chunks; ++chunk) {
    wait_for_stage(shared.stages);
    __syncthreads();
    load(chunk + shared.stages - 1);
    const T *x = reinterpret_cast<const T*>(memory + x_slot(shared, chunk, chunk)),
            *p = reinterpret_cast<const T*>(memory + proto_slot(shared, chunk));
    if (part.group < warps.groups) dots.template add<kSquare>(x, p, column_row(padded), warps, part, shifts);
  }
  copy_async_wait<0>();
  __syncthreads();
  add_slices(dots.sums, reinterpret_cast<float*>(memory + shared.exchange_at), warps, part);
  if (part.group < warps.groups && part.slice == 0)
    dots.template write<kSquare>(reinterpret_cast<float*>(memory + shared.logits_at), table->squares, part);
  __syncthreads();
}

}  // namespace spcl::gpu
