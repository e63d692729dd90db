// prototype_contrastive_loss: tensors in, workspaces, tensors out.
#include <tuple>

#include "../bind.h"

namespace spcl::gpu {
namespace {

void set_input(Contrast& a, const Tensor& features, const Tensor& labels, const Tensor& prototypes,
               const std::optional<Tensor>& class_weight, const std::optional<Tensor>& pixel_weight, const Tensor& flag,
               double temperature, bool normalize, int64_t ignore_index) {
  a.x = as_features(features);
  a.num_classes = prototypes.size(0);
  a.labels = as_labels(labels, a.x.height, a.x.width, ignore_index, a.num_classes, flag);
  STD_TORCH_CHECK(
      prototypes.scalar_type() == features.scalar_type() && prototypes.is_contiguous() && prototypes.size(1) == a.x.dim,
      "spcl_fast cuda backend: prototypes must be contiguous [K, D] of the features' dtype");
  a.prototypes = prototypes.data_ptr();
  a.class_weight = as_floats(class_weight), a.pixel_weight = as_pixel_map(pixel_weight);
  a.temperature = static_cast<float>(temperature), a.normalize = normalize;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor features, Tensor labels, Tensor prototypes,
                                                           std::optional<Tensor> class_weight,
                                                           std::optional<Tensor> pixel_weight, Tensor flag,
                                                           double temperature, bool normalize, int64_t ignore_index,
                                                           bool mean, bool per_pixel, bool save, bool save_logits) {
  const OnDevice device(features);
  ContrastForward a{};
  set_input(a, features, labels, prototypes, class_weight, pixel_weight, flag, temperature, normalize, ignore_index);
  const int64_t B = a.x.batch, P = a.x.height * a.x.width;
  const Tensor loss = per_pixel ? empty_floats(features, {B, a.x.height, a.x.width}) : empty_floats(features, {});
  const Tensor denominator = empty_floats(features, {});
  const Tensor partial = empty_floats(features, {per_pixel ? 0 : 2 * contrast_blocks(a.x)});
  const Tensor lse = save ? empty_floats(features, {B, P}) : empty_floats(features, {0});
  const Tensor inv_norm = save ? empty_floats(features, {B, P}) : empty_floats(features, {0});
  const Tensor logits =
      save && save_logits ? empty_floats(features, {B, a.num_classes, P}) : empty_floats(features, {0});
  a.mean = mean;
  a.loss_map = per_pixel ? data_of<float>(loss) : nullptr, a.loss = per_pixel ? nullptr : data_of<float>(loss);
  a.denominator = data_of<float>(denominator), a.partial = data_of<float>(partial);
  a.lse = data_of<float>(lse), a.inv_norm = data_of<float>(inv_norm), a.logits = data_of<float>(logits);
  check(prototype_contrastive_forward(a, device.stream()), "prototype_contrastive_loss");
  return {loss, denominator, lse, inv_norm, logits};
}

// dfeatures is written whole; or has no element where it is not wanted. Returns dprototypes [K, D] or [0].
Tensor backward(Tensor grad_loss, Tensor features, Tensor labels, Tensor prototypes, std::optional<Tensor> class_weight,
                std::optional<Tensor> pixel_weight, Tensor lse, Tensor inv_norm, Tensor logits, Tensor denominator,
                Tensor dfeatures, Tensor flag, double temperature, bool normalize, int64_t ignore_index,
                bool needs_dfeatures, bool needs_dprototypes) {
  const OnDevice device(features);
  ContrastBackward a{};
  set_input(a, features, labels, prototypes, class_weight, pixel_weight, flag, temperature, normalize, ignore_index);
  a.grad = as_pixel_map(grad_loss), a.denominator = as_floats(denominator);
  a.lse = as_floats(lse), a.inv_norm = as_floats(inv_norm), a.logits = logits.numel() ? as_floats(logits) : nullptr;
  if (needs_dfeatures) a.dx = as_features(dfeatures);
  const Tensor dprototypes =
      needs_dprototypes ? empty_floats(features, {a.num_classes, a.x.dim}) : empty_floats(features, {0});
  const Tensor partial = empty_floats(features, {needs_dprototypes ? contrast_partial_floats(a.x, a.num_classes) : 0});
  a.dprototypes = data_of<float>(dprototypes), a.partial = data_of<float>(partial);
  check(prototype_contrastive_backward(a, device.stream()), "prototype_contrastive_loss");
  return dprototypes;
}

// Loss [], and the gradient of the features for an incoming gradient of 1 -> dfeatures, written whole.
Tensor one_pass(Tensor features, Tensor labels, Tensor prototypes, std::optional<Tensor> class_weight,
                std::optional<Tensor> pixel_weight, Tensor dfeatures, Tensor flag, double temperature, bool normalize,
                int64_t ignore_index, bool mean) {
  const OnDevice device(features);
  ContrastOnePass a{};
  set_input(a, features, labels, prototypes, class_weight, pixel_weight, flag, temperature, normalize, ignore_index);
  const Tensor loss = empty_floats(features, {}), denominator = empty_floats(features, {}),
               partial = empty_floats(features, {one_pass_floats(a)});
  a.mean = mean, a.dx = as_features(dfeatures);
  a.loss = data_of<float>(loss), a.denominator = data_of<float>(denominator), a.partial = data_of<float>(partial);
  check(prototype_contrastive_one_pass(a, device.stream()), "prototype_contrastive_loss");
  return loss;
}

// dfeatures *= grad_loss [], in place; only the launch where it is 1.
void scale(Tensor dfeatures, Tensor grad_loss) {
  const OnDevice device(dfeatures);
  STD_TORCH_CHECK(grad_loss.scalar_type() == ScalarType::Float && grad_loss.numel() == 1,
                  "spcl_fast cuda backend: expected one float32");
  check(scale_gradient({dfeatures.data_ptr(), float_type(dfeatures), dfeatures.numel(),
                        static_cast<const float*>(grad_loss.data_ptr())},
                       device.stream()),
        "prototype_contrastive_loss");
}

}  // namespace
}  // namespace spcl::gpu

