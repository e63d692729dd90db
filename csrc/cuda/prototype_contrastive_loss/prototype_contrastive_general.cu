// prototype_contrastive_loss with options or with any number of classes, forward: a block owns 64 pixels of one image.
//
// Classes come in blocks of as many as shared memory holds logits of; the features of the tile are read once per block
// of classes, from the second one on from the caches. Probabilities are added up before, in a kernel of their own,
// which finds the pixels without any and those with bad ones.
#include "contrast_general.cuh"

namespace spcl::gpu {

Status finish_loss(const float* losses, int64_t count, const float* weights, int64_t weights_count, bool mean,
                   float* loss, float* denominator, Stream stream);  // prototype_contrastive_loss.cu

namespace {

constexpr int kSumThreads = 128;
constexpr int64_t kBadProbability = INT64_MAX;  // what the flag says of one: backends/labels.py

// ---- probabilities ----------------------------------------------------------------------------------------------

// One thread per pixel: sum_k w_k t_k, or that the pixel has no or bad probabilities -> options.target_sums.
__global__ void __launch_bounds__(kSumThreads) contrast_target_sums_kernel(const __grid_constant__ GeneralInput a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (n >= a.x.batch * a.pixels) return;
  const int64_t image = n / a.pixels, pixel = n - image * a.pixels;
  const Features& map = a.options.targets;
  Targets t{static_cast<const char*>(map.data) + pixel_offset(map, image, pixel) * size_of(map.type), map.type,
            map.stride_d, a.class_weight};
  double sum = 0, weighted = 0;
  bool bad = false;
  for (int64_t k = 0; k < a.num_classes; ++k) {
    const float value = t.probability(k);
    bad |= !(value >= 0 && value < INFINITY);
    sum += value, weighted += t.weight(k) * value;
  }
  if (bad) atomicMax(reinterpret_cast<long long*>(a.labels.flag), static_cast<long long>(kBadProbability));
  a.options.target_sums[n] = bad ? NAN : sum == 0 ? kNoTarget : static_cast<float>(weighted);
}

// ---- the loss ---------------------------------------------------------------------------------------------------

struct GeneralForward : GeneralInput {
  ContrastShared shared;
  ContrastWarps warps;
  int block_classes;
  int64_t kept_at;  // with variances
  float *loss_map, *denominator, *partial;
  double* lse;
  float *inv_norm, *logits;

