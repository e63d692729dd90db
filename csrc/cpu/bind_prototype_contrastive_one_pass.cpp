// prototype_contrastive_loss and its features' gradient in one pass: schema, tensors as plain structs, the denominator
// first. No arithmetic on features here.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/bind_contrast.h"
#include "cpu/bind_levels.h"

namespace spcl {
namespace {

constexpr int64_t kPastCacheBytes = 16 << 20;

// dfeatures is written whole, unless a label is bad.
std::tuple<Tensor, Tensor> prototype_contrastive_one_pass(Tensor features, Tensor labels, Tensor prototypes,
                                                          std::optional<Tensor> class_weight,
                                                          std::optional<Tensor> pixel_weight,
                                                          std::optional<Tensor> given_denominator, Tensor dfeatures,
                                                          std::vector<double> numbers, std::vector<int64_t> choices,
                                                          bool mean) {
  const ContrastSettings s(numbers, choices);
  ContrastOnePass a{};
  const std::optional<Tensor> none;
  ContrastProblem problem({features, prototypes, class_weight, pixel_weight, none, none, none}, s, &a, true, true);
  STD_TORCH_CHECK(!problem.needs_options() && a.x.type != kFloat16,
                  "spcl_fast_cpu: one pass is for the plain loss of float32 and bfloat16");
  const LabelMap map(labels, a.x, s.num_classes, s.ignore_index);
  a.labels = map.view, a.dx = as_features(dfeatures);
  a.tiles = make_tiles(a.x, a.x.dim + a.num_rows);
  a.past_cache = features.numel() * features.element_size() >= kPastCacheBytes;
  std::vector<double> partial(2 * a.tiles.count);
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  a.partial_loss = partial.data(), a.partial_weight = partial.data() + a.tiles.count, a.first_bad = &first_bad;

  const Kernels& isa = kernels();
  torch::stable::parallel_for(0, a.tiles.count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) isa.contrast_weight(a, tile);
  });
  double weight = std::accumulate(a.partial_weight, a.partial_weight + a.tiles.count, 0.0);
  if (given_denominator) weight = weight == 0 ? 0 : *as_floats(*given_denominator);
  a.denominator = mean ? static_cast<float>(weight) : 1.0f;
  Tensor loss = empty_floats({});
  const bool bad = first_bad != std::numeric_limits<int64_t>::max();
  if (!bad)
    for_each_group(a.tiles.count, isa.contrast_one_pass_scratch(a),
                   [&](int64_t tile, float* scratch) { isa.contrast_one_pass(a, tile, scratch); });
  const double total = std::accumulate(a.partial_loss, a.partial_loss + a.tiles.count, 0.0);
  *floats(loss) = static_cast<float>(mean ? (weight != 0 ? total / weight : 0.0) : total);
  return {loss, map.report(first_bad, a.x)};
}

}  // namespace
}  // namespace spcl

STABLE_TORCH_LIBRARY_FRAGMENT(spcl_fast_cpu, m) {
  // numbers, choices: ContrastSettings in bind_contrast.h
  m.def(
      "prototype_contrastive_one_pass(Tensor features, Tensor labels, Tensor prototypes, Tensor? class_weight, Tensor? "
      "pixel_weight, Tensor? denominator, Tensor(a!) dfeatures, float[] numbers, int[] choices, bool mean) "
      "-> (Tensor loss, Tensor report)");
}

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cpu, CPU, m) {
  m.impl("prototype_contrastive_one_pass", TORCH_BOX(&spcl::prototype_contrastive_one_pass));
}
