// prototype_contrastive_loss and the gradient of the features in one pass, for an incoming gradient of 1 and sm_90 on.
//
// A cluster owns 64 pixels of one image, each of its blocks a part of the channels. The tile stays in the blocks'
// shared memory from the first product to the gradient: x is read once and dx written once, 2 S bytes instead of the 3
// S of two kernels. The blocks add their partial dot products through each other's shared memory, in the order of their
// ranks; each finishes the softmax of its own pixels and reads the weights of the others' pixels from them: some 8 K
// bytes per pixel and block, next to the 2 S / N of x and dx. The mean's denominator must be known before the first
// gradient is: the labels are counted by a kernel of their own, before. Should the incoming gradient not be 1 after
// all, dx is scaled where it lies: another 2 S. Not for float16, whose gradients would underflow. Risk: every block
// waits for its cluster three times. The two-kernel form stays until both are measured.
#include "contrast_product.cuh"

namespace spcl::gpu {

Status finish_loss(const float* losses, int64_t count, const float* weights, int64_t weights_count, bool mean,
                   float* loss, float* denominator,
                   Stream stream);  // prototype_contrastive_loss.cu

namespace {

constexpr int kScaleThreads = 256;
constexpr int64_t kScaleBlocks = 1024;

struct CountKernel {
  Labels labels;
  const float* class_weight;
  int64_t pixels, width, all, each;  // of an image, of a row, of the batch, of a block
  float* weights;                    // [blocks]
};

__global__ void __launch_bounds__(kCountThreads) contrast_count_kernel(const __grid_constant__ CountKernel a) {
  double* sums = shared_memory<double>();
  double sum = 0;
  const int64_t first = blockIdx.x * a.each;
  for (int64_t n = first + threadIdx.x; n < min(first + a.each, a.all); n += kCountThreads) {
    const int64_t image = n / a.pixels;
    const int cls = read_class(a.labels, image, n - image * a.pixels, a.width);
    if (cls >= 0)
      sum += a.class_weight ? a.class_weight[cls] : 1.0f;
    else if (cls == kBadLabel)
      sum = NAN;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = warp_sum(threadIdx.x < kCountThreads / 32 ? sums[threadIdx.x] : 0.0);
  if (threadIdx.x == 0) a.weights[blockIdx.x] = static_cast<float>(sum);
}

struct OnePassKernel : ContrastGradient {
  OnePassPlan plan;
  bool mean;
  const float* weights;  // [weights_count], of contrast_count_kernel
  int64_t weights_count;
  float* losses;  // [gridDim.x]
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The pixels of the tile whose softmax this block finishes.
struct OwnPixels {
  int rank, each;
  __device__ __forceinline__ int first() const { return rank * each; }
};

__device__ __forceinline__ float denominator_of(const OnePassKernel& a) {
  double sum = 0;
  for (int64_t i = threadIdx.x % 32; i < a.weights_count; i += 32) sum += a.weights[i];
  sum = warp_sum(sum);
  return a.mean || isnan(sum) ? static_cast<float>(sum) : 1.0f;
}

// The own pixels' logits and squares, added over the ranks in their order, in place. Nobody else reads these places.
__device__ __forceinline__ void add_ranks(const OnePassKernel& a, PixelTable* table, const OwnPixels& own) {
  float* logits = reinterpret_cast<float*>(shared_memory<unsigned char>() + a.shared.logits_at);
  const int num_classes = static_cast<int>(a.num_classes);
  for (int i = threadIdx.x; i < (num_classes + 1) * own.each; i += blockDim.x) {
    const int k = i / own.each, p = own.first() + i % own.each;
    float* mine = k < num_classes ? logits + k * kLogitsRow + p : table->squares + p;
    float sum = 0;
#pragma unroll 8
    for (int rank = 0; rank < a.plan.blocks; ++rank) sum += *shared_of(mine, rank);
    *mine = sum;
  }
}

// Softmax, loss and weights of pixel p.
template <class T>
__device__ __forceinline__ void finish_pixel(const OnePassKernel& a, const ContrastTile& tile, PixelTable* table,
                                             float denominator, int p, int part) {
  const int cls = table->cls[p], num_classes = static_cast<int>(a.num_classes);
  const float inv = a.normalize ? inverse_norm(table->squares[p]) : 1.0f;
  const Logits z = formed_logits(a.shared, p, inv, a.temperature);
  const auto [top, log_total] = softmax_of(z, num_classes, part);
  void* weights = shared_memory<unsigned char>() + a.shared.weights_at;
  const float c = put_weights<T>(weights, z, top + log_total, cls, num_classes, p, part);
  if (part) return;
  float loss = cls == kBadLabel ? NAN : 0.0f, s = 0;
  if (cls >= 0) {
    const float weight =
        (a.class_weight ? a.class_weight[cls] : 1.0f) * pixel_weight_at(a.pixel_weight, tile, p, a.x.width);
    loss = weight * ((top - z[cls]) + log_total);
    s = denominator == 0 ? 0.0f : weight / denominator;
  }
  table->loss[p] = loss;
  put_factors(a, table, p, s, inv, c);
}

// The other pixels' weights and factors, from the blocks that own them.
template <class T>
__device__ __forceinline__ void gather_weights(const OnePassKernel& a, PixelTable* table, const OwnPixels& own) {
  float* weights = reinterpret_cast<float*>(shared_memory<unsigned char>() + a.shared.weights_at);
  for (int word = threadIdx.x; word < kPiece * ContrastShape<sizeof(T)>::kWeightRow; word += blockDim.x) {
    const int p = pixel_of_word<sizeof(T)>(word), owner = p / own.each;
    if (p < kTile && owner != own.rank) weights[word] = *shared_of(weights + word, owner);
  }
  const int p = threadIdx.x, owner = p / own.each;
  if (p >= kTile || owner == own.rank) return;
  table->along[p] = *shared_of(table->along + p, owner), table->inward[p] = *shared_of(table->inward + p, owner);
}

// The last barrier: a block's weights may still be read when its own gradient is written, and end with it.
template <class T> __device__ __forceinline__ void one_pass(const OnePassKernel& a) {
  PixelTable* table = reinterpret_cast<PixelTable*>(shared_memory<unsigned char>() + a.shared.pixels_at);
  const OwnPixels own{cluster_rank(), kTile / a.plan.blocks};
  const ContrastTile tile = contrast_tile(blockIdx.x / a.plan.blocks, a.pixels);
  const ContrastChannels channels = channels_of_rank<sizeof(T)>(a.plan, a.x.dim, own.rank);
  read_pixels(a, a.labels, tile, table);
  if (threadIdx.x < kTile) place_gradient(a, tile, table, threadIdx.x);
  tile_dots<T>(a, tile, channels, 0, a.warps, a.shared, table);
  start_gradient<T>(a, tile, channels, table);
  const float denominator = denominator_of(a);
  cluster_barrier();
  add_ranks(a, table, own);
  __syncthreads();
  for_each_pixel(own.first(), own.first() + own.each,
                 [&](int p, int part) { finish_pixel<T>(a, tile, table, denominator, p, part); });
  cluster_barrier();
  gather_weights<T>(a, table, own);
  if (threadIdx.x < 32) {
    float loss = 0;
    for (int p = threadIdx.x; p < own.each; p += 32) loss += table->loss[own.first() + p];
    loss = warp_sum(loss);
    if (threadIdx.x == 0) a.losses[blockIdx.x] = loss;
  }
  __syncthreads();
  write_gradient<T>(a, tile, channels, table);
  cluster_barrier();
}

#endif

// Two blocks per multiprocessor are what one_pass_plan counts on; of half floats three fit.
template <class T>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 2 ? 3 : 2)
    contrast_one_pass_kernel(const __grid_constant__ OnePassKernel a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  one_pass<T>(a);
#endif
}

// x *= factor; exact zeros stay (an ignored pixel, whatever the factor). A factor of 1 costs the launch.
template <class T>
__global__ void __launch_bounds__(kScaleThreads) contrast_scale_kernel(T* x, int64_t count, const float* factor) {
  const float by = *factor;
  if (by == 1) return;
  constexpr int kEach = 16 / sizeof(T);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x,
                threads = static_cast<int64_t>(gridDim.x) * kScaleThreads;
  auto scaled = [by](T v) { return to_float(v) == 0 ? v : from_float<T>(to_float(v) * by); };
  for (int64_t i = thread; i < count / kEach; i += threads) {
    T values[kEach];
    uint4 raw = reinterpret_cast<const uint4*>(x)[i];
    memcpy(values, &raw, 16);
#pragma unroll
    for (int j = 0; j < kEach; ++j) values[j] = scaled(values[j]);
    memcpy(&raw, values, 16);
    reinterpret_cast<uint4*>(x)[i] = raw;
  }
  for (int64_t i = count / kEach * kEach + thread; i < count; i += threads) x[i] = scaled(x[i]);
}

int64_t one_pass_blocks(const Contrast& a) {
  const int blocks = a.x.type == kFloat32 ? one_pass_plan<4>(a.num_classes, a.x.dim).blocks
                                          : one_pass_plan<2>(a.num_classes, a.x.dim).blocks;
  return contrast_blocks(a.x) * blocks;
}

template <class T> Status launch_one_pass(const ContrastOnePass& from, Stream stream) {
  OnePassKernel a{};
  static_cast<ContrastGradient&>(a) = gradient_input_of(from, from.dx);
  a.plan = one_pass_plan<sizeof(T)>(from.num_classes, from.x.dim);
  a.shared = a.plan.shared, a.warps = contrast_warps(from.num_classes, ContrastShape<sizeof(T)>::kClasses);
  if (a.shared.bytes > shared_memory_limit())
    return "one pass: the channels do not fit into the shared memory of a cluster";
  const OnePassCount counting = one_pass_count(from.x.batch * a.pixels);
  const int64_t blocks = one_pass_blocks(from);
  a.mean = from.mean, a.losses = from.partial, a.weights = from.partial + blocks, a.weights_count = counting.blocks;
  const CountKernel count{from.labels,   from.class_weight,    a.pixels, from.x.width, from.x.batch * a.pixels,
                          counting.each, from.partial + blocks};
  const Grid counted{dim3(static_cast<unsigned>(counting.blocks)), kCountThreads, kCountThreads / 32 * sizeof(double)};
  if (Status failed = launch(contrast_count_kernel, counted, stream, count)) return failed;
  const Grid grid{dim3(static_cast<unsigned>(blocks)), kProductThreads, static_cast<size_t>(a.shared.bytes),
                  static_cast<unsigned>(a.plan.blocks)};
  if (Status failed = launch(contrast_one_pass_kernel<T>, grid, stream, a)) return failed;
  return finish_loss(a.losses, blocks, a.weights, a.weights_count, from.mean, from.loss, from.denominator, stream);
}

}  // namespace

int64_t one_pass_floats(const Contrast& a) {
  return one_pass_blocks(a) + one_pass_count(a.x.batch * a.x.height * a.x.width).blocks;
}

Status prototype_contrastive_one_pass(const ContrastOnePass& a, Stream stream) {
  if (!has_clusters()) return "one pass: needs compute capability 9.0 or newer";
  if (a.num_classes > kMaxOnePassClasses) return "one pass: more than 32 classes";
  if (a.x.height * a.x.width > INT32_MAX) return "an image of 2^31 pixels or more";
  if (a.x.type == kFloat16) return "one pass: float16 gradients underflow unless they are scaled as they are formed";
  return a.x.type == kFloat32 ? launch_one_pass<float>(a, stream) : launch_one_pass<__nv_bfloat16>(a, stream);
}

Status scale_gradient(const ScaledGradient& a, Stream stream) {
  const int64_t steps = (a.count * size_of(a.type) / 16 + kScaleThreads) / kScaleThreads;
  const Grid grid{dim3(static_cast<unsigned>(steps < kScaleBlocks ? steps : kScaleBlocks)), kScaleThreads};
  if (a.type == kFloat32)
    return launch(contrast_scale_kernel<float>, grid, stream, static_cast<float*>(a.data), a.count, a.factor);
  return launch(contrast_scale_kernel<__nv_bfloat16>, grid, stream, static_cast<__nv_bfloat16*>(a.data), a.count,
                a.factor);
}

}  // namespace spcl::gpu
