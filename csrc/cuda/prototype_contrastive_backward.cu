// prototype_contrastive_loss, gradient of the features:
//
//   dx = inv * s * ( sum_k w_k P_k / tau - c * inv * x ),   w_k = p_k - [k = label],   c = sum_k w_k z_k
//
// c is a by-product of the softmax, so the normalisation costs no pass over D. The pixel's scale s stays out of the product: w is in [-1, 1]
// whatever the loss scale, and half floats lose nothing to underflow. c is formed from the rounded w: dx stays orthogonal to x.
// A block owns 64 pixels of one image and all D channels: weights once, from saved logits or logits formed again, then D in chunks. A chunk
// of x is staged, becomes the gradient in place and is stored by the same rules. Moves: x once or twice (the second time from L2), dx once.
// The tiles are walked in reverse: what the forward read last may still be in L2.
#include "contrast_pixels.cuh"

namespace spcl::gpu {

Status prototype_gradient(const ContrastBackward& a, Stream stream);  // prototype_contrastive_prototypes.cu

namespace {

struct BackwardKernel : ContrastInput {
  ContrastShared shared;
  ContrastWarps warps;
  Features dx;
  Access dx_access;
  Labels labels;
  const float* class_weight;
  PixelMap pixel_weight, grad;
  float temperature;
  const float *denominator, *lse, *inv_norm, *logits;
};

// Where the product finds the weight of a class for a pixel.
template <class T>
__device__ __forceinline__ void put_weight(void* weights, int k, int p, float w) {
  if constexpr (sizeof(T) == 4) static_cast<float*>(weights)[k * ContrastShape<4>::kWeightRow + p] = w;
  else static_cast<T*>(weights)[weight_place(k, p)] = from_float<T>(w);
}

// Weights of pixel p, and what turns their product into the gradient. p is normalised again and w of the own class is minus the sum of the
// others', so neither carries the rounding of lse.
template <class T>
__device__ __forceinline__ void weigh_pixel(const BackwardKernel& a, const ContrastTile& tile, PixelTable* table, int p, int part) {
  void* weights = shared_memory<unsigned char>() + a.shared.weights_at;
  const int cls = table->cls[p], num_classes = static_cast<int>(a.num_classes);
  const int64_t at = tile.image * a.pixels + tile.first + min(p, tile.count - 1);
  const float lse = a.lse[at], inv = a.inv_norm[at];
  const Logits z = a.logits ? saved_logits(a.logits, a, tile, 0, p) : formed_logits(shared_memory<float>(), p, inv, a.temperature);
  float others = 0, own = 0;
  for (int k = part; k < num_classes; k += 4) {
    const float e = expf(z[k] - lse);
    if (k == cls) own = e;
    else others += e;
  }
  others = quad_sum(others), own = quad_sum(own);
  const float factor = 1.0f / (others + own);
  float c = 0;
  for (int k = part; k < static_cast<int>(pieces_of(num_classes)) * kPiece; k += 4) {
    float w = 0;
    if (k < num_classes && cls >= 0) {
      const float value = z[k];
      w = to_float(from_float<T>((k == cls ? -others : expf(value - lse)) * factor));
      c += w * value;
    }
    put_weight<T>(weights, k, p, w);
  }
  c = quad_sum(c);
  if (part) return;
  const float s = cls >= 0 ? pixel_scale(a.class_weight, a.pixel_weight, a.grad, a.denominator, tile, p, cls, a.x.width) : 0.0f;
  const bool radial = a.normalize && inv < 1.0f / kNormEps;  // a clamped norm is a constant
  table->along[p] = cls == kNoClass ? 0.0f : cls == kBadLabel || isnan(c) ? NAN : s * (inv / a.temperature);
  table->inward[p] = radial ? s * (c * inv * inv) : 0.0f;
  if (a.dx_access != kGather || p >= tile.count) return;
  const Place place = place_of(tile, p, a.x.width);
  table->dx_at[p] = tile.image * a.dx.stride_b + place.i * a.dx.stride_h + place.j * a.dx.stride_w;
}

// Exactly 0 where nothing is labelled, whatever x holds. (A labelled NaN made `along` NaN.)
__device__ __forceinline__ float gradient_of(float product, float x, float along, float inward) {
  return along == 0 ? 0.0f : along * product - inward * x;
}

template <class T>
struct ContrastProduct;

// A half warp: 4 channels of 64 pixels, 4 x 4 a lane.
template <>
struct ContrastProduct<float> {
  using Shape = ContrastShape<4>;
  float sums[4][4];  // [channel][pixel]

  static __device__ __forceinline__ int channel() { return static_cast<int>(threadIdx.x / 16) * 4; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = 0;
  }

