// prototype_contrastive_loss with options or with any number of classes, gradients of the features and of the
// temperature.
//
// Two forms. Where shared memory holds the weights of all classes, as the plain backward: weights once, then D in
// chunks. Else a block owns a slice of the channels, too, whose sums over the classes stay in shared memory while the
// classes come in blocks; the logits are formed again by each slice (or read, where the forward saved them). dtau =
// -(1/tau) sum_n s_n sum_k dz_nk (z_nk - b_k): a number per block on the way, added in their order.
#include "contrast_general.cuh"
#include "contrast_product.cuh"

namespace spcl::gpu {

Status contrast_target_sums(const Contrast& from, Stream stream);  // prototype_contrastive_general.cu
Status prototype_general_gradient(const ContrastBackward& a,
                                  Stream stream);  // prototype_contrastive_general_prototypes.cu

namespace {

constexpr int kSumThreads = 256;

// A pixel's sums over the classes so far. A variance term counts twice in the first two: it is quadratic in x̂ and in
// 1 / tau.
struct Slopes {
  double along;  // dz_k x̂·P_k / tau of the weights as the product sees them: dx stays orthogonal to x
  double all;    // dz_k y_k, y_k being z_k - b_k less what the classes have alike
  double rest;   // dz_k of a softmax: 0 but for the rounding of lse and of A, which all classes have alike, too
  double aimed;  // a_k y_k / A

  __device__ __forceinline__ double of_temperature() const { return all - rest * aimed; }
};
static_assert(kTile * sizeof(Slopes) == kSlopesBytes);

struct GeneralBackward : GeneralInput {
  ContrastShared shared;
  ContrastWarps warps;
  Features dx;
  Access dx_access;
  PixelMap grad;
  const float* denominator;
  const double* lse;
  const float *inv_norm, *logits;
  float* dtemperature;  // [blocks] or nullptr
  // Streamed alone: classes of a block, chunks of channels of a slice, where its sums are.
  int block_classes;
  int64_t slice_chunks, sums_at;
  int64_t square_sums_at, kept_at;  // with variances

  __device__ __forceinline__ Slopes& slopes(int p) const {
    return reinterpret_cast<Slopes*>(shared_memory<unsigned char>() + shared.bytes)[p];
  }

