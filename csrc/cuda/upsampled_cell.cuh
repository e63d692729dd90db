// A lane's window of pixels of one cell, and the logits in it.
//
// Within a cell a logit is bilinear, so along equally spaced pixels of a row its exponential is a geometric sequence:
//   2^z(i, j) = first * down^i * across_i^j
// One exponential per row, cell and class and two more, not one per pixel and class; a sum over the pixels is a
// polynomial in `across`, by Horner's rule one multiply-add per pixel, and its first moment, which the gradient needs,
// one more. (across_i is a geometric sequence too, but powers of powers would lose too many bits.) That holds where no
// factor leaves float32: `narrow` cells, those whose logits all lie within kMostBits of each other. The others take
// every pixel's own maximum and own exponentials.
#pragma once
#include <algorithm>

#include "pixels.cuh"
#include "upsampled.h"

namespace spcl::gpu {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMostBits = 96.0f;  // 2^96 times any sane weight is a float, and so is 2^-96

// 2^x by the special function unit: relative error at most 2^-22 (PTX manual), results under 2^-126 are 0. The
// emulator's twin makes the whole of that error, up or down as the bits of x have it.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(SPCL_EMULATED)
  const float y = exp2f(x), error = (__float_as_uint(x) * 2654435761u >> 31) != 0 ? 0x1p-22f : -0x1p-22f;
  return y < 0x1p-126f ? 0.0f : x == 0.0f ? 1.0f : fmaf(y, error, y);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

struct UpsamplingTask {
  const void* logits;
  Axis y, x;
  CellPlan plan;
  int num_classes;
  int64_t stride_b, stride_k;
  int stride_h, stride_w;  // within an image and class 32 bits do
  float factor;            // log2(e) / temperature
  float lowest;            // the lowest logit whose sums and products are floats: see load_any_corners
};

// Upper left, upper right, lower left, lower right: offsets of a cell's nodes in elements, or their logits.
struct CornerOffsets {
  int a, b, c, d;
};
struct Corners {
  float a, b, c, d;
};

__device__ __forceinline__ CornerOffsets corner_offsets(const UpsamplingTask& task, int row, int column) {
  const int upper = clamp_node(row, task.y.size) * task.stride_h, lower = second_node(task.y, row) * task.stride_h;
  const int left = clamp_node(column, task.x.size) * task.stride_w, right = second_node(task.x, column) * task.stride_w;
  return {upper + left, upper + right, lower + left, lower + right};
}

template <class T> __device__ __forceinline__ Corners load_corners(const T* plane, const CornerOffsets& at) {
  return {to_float(plane[at.a]), to_float(plane[at.b]), to_float(plane[at.c]), to_float(plane[at.d])};
}

// The same for cells that are not narrow, where a class may be masked by -inf or by a very low logit: by the lowest of
// which the slopes along a cell are floats, so that its probability is 0. NaN stays.
template <class T>
__device__ __forceinline__ Corners load_any_corners(const UpsamplingTask& task, const T* plane,
                                                    const CornerOffsets& at) {
  const Corners v = load_corners(plane, at);
  const auto raised = [&](float x) { return x < task.lowest ? task.lowest : x; };
  return {raised(v.a), raised(v.b), raised(v.c), raised(v.d)};
}

// The largest and the smallest corner of all classes bound every logit of the cell. In units of log2.
struct Bounds {
  float top;
  bool narrow;
};

template <class T>
__device__ __forceinline__ Bounds bounds_of(const UpsamplingTask& task, const T* image, const CornerOffsets& at) {
  float top = -INFINITY, low = INFINITY, sum = 0.0f;
#pragma unroll 2
  for (int k = 0; k < task.num_classes; ++k, image += task.stride_k) {
    const Corners v = load_corners(image, at);
    top = fmaxf(top, fmaxf(fmaxf(v.a, v.b), fmaxf(v.c, v.d)));
    low = fminf(low, fminf(fminf(v.a, v.b), fminf(v.c, v.d)));
    sum += (v.a + v.b) + (v.c + v.d);  // maxima pass over NaN, a sum does not
  }
  return {top * task.factor, (top - low) * task.factor <= kMostBits && sum == sum && top > task.lowest};
}

struct Window {
  int row, column;    // the first pixel
  int rows, columns;  // 0: none; rows are the same for all lanes of a warp
  Ramp y, x;
};

__device__ __forceinline__ Window window_at(const UpsamplingTask& task, int row, int column, const Range& rows,
                                            const Range& columns) {
  return {rows.begin,
          columns.begin,
          rows.count(),
          columns.count(),
          ramp_of(task.y, row, rows),
          ramp_of(task.x, column, columns)};
}

// log2 of a window's factors: first, relative to a bound of the logits, across in the first row, down in the first
// column; and what each further row adds to across.
struct Exponents {
  float first, across, down, mixed;
  __device__ __forceinline__ float across_at(int row) const { return fmaf(static_cast<float>(row), mixed, across); }
};

__device__ __forceinline__ Exponents exponents(const Corners& v, const Window& window, float factor, float bound) {
  const float dx = v.b - v.a, dy = v.c - v.a, dxy = (v.d - v.c) - dx;
  const float slope_x = fmaf(window.y.start, dxy, dx), slope_y = fmaf(window.x.start, dxy, dy);
  const float first = fmaf(window.x.start, slope_x, fmaf(window.y.start, dy, v.a));
  return {fmaf(first, factor, -bound), slope_x * (window.x.slope * factor), slope_y * (window.y.slope * factor),
          dxy * (window.x.slope * window.y.slope * factor)};
}

// The sequence of one row: first * across^j. Short chains: a product of at most three factors from `first` on for 9
// columns.
template <int kColumns>
__device__ __forceinline__ void geometric_row(float first, float across, float (&value)[kColumns]) {
  const float square = across * across, fourth = square * square;
  value[0] = first;
  if constexpr (kColumns > 1) value[1] = first * across;
#pragma unroll
  for (int j = 2; j < kColumns; ++j) value[j] = j < 4 ? value[j - 2] * square : value[j - 4] * fourth;
}

// Sums over a window's pixels of g, (column) g, (row) g, (row) (column) g.
struct Moments2 {
  float all, column, row, both;
};

// The same sums of weight[i][j] * 2^z(i, j). Pixels beyond the window have weight 0 and come first, so no power of them
// is ever formed.
template <int kRows, int kColumns>
__device__ __forceinline__ Moments2 geometric_moments(const Exponents& e, int rows,
                                                      const float (&weight)[kRows][kColumns]) {
  const float down = exp2_fast(e.down);
  Moments2 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = kRows - 1; i >= 0; --i) {
    if (i >= rows) continue;
    const float across = exp2_fast(e.across_at(i));
    float all = weight[i][kColumns - 1], column = 0.0f;
#pragma unroll
    for (int j = kColumns - 2; j >= 0; --j) {
      column = j == kColumns - 2 ? all : fmaf(column, across, all);
      all = fmaf(all, across, weight[i][j]);
    }
    column *= across;
    sum.row = fmaf(sum.row, down, sum.all), sum.both = fmaf(sum.both, down, sum.column);
    sum.all = fmaf(sum.all, down, all), sum.column = fmaf(sum.column, down, column);
  }
  const float first = exp2_fast(e.first);
  return {sum.all * first, sum.column * first, sum.row * (first * down), sum.both * (first * down)};
}

