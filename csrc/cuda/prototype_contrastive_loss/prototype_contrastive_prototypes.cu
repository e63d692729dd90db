// prototype_contrastive_loss, gradient of the prototypes:  dP_k = (1/tau) sum_n w_nk s_n x̂_n.
//
// A block owns the classes of one warp (20 or 32), 64 channels and one of a fixed number of groups of tiles; a second
// kernel adds the groups in order. No atomics, and the number of groups follows from the sizes alone. FMA in float for
// every dtype: nothing underflows. Moves: x once (again, from the caches, where the logits are formed here), the logits
// once a block of channels.
#include "contrast_pixels.cuh"

namespace spcl::gpu {
namespace {

constexpr int kThreads = 128;
constexpr int kAddThreads = 256;

struct PrototypeKernel : ContrastInput {
  ContrastShared shared;
  ContrastWarps warps;
  ContrastGroups groups;
  Labels labels;
  const float* class_weight;
  PixelMap pixel_weight, grad;
  float temperature;
  const float *denominator, *lse, *inv_norm, *logits;
  float* partial;  // [groups][K][D]
};

// w * s * inv / tau of pixel p and the classes from k0 on -> weights [class][kOwnRow], 0 beyond K.
__device__ __forceinline__ void weigh_pixel(const PrototypeKernel& a, const ContrastTile& tile, const PixelTable* table,
                                            float* weights, int64_t k0, int p, int part) {
  const int cls = table->cls[p];
  const int64_t at = tile.image * a.pixels + tile.first + min(p, tile.count - 1);
  const float lse = a.lse[at], inv = a.inv_norm[at];
  const Logits z = a.logits ? saved_logits(a.logits, a, tile, k0, p) : formed_logits(a.shared, p, inv, a.temperature);
  float factor = cls == kBadLabel ? NAN : 0.0f;
  if (cls >= 0)
    factor = pixel_scale(a.class_weight, a.pixel_weight, a.grad, *a.denominator, tile, p, cls, a.x.width) *
             (inv / a.temperature);
  const int count = static_cast<int>(min(int64_t{kPiece}, a.num_classes - k0));
  for (int k = part; k < kPiece; k += 4) {
    float w = 0;
    if (k < count && cls != kNoClass) w = (k0 + k == cls ? expm1f(z[k] - lse) : expf(z[k] - lse)) * factor;
    weights[k * kOwnRow + p] = w;
  }
}

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
template <class T> struct PrototypeSums {
  using Shape = ContrastShape<sizeof(T)>;
  static constexpr int kRows = (Shape::kClasses + 7) / 8;
  float sums[kRows][4];
  int row, column;

  __device__ __forceinline__ PrototypeSums() : row(threadIdx.x / 16), column(threadIdx.x % 16) {
#pragma unroll
    for (int i = 0; i < kRows * 4; ++i) sums[i / 4][i % 4] = 0;
  }

  // x [kBlockChannels][kRow], weights [kPiece][kOwnRow].
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

// Two blocks a multiprocessor are said so that ptxas takes the registers: left alone it spills on sm_100 for a third.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) contrast_prototypes_kernel(const __grid_constant__ PrototypeKernel a) {
  using Shape = ContrastShape<sizeof(T)>;
  unsigned char* memory = shared_memory<unsigned char>();
  PixelTable* table = reinterpret_cast<PixelTable*>(memory + a.shared.pixels_at);
  float* weights = reinterpret_cast<float*>(memory + a.shared.weights_at);
  T* x = reinterpret_cast<T*>(memory);
  const int64_t blocks = ceil_div(a.x.dim, kBlockChannels), k0 = blockIdx.x / blocks * Shape::kClasses;
  const int64_t d0 = blockIdx.x % blocks * kBlockChannels, tiles = a.x.batch * contrast_tiles(a.pixels);
  PrototypeSums<T> own;
  const int64_t first = blockIdx.y * a.groups.tiles_per_group;
  for (int64_t t = first; t < min(first + a.groups.tiles_per_group, tiles); ++t) {
    const ContrastTile tile = contrast_tile(t, a.pixels);
    read_pixels(a, a.labels, tile, table);
    if (!a.logits) tile_dots<T>(a, tile, all_channels<T>(a.x), k0, a.warps, a.shared, table);
    for_each_pixel([&](int p, int part) { weigh_pixel(a, tile, table, weights, k0, p, part); });
    __syncthreads();
    for (int c = 0; c < kBlockChannels; c += Shape::kChunk)
      stage_pixels<T>(a.x, a.access, tile, table->x_at, d0 + c, x + c * Shape::kRow);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    own.add(x, weights, table, shifts_of<T>(a.x, a.access, tile));
    __syncthreads();
  }
  own.write(a.partial + (static_cast<int64_t>(blockIdx.y) * a.num_classes + k0) * a.x.dim + d0,
            min(int64_t{Shape::kClasses}, a.num_classes - k0), a.x.dim, a.x.dim - d0);
}

// partial [groups][size] -> out [size], summed in the groups' order.
__global__ void __launch_bounds__(kAddThreads)
    contrast_add_groups_kernel(const float* partial, int64_t groups, int64_t size, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int64_t g = 0; g < groups; ++g) sum += partial[g * size + i];
  out[i] = sum;
}

// Blocks of one group, and the groups.
struct PrototypeGrid {
  int64_t blocks;
  ContrastGroups groups;
};

PrototypeGrid grid_of(const Features& x, int64_t num_classes) {
  const int64_t classes = x.type == kFloat32 ? ContrastShape<4>::kClasses : ContrastShape<2>::kClasses;
  const int64_t blocks = ceil_div(num_classes, classes) * ceil_div(x.dim, kBlockChannels);
  return {blocks, contrast_groups(contrast_blocks(x), blocks, num_classes * x.dim)};
}

template <class T> Status gradient(const ContrastBackward& from, Stream stream) {
  const PrototypeGrid plan = grid_of(from.x, from.num_classes);
  PrototypeKernel a{};
  static_cast<ContrastInput&>(a) = input_of(from);
  a.shared = prototype_shared<sizeof(T)>(!from.logits);
  a.warps = contrast_warps(1, ContrastShape<sizeof(T)>::kClasses);
  a.groups = plan.groups;
  a.labels = from.labels, a.class_weight = from.class_weight, a.pixel_weight = from.pixel_weight, a.grad = from.grad;
  a.temperature = from.temperature, a.denominator = from.denominator, a.lse = from.lse, a.inv_norm = from.inv_norm,
  a.logits = from.logits;
  a.partial = plan.groups.groups > 1 ? from.partial : from.dprototypes;
  const Grid grid{dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.groups.groups)), kThreads,
                  static_cast<size_t>(a.shared.bytes)};
  if (Status failed = launch(contrast_prototypes_kernel<T>, grid, stream, a); failed || plan.groups.groups == 1)
    return failed;
  const int64_t size = from.num_classes * from.x.dim;
  const Grid adding{dim3(static_cast<unsigned>(ceil_div(size, kAddThreads))), kAddThreads};
  return launch(contrast_add_groups_kernel, adding, stream, from.partial, plan.groups.groups, size, from.dprototypes);
}

}  // namespace

int64_t contrast_partial_floats(const Features& x, int64_t num_classes) {
  const int64_t groups = grid_of(x, num_classes).groups.groups;
  return groups > 1 ? groups * num_classes * x.dim : 0;
}

Status prototype_gradient(const ContrastBackward& a, Stream stream) {
  return with_float_type(a.x.type, [&](auto one) { return gradient<decltype(one)>(a, stream); });
}

}  // namespace spcl::gpu
