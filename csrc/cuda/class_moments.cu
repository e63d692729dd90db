// class_moments: the launches. See class_moments.cuh for how it works.
#include "class_moments.cuh"

namespace spcl::gpu {

MomentsPlan plan_moments(const Features& x, int64_t num_classes, bool normalize) {
  return moments_plan(x, num_classes, normalize, shared_memory_limit());
}

// The ranges: everything but their sum.
static Status launch_ranges(const Moments& a, Stream stream) {
  if (a.plan.ranges == 0) return nullptr;
  return with_float_type(a.x.type, [&](auto type) -> Status {
    using T = decltype(type);
    if (a.normalize && !a.plan.own_norms) {
      const unsigned blocks = static_cast<unsigned>(ceil_div(a.x.batch * a.x.height * a.x.width, 32));
      if (Status wrong = launch(norms_kernel<T>, Grid{blocks, kNormThreads, kNormThreads * sizeof(float)}, stream, a.x, a.norms)) return wrong;
    }
    const size_t shared = moments_memory(a.plan, sizeof(T), a.num_classes).bytes;
    const Grid grid{static_cast<unsigned>(a.plan.ranges * a.plan.slices), static_cast<unsigned>(a.plan.threads), shared};
    return launch(a.squares ? moments_kernel<T, true> : moments_kernel<T, false>, grid, stream, a);
  });
}

Status class_moments(const Moments& a, Stream stream) {
  if (Status wrong = launch_ranges(a, stream)) return wrong;
  const unsigned blocks = static_cast<unsigned>(ceil_div(total_rows(a), kTotalWarps / total_parts(a)));
  return launch(moments_total_kernel, Grid{blocks, kTotalWarps * 32, kTotalWarps * 32 * sizeof(double)}, stream, a);
}

}  // namespace spcl::gpu