  // Classes of one piece: proto [kPiece][kProtoRow], weights of all classes.
  __device__ __forceinline__ void add(const float* proto, const void* weights, int piece, int64_t num_classes) {
    const int count = min(kPiece, static_cast<int>(num_classes) - piece * kPiece), p = threadIdx.x % 16 * 4;
    const float* w = static_cast<const float*>(weights) + piece * kPiece * Shape::kWeightRow + p;
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      const float4 q = *reinterpret_cast<const float4*>(proto + k * Shape::kProtoRow + channel());
      const float4 v = *reinterpret_cast<const float4*>(w + k * Shape::kWeightRow);
      add_channel(sums[0], q.x, v), add_channel(sums[1], q.y, v), add_channel(sums[2], q.z, v), add_channel(sums[3], q.w, v);
    }
  }

  static __device__ __forceinline__ void add_channel(float (&to)[4], float p, const float4& v) {
    to[0] += p * v.x, to[1] += p * v.y, to[2] += p * v.z, to[3] += p * v.w;
  }

  // x [kChunk][kRow], which may be unwritten where it is not used -> the gradient, in place.
  __device__ __forceinline__ void finish(float* x, const PixelTable* table, bool uses_x, int) {
    const int p = threadIdx.x % 16 * 4;
    const float4 along = *reinterpret_cast<const float4*>(table->along + p), inward = *reinterpret_cast<const float4*>(table->inward + p);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float4* at = reinterpret_cast<float4*>(x + (channel() + i) * Shape::kRow + p);
      const float4 v = uses_x ? *at : make_float4(0, 0, 0, 0);
      *at = make_float4(gradient_of(sums[i][0], v.x, along.x, inward.x), gradient_of(sums[i][1], v.y, along.y, inward.y),
                        gradient_of(sums[i][2], v.z, along.z, inward.z), gradient_of(sums[i][3], v.w, along.w, inward.w));
    }
  }
};

// A warp: 16 channels of 64 pixels; prototypes transposed [channels x classes] times weights [classes x pixels].
template <class T>
struct ContrastProduct {
  using Shape = ContrastShape<2>;
  float sums[8][4];  // [product of 8 pixels][fragment]

  static __device__ __forceinline__ int channel() { return static_cast<int>(threadIdx.x / 32) * 16; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i / 4][i % 4] = 0;
  }

  __device__ __forceinline__ void add(const T* proto, const void* weights, int piece, int64_t) {
    const int lane = threadIdx.x % 32;
    const uint4* b = static_cast<const uint4*>(weights) + piece * (kPiece / 16) * 4 * 32 + lane;
#pragma unroll
    for (int step = 0; step < kPiece / 16; ++step) {
      uint32_t a[4];
      const int k = step * 16 + lane / 16 * 8 + lane % 8, c = channel() + lane / 8 % 2 * 8;
      load_transposed(a, proto + k * Shape::kProtoRow + c);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4 w = b[(step * 4 + j) * 32];
        multiply_add<T>(sums[2 * j], a, w.x, w.y);
        multiply_add<T>(sums[2 * j + 1], a, w.z, w.w);
      }
    }
  }

  // A row belongs to 4 lanes of one warp: all read (a shifted row reaches into the next lane's words), then all write, not shifted.
  __device__ __forceinline__ void finish(T* x, const PixelTable* table, bool uses_x, int shifts) {
    const int q = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      T* row = x + (channel() + r * 8 + g) * Shape::kRow;
      uint32_t v[8] = {};
      if (uses_x) {
        const int shifted = shifts >> g % 2 & 1;
        read_eight(*reinterpret_cast<uint32_t(*)[4]>(v), row, 16 * q, shifted);
        read_eight(*reinterpret_cast<uint32_t(*)[4]>(v + 4), row, 16 * q + 8, shifted);
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const int p = backward_pixel(j, 2 * q);
        const float4 along = *reinterpret_cast<const float4*>(table->along + p), inward = *reinterpret_cast<const float4*>(table->inward + p);
        const float2 low = to_floats<T>(v[j]), high = to_floats<T>(v[j + 1]);
        v[j] = to_halves<T>(gradient_of(sums[j][2 * r], low.x, along.x, inward.x), gradient_of(sums[j][2 * r + 1], low.y, along.y, inward.y));
        v[j + 1] = to_halves<T>(gradient_of(sums[j + 1][2 * r], high.x, along.z, inward.z),
                                gradient_of(sums[j + 1][2 * r + 1], high.y, along.w, inward.w));
      }
      uint4* to = reinterpret_cast<uint4*>(row + 16 * q);
      to[0] = make_uint4(v[0], v[1], v[2], v[3]), to[1] = make_uint4(v[4], v[5], v[6], v[7]);
    }
  }
};

