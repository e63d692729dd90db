// upsampled_confusion: its schema and its tensors as plain structs.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/bind_levels.h"
#include "cpu/bind_threads.h"
#include "cpu/bind_upsample.h"

namespace spcl {
namespace {

std::tuple<Tensor, Tensor> upsampled_confusion(Tensor logits, Tensor labels, bool align_corners, int64_t ignore_index) {
  const int64_t B = labels.size(0), H = labels.size(1), W = labels.size(2), K = logits.size(1);
  const Upsampling up(logits, H, W, 1.0, align_corners);
  UpsampledConfusion a{up.view};
  a.pixels.batch = B, a.pixels.height = H, a.pixels.width = W;
  const LabelMap map(labels, a.pixels, K, ignore_index);
  a.labels = map.view;
  Tensor counts = torch::stable::empty({K, K}, ScalarType::Long);
  a.counts = static_cast<int64_t*>(counts.data_ptr());
  std::fill(a.counts, a.counts + K * K, 0);
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  a.first_bad = &first_bad;
  const Kernels& isa = kernels();
  for_each_group(B * a.bands, isa.upsampled_confusion_scratch(a),
                 [&](int64_t band, float* scratch) { isa.upsampled_confusion(a, band, scratch); });
  return {counts, map.report(first_bad, a.pixels)};
}

}  // namespace
}  // namespace spcl

STABLE_TORCH_LIBRARY_FRAGMENT(spcl_fast_cpu, m) {
  m.def(
      "upsampled_confusion(Tensor logits, Tensor labels, bool align_corners, int ignore_index) -> (Tensor counts, "
      "Tensor report)");
}

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cpu, CPU, m) {
  m.impl("upsampled_confusion", TORCH_BOX(&spcl::upsampled_confusion));
}
