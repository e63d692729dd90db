// class_moments: tensors in, workspaces, tensors out.
#include <tuple>

#include "bind.h"

namespace spcl::gpu {
namespace {

// One buffer for what the kernels leave to each other.
struct MomentsWorkspace {
  Tensor floats, ints;
  MomentsWorkspace(const Tensor& like, Moments& a, bool squares)
      : floats(empty_floats(like, {a.plan.sums_floats * (squares ? 2 : 1) + a.plan.norms_floats})),
        ints(empty(like, {a.plan.counts_ints}, ScalarType::Int)) {
    float* at = data_of<float>(floats);
    a.partial_sums = at;
    a.partial_squares = squares ? at + a.plan.sums_floats : nullptr;
    a.norms = a.plan.norms_floats ? at + a.plan.sums_floats * (squares ? 2 : 1) : nullptr;
    a.partial_counts = data_of<int>(ints);
  }
};

std::tuple<Tensor, Tensor, Tensor> class_moments_(Tensor features, Tensor labels, Tensor flag, int64_t num_classes, bool normalize, bool squares,
                                                  int64_t ignore_index) {
  const OnDevice device(features);
  Moments a{};
  a.x = as_features(features);
  a.labels = as_labels(labels, a.x.height, a.x.width, ignore_index, num_classes, flag);
  a.num_classes = num_classes, a.normalize = normalize;
  a.plan = plan_moments(a.x, num_classes, normalize);
  const MomentsWorkspace workspace(features, a, squares);
  const Tensor sums = empty_floats(features, {num_classes, a.x.dim});
  const Tensor square_sums = squares ? empty_floats(features, {num_classes, a.x.dim}) : empty_floats(features, {0});
  const Tensor counts = empty(features, {num_classes}, ScalarType::Long);
  a.sums = data_of<float>(sums), a.squares = data_of<float>(square_sums), a.counts = data_of<int64_t>(counts);
  check(class_moments(a, device.stream()), "class_moments");
  return {sums, counts, square_sums};
}

}  // namespace
}  // namespace spcl::gpu

SPCL_OPS(m) {
  m.def(
      "class_moments(Tensor features, Tensor labels, Tensor(a!) flag, int num_classes, bool normalize, bool squares, int ignore_index) "
      "-> (Tensor sums, Tensor counts, Tensor squares)");
}

SPCL_OPS_IMPL(m) { m.impl("class_moments", TORCH_BOX(&spcl::gpu::class_moments_)); }
