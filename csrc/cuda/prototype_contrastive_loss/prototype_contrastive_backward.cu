// prototype_contrastive_loss, gradient of the features:
//
//   dx = inv * s * ( sum_k w_k P_k / tau - c * inv * x ),   w_k = p_k - [k = label],   c = sum_k w_k z_k
//
// c is a by-product of the softmax, so the normalisation costs no pass over D.
// A block owns 64 pixels of one image and all D channels: weights once, from saved logits or logits formed again, then
// D in chunks. A chunk of x is staged, becomes the gradient in place and is stored by the same rules. Moves: x once or
// twice (the second time from L2), dx once. The tiles are walked in reverse: what the forward read last may still be in
// L2.
#include "contrast_product.cuh"

namespace spcl::gpu {

Status prototype_gradient(const ContrastBackward& a, Stream stream);  // prototype_contrastive_prototypes.cu
Status prototype_contrastive_general_backward(const ContrastBackward& a, Stream stream);  // the file of that name

namespace {

struct BackwardKernel : ContrastGradient {
  PixelMap grad;
  const float* denominator;
  const double* lse;
  const float *inv_norm, *logits;
};

// Weights of pixel p, and what turns their product into the gradient.
template <class T>
__device__ __forceinline__ void weigh_pixel(const BackwardKernel& a, const ContrastTile& tile, PixelTable* table, int p,
                                            int part) {
  const int cls = table->cls[p];
  const int64_t at = tile.image * a.pixels + tile.first + min(p, tile.count - 1);
  const float lse = static_cast<float>(a.lse[at]), inv = a.inv_norm[at];  // the weights are normalised again
  const Logits z = a.logits ? saved_logits(a.logits, a, tile, 0, p) : formed_logits(a.shared, p, inv, a.temperature);
  void* weights = shared_memory<unsigned char>() + a.shared.weights_at;
  const float c = put_weights<T>(weights, z, lse, cls, static_cast<int>(a.num_classes), p, part);
  if (part) return;
  const float s =
      cls >= 0 ? pixel_scale(a.class_weight, a.pixel_weight, a.grad, *a.denominator, tile, p, cls, a.x.width) : 0.0f;
  put_factors(a, table, p, s, inv, c);
  place_gradient(a, tile, table, p);
}

template <class T>
__global__ void __launch_bounds__(kContrastThreads) contrast_backward_kernel(const __grid_constant__ BackwardKernel a) {
  PixelTable* table = reinterpret_cast<PixelTable*>(shared_memory<unsigned char>() + a.shared.pixels_at);
  const ContrastTile tile = contrast_tile(gridDim.x - 1 - blockIdx.x, a.pixels);
  read_pixels(a, a.labels, tile, table);
  const ContrastChannels channels = all_channels<T>(a.x);
  if (!a.logits) tile_dots<T>(a, tile, channels, 0, a.warps, a.shared, table);
  for_each_pixel([&](int p, int part) { weigh_pixel<T>(a, tile, table, p, part); });
  __syncthreads();
  start_gradient<T>(a, tile, channels, table);
  write_gradient<T>(a, tile, channels, table);
}

template <class T> Status backward(const ContrastBackward& from, Stream stream) {
  BackwardKernel a{};
  static_cast<ContrastGradient&>(a) = gradient_input_of(from, from.dx);
  a.shared = contrast_shared<sizeof(T)>(from.logits ? 0 : from.num_classes, from.num_classes);
  a.warps = contrast_warps(from.logits ? 1 : from.num_classes, ContrastShape<sizeof(T)>::kClasses);
  a.grad = from.grad, a.denominator = from.denominator, a.lse = from.lse, a.inv_norm = from.inv_norm,
  a.logits = from.logits;
  const Grid grid{dim3(static_cast<unsigned>(contrast_blocks(from.x))), a.warps.count * 32u,
                  static_cast<size_t>(a.shared.bytes)};
  return launch(contrast_backward_kernel<T>, grid, stream, a);
}

}  // namespace

Status prototype_contrastive_backward(const ContrastBackward& a, Stream stream) {
  const int64_t limit = shared_memory_limit();
  const bool fits = a.x.type == kFloat32 ? fits_without_streaming<4>(a.num_classes, a.logits, limit)
                                         : fits_without_streaming<2>(a.num_classes, a.logits, limit);
  if (a.options.used || !fits) return prototype_contrastive_general_backward(a, stream);
  if (a.dx.data)
    if (Status failed = with_float_type(a.x.type, [&](auto one) { return backward<decltype(one)>(a, stream); }))
      return failed;
  return a.dprototypes ? prototype_gradient(a, stream) : nullptr;
}

}  // namespace spcl::gpu
