// prototype_contrastive_loss, forward: a block owns 64 pixels of one image and all K classes, and reads its features
// once.
//
// Neither unit features nor [N, K] logits need reach memory: 8 bytes per pixel are written (lse, inv_norm), 4 K more
// where the backward wants the logits. One partial loss and weight per block, added by one block in a fixed order.
#include "contrast_pixels.cuh"

namespace spcl::gpu {

// Adds up what the blocks left, of this form and of the one pass.
Status finish_loss(const float* losses, int64_t count, const float* weights, int64_t weights_count, bool mean,
                   float* loss, float* denominator, Stream stream);
Status prototype_contrastive_general_forward(const ContrastForward& a, Stream stream);  // the file of that name

namespace {

constexpr int kFinishThreads = 256;

struct ForwardKernel : ContrastInput {
  ContrastShared shared;
  ContrastWarps warps;
  Labels labels;
  const float* class_weight;
  PixelMap pixel_weight;
  float temperature;
  float *loss_map, *denominator, *partial;
  double* lse;
  float *inv_norm, *logits;
};

// Softmax and loss of pixel p -> table, lse, inv_norm, logits.
__device__ __forceinline__ void finish_pixel(const ForwardKernel& a, const ContrastTile& tile, PixelTable* table, int p,
                                             int part) {
  const int cls = table->cls[p], num_classes = static_cast<int>(a.num_classes);
  const float inv = a.normalize ? inverse_norm(table->squares[p]) : 1.0f;
  const Logits z = formed_logits(a.shared, p, inv, a.temperature);
  const auto [top, log_total] = softmax_of(z, num_classes, part);
  const bool inside = p < tile.count;
  if (a.logits && inside)
    for (int k = part; k < num_classes; k += 4)
      a.logits[(tile.image * num_classes + k) * a.pixels + tile.first + p] = z[k];
  if (part) return;
  float weight = 0, loss = 0;
  if (cls >= 0) {
    weight = a.class_weight ? a.class_weight[cls] : 1.0f;
    loss = weight * pixel_weight_at(a.pixel_weight, tile, p, a.x.width) * ((top - z[cls]) + log_total);
  } else if (cls == kBadLabel) {
    weight = loss = NAN;
  }
  table->loss[p] = loss, table->weight[p] = weight;
  if (!inside) return;
  const int64_t at = tile.image * a.pixels + tile.first + p;
  if (a.lse) a.lse[at] = static_cast<double>(top) + log_total, a.inv_norm[at] = inv;
  if (a.loss_map) a.loss_map[at] = loss;
}

template <class T>
__global__ void __launch_bounds__(kContrastThreads) contrast_forward_kernel(const __grid_constant__ ForwardKernel a) {
  PixelTable* table = reinterpret_cast<PixelTable*>(shared_memory<unsigned char>() + a.shared.pixels_at);
  const ContrastTile tile = contrast_tile(blockIdx.x, a.pixels);
  read_pixels(a, a.labels, tile, table);
  tile_dots<T>(a, tile, all_channels<T>(a.x), 0, a.warps, a.shared, table);
  for_each_pixel([&](int p, int part) { finish_pixel(a, tile, table, p, part); });
  __syncthreads();
  if (a.loss_map && blockIdx.x == 0 && threadIdx.x == 0) *a.denominator = 1;
  if (a.loss_map || threadIdx.x >= 32) return;
  const float loss = warp_sum(table->loss[threadIdx.x] + table->loss[threadIdx.x + 32]);
  const float weight = warp_sum(table->weight[threadIdx.x] + table->weight[threadIdx.x + 32]);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = loss, a.partial[gridDim.x + blockIdx.x] = weight;
}

// losses [count], weights [weights_count] -> loss, denominator; in double, by a fixed tree. A bad label makes both NaN.
__global__ void __launch_bounds__(kFinishThreads)
    contrast_finish_kernel(const float* losses, int64_t count, const float* weights, int64_t weights_count, bool mean,
                           float* loss, float* denominator) {
  double* sums = shared_memory<double>();
  double total = 0, weight = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) total += losses[i];
  for (int64_t i = threadIdx.x; i < weights_count; i += kFinishThreads) weight += weights[i];
  sums[threadIdx.x] = total, sums[kFinishThreads + threadIdx.x] = weight;
  for (int half = kFinishThreads / 2; half; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= half) continue;
    sums[threadIdx.x] += sums[threadIdx.x + half];
    sums[kFinishThreads + threadIdx.x] += sums[kFinishThreads + threadIdx.x + half];
  }
  if (threadIdx.x) return;
  total = sums[0], weight = sums[kFinishThreads];
  *loss = static_cast<float>(!mean ? total : weight == 0 ? 0.0 : total / weight);
  *denominator = mean ? static_cast<float>(weight) : isnan(weight) ? NAN : 1.0f;
}

template <class T> Status forward(const ContrastForward& from, Stream stream) {
  ForwardKernel a{};
  static_cast<ContrastInput&>(a) = input_of(from);
  a.shared = contrast_shared<sizeof(T)>(from.num_classes, 0);
  a.warps = contrast_warps(from.num_classes, ContrastShape<sizeof(T)>::kClasses);
  a.labels = from.labels, a.class_weight = from.class_weight, a.pixel_weight = from.pixel_weight,
  a.temperature = from.temperature;
  a.loss_map = from.loss_map, a.denominator = from.denominator, a.partial = from.partial;
  a.lse = from.lse, a.inv_norm = from.inv_norm, a.logits = from.logits;
  const int64_t blocks = contrast_blocks(from.x);
  const Grid grid{dim3(static_cast<unsigned>(blocks)), a.warps.count * 32u, static_cast<size_t>(a.shared.bytes)};
  if (Status failed = launch(contrast_forward_kernel<T>, grid, stream, a); failed || from.loss_map) return failed;
  return finish_loss(from.partial, blocks, from.partial + blocks, blocks, from.mean, from.loss, from.denominator,
                     stream);
}

}  // namespace

Status finish_loss(const float* losses, int64_t count, const float* weights, int64_t weights_count, bool mean,
                   float* loss, float* denominator, Stream stream) {
  const Grid grid{dim3(1), kFinishThreads, 2 * kFinishThreads * sizeof(double)};
  return launch(contrast_finish_kernel, grid, stream, losses, count, weights, weights_count, mean, loss, denominator);
}

int64_t contrast_blocks(const Features& x) { return x.batch * contrast_tiles(x.height * x.width); }

Status prototype_contrastive_forward(const ContrastForward& a, Stream stream) {
  if (a.x.height * a.x.width > INT32_MAX) return "an image of 2^31 pixels or more";
  if (a.options.used || a.num_classes > kMaxContrastClasses) return prototype_contrastive_general_forward(a, stream);
  return with_float_type(a.x.type, [&](auto one) { return forward<decltype(one)>(a, stream); });
}

}  // namespace spcl::gpu
