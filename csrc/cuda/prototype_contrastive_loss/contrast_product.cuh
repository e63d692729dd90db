// The gradient of a tile's pixels:  sum_k w_k P_k  for each channel, then along * sum - inward * x in place, and out.
//
// The pixel's scale s stays out of the product: w is in [-1, 1] whatever the loss scale, and half floats lose nothing
// to underflow. c = sum_k w_k z_k is formed from the rounded w: dx stays orthogonal to x.
#pragma once
#include "contrast_pixels.cuh"

namespace spcl::gpu {

struct ContrastGradient : ContrastInput {
  ContrastShared shared;
  ContrastWarps warps;
  Features dx;
  Access dx_access;
  Labels labels;
  const float* class_weight;
  PixelMap pixel_weight;
  float temperature;
};

inline ContrastGradient gradient_input_of(const Contrast& a, const Features& dx) {
  return {input_of(a), {}, {}, dx, access_of(dx), a.labels, a.class_weight, a.pixel_weight, a.temperature};
}

// Where the product finds the weight of a class for a pixel.
template <class T> __device__ __forceinline__ void put_weight(void* weights, int k, int p, float w) {
  if constexpr (sizeof(T) == 4)
    static_cast<float*>(weights)[k * ContrastShape<4>::kWeightRow + p] = w;
  else
    static_cast<T*>(weights)[weight_place(k, p)] = from_float<T>(w);
}

// Weights w of pixel p for the product; -> c. p is normalised again and w of the own class is minus the sum of the
// others', so neither carries the rounding of lse.
template <class T>
__device__ __forceinline__ float put_weights(void* weights, const Logits& z, float lse, int cls, int num_classes, int p,
                                             int part) {
  float others = 0, own = 0;
  for (int k = part; k < num_classes; k += 4) {
    const float e = expf(z[k] - lse);
    if (k == cls)
      own = e;
    else
      others += e;
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
  return quad_sum(c);
}

// What turns the product of pixel p into its gradient.
__device__ __forceinline__ void put_factors(const ContrastGradient& a, PixelTable* table, int p, float s, float inv,
                                            float c) {
  const int cls = table->cls[p];
  const bool radial = a.normalize && inv < 1.0f / kNormEps;  // a clamped norm is a constant
  table->along[p] = cls == kNoClass ? 0.0f : cls == kBadLabel || isnan(c) ? NAN : s * (inv / a.temperature);
  table->inward[p] = radial ? s * (c * inv * inv) : 0.0f;
}

__device__ __forceinline__ void place_gradient(const ContrastGradient& a, const ContrastTile& tile, PixelTable* table,
                                               int p) {
  if (a.dx_access != kGather || p >= tile.count) return;
  const Place place = place_of(tile, p, a.x.width);
  table->dx_at[p] = tile.image * a.dx.stride_b + place.i * a.dx.stride_h + place.j * a.dx.stride_w;
}

// Exactly 0 where nothing is labelled, whatever x holds. (A labelled NaN made `along` NaN.)
__device__ __forceinline__ float gradient_of(float product, float x, float along, float inward) {
  return along == 0 ? 0.0f : along * product - inward * x;
}

template <class T> struct ContrastProduct;

// A half warp: 4 channels of 64 pixels, 4 x 4 a lane.
template <> struct ContrastProduct<float> {
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
      add_channel(sums[0], q.x, v), add_channel(sums[1], q.y, v), add_channel(sums[2], q.z, v),
          add_channel(sums[3], q.w, v);
    }
  }

  static __device__ __forceinline__ void add_channel(float (&to)[4], float p, const float4& v) {
    to[0] += p * v.x, to[1] += p * v.y, to[2] += p * v.z, to[3] += p * v.w;
  }