  __device__ __forceinline__ float* kept() const {
    return reinterpret_cast<float*>(shared_memory<unsigned char>() + kept_at);
  }
};

// Weights of a block of classes of pixel p for the product, and their part of its slopes. Where a variance term is not
// part of the label's own logit, the label's weight for it -> table->squares.
template <class T, bool kQuadratic>
__device__ __forceinline__ void weigh_block(const GeneralBackward& a, const ContrastTile& tile, PixelTable* table,
                                            float temperature, int64_t k0, int block, int p, int part) {
  const int cls = table->cls[p], count = static_cast<int>(min(int64_t{block}, a.num_classes - k0));
  const int64_t at = tile.image * a.pixels + tile.first + min(p, tile.count - 1);
  GeneralLogits z;
  if constexpr (kQuadratic)
    z = quadratic_logits(a, tile, a.shared, a.kept(), k0, cls, p, a.inv_norm[at], temperature);
  else
    z = logits_of(
        a, tile,
        a.logits ? saved_logits(a.logits, a, tile, k0, p) : formed_logits(a.shared, p, a.inv_norm[at], temperature), k0,
        cls, temperature);
  const Targets t = targets_of(a, tile, p, cls);
  const LogSum lse(a.lse[at]);
  void* weights = shared_memory<unsigned char>() + a.shared.weights_at;
  // the weights of a softmax add up to 0: what all classes have alike is left out of the sum, not cancelled by it
  const bool positive = kQuadratic && a.options.positive_variance;
  const float first = a.options.sigmoid ? 0.0f
                      : k0 == 0         ? z.dot(0) + (positive ? 2.0f * z.square(0) : 0.0f)
                                        : table->along[p];
  if (k0 == 0 && part == 0) table->along[p] = first;
  static_assert(kPiece % (4 * kTerms) == 0);
  Slopes sums{};
  for (int piece = 0; piece < static_cast<int>(pieces_of(block)) * kPiece; piece += 4 * kTerms) {
    float along = 0, all = 0, rest = 0, aimed = 0;
    for (int k = piece + part; k < piece + 4 * kTerms; k += 4) {
      float w = 0;
      if (k < count && cls >= 0) {
        const float wanted = t.wanted(k0 + k), weight = t.weight(k0 + k);
        const float exact = weight_of(z[k], wanted, weight, t, lse, a.options.sigmoid);
        const float y = z.dot(k) + (positive ? 2.0f * z.square(k) : 0.0f) - first - (k == z.own ? z.margin : 0.0f);
        w = to_float(from_float<T>(exact));
        along += w * z.dot(k);
        all += exact * y;
        if (!a.options.sigmoid) rest += exact, aimed += t.share(wanted, weight) * y;
        if constexpr (kQuadratic) {
          const bool lacks_own = !a.options.positive_variance && k == z.own;
          const float of_square = lacks_own ? expf(lse.below(z[k])) : exact;
          if (lacks_own) table->squares[p] = of_square;
          along += 2.0f * to_float(from_float<T>(of_square)) * z.square(k);
          if (!positive) all += 2.0f * of_square * z.square(k);
        }
      }
      put_weight<T>(weights, k, p, w);
    }
    sums.along += along, sums.all += all, sums.rest += rest, sums.aimed += aimed;
  }
  sums = {quad_sum(sums.along), quad_sum(sums.all), quad_sum(sums.rest), quad_sum(sums.aimed)};
  if (part) return;
  Slopes& slopes = a.slopes(p);
  slopes.along += sums.along, slopes.all += sums.all, slopes.rest += sums.rest, slopes.aimed += sums.aimed;
}

// What turns the product of pixel p into its gradient; and its part of the temperature's -> table->weight.
__device__ __forceinline__ void finish_pixel(const GeneralBackward& a, const ContrastTile& tile, PixelTable* table,
                                             float temperature, int p) {
  const int cls = table->cls[p];
  const float inv = a.inv_norm[tile.image * a.pixels + tile.first + min(p, tile.count - 1)],
              c = static_cast<float>(a.slopes(p).along);
  float s = 0;
  if (cls >= 0) s = general_scale(a, a.grad, *a.denominator, tile, p, targets_of(a, tile, p, cls).sum);
  const bool radial = a.normalize && inv < 1.0f / kNormEps;  // a clamped norm is a constant
  table->along[p] = cls == kNoClass ? 0.0f : cls == kBadLabel || isnan(c) ? NAN : s * (inv / temperature);
  table->inward[p] = radial ? s * (c * inv * inv) : 0.0f;
  table->weight[p] = cls == kBadLabel ? NAN : s == 0 ? 0.0f : static_cast<float>(s * a.slopes(p).of_temperature());
  if (a.dx.data && a.dx_access == kGather && p < tile.count) {
    const Place place = place_of(tile, p, a.x.width);
    table->dx_at[p] = tile.image * a.dx.stride_b + place.i * a.dx.stride_h + place.j * a.dx.stride_w;
  }
}

__device__ __forceinline__ void clear_slopes(const GeneralBackward& a) {
  if (threadIdx.x < kTile) a.slopes(threadIdx.x) = {};
  __syncthreads();
}

// The tile's part of the temperature's gradient. Begins after a barrier.
__device__ __forceinline__ void write_dtemperature(const GeneralBackward& a, const PixelTable* table) {
  if (!a.dtemperature || threadIdx.x >= 32) return;
  const float sum = warp_sum(table->weight[threadIdx.x] + table->weight[threadIdx.x + 32]);
  if (threadIdx.x == 0) a.dtemperature[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kContrastThreads)
    contrast_general_backward_kernel(const __grid_constant__ GeneralBackward a) {
  PixelTable* table = reinterpret_cast<PixelTable*>(shared_memory<unsigned char>() + a.shared.pixels_at);
  const ContrastTile tile = contrast_tile(gridDim.x - 1 - blockIdx.x, a.pixels);
  const ContrastChannels channels = all_channels<T>(a.x);
  const float temperature = a.temperature();
  read_general_pixels(a, tile, table);
  clear_slopes(a);
  if (!a.logits) tile_dots<T>(a, tile, channels, 0, a.warps, a.shared, table);
  for_each_pixel([&](int p, int part) {
    weigh_block<T, false>(a, tile, table, temperature, 0, static_cast<int>(a.num_classes), p, part);
    if (part == 0) finish_pixel(a, tile, table, temperature, p);
  });
  __syncthreads();
  write_dtemperature(a, table);
  if (!a.dx.data) return;
  start_gradient<T>(a, tile, channels, table);
  write_gradient<T>(a, tile, channels, table);
}

// ---- streamed ---------------------------------------------------------------------------------------------------

// Adds the products of a block of classes, whose weights are there, to the sums of the slice. Ends with a barrier.
template <class T>
__device__ __forceinline__ void add_products(const GeneralBackward& a, const T* rows, const ContrastChannels& slice,
                                             int64_t k0, int64_t sums_at) {
  using Shape = ContrastShape<sizeof(T)>;
  unsigned char* memory = shared_memory<unsigned char>();
  float* sums = reinterpret_cast<float*>(memory + sums_at);
  const int64_t count = min(int64_t{a.block_classes}, a.num_classes - k0), pieces = pieces_of(count);
  auto load = [&](int64_t item) {
    const int64_t chunk = item / pieces, piece = item - chunk * pieces;
    if (chunk < slice.chunks)
      stage_prototypes<T>(rows, a.num_classes, a.x.dim, k0 + piece * kPiece, kPiece,
                          slice.first + chunk * Shape::kChunk,
                          reinterpret_cast<T*>(memory + proto_slot(a.shared, item)));
    copy_async_commit();
  };
  for (int64_t item = 0; item < a.shared.stages - 1; ++item) load(item);
  ContrastProduct<T> product;
  for (int64_t item = 0; item < slice.chunks * pieces; ++item) {
    wait_for_stage(a.shared.stages);
    __syncthreads();
    load(item + a.shared.stages - 1);
    const int64_t chunk = item / pieces;
    const int piece = static_cast<int>(item - chunk * pieces);
    if (piece == 0) product.clear();
    product.add(reinterpret_cast<const T*>(memory + proto_slot(a.shared, item)), memory + a.shared.weights_at, piece,
                count);
    if (piece == pieces - 1) product.add_to(sums + chunk * Shape::kChunk * kSumsRow, kSumsRow);
  }
  copy_async_wait<0>();
  __syncthreads();
}

// The labels' own weights for the products with the variances, where they are others. Ends with a barrier.
template <class T>
__device__ __forceinline__ void put_own_weights(const GeneralBackward& a, const PixelTable* table, int64_t k0) {
  const int p = threadIdx.x;
  if (p < kTile && !a.options.positive_variance) {
    const int64_t own = table->cls[p] - k0;
    if (table->cls[p] >= 0 && own >= 0 && own < min(int64_t{a.block_classes}, a.num_classes - k0))
      put_weight<T>(shared_memory<unsigned char>() + a.shared.weights_at, static_cast<int>(own), p, table->squares[p]);
  }
  __syncthreads();
}

// sums += x̂ / tau * (sums of the products with the variances), of a chunk that is staged.
template <class T>
__device__ __forceinline__ void add_squares(const GeneralBackward& a, const PixelTable* table, int64_t chunk,
                                            int shifts) {
  using Shape = ContrastShape<sizeof(T)>;
  unsigned char* memory = shared_memory<unsigned char>();
  const T* x = reinterpret_cast<const T*>(memory);
  const int64_t first = chunk * Shape::kChunk * kSumsRow;
  for (int i = threadIdx.x; i < Shape::kChunk * kTile; i += kProductThreads) {
    const int c = i / kTile, p = i % kTile, at = c * kSumsRow + p;
    const float value = to_float(x[c * Shape::kRow + p + (shifts >> c % 2 & 1)]);
    reinterpret_cast<float*>(memory + a.sums_at)[first + at] +=
        value * table->loss[p] * reinterpret_cast<const float*>(memory + a.square_sums_at)[first + at];
  }
  __syncthreads();
}

// The sums of the slice -> dx.
template <class T, bool kQuadratic>
__device__ __forceinline__ void write_slice(const GeneralBackward& a, const ContrastTile& tile,
                                            const ContrastChannels& slice, const PixelTable* table) {
  using Shape = ContrastShape<sizeof(T)>;
  unsigned char* memory = shared_memory<unsigned char>();
  const float* sums = reinterpret_cast<const float*>(memory + a.sums_at);
  T* x = reinterpret_cast<T*>(memory);
  const int shifts = shifts_of<T>(a.x, a.access, tile);
  for (int64_t chunk = 0; chunk < slice.chunks; ++chunk) {
    const int64_t d0 = slice.first + chunk * Shape::kChunk;
    if (kQuadratic || a.normalize) stage_pixels<T>(a.x, a.access, tile, table->x_at, d0, x);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if constexpr (kQuadratic) add_squares<T>(a, table, chunk, shifts);
    ContrastProduct<T> product;
    product.read(sums + chunk * Shape::kChunk * kSumsRow, kSumsRow);
    product.finish(x, table, a.normalize, shifts);
    __syncthreads();
    store_pixels<T>(a.dx, a.dx_access, tile, table->dx_at, d0, x);
    __syncthreads();
  }
}

template <class T, bool kQuadratic>
__global__ void __launch_bounds__(kProductThreads)
    contrast_streamed_backward_kernel(const __grid_constant__ GeneralBackward a) {
  using Shape = ContrastShape<sizeof(T)>;
  unsigned char* memory = shared_memory<unsigned char>();
  PixelTable* table = reinterpret_cast<PixelTable*>(memory + a.shared.pixels_at);
  float* sums = reinterpret_cast<float*>(memory + a.sums_at);
  const ContrastTile tile = contrast_tile(gridDim.x - 1 - blockIdx.x, a.pixels);
  const ContrastChannels all = all_channels<T>(a.x);
  const int64_t first = blockIdx.y * a.slice_chunks;
  const ContrastChannels slice{first * Shape::kChunk, min(a.slice_chunks, all.chunks - first)};
  const float temperature = a.temperature();
  read_general_pixels(a, tile, table);
  for (int i = threadIdx.x; i < static_cast<int>(a.slice_chunks) * Shape::kChunk * kSumsRow; i += kProductThreads)
    sums[i] = 0;
  if constexpr (kQuadratic)
    for (int i = threadIdx.x; i < static_cast<int>(a.slice_chunks) * Shape::kChunk * kSumsRow; i += kProductThreads)
      reinterpret_cast<float*>(memory + a.square_sums_at)[i] = 0;
  clear_slopes(a);
  for (int64_t k0 = 0; k0 < a.num_classes; k0 += a.block_classes) {
    if constexpr (kQuadratic)
      quadratic_dots<T>(a, tile, k0, a.warps, a.shared, table, a.kept());
    else if (!a.logits)
      tile_dots<T>(a, tile, all, k0, a.warps, a.shared, table);
    for_each_pixel([&](int p, int part) {
      weigh_block<T, kQuadratic>(a, tile, table, temperature, k0, a.block_classes, p, part);
    });
    __syncthreads();
    if (!a.dx.data) continue;
    add_products<T>(a, prototypes_of<T>(a, tile), slice, k0, a.sums_at);
    if constexpr (kQuadratic) {
      put_own_weights<T>(a, table, k0);
      add_products<T>(a, variances_of<T>(a, tile), slice, k0, a.square_sums_at);
    }
  }
  for_each_pixel([&](int p, int part) {
    if (part == 0) finish_pixel(a, tile, table, temperature, p);
    if (kQuadratic && part == 0)
      table->loss[p] = a.inv_norm[tile.image * a.pixels + tile.first + min(p, tile.count - 1)] / temperature;
  });
  __syncthreads();
  if (blockIdx.y == 0) write_dtemperature(a, table);
  if (a.dx.data) write_slice<T, kQuadratic>(a, tile, slice, table);
}

// The blocks' parts -> -sum / tau; in double, by a fixed tree.
__global__ void __launch_bounds__(kSumThreads)
    contrast_temperature_kernel(const float* parts, int64_t count, const __grid_constant__ GeneralInput a, float* out) {
  double* sums = shared_memory<double>();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += parts[i];
  sums[threadIdx.x] = sum;
  for (int half = kSumThreads / 2; half; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = static_cast<float>(-sums[0] / a.temperature());
}

template <class T> Status launch_streamed(GeneralBackward& a, int64_t blocks, Stream stream) {
  using Shape = ContrastShape<sizeof(T)>;
  constexpr bool kHasVariances = !std::is_same_v<T, __half>;
  const bool quadratic = a.options.variances != nullptr;
  // with variances in the blocks of the forward, so that the logits are formed in its order
  const int64_t most = kStreamedWarps * Shape::kClasses;
  const int64_t own = streamed_warps<sizeof(T)>(a.logits != nullptr, shared_memory_limit()) * Shape::kClasses;
  const int64_t classes = quadratic ? between(a.num_classes, 1, most) : own;
  a.warps = contrast_warps(classes, Shape::kClasses);
  a.block_classes = a.warps.groups * Shape::kClasses;
  a.shared = contrast_shared<sizeof(T)>(a.logits ? 0 : a.block_classes, a.block_classes);
  a.kept_at = a.shared.bytes + kSlopesBytes;
  a.sums_at = a.kept_at + (quadratic ? kept_bytes(a.block_classes) : 0);
  const int64_t left = shared_memory_limit() - a.sums_at;
  a.slice_chunks = streamed_chunks<sizeof(T)>(a.x.dim, quadratic ? left / 2 : left);
  const int64_t sums = a.slice_chunks * Shape::kChunk * kSumsRow * 4;
  a.square_sums_at = a.sums_at + sums;
  const int64_t bytes = quadratic ? a.square_sums_at + sums : a.square_sums_at;
  const int64_t slices = a.dx.data ? ceil_div(chunks_of<sizeof(T)>(a.x.dim), a.slice_chunks) : 1;
  const Grid grid{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slices)), kProductThreads,
                  static_cast<size_t>(bytes)};
  const auto kernel =
      quadratic ? contrast_streamed_backward_kernel<T, kHasVariances> : contrast_streamed_backward_kernel<T, false>;
  return launch(kernel, grid, stream, a);
}

template <class T> Status backward(const ContrastBackward& from, Stream stream) {
  GeneralBackward a{};
  set_general(a, from);
  a.dx = from.dx, a.dx_access = access_of(from.dx), a.grad = from.grad, a.denominator = from.denominator;
  a.lse = from.lse, a.inv_norm = from.inv_norm, a.logits = from.logits;
  const int64_t blocks = contrast_blocks(from.x);
  const ContrastPartial sizes = contrast_partial(from);
  if (from.dtemperature) a.dtemperature = from.partial + sizes.prototypes + sizes.bias;
  if (!from.options.variances &&
      fits_without_streaming<sizeof(T)>(from.num_classes, from.logits != nullptr, shared_memory_limit())) {
    a.shared = contrast_shared<sizeof(T)>(from.logits ? 0 : from.num_classes, from.num_classes);
    a.warps = contrast_warps(from.logits ? 1 : from.num_classes, ContrastShape<sizeof(T)>::kClasses);
    const Grid grid{dim3(static_cast<unsigned>(blocks)), a.warps.count * 32u,
                    static_cast<size_t>(a.shared.bytes + kSlopesBytes)};
    if (Status failed = launch(contrast_general_backward_kernel<T>, grid, stream, a)) return failed;
  } else if (Status failed = launch_streamed<T>(a, blocks, stream)) {
    return failed;
  }
  if (!from.dtemperature) return nullptr;
  const Grid adding{dim3(1), kSumThreads, kSumThreads * sizeof(double)};
  return launch(contrast_temperature_kernel, adding, stream, a.dtemperature, blocks,
                static_cast<const GeneralInput&>(a), from.dtemperature);
}

}  // namespace

Status prototype_contrastive_general_backward(const ContrastBackward& a, Stream stream) {
  if (Status failed = contrast_target_sums(a, stream)) return failed;
  if (a.dx.data || a.dtemperature)
    if (Status failed = with_float_type(a.x.type, [&](auto one) { return backward<decltype(one)>(a, stream); }))
      return failed;
  return a.dprototypes || a.dbias ? prototype_general_gradient(a, stream) : nullptr;
}

}  // namespace spcl::gpu