SPCL_OPS(m) {
  m.def(
      "prototype_contrastive_forward(Tensor features, Tensor labels, Tensor prototypes, Tensor? class_weight, Tensor? "
      "pixel_weight, "
      "Tensor(a!) flag, float temperature, bool normalize, int ignore_index, bool mean, bool per_pixel, bool save, "
      "bool save_logits) "
      "-> (Tensor loss, Tensor denominator, Tensor lse, Tensor inv_norm, Tensor logits)");
  m.def(
      "prototype_contrastive_backward(Tensor grad_loss, Tensor features, Tensor labels, Tensor prototypes, Tensor? "
      "class_weight, "
      "Tensor? pixel_weight, Tensor lse, Tensor inv_norm, Tensor logits, Tensor denominator, Tensor(a!) dfeatures, "
      "Tensor(b!) flag, "
      "float temperature, bool normalize, int ignore_index, bool needs_dfeatures, bool needs_dprototypes) -> Tensor "
      "dprototypes");
  m.def(
      "prototype_contrastive_one_pass(Tensor features, Tensor labels, Tensor prototypes, Tensor? class_weight, Tensor? "
      "pixel_weight, "
      "Tensor(a!) dfeatures, Tensor(b!) flag, float temperature, bool normalize, int ignore_index, bool mean) -> "
      "Tensor loss");
  m.def("prototype_contrastive_scale(Tensor(a!) dfeatures, Tensor grad_loss) -> ()");
}

SPCL_OPS_IMPL(m) {
  m.impl("prototype_contrastive_forward", TORCH_BOX(&spcl::gpu::forward));
  m.impl("prototype_contrastive_backward", TORCH_BOX(&spcl::gpu::backward));
  m.impl("prototype_contrastive_one_pass", TORCH_BOX(&spcl::gpu::one_pass));
  m.impl("prototype_contrastive_scale", TORCH_BOX(&spcl::gpu::scale));
}