constexpr int kProductThreads = 128;  // 4 warps take a chunk's channels between them; with more classes than 128 the others help with copies

template <class T>
__device__ void write_gradient(const BackwardKernel& a, const ContrastTile& tile, const PixelTable* table) {
  using Shape = ContrastShape<sizeof(T)>;
  unsigned char* memory = shared_memory<unsigned char>();
  const int64_t chunks = (a.x.dim + Shape::kChunk - 1) / Shape::kChunk, pieces = pieces_of(a.num_classes), items = chunks * pieces;
  auto load = [&](int64_t item) {
    if (item < items) {
      unsigned char* stage = memory + item % a.shared.stages * a.shared.stage_bytes;
      const int64_t chunk = item / pieces, piece = item - chunk * pieces;
      if (a.normalize && piece == pieces - 1) stage_pixels<T>(a.x, a.access, tile, table->x_at, chunk * Shape::kChunk, reinterpret_cast<T*>(stage));
      stage_prototypes<T>(static_cast<const T*>(a.prototypes), a.num_classes, a.x.dim, piece * kPiece, kPiece, chunk * Shape::kChunk,
                          reinterpret_cast<T*>(stage + a.shared.stage_proto_at));
    }
    copy_async_commit();
  };

  const bool works = threadIdx.x < kProductThreads;
  const int shifts = shifts_of<T>(a.x, a.access, tile);
  ContrastProduct<T> product;
  for (int64_t s = 0; s < a.shared.stages - 1; ++s) load(s);
  for (int64_t item = 0; item < items; ++item) {
    if (a.shared.stages == 3) copy_async_wait<1>();
    else copy_async_wait<0>();
    __syncthreads();
    load(item + a.shared.stages - 1);
    T* stage = reinterpret_cast<T*>(memory + item % a.shared.stages * a.shared.stage_bytes);
    const int64_t chunk = item / pieces;
    const int piece = static_cast<int>(item - chunk * pieces);
    if (piece == 0) product.clear();
    if (works) product.add(stage + a.shared.stage_proto_at / sizeof(T), memory + a.shared.weights_at, piece, a.num_classes);
    if (piece < pieces - 1) continue;
    if (works) product.finish(stage, table, a.normalize, shifts);
    __syncthreads();
    store_pixels<T>(a.dx, a.dx_access, tile, table->dx_at, chunk * Shape::kChunk, stage);
  }
}

template <class T>
__global__ void __launch_bounds__(kContrastThreads) contrast_backward_kernel(const __grid_constant__ BackwardKernel a) {
  PixelTable* table = reinterpret_cast<PixelTable*>(shared_memory<unsigned char>() + a.shared.pixels_at);
  const ContrastTile tile = contrast_tile(gridDim.x - 1 - blockIdx.x, a.pixels);
  read_pixels(a, a.labels, tile, table);
  if (!a.logits) tile_dots<T>(a, tile, 0, a.warps, a.shared, table);
  for_each_pixel([&](int p, int part) { weigh_pixel<T>(a, tile, table, p, part); });
  __syncthreads();
  write_gradient<T>(a, tile, table);
}

template <class T>
Status backward(const ContrastBackward& from, Stream stream) {
  BackwardKernel a{};
  static_cast<ContrastInput&>(a) = input_of(from);
  a.shared = contrast_shared<sizeof(T)>(from.logits ? 0 : from.num_classes, from.num_classes);
  a.warps = contrast_warps(from.logits ? 1 : from.num_classes, ContrastShape<sizeof(T)>::kClasses);
  a.dx = from.dx, a.dx_access = access_of(from.dx);
  a.labels = from.labels, a.class_weight = from.class_weight, a.pixel_weight = from.pixel_weight, a.grad = from.grad;
  a.temperature = from.temperature, a.denominator = from.denominator, a.lse = from.lse, a.inv_norm = from.inv_norm, a.logits = from.logits;
  const Grid grid{dim3(static_cast<unsigned>(contrast_blocks(from.x))), a.warps.count * 32u, static_cast<size_t>(a.shared.bytes)};
  return launch(contrast_backward_kernel<T>, grid, stream, a);
}

}  // namespace

Status prototype_contrastive_backward(const ContrastBackward& a, Stream stream) {
  if (a.dx.data)
    if (Status failed = with_float_type(a.x.type, [&](auto one) { return backward<decltype(one)>(a, stream); })) return failed;
  return a.dprototypes ? prototype_gradient(a, stream) : nullptr;
}

}  // namespace spcl::gpu
