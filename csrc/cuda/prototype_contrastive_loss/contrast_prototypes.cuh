// The prototypes' gradient of a block: its classes' weights times 64 channels of its tiles, added up in registers.
#pragma once
#include "contrast_pixels.cuh"

namespace spcl::gpu {

constexpr int kPrototypeThreads = 128;
constexpr int kAddThreads = 256;

// How a gradient of the prototypes is cut: the blocks of a group of tiles (`channels` of them for each of the classes
// they own), and the groups of each image, or of the whole batch where all share prototypes and bias.
struct PrototypeGrid {
  int64_t blocks, channels, images;
  ContrastGroups groups;
  bool own_prototypes, own_bias;  // per image

  // So many partial sums make one gradient.
  int64_t adds() const { return own_prototypes ? groups.groups : images * groups.groups; }
  int64_t bias_adds() const { return own_bias ? groups.groups : images * groups.groups; }
};

PrototypeGrid prototype_grid(const ContrastBackward& a);
Status add_groups(const float* partial, int64_t groups, int64_t size, int64_t outputs, float* out, Stream stream);

// 4 pixels of a staged row, 0 where there is no label: 0 times an unlabelled pixel's NaN would be NaN.
template <class T> __device__ __forceinline__ float4 read_four(const T* row, int p, int shifted, const int4& cls) {
  float4 v;
  if constexpr (sizeof(T) == 4)
    v = *reinterpret_cast<const float4*>(row + p);
  else
    v = make_float4(to_float(row[p + shifted]), to_float(row[p + 1 + shifted]), to_float(row[p + 2 + shifted]),
                    to_float(row[p + 3 + shifted]));
  return make_float4(cls.x == kNoClass ? 0.0f : v.x, cls.y == kNoClass ? 0.0f : v.y, cls.z == kNoClass ? 0.0f : v.z,
                     cls.w == kNoClass ? 0.0f : v.w);
}

// A lane's part of [classes x 64 channels]: classes row + 8 i, channels column + 16 j.
template <class T, int kGroups = 1> struct PrototypeSums {
  using Shape = ContrastShape<sizeof(T)>;
  static constexpr int kRows = (kGroups * Shape::kClasses + 7) / 8;
  float sums[kRows][4];
  int row, column;

  __device__ __forceinline__ PrototypeSums() : row(threadIdx.x / 16), column(threadIdx.x % 16) {
#pragma unroll
    for (int i = 0; i < kRows * 4; ++i) sums[i / 4][i % 4] = 0;
  }

  // x [kBlockChannels][kRow], weights [class][kOwnRow].
  __device__ __forceinline__ void add(const T* x, const float* weights, const PixelTable* table, int shifts) {
    const int shifted = shifts >> column % 2 & 1;
    for (int p = 0; p < kTile; p += 4) {
      const int4 cls = *reinterpret_cast<const int4*>(table->cls + p);
      float4 v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = read_four(x + (column + 16 * j) * Shape::kRow, p, shifted, cls);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 w = *reinterpret_cast<const float4*>(weights + (row + 8 * i) * kOwnRow + p);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sums[i][j] += w.x * v[j].x, sums[i][j] += w.y * v[j].y, sums[i][j] += w.z * v[j].z,
              sums[i][j] += w.w * v[j].w;
      }
    }
  }

  __device__ __forceinline__ void write(float* to, int64_t classes, int64_t dim, int64_t channels) const {
#pragma unroll
    for (int i = 0; i < kRows * 4; ++i) {
      const int k = row + i / 4 * 8, c = column + i % 4 * 16;
      if (k < classes && c < channels) to[k * dim + c] = sums[i / 4][i % 4];
    }
  }
};

// The channels from d0 on of a tile -> x [kBlockChannels][kRow]. Ends with a barrier.
template <class T>
__device__ __forceinline__ void stage_block(const ContrastInput& a, const ContrastTile& tile, const PixelTable* table,
                                            int64_t d0, T* x) {
  using Shape = ContrastShape<sizeof(T)>;
  for (int c = 0; c < kBlockChannels; c += Shape::kChunk)
    stage_pixels<T>(a.x, a.access, tile, table->x_at, d0 + c, x + c * Shape::kRow);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
}

}  // namespace spcl::gpu
