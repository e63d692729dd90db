// upsampled_cross_entropy and upsampled_prediction: tensors in, workspace, tensors out.
#include <tuple>

#include "bind.h"

namespace spcl::gpu {
namespace {

void set_input(Upsampling& a, const Tensor& logits, int64_t height, int64_t width, double temperature, bool align_corners) {
  a.logits = as_features(logits);
  a.height = height, a.width = width, a.temperature = temperature, a.align_corners = align_corners;
  const int64_t most = INT32_MAX, offset = (a.logits.height - 1) * a.logits.stride_h + (a.logits.width - 1) * a.logits.stride_w;
  STD_TORCH_CHECK(a.logits.height <= most && a.logits.width <= most && height <= most && width <= most && offset <= most,
                  "spcl_fast cuda backend: sizes, and offsets within an image and class, must be under 2**31");
}

std::tuple<Tensor, Tensor> cross_entropy(Tensor logits, Tensor labels, std::optional<Tensor> class_weight,
                                         std::optional<Tensor> pixel_weight, Tensor flag, double temperature, bool align_corners,
                                         int64_t ignore_index, bool mean, bool per_pixel, bool needs_dlogits) {
  const OnDevice device(logits);
  UpsampledCrossEntropy a{};
  set_input(a, logits, labels.size(1), labels.size(2), temperature, align_corners);
  const auto [data, type, batch, classes, h, w, sb, sd, sh, sw] = a.logits;
  a.labels = as_labels(labels, a.height, a.width, ignore_index, classes, flag);
  a.class_weight = as_floats(class_weight), a.pixel_weight = as_pixel_map(pixel_weight), a.mean = mean;
  const Tensor loss = per_pixel ? empty_floats(logits, {batch, a.height, a.width}) : empty_floats(logits, {});
  const Tensor dlogits = needs_dlogits ? empty_floats(logits, {batch, classes, h, w}) : empty_floats(logits, {0});
  a.loss_map = per_pixel ? data_of<float>(loss) : nullptr, a.loss = per_pixel ? nullptr : data_of<float>(loss);
  a.dlogits = data_of<float>(dlogits);
  const Tensor workspace = empty(logits, {upsampled_cross_entropy_workspace(a)}, ScalarType::Double);
  a.workspace = data_of<double>(workspace);
  check(upsampled_cross_entropy(a, device.stream()), "upsampled_cross_entropy");
  return {loss, dlogits};
}

std::tuple<Tensor, Tensor> prediction(Tensor logits, int64_t height, int64_t width, std::optional<Tensor> thresholds, double temperature,
                                      bool align_corners, int64_t ignore_index) {
  const OnDevice device(logits);
  UpsampledPrediction a{};
  set_input(a, logits, height, width, temperature, align_corners);
  a.thresholds = as_floats(thresholds), a.ignore_index = static_cast<int>(ignore_index);
  const Tensor labels = empty(logits, {a.logits.batch, height, width}, ScalarType::Byte);
  const Tensor confidence = empty_floats(logits, {a.logits.batch, height, width});
  a.labels = data_of<uint8_t>(labels), a.confidence = data_of<float>(confidence);
  check(upsampled_prediction(a, device.stream()), "upsampled_prediction");
  return {labels, confidence};
}

}  // namespace
}  // namespace spcl::gpu

SPCL_OPS(m) {
  m.def(
      "upsampled_cross_entropy(Tensor logits, Tensor labels, Tensor? class_weight, Tensor? pixel_weight, Tensor(a!) flag, "
      "float temperature, bool align_corners, int ignore_index, bool mean, bool per_pixel, bool needs_dlogits) "
      "-> (Tensor loss, Tensor dlogits)");
  m.def(
      "upsampled_prediction(Tensor logits, int height, int width, Tensor? thresholds, float temperature, bool align_corners, "
      "int ignore_index) -> (Tensor labels, Tensor confidence)");
}

SPCL_OPS_IMPL(m) {
  m.impl("upsampled_cross_entropy", TORCH_BOX(&spcl::gpu::cross_entropy));
  m.impl("upsampled_prediction", TORCH_BOX(&spcl::gpu::prediction));
}
