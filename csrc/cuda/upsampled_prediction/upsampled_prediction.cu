// upsampled_prediction: class and confidence of every pixel of bilinearly up-sampled logits, which never exist.
//
// Warps are independent: each has a piece of one row of cells, and a window of these cells' pixels. In narrow cells the
// classes are walked once: the largest exponential and the sum of all give class and confidence together. The results
// of a warp are consecutive pixels of a few rows; they pass through shared memory, so that they leave 16 bytes at a
// time. 5 bytes per pixel written, 8 beyond 255 classes; no extra memory.
#include "../upsampled_cell.cuh"

namespace spcl::gpu {
namespace {

struct PredictionTask : UpsamplingTask {
  const float* thresholds;
  int ignore_index;
  void* labels;
  float* confidence;
  int64_t warps;
};

// What a warp needs when its window is done, kept here rather than in every lane's registers; and a row of its results
// on the way out. What is bound for an address of a 16-byte boundary lies on one here.
template <int kColumns, class Label> struct StagedRow {
  int64_t image;
  Range across;  // the columns of all the warp's lanes
  __align__(16) float confidence[32 * kColumns + 4];
  __align__(16) Label labels[32 * kColumns + 16 / sizeof(Label)];
};

// Elements between `to` and the 16-byte boundary before it.
template <class E> __device__ __forceinline__ int beyond_boundary(const E* to) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(to) % 16 / sizeof(E));
}

// count elements from staged[beyond_boundary(to)] on -> to. By one warp.
template <class E> __device__ __forceinline__ void store_row(E* to, const E* staged, int count, int lane) {
  constexpr int kVector = 16 / sizeof(E);
  const int shift = beyond_boundary(to), vectors = (shift + count + kVector - 1) / kVector;
  E* boundary = to - shift;
  for (int v = lane; v < vectors; v += 32) {
    const int first = v * kVector;
    if (first >= shift && first + kVector <= shift + count) {
      *reinterpret_cast<uint4*>(boundary + first) = *reinterpret_cast<const uint4*>(staged + first);
      continue;
    }
    for (int e = first; e < first + kVector; ++e)
      if (e >= shift && e < shift + count) boundary[e] = staged[e];
  }
}

// best: the largest exponential of a pixel, then its confidence.
template <int kRows_, int kColumns_> struct NarrowPixels {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  float best[kRows][kColumns];
  int label[kRows][kColumns];

  template <class T>
  __device__ __forceinline__ void predict(const UpsamplingTask& task, const T* plane, const CornerOffsets& at,
                                          const Window& window, float bound) {
    float total[kRows][kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) best[i][j] = 0.0f, total[i][j] = 0.0f, label[i][j] = 0;
#pragma unroll 1
    for (int k = 0; k < task.num_classes; ++k, plane += task.stride_k) {
      const Exponents e = exponents(load_corners(plane, at), window, task.factor, bound);
      const float down = exp2_fast(e.down);
      float first = exp2_fast(e.first);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= window.rows) continue;
        float value[kColumns];
        geometric_row(first, exp2_fast(e.across_at(i)), value);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          total[i][j] += value[j];
          label[i][j] = value[j] > best[i][j] ? k : label[i][j];  // the first of equals, as argmax
          best[i][j] = fmaxf(best[i][j], value[j]);
        }
        first *= down;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) best[i][j] /= total[i][j];
  }
};

template <int kColumns_> struct WidePixels {
  static constexpr int kRows = 1, kColumns = kColumns_;
  float best[1][kColumns];
  int label[1][kColumns];

  template <class T>
  __device__ __forceinline__ void predict(const UpsamplingTask& task, const T* image, const CornerOffsets& at,
                                          const Window& window, float) {
    float total[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) best[0][j] = -INFINITY, total[j] = 0.0f, label[0][j] = 0;
    const T* plane = image;
#pragma unroll 1
    for (int k = 0; k < task.num_classes; ++k, plane += task.stride_k) {
      const Exponents e = exponents(load_any_corners(task, plane, at), window, task.factor, 0.0f);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float z = exponent_at(e, j);
        const bool better = is_better(z, best[0][j]);
        label[0][j] = better ? k : label[0][j];
        best[0][j] = better ? z : best[0][j];
      }
    }
    plane = image;
#pragma unroll 1
    for (int k = 0; k < task.num_classes; ++k, plane += task.stride_k) {
      const Exponents e = exponents(load_any_corners(task, plane, at), window, task.factor, 0.0f);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) total[j] += exp2_fast(exponent_at(e, j) - best[0][j]);
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) best[0][j] = 1.0f / total[j];
  }
};

