// What the glue of upsampled_cross_entropy and of upsampled_prediction share.
#pragma once
#include "bind.h"

namespace spcl::gpu {

inline void set_upsampling(Upsampling& a, const Tensor& logits, int64_t height, int64_t width, double temperature,
                           bool align_corners) {
  a.logits = as_features(logits);
  a.height = height, a.width = width, a.temperature = temperature, a.align_corners = align_corners;
  const int64_t most = INT32_MAX,
                offset = (a.logits.height - 1) * a.logits.stride_h + (a.logits.width - 1) * a.logits.stride_w;
  STD_TORCH_CHECK(
      a.logits.height <= most && a.logits.width <= most && height <= most && width <= most && offset <= most,
      "spcl_fast cuda backend: sizes, and offsets within an image and class, must be under 2**31");
}

}  // namespace spcl::gpu
