// upsampled_cross_entropy: tensors in, workspace, tensors out.
#include <tuple>

#include "../bind_upsampled.h"

namespace spcl::gpu {
namespace {

std::tuple<Tensor, Tensor> cross_entropy(Tensor logits, Tensor labels, std::optional<Tensor> class_weight,
                                         std::optional<Tensor> pixel_weight, Tensor flag, double temperature,
                                         bool align_corners, int64_t ignore_index, bool mean, bool per_pixel,
                                         bool needs_dlogits, std::optional<Tensor> denominator) {
  const OnDevice device(logits);
  UpsampledCrossEntropy a{};
  set_upsampling(a, logits, labels.size(1), labels.size(2), temperature, align_corners);
  const auto [data, type, batch, classes, h, w, sb, sd, sh, sw] = a.logits;
  a.labels = as_labels(labels, a.height, a.width, ignore_index, classes, flag);
  a.class_weight = as_floats(class_weight), a.pixel_weight = as_pixel_map(pixel_weight), a.mean = mean;
  a.denominator = as_floats(denominator);
  const Tensor loss = per_pixel ? empty_floats(logits, {batch, a.height, a.width}) : empty_floats(logits, {});
  const Tensor dlogits = needs_dlogits ? empty_floats(logits, {batch, classes, h, w}) : empty_floats(logits, {0});
  a.loss_map = per_pixel ? data_of<float>(loss) : nullptr, a.loss = per_pixel ? nullptr : data_of<float>(loss);
  a.dlogits = data_of<float>(dlogits);
  const Tensor workspace = empty(logits, {upsampled_cross_entropy_workspace(a)}, ScalarType::Double);
  a.workspace = data_of<double>(workspace);
  check(upsampled_cross_entropy(a, device.stream()), "upsampled_cross_entropy");
  return {loss, dlogits};
}

}  // namespace
}  // namespace spcl::gpu

SPCL_OPS(m) {
  m.def(
      "upsampled_cross_entropy(Tensor logits, Tensor labels, Tensor? class_weight, Tensor? pixel_weight, "
      "Tensor(a!) flag, float temperature, bool align_corners, int ignore_index, bool mean, bool per_pixel, bool "
      "needs_dlogits, "
      "Tensor? denominator) -> (Tensor loss, Tensor dlogits)");
}

SPCL_OPS_IMPL(m) { m.impl("upsampled_cross_entropy", TORCH_BOX(&spcl::gpu::cross_entropy)); }