  // sums [channel][row of pixels] in shared memory, += this lane's; and back.
  __device__ __forceinline__ void add_to(float* to, int row) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float4* at = reinterpret_cast<float4*>(to + (channel() + i) * row + threadIdx.x % 16 * 4);
      *at = make_float4(at->x + sums[i][0], at->y + sums[i][1], at->z + sums[i][2], at->w + sums[i][3]);
    }
  }
  __device__ __forceinline__ void read(const float* from, int row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 v = *reinterpret_cast<const float4*>(from + (channel() + i) * row + threadIdx.x % 16 * 4);
      sums[i][0] = v.x, sums[i][1] = v.y, sums[i][2] = v.z, sums[i][3] = v.w;
    }
  }

  // x [kChunk][kRow], which may be unwritten where it is not used -> the gradient, in place.
  __device__ __forceinline__ void finish(float* x, const PixelTable* table, bool uses_x, int) {
    const int p = threadIdx.x % 16 * 4;
    const float4 along = *reinterpret_cast<const float4*>(table->along + p),
                 inward = *reinterpret_cast<const float4*>(table->inward + p);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float4* at = reinterpret_cast<float4*>(x + (channel() + i) * Shape::kRow + p);
      const float4 v = uses_x ? *at : make_float4(0, 0, 0, 0);
      *at =
          make_float4(gradient_of(sums[i][0], v.x, along.x, inward.x), gradient_of(sums[i][1], v.y, along.y, inward.y),
                      gradient_of(sums[i][2], v.z, along.z, inward.z), gradient_of(sums[i][3], v.w, along.w, inward.w));
    }
  }
};

// A warp: 16 channels of 64 pixels; prototypes transposed [channels x classes] times weights [classes x pixels].
template <class T> struct ContrastProduct {
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

  // Where this lane's sums [j][2r], [j][2r + 1] are in rows of pixels.
  static __device__ __forceinline__ int place(int j, int r, int row) {
    const int lane = threadIdx.x % 32;
    return (channel() + r * 8 + lane / 4) * row + backward_pixel(j, 2 * (lane % 4));
  }
  __device__ __forceinline__ void add_to(float* to, int row) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float2* at = reinterpret_cast<float2*>(to + place(i / 2, i % 2, row));
      *at = make_float2(at->x + sums[i / 2][i % 2 * 2], at->y + sums[i / 2][i % 2 * 2 + 1]);
    }
  }
  __device__ __forceinline__ void read(const float* from, int row) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 v = *reinterpret_cast<const float2*>(from + place(i / 2, i % 2, row));
      sums[i / 2][i % 2 * 2] = v.x, sums[i / 2][i % 2 * 2 + 1] = v.y;
    }
  }

  // Eight floats, of which half of the lanes read the second four first: they would meet the others in their banks.
  static __device__ __forceinline__ void read_swapped(float4 (&out)[2], const float* from, bool swaps) {
    const float4 first = *reinterpret_cast<const float4*>(from + (swaps ? 4 : 0)),
                 second = *reinterpret_cast<const float4*>(from + (swaps ? 0 : 4));
    out[0] = swaps ? second : first, out[1] = swaps ? first : second;
  }

  // A row belongs to 4 lanes of one warp: all read (a shifted row reaches into the next lane's words), then all write,
  // not shifted.
  __device__ __forceinline__ void finish(T* x, const PixelTable* table, bool uses_x, int shifts) {
    const int q = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      T* row = x + (channel() + r * 8 + g) * Shape::kRow;
      uint32_t v[8] = {};
      if (uses_x) {
        const int shifted = shifts >> g % 2 & 1;
        read_eight(*reinterpret_cast<uint32_t (*)[4]>(v), row, 16 * q, shifted);
        read_eight(*reinterpret_cast<uint32_t (*)[4]>(v + 4), row, 16 * q + 8, shifted);
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        float4 along[2], inward[2];
        read_swapped(along, table->along + backward_pixel(j, 2 * q), q >= 2);
        read_swapped(inward, table->inward + backward_pixel(j, 2 * q), q >= 2);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int n = j + 2 * i;
          const float2 low = to_floats<T>(v[n]), high = to_floats<T>(v[n + 1]);
          v[n] = to_halves<T>(gradient_of(sums[n][2 * r], low.x, along[i].x, inward[i].x),
                              gradient_of(sums[n][2 * r + 1], low.y, along[i].y, inward[i].y));
          v[n + 1] = to_halves<T>(gradient_of(sums[n + 1][2 * r], high.x, along[i].z, inward[i].z),
                                  gradient_of(sums[n + 1][2 * r + 1], high.y, along[i].w, inward[i].w));
        }
      }
      uint4* to = reinterpret_cast<uint4*>(row + 16 * q);
      to[0] = make_uint4(v[0], v[1], v[2], v[3]), to[1] = make_uint4(v[4], v[5], v[6], v[7]);
    }
  }
};