// One window: predicts it and writes it.
template <class Label, class Pixels, class T>
__device__ __forceinline__ void predict_window(const PredictionTask& task, const T* logits, const CornerOffsets& at,
                                               const Window& window, float bound,
                                               StagedRow<Pixels::kColumns, Label>& staged) {
  Label* labels = static_cast<Label*>(task.labels);
  Pixels pixels;
  pixels.predict(task, logits, at, window, bound);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Pixels::kRows; ++i) {
    if (i >= window.rows) break;  // the same for the whole warp
    const Range across = staged.across;
    const int64_t to = (staged.image * task.y.out + window.row + i) * task.x.out + across.begin;
    const int column = window.column - across.begin;
    const int shift_confidence = beyond_boundary(task.confidence + to), shift_label = beyond_boundary(labels + to);
    __syncwarp();  // the row before has left
#pragma unroll
    for (int j = 0; j < Pixels::kColumns; ++j) {
      if (j >= window.columns) continue;
      const bool kept = !task.thresholds || pixels.best[i][j] >= __ldg(task.thresholds + pixels.label[i][j]);
      staged.confidence[shift_confidence + column + j] = pixels.best[i][j];
      staged.labels[shift_label + column + j] = static_cast<Label>(kept ? pixels.label[i][j] : task.ignore_index);
    }
    __syncwarp();
    store_row(task.confidence + to, staged.confidence, across.count(), lane);
    store_row(labels + to, staged.labels, across.count(), lane);
  }
}

template <class T, class Label, int kRows, int kColumns>
__global__ __launch_bounds__(kUpThreads, 2) void prediction_kernel(const PredictionTask task) {
  const CellPlan& plan = task.plan;
  const int lane = threadIdx.x % 32, cell = lane / plan.lanes_per_cell, part = lane % plan.lanes_per_cell;
  int64_t rest = blockIdx.x * static_cast<int64_t>(kUpWarps) + threadIdx.x / 32;
  if (rest >= task.warps) return;
  const int tile = static_cast<int>(rest % plan.tiles),
            row = static_cast<int>(rest / plan.tiles % (task.y.size + 1)) - 1;
  const int64_t image = rest / plan.tiles / (task.y.size + 1);
  const int cell_column = plan.first_column(tile) + cell;
  const Range rows = pixels_of(task.y, row), columns = pixels_of(task.x, cell_column);
  if (rows.count() == 0) return;
  const T* logits = static_cast<const T*>(task.logits) + image * task.stride_b;
  const CornerOffsets at = corner_offsets(task, row, cell_column);
  const Bounds bounds = bounds_of(task, logits, at);
  using Staged = StagedRow<kColumns, Label>;
  Staged& staged = shared_memory<Staged>()[threadIdx.x / 32];
  const bool narrow = __all_sync(kAllLanes, bounds.narrow);
  const int height = narrow ? kRows : 1;
  for (int step = 0; step < plan.column_steps; ++step) {
    const Range mine = part_of(columns, step * plan.lanes_per_cell + part, plan.column_steps * plan.lanes_per_cell);
    __syncwarp();
    if (lane == 0) staged.image = image, staged.across.begin = mine.begin;
    if (lane == 31) staged.across.end = mine.end;
    __syncwarp();
    for (int w = 0; w * height < rows.count(); ++w) {
      const Window window = window_at(task, row, cell_column, window_of(rows, w, height), mine);
      if (narrow) {
        predict_window<Label, NarrowPixels<kRows, kColumns>>(task, logits, at, window, bounds.top, staged);
      } else {
        predict_window<Label, WidePixels<kColumns>>(task, logits, at, window, 0.0f, staged);
      }
    }
  }
}

// Lanes share a cell until the pixels of a warp are consecutive.
template <class Label, int kRows, int kColumns> Status launch_shape(const UpsampledPrediction& a, Stream stream) {
  PredictionTask task{};
  static_cast<UpsamplingTask&>(task) = make_task(a, kRows, kColumns, false, 32);
  task.thresholds = a.thresholds, task.ignore_index = a.ignore_index, task.labels = a.labels,
  task.confidence = a.confidence;
  task.warps = a.logits.batch * (a.logits.height + 1) * task.plan.tiles;
  const Grid grid{static_cast<unsigned>(ceil_div(task.warps, kUpWarps)), kUpThreads,
                  kUpWarps * sizeof(StagedRow<kColumns, Label>)};
  return with_float_type(a.logits.type, [&](auto type) {
    return launch(prediction_kernel<decltype(type), Label, kRows, kColumns>, grid, stream, task);
  });
}

}  // namespace

Status upsampled_prediction(const UpsampledPrediction& a, Stream stream) {
  const int64_t pixels =
      most_pixels(make_axis(static_cast<int>(a.logits.width), static_cast<int>(a.width), a.align_corners));
  if (a.logits.dim > kMaxByteClasses) return launch_shape<int32_t, 4, 5>(a, stream);  // one window for all sizes
  if (pixels <= 3) return launch_shape<uint8_t, 3, 3>(a, stream);
  return pixels <= 5 ? launch_shape<uint8_t, 4, 5>(a, stream) : launch_shape<uint8_t, 2, 9>(a, stream);
}

}  // namespace spcl::gpu
