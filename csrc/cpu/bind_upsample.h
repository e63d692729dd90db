// The tables of operands.h from a tensor of logits, checked.
#pragma once
#include "cpu/bind_tensors.h"

namespace spcl {

inline Features checked_nodes(const Tensor& logits) {
  const Features nodes = as_features(logits);
  STD_TORCH_CHECK(
      nodes.height > 0 && nodes.height < (int64_t{1} << 31) && nodes.width > 0 && nodes.width < (int64_t{1} << 31),
      "spcl_fast_cpu: an axis must have 1 to 2**31 - 1 nodes");
  return nodes;
}

struct Upsampling : UpsamplingTables {
  Upsampling(const Tensor& logits, int64_t height, int64_t width, double temperature, bool align_corners)
      : UpsamplingTables(checked_nodes(logits), height, width, temperature, align_corners) {}
};

}  // namespace spcl