// What each corner gets of the sums: the adjoint of the interpolation.
__device__ __forceinline__ Corners to_corners(const Moments2& sum, const Window& window) {
  const float right = fmaf(window.x.slope, sum.column, window.x.start * sum.all);
  const float right_by_row = fmaf(window.x.slope, sum.both, window.x.start * sum.row);
  const float lower = fmaf(window.y.slope, sum.row, window.y.start * sum.all);
  const float lower_right = fmaf(window.y.slope, right_by_row, window.y.start * right);
  const float upper = sum.all - lower, upper_right = right - lower_right;
  return {upper - upper_right, upper_right, lower - lower_right, lower_right};
}

// z at one pixel of a window whose exponents are relative to 0.
__device__ __forceinline__ float exponent_at(const Exponents& e, int column) {
  return fmaf(static_cast<float>(column), e.across, e.first);
}

// Whether z is what argmax takes instead of the best one so far: NaN is the largest, inf is as NaN, and of equals the
// first.
__device__ __forceinline__ bool is_better(float z, float best) { return !(z <= best) && best < INFINITY; }

// A sum over the block in float64 and in a fixed order; every thread gets it. `scratch`: kUpWarps doubles. Begins and
// ends with a barrier.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1) value += __shfl_xor_sync(kAllLanes, value, lanes);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < kUpWarps; ++warp) sum += scratch[warp];
  __syncthreads();
  return sum;
}

inline int64_t blocks_of(const UpsamplingTask& task, int64_t images) {
  return images * task.plan.strips * task.plan.tiles;
}

// rows, columns: the window of pixels that a lane holds at once.
inline UpsamplingTask make_task(const Upsampling& a, int rows, int columns, bool owns_nodes, int most_lanes) {
  UpsamplingTask task{};
  task.logits = a.logits.data;
  task.y = make_axis(static_cast<int>(a.logits.height), static_cast<int>(a.height), a.align_corners);
  task.x = make_axis(static_cast<int>(a.logits.width), static_cast<int>(a.width), a.align_corners);
  task.plan = plan_cells(task.y, task.x, a.logits.batch, rows, columns, owns_nodes, most_lanes);
  task.num_classes = static_cast<int>(a.logits.dim);
  task.stride_b = a.logits.stride_b, task.stride_k = a.logits.stride_d;
  task.stride_h = static_cast<int>(a.logits.stride_h), task.stride_w = static_cast<int>(a.logits.stride_w);
  task.factor = static_cast<float>(1.4426950408889634 / a.temperature);
  task.lowest = -6e37f / std::max(task.factor, 1.0f);
  return task;
}

}  // namespace spcl::gpu
