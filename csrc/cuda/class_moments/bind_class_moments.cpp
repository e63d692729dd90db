// class_moments, and the prototype update that is built on it: tensors in, workspaces, tensors out.
#include <tuple>

#include "../bind.h"

namespace spcl::gpu {
namespace {

struct Problem {
  Moments a{};
  Tensor floats, counts;  // what the kernels leave to each other

  Problem(const Tensor& features, const Tensor& labels, const Tensor& flag, int64_t num_classes, bool normalize,
          bool squares, int64_t ignore_index, const std::optional<Tensor>& pixel_weight = std::nullopt)
      : a(described(features, labels, flag, num_classes, normalize, ignore_index, pixel_weight)),
        floats(empty_floats(features, {a.plan.sums_floats * (squares ? 2 : 1) + a.plan.norms_floats +
                                       (a.plan.weighted ? a.plan.counts_ints : 0)})),
        counts(empty(features, {a.plan.counts_ints}, ScalarType::Int)) {
    float* at = data_of<float>(floats);
    a.partial_sums = at;
    a.partial_squares = squares ? at + a.plan.sums_floats : nullptr;
    at += a.plan.sums_floats * (squares ? 2 : 1);
    a.norms = a.plan.norms_floats ? at : nullptr;
    a.partial_weights = a.plan.weighted ? at + a.plan.norms_floats : nullptr;
    a.partial_counts = data_of<int>(counts);
  }

  static Moments described(const Tensor& features, const Tensor& labels, const Tensor& flag, int64_t num_classes,
                           bool normalize, int64_t ignore_index, const std::optional<Tensor>& pixel_weight) {
    Moments a{};
    a.x = as_features(features);
    a.labels = as_labels(labels, a.x.height, a.x.width, ignore_index, num_classes, flag);
    a.num_classes = num_classes, a.normalize = normalize;
    a.pixel_weight = as_floats(pixel_weight);
    a.plan = plan_moments(a.x, num_classes, normalize, pixel_weight.has_value());
    return a;
  }
};

std::tuple<Tensor, Tensor, Tensor> class_moments_(Tensor features, Tensor labels, std::optional<Tensor> pixel_weight,
                                                  Tensor flag, int64_t num_classes, bool normalize, bool squares,
                                                  int64_t ignore_index) {
  const OnDevice device(features);
  Problem problem(features, labels, flag, num_classes, normalize, squares, ignore_index, pixel_weight);
  Moments& a = problem.a;
  const Tensor sums = empty_floats(features, {num_classes, a.x.dim});
  const Tensor square_sums = squares ? empty_floats(features, {num_classes, a.x.dim}) : empty_floats(features, {0});
  const Tensor counts = empty(features, {num_classes}, pixel_weight ? ScalarType::Float : ScalarType::Long);
  a.sums = data_of<float>(sums), a.squares = data_of<float>(square_sums);
  a.counts = pixel_weight ? nullptr : data_of<int64_t>(counts);
  a.weights = pixel_weight ? data_of<float>(counts) : nullptr;
  check(class_moments(a, device.stream()), "class_moments");
  return {sums, counts, square_sums};
}

void move_prototypes_(Tensor prototypes, Tensor features, Tensor labels, Tensor flag, double keep, int64_t min_pixels,
                      bool decay_absent, bool normalize, int64_t ignore_index) {
  const OnDevice device(features);
  const Problem problem(features, labels, flag, prototypes.size(0), normalize, false, ignore_index);
  STD_TORCH_CHECK(prototypes.size(1) == problem.a.x.dim, "spcl_fast cuda backend: prototypes must be [K, ",
                  problem.a.x.dim, "]");
  const PrototypeMove move{const_cast<float*>(as_floats(prototypes)), static_cast<float>(keep), min_pixels,
                           decay_absent};
  check(move_prototypes(problem.a, move, device.stream()), "move_prototypes");
}

}  // namespace
}  // namespace spcl::gpu

SPCL_OPS(m) {
  m.def(
      "class_moments(Tensor features, Tensor labels, Tensor? pixel_weight, Tensor(a!) flag, int num_classes, bool "
      "normalize, bool squares, int ignore_index) "
      "-> (Tensor sums, Tensor counts, Tensor squares)");
  m.def(
      "move_prototypes(Tensor(a!) prototypes, Tensor features, Tensor labels, Tensor(b!) flag, float keep, int "
      "min_pixels, bool decay_absent, "
      "bool normalize, int ignore_index) -> ()");
}

SPCL_OPS_IMPL(m) {
  m.impl("class_moments", TORCH_BOX(&spcl::gpu::class_moments_));
  m.impl("move_prototypes", TORCH_BOX(&spcl::gpu::move_prototypes_));
}
