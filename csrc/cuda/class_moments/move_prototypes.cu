// The prototype update of a source step: class_moments whose total is not written but moves the prototypes. No host
// sync, two launches (three where the norms are a pass of their own), one read of the features.
#include "class_totals.cuh"

namespace spcl::gpu {

static __device__ __forceinline__ float moved(const PrototypeMove& move, float old, float sum, int64_t count) {
  if (count >= move.min_pixels) return move.keep * old + (1.0f - move.keep) * (sum / static_cast<float>(count));
  return move.decay_absent ? move.keep * old : old;
}

__global__ void __launch_bounds__(kTotalWarps * 32)
    move_kernel(const __grid_constant__ Moments a, const PrototypeMove move) {
  double* shared = shared_memory<double>();  // [warps][32]
  const TotalPlace t = total_place(a, blockIdx.x, threadIdx.x);
  const float sum = add_ranges(a, a.partial_sums, t, shared);
  if (t.part != 0 || t.k >= a.num_classes) return;
  const int64_t count = add_counts(a, t.k);
  if (!t.inside) return;
  float* prototype = move.prototypes + t.k * a.x.dim + t.d;
  *prototype = moved(move, *prototype, sum, count);
}

Status move_prototypes(const Moments& a, const PrototypeMove& move, Stream stream) {
  if (Status wrong = launch_ranges(a, stream)) return wrong;
  return launch(move_kernel, Grid{total_blocks(a), kTotalWarps * 32, kTotalWarps * 32 * sizeof(double)}, stream, a,
                move);
}

}  // namespace spcl::gpu
