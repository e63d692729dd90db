// class_moments: its schema, tensors as plain structs, partial sums in a fixed order. No arithmetic on features here.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/bind_levels.h"
#include "cpu/bind_tensors.h"
#include "cpu/bind_threads.h"

namespace spcl {
namespace {

void sum_partials(const std::vector<float>& partial, int64_t groups, float* out, int64_t size) {
  torch::stable::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    double sum[256];
    for (int64_t first = begin; first < end; first += 256) {
      const int64_t count = std::min<int64_t>(256, end - first);
      std::fill(sum, sum + count, 0.0);
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t i = 0; i < count; ++i) sum[i] += partial[g * size + first + i];
      for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<float>(sum[i]);
    }
  });
}

// Of the groups' partial sums, in their order: int64 numbers of pixels, or float32 sums of their weights.
template <class T, class Partial>
Tensor total_of(const std::vector<Partial>& partial, int64_t num_classes, ScalarType type) {
  std::vector<Partial> total(num_classes);
  for (size_t i = 0; i < partial.size(); ++i) total[i % num_classes] += partial[i];
  Tensor out = torch::stable::empty({num_classes}, type);
  std::copy(total.begin(), total.end(), static_cast<T*>(out.data_ptr()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_moments(Tensor features, Tensor labels,
                                                         std::optional<Tensor> pixel_weight, int64_t num_classes,
                                                         bool normalize, bool squares, int64_t ignore_index) {
  Moments a{};
  a.x = as_features(features);
  const int64_t K = num_classes, D = a.x.dim;
  const LabelMap map(labels, a.x, K, ignore_index);
  a.labels = map.view, a.num_classes = K, a.normalize = normalize, a.tiles = make_tiles(a.x, 512);
  const int64_t groups = a.groups = partial_groups(a.x, K, a.tiles.count);
  std::vector<float> sums(groups * K * D), square_sums(squares ? groups * K * D : 0);
  std::vector<int64_t> counts(groups * K);
  std::vector<double> weights(pixel_weight ? groups * K : 0);
  a.pixel_weight = as_pixel_map(pixel_weight), a.weights = weights.data();
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  a.sums = sums.data(), a.squares = squares ? square_sums.data() : nullptr, a.counts = counts.data(),
  a.first_bad = &first_bad;

  const Kernels& isa = kernels();
  for_each_group(groups, isa.class_moments_scratch(a),
                 [&](int64_t group, float* scratch) { isa.class_moments(a, group, scratch); });
  Tensor out = empty_floats({K, D}), out_squares = squares ? empty_floats({K, D}) : empty_floats({0});
  Tensor out_counts =
      pixel_weight ? total_of<float>(weights, K, ScalarType::Float) : total_of<int64_t>(counts, K, ScalarType::Long);
  sum_partials(sums, groups, floats(out), K * D);
  if (squares) sum_partials(square_sums, groups, floats(out_squares), K * D);
  return {out, out_counts, out_squares, map.report(first_bad, a.x)};
}

}  // namespace
}  // namespace spcl

STABLE_TORCH_LIBRARY_FRAGMENT(spcl_fast_cpu, m) {
  m.def(
      "class_moments(Tensor features, Tensor labels, Tensor? pixel_weight, int num_classes, bool normalize, bool "
      "squares, int ignore_index) "
      "-> (Tensor sums, Tensor counts, Tensor squares, Tensor report)");
}

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cpu, CPU, m) { m.impl("class_moments", TORCH_BOX(&spcl::class_moments)); }
