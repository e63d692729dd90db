// upsampled_confusion: tensors in, counts added to a tensor.
#include "../bind_upsampled.h"

namespace spcl::gpu {
namespace {

void confusion(Tensor counts, Tensor logits, Tensor labels, Tensor flag, bool align_corners, int64_t ignore_index) {
  const OnDevice device(logits);
  UpsampledConfusion a{};
  set_upsampling(a, logits, labels.size(1), labels.size(2), 1.0, align_corners);
  const int64_t classes = a.logits.dim;
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Int && counts.is_contiguous() && counts.dim() == 3 &&
                      counts.size(0) > 0 && counts.size(1) == classes && counts.size(2) == classes &&
                      classes * classes <= INT32_MAX,
                  "spcl_fast cuda backend: counts must be int32 [copies, K, K]");
  a.labels = as_labels(labels, a.height, a.width, ignore_index, classes, flag);
  a.counts = static_cast<int*>(counts.data_ptr()), a.copies = counts.size(0);
  check(upsampled_confusion(a, device.stream()), "upsampled_confusion");
}

}  // namespace
}  // namespace spcl::gpu

SPCL_OPS(m) {
  m.def(
      "upsampled_confusion(Tensor(a!) counts, Tensor logits, Tensor labels, Tensor(b!) flag, bool align_corners, int "
      "ignore_index) -> ()");
}

SPCL_OPS_IMPL(m) { m.impl("upsampled_confusion", TORCH_BOX(&spcl::gpu::confusion)); }
