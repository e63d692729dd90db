// prototype_contrastive_loss, gradient of the prototypes:  dP_k = (1/tau) sum_n w_nk s_n x̂_n.
//
// Here for the classes of one warp (20 or 32); more of them are the general kernel's. A block owns them, 64 channels
// and one of a fixed number of groups of tiles; a second kernel adds the groups in order. No atomics, and the number of
// groups follows from the sizes alone. FMA in float for every dtype: nothing underflows. Moves: x once (again, from the
// caches, where the logits are formed here), the logits once a block of channels.
#include "contrast_prototypes.cuh"

namespace spcl::gpu {

Status prototype_general_gradient(const ContrastBackward& a,
                                  Stream stream);  // prototype_contrastive_general_prototypes.cu

namespace {

struct PrototypeKernel : ContrastInput {
  ContrastShared shared;
  ContrastWarps warps;
  ContrastGroups groups;
  Labels labels;
  const float* class_weight;
  PixelMap pixel_weight, grad;
  float temperature;
  const float* denominator;
  const double* lse;
  const float *inv_norm, *logits;
  float* partial;  // [groups][K][D]
};

// w * s * inv / tau of pixel p and the classes from k0 on -> weights [class][kOwnRow], 0 beyond K.
__device__ __forceinline__ void weigh_pixel(const PrototypeKernel& a, const ContrastTile& tile, const PixelTable* table,
                                            float* weights, int64_t k0, int p, int part) {
  const int cls = table->cls[p];
  const int64_t at = tile.image * a.pixels + tile.first + min(p, tile.count - 1);
  const float inv = a.inv_norm[at];
  const LogSum lse(a.lse[at]);
  const Logits z = a.logits ? saved_logits(a.logits, a, tile, k0, p) : formed_logits(a.shared, p, inv, a.temperature);
  float factor = cls == kBadLabel ? NAN : 0.0f;
  if (cls >= 0)
    factor = pixel_scale(a.class_weight, a.pixel_weight, a.grad, *a.denominator, tile, p, cls, a.x.width) *
             (inv / a.temperature);
  const int count = static_cast<int>(min(int64_t{kPiece}, a.num_classes - k0));
  for (int k = part; k < kPiece; k += 4) {
    float w = 0;
    if (k < count && cls != kNoClass) w = (k0 + k == cls ? expm1f(lse.below(z[k])) : expf(lse.below(z[k]))) * factor;
    weights[k * kOwnRow + p] = w;
  }
}

// Two blocks per multiprocessor are promised so that ptxas takes the registers: left alone it spills on sm_100 for a
// third.
template <class T>
__global__ void __launch_bounds__(kPrototypeThreads, 2)
    contrast_prototypes_kernel(const __grid_constant__ PrototypeKernel a) {
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
    stage_block<T>(a, tile, table, d0, x);
    own.add(x, weights, table, shifts_of<T>(a.x, a.access, tile));
    __syncthreads();
  }
  own.write(a.partial + (static_cast<int64_t>(blockIdx.y) * a.num_classes + k0) * a.x.dim + d0,
            min(int64_t{Shape::kClasses}, a.num_classes - k0), a.x.dim, a.x.dim - d0);
}

template <class T> Status gradient(const ContrastBackward& from, Stream stream) {
  const PrototypeGrid plan = prototype_grid(from);
  PrototypeKernel a{};
  static_cast<ContrastInput&>(a) = input_of(from);
  a.shared = prototype_shared<sizeof(T)>(!from.logits, 1);
  a.warps = contrast_warps(1, ContrastShape<sizeof(T)>::kClasses);
  a.groups = plan.groups;
  a.labels = from.labels, a.class_weight = from.class_weight, a.pixel_weight = from.pixel_weight, a.grad = from.grad;
  a.temperature = from.temperature, a.denominator = from.denominator, a.lse = from.lse, a.inv_norm = from.inv_norm,
  a.logits = from.logits;
  a.partial = plan.adds() > 1 ? from.partial : from.dprototypes;
  const Grid grid{dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.groups.groups)),
                  kPrototypeThreads, static_cast<size_t>(a.shared.bytes)};
  if (Status failed = launch(contrast_prototypes_kernel<T>, grid, stream, a)) return failed;
  return add_groups(from.partial, plan.adds(), from.num_classes * from.x.dim, 1, from.dprototypes, stream);
}

// partial [outputs][groups][size] -> out [outputs][size], summed in the groups' order.
__global__ void __launch_bounds__(kAddThreads)
    contrast_add_groups_kernel(const float* partial, int64_t groups, int64_t size, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i >= size) return;
  partial += blockIdx.y * groups * size;
  float sum = 0;
  for (int64_t g = 0; g < groups; ++g) sum += partial[g * size + i];
  out[blockIdx.y * size + i] = sum;
}

}  // namespace

PrototypeGrid prototype_grid(const ContrastBackward& a) {
  const int of_warp = a.x.type == kFloat32 ? ContrastShape<4>::kClasses : ContrastShape<2>::kClasses;
  const int64_t classes = of_warp * prototype_groups(a.num_classes, of_warp);
  const int64_t channels = a.dprototypes ? ceil_div(a.x.dim, kBlockChannels) : 1;
  const int64_t blocks = ceil_div(a.num_classes, classes) * channels;
  const bool own_prototypes = a.options.prototypes_stride_b != 0, own_bias = a.options.bias_stride_b != 0;
  const int64_t images = own_prototypes || own_bias ? a.x.batch : 1, tiles = contrast_blocks(a.x) / images;
  return {blocks,         channels, images, contrast_groups(tiles, blocks * images, images * a.num_classes * a.x.dim),
          own_prototypes, own_bias};
}

ContrastPartial contrast_partial(const ContrastBackward& a) {
  const PrototypeGrid plan = prototype_grid(a);
  const int64_t total = plan.images * plan.groups.groups;
  return {a.dprototypes && plan.adds() > 1 ? total * a.num_classes * a.x.dim : 0,
          a.dbias && plan.bias_adds() > 1 ? total * a.num_classes : 0, a.dtemperature ? contrast_blocks(a.x) : 0};
}

Status add_groups(const float* partial, int64_t groups, int64_t size, int64_t outputs, float* out, Stream stream) {
  if (groups == 1) return nullptr;  // they wrote there
  const Grid grid{dim3(static_cast<unsigned>(ceil_div(size, kAddThreads)), static_cast<unsigned>(outputs)),
                  kAddThreads};
  return launch(contrast_add_groups_kernel, grid, stream, partial, groups, size, out);
}

Status prototype_gradient(const ContrastBackward& a, Stream stream) {
  const int of_warp = a.x.type == kFloat32 ? ContrastShape<4>::kClasses : ContrastShape<2>::kClasses;
  if (prototype_groups(a.num_classes, of_warp) > 1) return prototype_general_gradient(a, stream);
  return with_float_type(a.x.type, [&](auto one) { return gradient<decltype(one)>(a, stream); });
}

}  // namespace spcl::gpu