  __device__ __forceinline__ Seen* seen(int p, int part) const {
    return reinterpret_cast<Seen*>(shared_memory<unsigned char>() + shared.bytes) + p * 4 + part;
  }
  __device__ __forceinline__ float* kept() const {
    return reinterpret_cast<float*>(shared_memory<unsigned char>() + kept_at);
  }
};

__device__ __forceinline__ float inverse_norm_of(const GeneralForward& a, const PixelTable* table, int p) {
  return a.normalize ? inverse_norm(table->squares[p]) : 1.0f;
}

// The classes from k0 on, of a quarter of pixel p's.
template <bool kQuadratic>
__device__ __forceinline__ void see_block(const GeneralForward& a, const ContrastTile& tile, const PixelTable* table,
                                          float temperature, int64_t k0, int p, int part) {
  const int cls = table->cls[p], count = static_cast<int>(min(int64_t{a.block_classes}, a.num_classes - k0));
  const float inv = inverse_norm_of(a, table, p);
  GeneralLogits z;
  if constexpr (kQuadratic)
    z = quadratic_logits(a, tile, a.shared, a.kept(), k0, cls, p, inv, temperature);
  else
    z = logits_of(a, tile, formed_logits(a.shared, p, inv, temperature), k0, cls, temperature);
  if (a.logits && p < tile.count)
    for (int k = part; k < count; k += 4)
      a.logits[(tile.image * a.num_classes + k0 + k) * a.pixels + tile.first + p] = z.plain(k);
  see_classes(*a.seen(p, part), z, targets_of(a, tile, p, cls), k0, count, part, a.options.sigmoid,
              kQuadratic && !a.options.positive_variance);
}

// Loss of pixel p -> table, lse, inv_norm, loss_map.
__device__ __forceinline__ void finish_pixel(const GeneralForward& a, const ContrastTile& tile, PixelTable* table,
                                             int p, int part) {
  const int cls = table->cls[p];
  const Seen seen = merged(*a.seen(p, part), a.options.sigmoid);
  if (part) return;
  const double log_total = a.options.sigmoid ? 0.0 : log_of(seen.total);
  float weight = 0, loss = 0;
  if (cls >= 0) {
    weight = a.class_weight && !a.options.sigmoid && !a.options.targets.data ? a.class_weight[cls] : 1.0f;
    loss = pixel_weight_at(a.pixel_weight, tile, p, a.x.width) *
           static_cast<float>(seen.below + (a.options.sigmoid ? 0.0 : seen.mass * log_total));
  } else if (cls == kBadLabel) {
    weight = loss = NAN;
  }
  table->loss[p] = loss, table->weight[p] = weight;
  if (p >= tile.count) return;
  const int64_t at = tile.image * a.pixels + tile.first + p;
  if (a.lse) a.lse[at] = a.options.sigmoid ? 0.0 : seen.top + log_total;
  if (a.lse) a.inv_norm[at] = inverse_norm_of(a, table, p);
  if (a.loss_map) a.loss_map[at] = loss;
}

template <class T, bool kQuadratic>
__global__ void __launch_bounds__(kContrastThreads)
    contrast_general_forward_kernel(const __grid_constant__ GeneralForward a) {
  PixelTable* table = reinterpret_cast<PixelTable*>(shared_memory<unsigned char>() + a.shared.pixels_at);
  const ContrastTile tile = contrast_tile(blockIdx.x, a.pixels);
  const float temperature = a.temperature();
  read_general_pixels(a, tile, table);
  for_each_pixel([&](int p, int part) { *a.seen(p, part) = {-INFINITY, 0, 0, 0}; });  // each lane reads its own
  for (int64_t k0 = 0; k0 < a.num_classes; k0 += a.block_classes) {
    if constexpr (kQuadratic)
      quadratic_dots<T>(a, tile, k0, a.warps, a.shared, table, a.kept());
    else
      tile_dots<T>(a, tile, all_channels<T>(a.x), k0, a.warps, a.shared, table);
    for_each_pixel([&](int p, int part) { see_block<kQuadratic>(a, tile, table, temperature, k0, p, part); });
    __syncthreads();
  }
  for_each_pixel([&](int p, int part) { finish_pixel(a, tile, table, p, part); });
  __syncthreads();
  if (a.loss_map && blockIdx.x == 0 && threadIdx.x == 0) *a.denominator = 1;
  if (a.loss_map || threadIdx.x >= 32) return;
  const float loss = warp_sum(table->loss[threadIdx.x] + table->loss[threadIdx.x + 32]);
  const float weight = warp_sum(table->weight[threadIdx.x] + table->weight[threadIdx.x + 32]);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = loss, a.partial[gridDim.x + blockIdx.x] = weight;
}

// loss, a sum -> loss / given, 0 where that is 0; NaN stays. denominator: 1 or NaN -> given.
__global__ void contrast_divide_kernel(float* loss, float* denominator, const float* given) {
  if (threadIdx.x) return;
  *loss = *given == 0 && !isnan(*denominator) ? 0.0f : *loss / *given;
  *denominator = isnan(*denominator) ? NAN : *given;
}

template <class T> Status forward(const ContrastForward& from, Stream stream) {
  GeneralForward a{};
  set_general(a, from);
  constexpr bool kHasVariances = !std::is_same_v<T, __half>;
  const bool quadratic = from.options.variances != nullptr;
  const int64_t most = quadratic ? kStreamedWarps * ContrastShape<sizeof(T)>::kClasses
                                 : forward_classes<sizeof(T)>(shared_memory_limit());
  const int64_t classes = between(from.num_classes, 1, most);
  a.warps = contrast_warps(classes, ContrastShape<sizeof(T)>::kClasses);
  a.block_classes = a.warps.groups * ContrastShape<sizeof(T)>::kClasses;
  a.shared = contrast_shared<sizeof(T)>(a.block_classes, 0);
  a.loss_map = from.loss_map, a.denominator = from.denominator, a.partial = from.partial;
  a.lse = from.lse, a.inv_norm = from.inv_norm, a.logits = from.logits;
  static_assert(4 * kTile * sizeof(Seen) == kSeenBytes);
  a.kept_at = a.shared.bytes + kSeenBytes;
  const int64_t blocks = contrast_blocks(from.x), bytes = a.kept_at + (quadratic ? kept_bytes(a.block_classes) : 0);
  const Grid grid{dim3(static_cast<unsigned>(blocks)), a.warps.count * 32u, static_cast<size_t>(bytes)};
  const auto kernel =
      quadratic ? contrast_general_forward_kernel<T, kHasVariances> : contrast_general_forward_kernel<T, false>;
  if (Status failed = launch(kernel, grid, stream, a); failed || from.loss_map) return failed;
  const bool divides = from.mean && from.options.denominator;
  if (Status failed = finish_loss(from.partial, blocks, from.partial + blocks, blocks, from.mean && !divides, from.loss,
                                  from.denominator, stream);
      failed || !divides)
    return failed;
  return launch(contrast_divide_kernel, Grid{dim3(1), 32}, stream, from.loss, from.denominator,
                from.options.denominator);
}

}  // namespace

Status contrast_target_sums(const Contrast& from, Stream stream) {
  if (!from.options.targets.data) return nullptr;
  GeneralInput a{};
  set_general(a, from);
  const Grid grid{dim3(static_cast<unsigned>(ceil_div(a.x.batch * a.pixels, kSumThreads))), kSumThreads};
  return launch(contrast_target_sums_kernel, grid, stream, a);
}

Status prototype_contrastive_general_forward(const ContrastForward& a, Stream stream) {
  if (Status failed = contrast_target_sums(a, stream)) return failed;
  return with_float_type(a.x.type, [&](auto one) { return forward<decltype(one)>(a, stream); });
}

}  // namespace spcl::gpu
