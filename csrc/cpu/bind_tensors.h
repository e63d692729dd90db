// Tensors to the plain structs of cpu/kernels.h, checked; those that CUDA has, too, are in arrays_of_tensors.h.
#pragma once
#include <limits>

#include "arrays_of_tensors.h"
#include "cpu/operands.h"

namespace spcl {

struct LabelMap {
  std::vector<int64_t> row, col;
  Labels view;
  int64_t stride_h, stride_w;

  LabelMap(const Tensor& t, const Features& x, int64_t num_classes, int64_t ignore_index) {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 3 && t.size(0) == x.batch,
                    "spcl_fast_cpu: labels must be a CPU tensor [B, H, W]");
    STD_TORCH_CHECK(x.height * x.width == 0 || t.size(1) * t.size(2) > 0, "spcl_fast_cpu: labels hold no pixel");
    stride_h = t.stride(1), stride_w = t.stride(2);
    row = nearest_offsets(t.size(1), x.height, stride_h);
    col = nearest_offsets(t.size(2), x.width, stride_w);
    view = {t.data_ptr(), label_type(t), t.stride(0), row.data(), col.data(), stride_w == 1 && t.size(2) == x.width,
            ignore_index, num_classes};
  }

  int64_t value_at(int64_t offset) const {
    switch (view.type) {
      case kUInt8: return static_cast<const uint8_t*>(view.data)[offset];
      case kInt8: return static_cast<const int8_t*>(view.data)[offset];
      case kUInt16: return static_cast<const uint16_t*>(view.data)[offset];
      case kInt16: return static_cast<const int16_t*>(view.data)[offset];
      case kUInt32: return static_cast<const uint32_t*>(view.data)[offset];
      case kInt32: return static_cast<const int32_t*>(view.data)[offset];
      default: return static_cast<const int64_t*>(view.data)[offset];
    }
  }

  // [5] int64: 1 if a label was out of range, its value, and its place (b, i, j) on the labels' own grid.
  Tensor report(int64_t first_bad, const Features& x) const {
    Tensor out = torch::stable::empty({5}, ScalarType::Long);
    int64_t* to = static_cast<int64_t*>(out.data_ptr());
    std::fill(to, to + 5, 0);
    if (first_bad == std::numeric_limits<int64_t>::max()) return out;
    const int64_t b = first_bad / (x.height * x.width), i = first_bad / x.width % x.height, j = first_bad % x.width;
    to[0] = 1, to[1] = value_at(b * view.stride_b + row[i] + col[j]), to[2] = b;
    to[3] = stride_h ? row[i] / stride_h : 0, to[4] = stride_w ? col[j] / stride_w : 0;
    return out;
  }
};

// The same of probabilities: 1 if one is negative or not finite, its class, and its place (b, i, j).
inline Tensor report_probability(const Features& targets, int64_t first_bad) {
  Tensor out = torch::stable::empty({5}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(out.data_ptr());
  std::fill(to, to + 5, 0);
  if (first_bad == std::numeric_limits<int64_t>::max()) return out;
  const int64_t pixels = targets.height * targets.width;
  to[0] = 1, to[1] = -1, to[2] = first_bad / pixels, to[3] = first_bad % pixels / targets.width,
  to[4] = first_bad % targets.width;
  return out;
}

inline bool is_floating(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline Tensor empty_floats(std::vector<int64_t> shape) { return torch::stable::empty(shape, ScalarType::Float); }
inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

}  // namespace spcl
