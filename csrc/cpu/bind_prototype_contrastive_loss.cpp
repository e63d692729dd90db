// prototype_contrastive_loss: its schemas, tensors as plain structs, partial sums in a fixed order. No arithmetic on features here.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/bind_levels.h"
#include "cpu/bind_pages.h"
#include "cpu/bind_tensors.h"
#include "cpu/bind_threads.h"

namespace spcl {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prototype_contrastive_forward(
    Tensor features, Tensor labels, Tensor prototypes, std::optional<Tensor> class_weight, std::optional<Tensor> pixel_weight, double temperature,
    bool normalize, int64_t ignore_index, bool mean, bool per_pixel, bool save, bool save_logits) {
  ContrastForward a{};
  a.x = as_features(features);
  const int64_t K = prototypes.size(0), D = a.x.dim, P = a.x.height * a.x.width, B = a.x.batch;
  const LabelMap map(labels, a.x, K, ignore_index);
  const PanelBuffer by_class(as_floats(prototypes), K, D, D, 1);
  a.labels = map.view, a.by_class = by_class.view, a.num_classes = K;
  a.class_weight = as_floats(class_weight);
  a.pixel_weight = as_pixel_map(pixel_weight);
  a.temperature = static_cast<float>(temperature), a.normalize = normalize;
  a.tiles = make_tiles(a.x, 128 + K);

  Tensor loss = per_pixel ? empty_floats({B, a.x.height, a.x.width}) : empty_floats({});
  Tensor denominator = empty_floats({});
  Tensor lse = save ? empty_floats({B, P}) : empty_floats({0}), inv_norm = save ? empty_floats({B, P}) : empty_floats({0});
  Tensor logits = save && save_logits ? empty_logits(B, K, P) : empty_floats({0});
  a.loss_map = per_pixel ? floats(loss) : nullptr;
  if (save) a.lse = floats(lse), a.inv_norm = floats(inv_norm);
  if (save && save_logits) a.logits = floats(logits);
  std::vector<double> partial(2 * a.tiles.count);
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  a.partial_loss = partial.data(), a.partial_weight = partial.data() + a.tiles.count, a.first_bad = &first_bad;

  const Kernels& isa = kernels();
  for_each_group(a.tiles.count, isa.contrast_forward_scratch(a), [&](int64_t tile, float* scratch) { isa.contrast_forward(a, tile, scratch); });

  double total = 0, weight = 0;
  for (int64_t tile = 0; tile < a.tiles.count; ++tile) total += a.partial_loss[tile], weight += a.partial_weight[tile];
  *floats(denominator) = mean ? static_cast<float>(weight) : 1.0f;
  if (!per_pixel) *floats(loss) = static_cast<float>(mean && weight != 0 ? total / weight : total);
  return {loss, denominator, lse, inv_norm, logits, map.report(first_bad, a.x)};
}

// partial [groups][D][stride] -> out [K, D], summed in the order of the groups.
void sum_prototype_partials(const std::vector<float>& partial, int64_t groups, int64_t dim, int64_t stride, int64_t num_classes, float* out) {
  torch::stable::parallel_for(0, dim, 64, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d)
      for (int64_t k = 0; k < num_classes; ++k) {
        double sum = 0;
        for (int64_t g = 0; g < groups; ++g) sum += partial[(g * dim + d) * stride + k];
        out[k * dim + d] = static_cast<float>(sum);
      }
  });
}

constexpr int64_t kPastCacheBytes = 16 << 20;

// dfeatures is written whole; or has no element where it is not wanted. Returns dprototypes [K, D] or [0].
Tensor prototype_contrastive_backward(
    Tensor grad_loss, Tensor features, Tensor labels, Tensor prototypes, std::optional<Tensor> class_weight, std::optional<Tensor> pixel_weight,
    Tensor lse, Tensor inv_norm, Tensor logits, Tensor denominator, Tensor dfeatures, double temperature, bool normalize, int64_t ignore_index,
    bool needs_dfeatures, bool needs_dprototypes) {
  ContrastBackward a{};
  a.x = as_features(features);
  const int64_t K = prototypes.size(0), D = a.x.dim;
  const LabelMap map(labels, a.x, K, ignore_index);
  const float* proto = as_floats(prototypes);
  const PanelBuffer by_class(logits.numel() ? nullptr : proto, K, D, D, 1), by_channel(proto, D, K, 1, D);
  a.labels = map.view, a.by_class = by_class.view, a.by_channel = by_channel.view, a.num_classes = K;
  a.class_weight = as_floats(class_weight);
  a.pixel_weight = as_pixel_map(pixel_weight), a.grad = as_pixel_map(grad_loss);
  a.temperature = static_cast<float>(temperature), a.normalize = normalize;
  a.denominator = *as_floats(denominator), a.lse = as_floats(lse), a.inv_norm = as_floats(inv_norm);
  a.logits = logits.numel() ? as_floats(logits) : nullptr;
  if (needs_dfeatures) a.dx = as_features(dfeatures);
  a.past_cache = features.numel() * features.element_size() >= kPastCacheBytes;
  a.tiles = make_tiles(a.x, (!a.logits || needs_dprototypes ? D : 48) + K);

  const int64_t groups = needs_dprototypes ? partial_groups(a.x, K, a.tiles.count) : a.tiles.count;
  a.dproto_stride = needs_dprototypes ? (K + 31) / 32 * 32 : 0;
  std::vector<float> partial(needs_dprototypes ? groups * D * a.dproto_stride : 0);
  a.dproto = needs_dprototypes ? partial.data() : nullptr;
  const Kernels& isa = kernels();
  for_each_group(groups, isa.contrast_backward_scratch(a), [&](int64_t group, float* scratch) {
    for (int64_t tile = group * a.tiles.count / groups; tile < (group + 1) * a.tiles.count / groups; ++tile)
      isa.contrast_backward(a, tile, group, scratch);
  });
  Tensor dprototypes = needs_dprototypes ? empty_floats({K, D}) : empty_floats({0});
  if (needs_dprototypes) sum_prototype_partials(partial, groups, D, a.dproto_stride, K, floats(dprototypes));
  return dprototypes;
}

}  // namespace
}  // namespace spcl

STABLE_TORCH_LIBRARY_FRAGMENT(spcl_fast_cpu, m) {
  m.def(
      "prototype_contrastive_forward(Tensor features, Tensor labels, Tensor prototypes, Tensor? class_weight, Tensor? pixel_weight, "
      "float temperature, bool normalize, int ignore_index, bool mean, bool per_pixel, bool save, bool save_logits) "
      "-> (Tensor loss, Tensor denominator, Tensor lse, Tensor inv_norm, Tensor logits, Tensor report)");
  m.def(
      "prototype_contrastive_backward(Tensor grad_loss, Tensor features, Tensor labels, Tensor prototypes, Tensor? class_weight, "
      "Tensor? pixel_weight, Tensor lse, Tensor inv_norm, Tensor logits, Tensor denominator, Tensor(a!) dfeatures, float temperature, "
      "bool normalize, int ignore_index, bool needs_dfeatures, bool needs_dprototypes) -> Tensor dprototypes");
}

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cpu, CPU, m) {
  m.impl("prototype_contrastive_forward", TORCH_BOX(&spcl::prototype_contrastive_forward));
  m.impl("prototype_contrastive_backward", TORCH_BOX(&spcl::prototype_contrastive_backward));
}
