// Tensors to plain structs, for the glue of each op (bind_<op>.cpp). Through libtorch's stable ABI alone (target 2.11): no header of c10/cuda
// is opened, so that this compiles beside a torch without CUDA, and one binary serves every torch from 2.11 on.
#pragma once
#if !defined(SPCL_EMULATED) && !defined(USE_CUDA)
#define USE_CUDA  // declares aoti_torch_get_current_cuda_stream
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "kernels.h"

// What every glue file ends with: SPCL_OPS(m) { m.def("schema"); } and SPCL_OPS_IMPL(m) { m.impl("name", TORCH_BOX(&function)); }
#if defined(SPCL_EMULATED)
// In tests the same functions serve CPU tensors; several builds (a bug planted in each) live in one process under names of their own.
#include <stdlib.h>
extern "C" void* emulator_allocate(size_t bytes, size_t alignment);
extern "C" void emulator_free(void* data);
#define SPCL_EMULATED_LIBRARY(KIND, KEY, FUNCTION, m)                                                                      \
  static void FUNCTION(torch::stable::detail::StableLibrary&);                                                             \
  static const torch::stable::detail::StableTorchLibraryInit FUNCTION##_init(                                              \
      torch::stable::detail::StableLibrary::Kind::KIND, &FUNCTION, getenv("SPCL_EMULATED_NAME"), KEY, __FILE__, __LINE__); \
  static void FUNCTION(torch::stable::detail::StableLibrary& m)
#define SPCL_OPS(m) SPCL_EMULATED_LIBRARY(FRAGMENT, nullptr, define_ops, m)
#define SPCL_OPS_IMPL(m) SPCL_EMULATED_LIBRARY(IMPL, "CPU", implement_ops, m)
#else
#define SPCL_OPS(m) STABLE_TORCH_LIBRARY_FRAGMENT(spcl_fast_cuda, m)
#define SPCL_OPS_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cuda, CUDA, m)
#endif

namespace spcl::gpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(Status status, const char* op) { STD_TORCH_CHECK(status == nullptr, "spcl_fast cuda backend, ", op, ": ", status ? status : ""); }

// The device and the stream of a tensor for the time of a call.
class OnDevice {
 public:
#if defined(SPCL_EMULATED)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
#endif
  Stream stream() const { return stream_; }

 private:
#if !defined(SPCL_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_ = nullptr;
};

// Uninitialised, on the device of `like`; strides as of contiguous.
inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
#if defined(SPCL_EMULATED)
  const size_t width = type == ScalarType::Long || type == ScalarType::Double                                 ? 8
                       : type == ScalarType::Byte                                                             ? 1
                       : type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Short ? 2
                                                                                                              : 4;
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0;) strides[i] = count, count *= sizes[i];
  if (count == 0) return torch::stable::new_empty(like, sizes, type);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(emulator_allocate(count * width, 16), sizes, strides, cpu, type, [](void* data) { emulator_free(data); });
#else
  return torch::stable::new_empty(like, sizes, type);
#endif
}

inline Tensor empty_floats(const Tensor& like, std::vector<int64_t> sizes) { return empty(like, std::move(sizes), ScalarType::Float); }

template <class T>
T* data_of(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

inline FloatType float_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: STD_TORCH_CHECK(false, "spcl_fast cuda backend: expected float32, bfloat16 or float16");
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
    default: STD_TORCH_CHECK(false, "spcl_fast cuda backend: labels must have an integer dtype");
  }
}

inline Features as_features(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "spcl_fast cuda backend: features must be [B, D, h, w]");
  const auto size = t.sizes(), stride = t.strides();
  return {t.data_ptr(), float_type(t), size[0], size[1], size[2], size[3], stride[0], stride[1], stride[2], stride[3]};
}

// labels [B, H, W] read on a grid of height x width; flag [] int64 (see backends/labels.py).
inline Labels as_labels(const Tensor& t, int64_t height, int64_t width, int64_t ignore_index, int64_t num_classes, const Tensor& flag) {
  STD_TORCH_CHECK(t.dim() == 3, "spcl_fast cuda backend: labels must be [B, H, W]");
  STD_TORCH_CHECK(flag.scalar_type() == ScalarType::Long && flag.numel() == 1, "spcl_fast cuda backend: the flag must be one int64");
  const auto size = t.sizes(), stride = t.strides();
  return {t.data_ptr(), label_type(t), size[1], size[2], stride[0], stride[1], stride[2],
          static_cast<float>(size[1]) / static_cast<float>(height), static_cast<float>(size[2]) / static_cast<float>(width),
          ignore_index, num_classes, static_cast<int64_t*>(flag.data_ptr())};
}

// [B, h, w] float32, or one number that stands for every pixel; nothing stands for ones.
inline PixelMap as_pixel_map(const std::optional<Tensor>& t) {
  if (!t) return {nullptr, 0, 0, 0};
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && (t->dim() == 3 || t->numel() == 1), "spcl_fast cuda backend: expected float32 [B, h, w]");
  const float* data = static_cast<const float*>(t->data_ptr());
  return t->dim() == 3 ? PixelMap{data, t->stride(0), t->stride(1), t->stride(2)} : PixelMap{data, 0, 0, 0};
}

inline const float* as_floats(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), "spcl_fast cuda backend: expected contiguous float32");
  return static_cast<const float*>(t.data_ptr());
}
inline const float* as_floats(const std::optional<Tensor>& t) { return t ? as_floats(*t) : nullptr; }

}  // namespace spcl::gpu
