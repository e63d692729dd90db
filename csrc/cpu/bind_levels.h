// The kernels of every instruction set that was built, and which of them this processor runs.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace spcl {

struct Kernels {
  const char* name;
  decltype(&baseline::contrast_forward_scratch) contrast_forward_scratch;
  decltype(&baseline::contrast_forward) contrast_forward;
  decltype(&baseline::contrast_backward_scratch) contrast_backward_scratch;
  decltype(&baseline::contrast_backward) contrast_backward;
  decltype(&baseline::streamed_forward_scratch) streamed_forward_scratch;
  decltype(&baseline::streamed_forward) streamed_forward;
  decltype(&baseline::streamed_backward_scratch) streamed_backward_scratch;
  decltype(&baseline::streamed_take) streamed_take;
  decltype(&baseline::streamed_backward) streamed_backward;
  decltype(&baseline::streamed_give) streamed_give;
  decltype(&baseline::class_moments_scratch) class_moments_scratch;
  decltype(&baseline::class_moments) class_moments;
  decltype(&baseline::upsampled_cross_entropy_scratch) upsampled_cross_entropy_scratch;
  decltype(&baseline::upsampled_cross_entropy) upsampled_cross_entropy;
  decltype(&baseline::upsampled_prediction_scratch) upsampled_prediction_scratch;
  decltype(&baseline::upsampled_prediction) upsampled_prediction;
  decltype(&baseline::upsampled_confusion_scratch) upsampled_confusion_scratch;
  decltype(&baseline::upsampled_confusion) upsampled_confusion;
};

// The best level of this processor, or the lower one that SPCL_FAST_CPU_CAPABILITY names.
const Kernels& kernels();

// Of all levels that were built, the lowest first.
std::vector<std::string> level_names();

}  // namespace spcl
