// prototype_contrastive_loss with options or with any number of classes, gradients of the prototypes and of the bias.
//
// As the plain gradient of the prototypes; images that have prototypes or a bias of their own have groups of tiles of
// their own. db_k = sum_n s_n dz_nk: eight pixels by shuffles, then per warp in shared memory, by the blocks of the
// first channels.
#include "contrast_general.cuh"
#include "contrast_prototypes.cuh"

namespace spcl::gpu {
namespace {

constexpr int kWarps = kPrototypeThreads / 32;

struct GeneralPrototypes : GeneralInput {
  ContrastShared shared;
  ContrastWarps warps;
  PrototypeGrid plan;
  PixelMap grad;
  const float* denominator;
  const double* lse;
  const float *inv_norm, *logits;
  float *prototypes_out, *bias_out;  // [images][groups][K][D] and [images][groups][K], or nullptr

  int64_t kept_at;  // with variances

  __device__ __forceinline__ float* kept() const {
    return reinterpret_cast<float*>(shared_memory<unsigned char>() + kept_at);
  }
  __device__ __forceinline__ float* bias_sums() const {  // [kWarps][own_classes]
    return reinterpret_cast<float*>(shared_memory<unsigned char>() + shared.bytes);
  }
};

// dz_k s inv / tau of pixel p and the classes from k0 on -> weights [class][kOwnRow], 0 beyond K; dz_k s -> bias_sums.
template <int kOwn, bool kQuadratic>
__device__ __forceinline__ void weigh_pixel(const GeneralPrototypes& a, const ContrastTile& tile,
                                            const PixelTable* table, float temperature, float* weights, int64_t k0,
                                            bool sums_bias, int p, int part) {
  const int cls = table->cls[p], count = static_cast<int>(min(int64_t{kOwn}, a.num_classes - k0));
  const int64_t at = tile.image * a.pixels + tile.first + min(p, tile.count - 1);
  const float inv = a.inv_norm[at];
  GeneralLogits z;
  if constexpr (kQuadratic)
    z = quadratic_logits(a, tile, a.shared, a.kept(), k0, cls, p, inv, temperature);
  else
    z = logits_of(a, tile,
                  a.logits ? saved_logits(a.logits, a, tile, k0, p) : formed_logits(a.shared, p, inv, temperature), k0,
                  cls, temperature);
  const Targets t = targets_of(a, tile, p, cls);
  const LogSum lse(a.lse[at]);
  const float s = cls >= 0 ? general_scale(a, a.grad, *a.denominator, tile, p, t.sum) : cls == kBadLabel ? NAN : 0.0f;
  for (int k = part; k < kOwn; k += 4) {
    float w = 0;
    if (k < count && cls != kNoClass && s != 0)
      w = weight_of(z[k], cls < 0 ? 0.0f : t.wanted(k0 + k), t.weight(k0 + k), t, lse, a.options.sigmoid) * s;
    weights[k * kOwnRow + p] = w == 0 ? 0.0f : w * (inv / temperature);
    if (!sums_bias) continue;
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) w += __shfl_xor_sync(kAllLanes, w, lanes);
    if (threadIdx.x % 32 < 4) a.bias_sums()[threadIdx.x / 32 * kOwn + k] += w;
  }
}

template <class T, int kGroups, bool kQuadratic>
__global__ void __launch_bounds__(kPrototypeThreads, 2)
    contrast_general_prototypes_kernel(const __grid_constant__ GeneralPrototypes a) {
  constexpr int kClasses = kGroups * ContrastShape<sizeof(T)>::kClasses, kOwn = own_classes<sizeof(T)>(kGroups);
  unsigned char* memory = shared_memory<unsigned char>();
  PixelTable* table = reinterpret_cast<PixelTable*>(memory + a.shared.pixels_at);
  float* weights = reinterpret_cast<float*>(memory + a.shared.weights_at);
  T* x = reinterpret_cast<T*>(memory);
  const int64_t k0 = blockIdx.x / a.plan.channels * kClasses, d0 = blockIdx.x % a.plan.channels * kBlockChannels;
  const int64_t image = blockIdx.y / a.plan.groups.groups, group = blockIdx.y - image * a.plan.groups.groups;
  const int64_t tiles = a.x.batch * contrast_tiles(a.pixels) / a.plan.images;
  const int64_t begin = group * a.plan.groups.tiles_per_group, end = min(begin + a.plan.groups.tiles_per_group, tiles);
  const bool sums_bias = a.bias_out && d0 == 0;
  const float temperature = a.temperature();
  for (int i = threadIdx.x; i < kWarps * kOwn; i += kPrototypeThreads) a.bias_sums()[i] = 0;
  PrototypeSums<T, kGroups> own;
  for (int64_t t = begin; t < end; ++t) {
    const ContrastTile tile = contrast_tile(image * tiles + t, a.pixels);
    read_general_pixels(a, tile, table);
    if constexpr (kQuadratic)
      quadratic_dots<T>(a, tile, k0, a.warps, a.shared, table, a.kept());
    else if (!a.logits)
      tile_dots<T>(a, tile, all_channels<T>(a.x), k0, a.warps, a.shared, table);
    for_each_pixel([&](int p, int part) {
      weigh_pixel<kOwn, kQuadratic>(a, tile, table, temperature, weights, k0, sums_bias, p, part);
    });
    __syncthreads();
    if (a.prototypes_out) {
      stage_block<T>(a, tile, table, d0, x);
      own.add(x, weights, table, shifts_of<T>(a.x, a.access, tile));
    }
    __syncthreads();
  }
  const int64_t classes = min(int64_t{kClasses}, a.num_classes - k0), first = blockIdx.y * a.num_classes + k0;
  if (a.prototypes_out) own.write(a.prototypes_out + first * a.x.dim + d0, classes, a.x.dim, a.x.dim - d0);
  __syncthreads();
  if (!sums_bias || static_cast<int>(threadIdx.x) >= classes) return;
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += a.bias_sums()[warp * kOwn + threadIdx.x];
  a.bias_out[first + threadIdx.x] = sum;
}

template <class T, int kGroups> Status gradient(const ContrastBackward& from, Stream stream) {
  const PrototypeGrid plan = prototype_grid(from);
  const ContrastPartial sizes = contrast_partial(from);
  GeneralPrototypes a{};
  set_general(a, from);
  a.shared = prototype_shared<sizeof(T)>(!from.logits, kGroups);
  a.warps = contrast_warps(kGroups * ContrastShape<sizeof(T)>::kClasses, ContrastShape<sizeof(T)>::kClasses);
  a.plan = plan, a.grad = from.grad, a.denominator = from.denominator;
  a.lse = from.lse, a.inv_norm = from.inv_norm, a.logits = from.logits;
  float* bias_partial = from.partial + sizes.prototypes;
  if (from.dprototypes) a.prototypes_out = plan.adds() > 1 ? from.partial : from.dprototypes;
  if (from.dbias) a.bias_out = plan.bias_adds() > 1 ? bias_partial : from.dbias;
  constexpr bool kHasVariances = !std::is_same_v<T, __half>;
  const bool quadratic = from.options.variances != nullptr;
  a.kept_at = a.shared.bytes + kWarps * own_classes<sizeof(T)>(kGroups) * static_cast<int64_t>(sizeof(float));
  const int64_t bytes = a.kept_at + (quadratic ? kept_bytes(kGroups * ContrastShape<sizeof(T)>::kClasses) : 0);
  const Grid grid{dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.images * plan.groups.groups)),
                  kPrototypeThreads, static_cast<size_t>(bytes)};
  const auto kernel = quadratic ? contrast_general_prototypes_kernel<T, kGroups, kHasVariances>
                                : contrast_general_prototypes_kernel<T, kGroups, false>;
  if (Status failed = launch(kernel, grid, stream, a)) return failed;
  if (from.dprototypes)
    if (Status failed = add_groups(from.partial, plan.adds(), from.num_classes * from.x.dim,
                                   plan.own_prototypes ? plan.images : 1, from.dprototypes, stream))
      return failed;
  if (!from.dbias) return nullptr;
  return add_groups(bias_partial, plan.bias_adds(), from.num_classes, plan.own_bias ? plan.images : 1, from.dbias,
                    stream);
}

}  // namespace

Status prototype_general_gradient(const ContrastBackward& a, Stream stream) {
  return with_float_type(a.x.type, [&](auto one) {
    using T = decltype(one);
    switch (prototype_groups(a.num_classes, ContrastShape<sizeof(T)>::kClasses)) {
      case 1: return gradient<T, 1>(a, stream);
      case 2: return gradient<T, 2>(a, stream);
      default: return gradient<T, 4>(a, stream);
    }
  });
}

}  // namespace spcl::gpu