constexpr int kProductThreads =
    128;  // 4 warps take a chunk's channels between them; with more classes than 128 the others help with copies

// Item i of the product: piece i % pieces of chunk i / pieces of these channels.
template <class T, class Gradient>
__device__ __forceinline__ void load_item(const Gradient& a, const ContrastTile& tile, const ContrastChannels& channels,
                                          const PixelTable* table, int64_t item) {
  using Shape = ContrastShape<sizeof(T)>;
  unsigned char* memory = shared_memory<unsigned char>();
  const int64_t pieces = pieces_of(a.num_classes), chunk = item / pieces, piece = item - chunk * pieces;
  if (chunk < channels.chunks) {
    const int64_t d0 = channels.first + chunk * Shape::kChunk;
    if (a.normalize && !a.shared.resident && piece == pieces - 1)
      stage_pixels<T>(a.x, a.access, tile, table->x_at, d0,
                      reinterpret_cast<T*>(memory + x_slot(a.shared, chunk, item)));
    stage_prototypes<T>(prototypes_of<T>(a, tile), a.num_classes, a.x.dim, piece * kPiece, kPiece, d0,
                        reinterpret_cast<T*>(memory + proto_slot(a.shared, item)));
  }
  copy_async_commit();
}

// Sends for the first stages. Their memory must be free.
template <class T, class Gradient>
__device__ __forceinline__ void start_gradient(const Gradient& a, const ContrastTile& tile,
                                               const ContrastChannels& channels, const PixelTable* table) {
  for (int64_t item = 0; item < a.shared.stages - 1; ++item) load_item<T>(a, tile, channels, table, item);
}

// After start_gradient: the gradient of these channels -> dx.
template <class T, class Gradient>
__device__ void write_gradient(const Gradient& a, const ContrastTile& tile, const ContrastChannels& channels,
                               const PixelTable* table) {
  using Shape = ContrastShape<sizeof(T)>;
  unsigned char* memory = shared_memory<unsigned char>();
  const int64_t pieces = pieces_of(a.num_classes);
  const bool works = threadIdx.x < kProductThreads;
  const int shifts = shifts_of<T>(a.x, a.access, tile);
  ContrastProduct<T> product;
  for (int64_t item = 0; item < channels.chunks * pieces; ++item) {
    wait_for_stage(a.shared.stages);
    __syncthreads();
    load_item<T>(a, tile, channels, table, item + a.shared.stages - 1);
    const int64_t chunk = item / pieces;
    const int piece = static_cast<int>(item - chunk * pieces);
    if (piece == 0) product.clear();
    if (works)
      product.add(reinterpret_cast<const T*>(memory + proto_slot(a.shared, item)), memory + a.shared.weights_at, piece,
                  a.num_classes);
    if (piece < pieces - 1) continue;
    T* x = reinterpret_cast<T*>(memory + x_slot(a.shared, chunk, item));
    if (works) product.finish(x, table, a.normalize, shifts);
    __syncthreads();
    store_pixels<T>(a.dx, a.dx_access, tile, table->dx_at, channels.first + chunk * Shape::kChunk, x);
  }
}

}  // namespace spcl::gpu
