// Tensors to the structs of arrays.h, checked; for the glue of both parts. Through libtorch's stable ABI alone.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "arrays.h"

namespace spcl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline FloatType float_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: STD_TORCH_CHECK(false, "spcl_fast: expected float32, bfloat16 or float16");
  }
}

inline LabelType label_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Byte: return kUInt8;
    case ScalarType::Char: return kInt8;
    case ScalarType::UInt16: return kUInt16;
    case ScalarType::Short: return kInt16;
    case ScalarType::UInt32: return kUInt32;
    case ScalarType::Int: return kInt32;
    case ScalarType::UInt64: return kUInt64;
    case ScalarType::Long: return kInt64;
    default: STD_TORCH_CHECK(false, "spcl_fast: labels must have an integer dtype");
  }
}

inline Features as_features(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "spcl_fast: features must be [B, D, h, w]");
  const auto size = t.sizes(), stride = t.strides();
  return {t.data_ptr(), float_type(t), size[0], size[1], size[2], size[3], stride[0], stride[1], stride[2], stride[3]};
}

// [B, h, w] float32, or one number that stands for every pixel; nothing stands for ones.
inline PixelMap as_pixel_map(const std::optional<Tensor>& t) {
  if (!t) return {nullptr, 0, 0, 0};
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && (t->dim() == 3 || t->numel() == 1),
                  "spcl_fast: expected float32 [B, h, w]");
  const float* data = static_cast<const float*>(t->data_ptr());
  return t->dim() == 3 ? PixelMap{data, t->stride(0), t->stride(1), t->stride(2)} : PixelMap{data, 0, 0, 0};
}

inline const float* as_floats(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), "spcl_fast: expected contiguous float32");
  return static_cast<const float*>(t.data_ptr());
}
inline const float* as_floats(const std::optional<Tensor>& t) { return t ? as_floats(*t) : nullptr; }

}  // namespace spcl
