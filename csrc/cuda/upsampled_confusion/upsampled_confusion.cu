// upsampled_confusion: labels against the argmax of bilinearly up-sampled logits, counted; neither exists as a map.
//
// The cells and windows of upsampled_prediction, one walk over the classes, no exponentials. Lanes of a warp that meet
// the same entry add once. Integer atomics: their order cannot be seen. Copies of the table share them.
#include "../pixels.cuh"
#include "../upsampled_cell.cuh"

namespace spcl::gpu {
namespace {

struct ConfusionTask : UpsamplingTask {
  Labels labels;
  int* counts;
  int64_t copies, warps;
};

template <int kRows, int kColumns> struct BestClasses {
  float best[kRows][kColumns];
  int label[kRows][kColumns];

  template <class T>
  __device__ __forceinline__ void find(const UpsamplingTask& task, const T* plane, const CornerOffsets& at,
                                       const Window& window) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) best[i][j] = -INFINITY, label[i][j] = 0;
#pragma unroll 1
    for (int k = 0; k < task.num_classes; ++k, plane += task.stride_k) {
      const Exponents e = exponents(load_any_corners(task, plane, at), window, task.factor, 0.0f);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float first = fmaf(static_cast<float>(i), e.down, e.first), across = e.across_at(i);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const float z = fmaf(static_cast<float>(j), across, first);
          const bool better = is_better(z, best[i][j]);
          label[i][j] = better ? k : label[i][j];
          best[i][j] = better ? z : best[i][j];
        }
      }
    }
  }
};

// By a whole warp: entry -1 where a lane has nothing to count.
__device__ __forceinline__ void count_entry(int* counts, int entry, int lane) {
  const unsigned same = __match_any_sync(kAllLanes, entry);
  if (entry >= 0 && __ffs(static_cast<int>(same)) - 1 == lane) atomicAdd(counts + entry, __popc(same));
  __syncwarp();
}

template <class T, int kRows, int kColumns>
__global__ __launch_bounds__(kUpThreads, 2) void confusion_kernel(const ConfusionTask task) {
  const CellPlan& plan = task.plan;
  const int lane = threadIdx.x % 32, cell = lane / plan.lanes_per_cell, part = lane % plan.lanes_per_cell;
  const int64_t warp = blockIdx.x * static_cast<int64_t>(kUpWarps) + threadIdx.x / 32;
  if (warp >= task.warps) return;
  const int tile = static_cast<int>(warp % plan.tiles),
            row = static_cast<int>(warp / plan.tiles % (task.y.size + 1)) - 1;
  const int64_t image = warp / plan.tiles / (task.y.size + 1), classes = task.num_classes;
  const int cell_column = plan.first_column(tile) + cell;
  const Range rows = pixels_of(task.y, row), columns = pixels_of(task.x, cell_column);
  if (rows.count() == 0) return;
  const T* logits = static_cast<const T*>(task.logits) + image * task.stride_b;
  const CornerOffsets at = corner_offsets(task, row, cell_column);
  int* counts = task.counts + warp % task.copies * classes * classes;
  for (int step = 0; step < plan.column_steps; ++step) {
    const Range mine = part_of(columns, step * plan.lanes_per_cell + part, plan.column_steps * plan.lanes_per_cell);
    for (int w = 0; w * kRows < rows.count(); ++w) {
      const Window window = window_at(task, row, cell_column, window_of(rows, w, kRows), mine);
      BestClasses<kRows, kColumns> pixels;
      pixels.find(task, logits, at, window);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i >= window.rows) break;  // the same for the whole warp
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          int entry = -1;
          if (j < window.columns) {
            const int cls =
                class_at(task.labels, image * task.labels.stride_b + (window.row + i) * task.labels.stride_h +
                                          (window.column + j) * task.labels.stride_w);
            if (cls >= 0) entry = cls * static_cast<int>(classes) + pixels.label[i][j];
          }
          count_entry(counts, entry, lane);
        }
      }
    }
  }
}

}  // namespace

Status upsampled_confusion(const UpsampledConfusion& a, Stream stream) {
  constexpr int kRows = 4, kColumns = 5;
  ConfusionTask task{};
  static_cast<UpsamplingTask&>(task) = make_task(a, kRows, kColumns, false, 32);
  task.labels = a.labels, task.counts = a.counts, task.copies = a.copies;
  task.warps = a.logits.batch * (a.logits.height + 1) * task.plan.tiles;
  const Grid grid{static_cast<unsigned>(ceil_div(task.warps, kUpWarps)), kUpThreads, 0};
  return with_float_type(a.logits.type, [&](auto type) {
    return launch(confusion_kernel<decltype(type), kRows, kColumns>, grid, stream, task);
  });
}

}  // namespace spcl::gpu
