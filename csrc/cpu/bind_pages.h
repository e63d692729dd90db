// Memory of large outputs.
#pragma once
#include "cpu/bind_tensors.h"

namespace spcl {

// An uninitialised tensor of the shape and dtype of `like`, with these (dense) strides.
Tensor empty_gradient(Tensor like, std::vector<int64_t> strides);

// [batch, num_classes, pixels] float32, uninitialised.
Tensor empty_logits(int64_t batch, int64_t num_classes, int64_t pixels);

}  // namespace spcl
