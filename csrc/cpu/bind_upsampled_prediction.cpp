// upsampled_prediction: its schema and its tensors as plain structs.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/bind_levels.h"
#include "cpu/bind_tensors.h"
#include "cpu/bind_threads.h"
#include "cpu/bind_upsample.h"

namespace spcl {
namespace {

std::tuple<Tensor, Tensor> upsampled_prediction(Tensor logits, int64_t height, int64_t width,
                                                std::optional<Tensor> thresholds, double temperature,
                                                bool align_corners, int64_t ignore_index) {
  const Upsampling up(logits, height, width, temperature, align_corners);
  UpsampledPrediction a{up.view};
  a.wide_labels = logits.size(1) > 255;
  Tensor labels =
      torch::stable::empty({logits.size(0), height, width}, a.wide_labels ? ScalarType::Int : ScalarType::Byte);
  Tensor confidence = empty_floats({logits.size(0), height, width});
  a.thresholds = as_floats(thresholds);
  a.ignore_index = ignore_index;
  a.labels = labels.data_ptr(), a.confidence = floats(confidence);
  const Kernels& isa = kernels();
  for_each_group(logits.size(0) * a.bands, isa.upsampled_prediction_scratch(a),
                 [&](int64_t band, float* scratch) { isa.upsampled_prediction(a, band, scratch); });
  return {labels, confidence};
}

}  // namespace
}  // namespace spcl

STABLE_TORCH_LIBRARY_FRAGMENT(spcl_fast_cpu, m) {
  m.def(
      "upsampled_prediction(Tensor logits, int height, int width, Tensor? thresholds, float temperature, bool "
      "align_corners, "
      "int ignore_index) -> (Tensor labels, Tensor confidence)");
}

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cpu, CPU, m) {
  m.impl("upsampled_prediction", TORCH_BOX(&spcl::upsampled_prediction));
}
