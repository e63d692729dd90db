// upsampled_cross_entropy and its gradient: cross-entropy of bilinearly up-sampled logits, which never exist.
//
// A block owns a rectangle of low-resolution nodes and works on their cells, halo included: gather, no atomics, no
// order to be seen. A lane holds a window of its cell's pixels and walks the classes twice, for the sum of exponentials
// and for the gradient; then the block adds what the cells around each of its nodes have found, a few classes at a
// time, in shared memory. Instructions, not bytes, are the bound (upsampled_cell.cuh says how few exponentials it
// takes). Bytes: labels as they are, twice with the gradient of a mean; the low-resolution logits, three times through
// the caches; dlogits once. Extra memory: 16 bytes per block.
#include <algorithm>

#include "upsampled_cross_entropy.cuh"

namespace spcl::gpu {
namespace {

constexpr int kClasses = 4;        // classes between two barriers
constexpr int kLabelBlocks = 256;  // partial sums of the labels' weights

// What a block needs now and then is kept here, not in the registers of every thread: a window of pixels wants them
// all.
struct Shared {
  double scratch[kUpWarps];
  float sums[2][kClasses][kUpWarps][32];          // [upper, lower nodes][class][warp][cell]
  float losses[kUpThreads], weights[kUpThreads];  // of a thread's own pixels
  int64_t image;
  int first_row, first_column;  // of the block's cells
  Range nodes;                  // the rows of nodes that it owns
  bool first_tile, first_strip;
};

// ---- the mean's denominator -------------------------------------------------------------------------------------

// partial[block]: the summed class weights of its labels; NaN where one is bad. Reads the labels once, each block a
// fixed share of rows.
__global__ __launch_bounds__(kUpThreads) void label_weight_kernel(const Labels labels, int64_t rows,
                                                                  const float* class_weight, double* partial) {
  Shared& shared = *shared_memory<Shared>();
  const int64_t warps = gridDim.x * static_cast<int64_t>(kUpWarps);
  double sum = 0.0;
  for (int64_t row = blockIdx.x * static_cast<int64_t>(kUpWarps) + threadIdx.x / 32; row < rows; row += warps) {
    const int64_t image = row / labels.height,
                  first = image * labels.stride_b + (row - image * labels.height) * labels.stride_h;
    float of_row = 0.0f;
#pragma unroll 4
    for (int64_t j = threadIdx.x % 32; j < labels.width; j += 32) {
      const int code = class_at(labels, first + j * labels.stride_w);
      if (code != kNoClass) of_row += code == kBadLabel ? NAN : class_weight ? __ldg(class_weight + code) : 1.0f;
    }
    sum += of_row;
  }
  sum = block_sum(sum, shared.scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// 1 / the denominator, 0 where nothing is labelled. Every block adds the same numbers in the same order.
__device__ float inverse_denominator(const CrossEntropyTask& task, double* scratch) {
  if (task.denominator) return *task.denominator == 0.0f ? 0.0f : 1.0f / *task.denominator;
  if (!task.partial_denominator) return 1.0f;
  const int t = threadIdx.x;
  const double sum = block_sum(t < task.denominators ? task.partial_denominator[t] : 0.0, scratch);
  return sum == 0.0 ? 0.0f : static_cast<float>(1.0 / sum);
}

// ---- the loss ---------------------------------------------------------------------------------------------------

// Which part of the map is the block's.
__device__ __forceinline__ void find_place(const CrossEntropyTask& task, Shared& shared) {
  const CellPlan& plan = task.plan;
  if (threadIdx.x == 0) {
    const int tile = static_cast<int>(blockIdx.x % plan.tiles),
              strip = static_cast<int>(blockIdx.x / plan.tiles % plan.strips);
    shared.image = blockIdx.x / plan.tiles / plan.strips;
    shared.first_row = plan.first_row(strip), shared.first_column = plan.first_column(tile);
    shared.nodes = {shared.first_row + 1, min(task.y.size, shared.first_row + plan.group_rows() * plan.groups)};
    shared.first_tile = tile == 0, shared.first_strip = strip == 0;
  }
  shared.losses[threadIdx.x] = 0.0f, shared.weights[threadIdx.x] = 0.0f;
  __syncthreads();
}

// A lane's cell: the first column of cells and row of cells are the halo, and are another block's unless there is none
// before.
struct Lane {
  int warp, lane;
  int cell, part;  // along the row, from 0; which part of the cell's columns
  CornerOffsets corners;
};

// Reads the labels of a window. Returns whether any pixel has a class; adds the class weights of the lane's own pixels.
template <int kRows, int kColumns>
__device__ __forceinline__ bool read_codes(const CrossEntropyTask& task, const PixelPlace& place, const Window& window,
                                           bool mine, float& weight) {
  const Labels& labels = task.labels;
  const int64_t first = place.image * labels.stride_b + place.row * labels.stride_h + place.column * labels.stride_w;
  bool any = false;
#pragma unroll 1
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      int code = kNoClass;
      if (i < window.rows && j < window.columns)
        code = class_at(labels, first + i * labels.stride_h + j * labels.stride_w);
      place.codes[(i * kColumns + j) * kUpThreads] = static_cast<int16_t>(code);
      any |= code >= 0;
      if (mine && code != kNoClass) weight += code == kBadLabel ? NAN : class_weight_of(task, code);
    }
  }
  return any;
}

// Adds up a cell's lanes, then what a node gets from its own cell and from the one before. -> upper, lower node of the
// cell's left side.
__device__ __forceinline__ float2 node_sums(Corners g, int lanes_per_cell) {
  for (int lanes = 1; lanes < lanes_per_cell; lanes *= 2) {
    g.a += __shfl_xor_sync(kAllLanes, g.a, lanes), g.b += __shfl_xor_sync(kAllLanes, g.b, lanes);
    g.c += __shfl_xor_sync(kAllLanes, g.c, lanes), g.d += __shfl_xor_sync(kAllLanes, g.d, lanes);
  }
  return {g.a + __shfl_up_sync(kAllLanes, g.b, lanes_per_cell), g.c + __shfl_up_sync(kAllLanes, g.d, lanes_per_cell)};
}

// Writes, or adds to, the block's nodes around its cells: classes k0 on, cell rows cell_row on. The nodes between two
// groups of cell rows belong to both: the later one adds.
__device__ __forceinline__ void gather_nodes(const CrossEntropyTask& task, const Lane& at, const Shared& shared, int k0,
                                             int cell_row, bool again) {
  const CellPlan& plan = task.plan;
  const int rows = plan.group_rows(), node_column = shared.first_column + at.lane;
  const bool owned = at.lane >= 1 && at.lane < plan.cells() && node_column < task.x.size;
  for (int n = at.warp; n < kClasses * (rows + 1); n += kUpWarps) {
    const int c = n / (rows + 1), i = n - c * (rows + 1), k = k0 + c, node = cell_row + i;
    if (!owned || k >= task.num_classes || node < shared.nodes.begin || node >= shared.nodes.end) continue;
    float sum = 0.0f;
    for (int s = 0; s < plan.row_warps; ++s) {
      if (i > 0) sum += shared.sums[1][c][(i - 1) * plan.row_warps + s][at.lane];
      if (i < rows) sum += shared.sums[0][c][i * plan.row_warps + s][at.lane];
    }
    float* to = task.dlogits + ((shared.image * task.num_classes + k) * task.y.size + node) * task.x.size + node_column;
    *to = again || (i == 0 && node > shared.nodes.begin) ? *to + sum : sum;
  }
}

template <class Pixels, class T>
__device__ __forceinline__ void gradient(const CrossEntropyTask& task, const Lane& at, Shared& shared,
                                         const Pixels& pixels, const T* plane, const Window& window,
                                         const PixelPlace& place, float bound, bool live, int cell_row, bool again) {
  int next = next_code<Pixels::kRows * Pixels::kColumns>(place, -1);
#pragma unroll 1
  for (int k0 = 0; k0 < task.num_classes; k0 += kClasses) {
#pragma unroll 1
    for (int c = 0; c < kClasses; ++c) {
      const int k = k0 + c;
      float2 nodes{0.0f, 0.0f};
      if (live && k < task.num_classes) {  // the same for all lanes of a warp
        const bool labelled = k == next;
        const Exponents e = exponents(Pixels::load(task, plane, at.corners), window, Pixels::factor(task), bound);
        const Moments2 sum = pixels.moments(task, e, window, place, k, labelled);
        if (labelled) next = next_code<Pixels::kRows * Pixels::kColumns>(place, k);
        nodes = node_sums(to_corners(sum, window), task.plan.lanes_per_cell);
        plane += task.stride_k;
      }
      if (at.part == 0) shared.sums[0][c][at.warp][at.cell] = nodes.x, shared.sums[1][c][at.warp][at.cell] = nodes.y;
    }
    __syncthreads();
    gather_nodes(task, at, shared, k0, cell_row, again);
    __syncthreads();
  }
}

// All windows of one group of cell rows. Pixels: how a window's pixels are held, NarrowWindow or WideWindow.
template <class Pixels, class T, int kPixels, bool kGradient>
__device__ __forceinline__ void group_of_rows(const CrossEntropyTask& task, const Lane& at, Shared& shared,
                                              const T* image, int cell_row, float bound, float scale) {
  const CellPlan& plan = task.plan;
  const int row = cell_row + at.warp / plan.row_warps, column = shared.first_column + at.cell;
  const bool mine =
      (at.cell >= plan.halo || shared.first_tile) && (row >= shared.first_row + plan.halo || shared.first_strip);
  const Range rows = pixels_of(task.y, row), columns = pixels_of(task.x, column);
  const int windows = (static_cast<int>(most_pixels(task.y)) + Pixels::kRows - 1) / Pixels::kRows;
  bool again = false;
  for (int w = 0; w < windows; w += plan.row_warps) {
    for (int step = 0; step < plan.column_steps; ++step, again = true) {
      const Range part =
          part_of(columns, step * plan.lanes_per_cell + at.part, plan.column_steps * plan.lanes_per_cell);
      const Window window =
          window_at(task, row, column, window_of(rows, w + at.warp % plan.row_warps, Pixels::kRows), part);
      float* values = reinterpret_cast<float*>(&shared + 1);
      const PixelPlace place{shared.image, window.row, window.column, values + threadIdx.x,
                             reinterpret_cast<int16_t*>(values + kPixels * kUpThreads) + threadIdx.x};
      const bool labelled =
          read_codes<Pixels::kRows, Pixels::kColumns>(task, place, window, mine, shared.weights[threadIdx.x]);
      const bool live = __any_sync(kAllLanes, labelled);
      Pixels pixels;
      shared.losses[threadIdx.x] +=
          pixels.losses(task, image, at.corners, window, place, live ? task.num_classes : 0, bound, scale, mine);
      if constexpr (kGradient) {
        if (!__syncthreads_or(live) && again) continue;
        gradient(task, at, shared, pixels, image, window, place, bound, live, cell_row, again);
      }
    }
  }
}

// Three blocks of the smallest window without a gradient fit a multiprocessor.
template <class T, int kRows, int kColumns, bool kGradient>
__global__ __launch_bounds__(kUpThreads, kRows* kColumns <= 9 && !kGradient
                                             ? 3
                                             : 2) void cross_entropy_kernel(const CrossEntropyTask task) {
  Shared& shared = *shared_memory<Shared>();
  const float scale = kGradient ? inverse_denominator(task, shared.scratch) * task.inv_temperature : 0.0f;
  find_place(task, shared);
  const int lane = threadIdx.x % 32;
  Lane at{
      static_cast<int>(threadIdx.x) / 32, lane, lane / task.plan.lanes_per_cell, lane % task.plan.lanes_per_cell, {}};
  const T* image = static_cast<const T*>(task.logits) + shared.image * task.stride_b;
#pragma unroll 1
  for (int group = 0; group < task.plan.groups; ++group) {
    const int cell_row = shared.first_row + group * task.plan.group_rows();
    if (cell_row >= task.y.size) break;
    at.corners = corner_offsets(task, cell_row + at.warp / task.plan.row_warps, shared.first_column + at.cell);
    const Bounds bounds = bounds_of(task, image, at.corners);
    if (__syncthreads_and(bounds.narrow && task.num_classes <= kNarrowClasses)) {
      group_of_rows<NarrowWindow<kRows, kColumns>, T, kRows * kColumns, kGradient>(task, at, shared, image, cell_row,
                                                                                   bounds.top, scale);
    } else {
      group_of_rows<WideWindow<kColumns>, T, kRows * kColumns, kGradient>(task, at, shared, image, cell_row, 0.0f,
                                                                          scale);
    }
  }
  const double losses = block_sum(shared.losses[threadIdx.x], shared.scratch);
  const double weights = block_sum(shared.weights[threadIdx.x], shared.scratch);
  if (threadIdx.x == 0) task.partial[blockIdx.x] = losses, task.partial[gridDim.x + blockIdx.x] = weights;
}

// One block: the sums over all blocks, in a fixed order -> loss.
__global__ __launch_bounds__(kUpThreads) void finish_kernel(const double* partial, int64_t blocks, bool mean,
                                                            const float* denominator, float* loss) {
  Shared& shared = *shared_memory<Shared>();
  double loss_sum = 0.0, weight_sum = 0.0;
  for (int64_t n = threadIdx.x; n < blocks; n += kUpThreads) loss_sum += partial[n], weight_sum += partial[blocks + n];
  loss_sum = block_sum(loss_sum, shared.scratch), weight_sum = block_sum(weight_sum, shared.scratch);
  if (denominator && !isnan(weight_sum)) weight_sum = *denominator;
  if (threadIdx.x == 0) *loss = static_cast<float>(!mean ? loss_sum : weight_sum == 0.0 ? 0.0 : loss_sum / weight_sum);
}

// ---- launches ---------------------------------------------------------------------------------------------------

struct Shape {
  int rows, columns;
};

// The window a lane holds: a cell's columns whole, as far as registers go, or half of them.
Shape shape_of(const Upsampling& a) {
  const int64_t pixels =
      most_pixels(make_axis(static_cast<int>(a.logits.width), static_cast<int>(a.width), a.align_corners));
  return pixels <= 3 ? Shape{3, 3} : pixels <= 5 || pixels == 9 || pixels == 10 ? Shape{5, 5} : Shape{3, 8};
}

CrossEntropyTask make_cross_entropy_task(const UpsampledCrossEntropy& a, const Shape& shape) {
  CrossEntropyTask task{};
  static_cast<UpsamplingTask&>(task) = make_task(a, shape.rows, shape.columns, a.dlogits != nullptr, 8);
  task.labels = a.labels, task.class_weight = a.class_weight, task.pixel_weight = a.pixel_weight;
  task.loss_map = a.loss_map, task.dlogits = a.dlogits;
  task.inv_temperature = static_cast<float>(1.0 / a.temperature);
  const int64_t label_blocks = std::min<int64_t>(ceil_div(a.logits.batch * a.height, kUpWarps), kLabelBlocks);
  task.denominator = a.mean ? a.denominator : nullptr;
  task.denominators = a.dlogits && a.mean && !a.denominator ? static_cast<int>(label_blocks) : 0;
  task.partial = a.workspace,
  task.partial_denominator = task.denominators ? a.workspace + 2 * blocks_of(task, a.logits.batch) : nullptr;
  return task;
}

template <class T, int kRows, int kColumns>
Status launch_shape(const CrossEntropyTask& task, int64_t batch, Stream stream) {
  const size_t of_pixels = kRows * kColumns * kUpThreads * (sizeof(float) + sizeof(int16_t));
  const Grid grid{static_cast<unsigned>(blocks_of(task, batch)), kUpThreads, sizeof(Shared) + of_pixels};
  return task.dlogits ? launch(cross_entropy_kernel<T, kRows, kColumns, true>, grid, stream, task)
                      : launch(cross_entropy_kernel<T, kRows, kColumns, false>, grid, stream, task);
}

}  // namespace

int64_t upsampled_cross_entropy_workspace(const UpsampledCrossEntropy& a) {
  return 2 * blocks_of(make_cross_entropy_task(a, shape_of(a)), a.logits.batch) + kLabelBlocks;
}

Status upsampled_cross_entropy(const UpsampledCrossEntropy& a, Stream stream) {
  const Shape shape = shape_of(a);
  const CrossEntropyTask task = make_cross_entropy_task(a, shape);
  if (task.partial_denominator) {
    const Status status =
        launch(label_weight_kernel, Grid{static_cast<unsigned>(task.denominators), kUpThreads, sizeof(Shared)}, stream,
               a.labels, a.logits.batch * a.height, a.class_weight, const_cast<double*>(task.partial_denominator));
    if (status) return status;
  }
  const Status status = with_float_type(a.logits.type, [&](auto type) {
    using T = decltype(type);
    if (shape.columns == 3) return launch_shape<T, 3, 3>(task, a.logits.batch, stream);
    if (shape.columns == 5) return launch_shape<T, 5, 5>(task, a.logits.batch, stream);
    return launch_shape<T, 3, 8>(task, a.logits.batch, stream);
  });
  if (status || a.loss_map) return status;
  return launch(finish_kernel, Grid{1, kUpThreads, sizeof(Shared)}, stream, a.workspace,
                blocks_of(task, a.logits.batch), a.mean, a.denominator, a.loss);
}

}  // namespace spcl::gpu
