// class_moments: the launches and the total. See class_moments.cuh for how it works.
#include "class_moments.cuh"
#include "class_totals.cuh"
#include "pixel_norms.cuh"

namespace spcl::gpu {

MomentsPlan plan_moments(const Features& x, int64_t num_classes, bool normalize, bool weighted) {
  return moments_plan(x, num_classes, normalize, shared_memory_limit(), weighted);
}

Status launch_ranges(const Moments& a, Stream stream) {
  if (a.plan.ranges == 0) return nullptr;
  return with_float_type(a.x.type, [&](auto type) -> Status {
    using T = decltype(type);
    if (a.normalize && !a.plan.own_norms) {
      const unsigned blocks = static_cast<unsigned>(ceil_div(a.x.batch * a.x.height * a.x.width, 32));
      if (Status wrong =
              launch(norms_kernel<T>, Grid{blocks, kNormThreads, kNormThreads * sizeof(float)}, stream, a.x, a.norms))
        return wrong;
    }
    const size_t shared = moments_memory(a.plan, sizeof(T), a.num_classes).bytes;
    const Grid grid{static_cast<unsigned>(a.plan.ranges * a.plan.slices), static_cast<unsigned>(a.plan.threads),
                    shared};
    if (a.plan.weighted)
      return launch(a.squares ? moments_kernel<T, true, true> : moments_kernel<T, false, true>, grid, stream, a);
    return launch(a.squares ? moments_kernel<T, true, false> : moments_kernel<T, false, false>, grid, stream, a);
  });
}

// Weights are a template's, so that without them more blocks fit a multiprocessor.
template <bool kWeighted>
__global__ void __launch_bounds__(kTotalWarps * 32) moments_total_kernel(const __grid_constant__ Moments a) {
  double* shared = shared_memory<double>();  // [warps][32]
  const TotalPlace t = total_place(a, blockIdx.x, threadIdx.x);
  const bool mine = t.inside && t.part == 0;
  const float sum = add_ranges(a, a.partial_sums, t, shared);
  if (mine) a.sums[t.k * a.x.dim + t.d] = sum;
  if (a.squares) {
    const float square = add_ranges(a, a.partial_squares, t, shared);
    if (mine) a.squares[t.k * a.x.dim + t.d] = square;
  }
  if (t.d < 32 && t.part == 0 && t.k < a.num_classes) {  // a whole warp, whatever D is
    const int64_t count = add_counts(a, t.k);
    if (t.d == 0 && a.counts) a.counts[t.k] = count;
    if constexpr (kWeighted) {
      const float weight = add_weights(a, t.k);
      if (t.d == 0) a.weights[t.k] = weight;
    }
  }
}

Status class_moments(const Moments& a, Stream stream) {
  if (Status wrong = launch_ranges(a, stream)) return wrong;
  const Grid grid{total_blocks(a), kTotalWarps * 32, kTotalWarps * 32 * sizeof(double)};
  return launch(a.weights ? moments_total_kernel<true> : moments_total_kernel<false>, grid, stream, a);
}

}  // namespace spcl::gpu
