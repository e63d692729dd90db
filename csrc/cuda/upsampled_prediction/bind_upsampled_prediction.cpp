// upsampled_prediction: tensors in, tensors out.
#include <tuple>

#include "../bind_upsampled.h"

namespace spcl::gpu {
namespace {

std::tuple<Tensor, Tensor> prediction(Tensor logits, int64_t height, int64_t width, std::optional<Tensor> thresholds,
                                      double temperature, bool align_corners, int64_t ignore_index) {
  const OnDevice device(logits);
  UpsampledPrediction a{};
  set_upsampling(a, logits, height, width, temperature, align_corners);
  a.thresholds = as_floats(thresholds), a.ignore_index = static_cast<int>(ignore_index);
  const bool fits_a_byte = a.logits.dim <= kMaxByteClasses;
  const Tensor labels =
      empty(logits, {a.logits.batch, height, width}, fits_a_byte ? ScalarType::Byte : ScalarType::Int);
  const Tensor confidence = empty_floats(logits, {a.logits.batch, height, width});
  a.labels = labels.numel() ? labels.data_ptr() : nullptr, a.confidence = data_of<float>(confidence);
  check(upsampled_prediction(a, device.stream()), "upsampled_prediction");
  return {labels, confidence};
}

}  // namespace
}  // namespace spcl::gpu

SPCL_OPS(m) {
  m.def(
      "upsampled_prediction(Tensor logits, int height, int width, Tensor? thresholds, float temperature, bool "
      "align_corners, "
      "int ignore_index) -> (Tensor labels, Tensor confidence)");
}

SPCL_OPS_IMPL(m) { m.impl("upsampled_prediction", TORCH_BOX(&spcl::gpu::prediction)); }
