// Tensors to plain structs, for the glue of each op (bind_<op>.cpp). Through libtorch's stable ABI alone (target 2.11):
// no header of c10/cuda is opened, so that this compiles next to a torch without CUDA, and one binary serves every
// torch from 2.11 on.
#pragma once
#if !defined(SPCL_EMULATED) && !defined(USE_CUDA)
#define USE_CUDA  // declares aoti_torch_get_current_cuda_stream
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../arrays_of_tensors.h"
#include "kernels.h"

// What every glue file ends with: SPCL_OPS(m) { m.def("schema"); } and SPCL_OPS_IMPL(m) { m.impl("name",
// TORCH_BOX(&function)); }
#if defined(SPCL_EMULATED)
// In tests the same functions serve CPU tensors; several builds (a bug planted in each) live in one process under names
// of their own.
#include <stdlib.h>
extern "C" void* emulator_allocate(size_t bytes, size_t alignment);
extern "C" void emulator_free(void* data);
#define SPCL_EMULATED_LIBRARY(KIND, KEY, FUNCTION, m)                                                           \
  static void FUNCTION(torch::stable::detail::StableLibrary&);                                                  \
  static const torch::stable::detail::StableTorchLibraryInit FUNCTION##_init(                                   \
      torch::stable::detail::StableLibrary::Kind::KIND, &FUNCTION, getenv("SPCL_EMULATED_NAME"), KEY, __FILE__, \
      __LINE__);                                                                                                \
  static void FUNCTION(torch::stable::detail::StableLibrary& m)
#define SPCL_OPS(m) SPCL_EMULATED_LIBRARY(FRAGMENT, nullptr, define_ops, m)
#define SPCL_OPS_IMPL(m) SPCL_EMULATED_LIBRARY(IMPL, "CPU", implement_ops, m)
#else
#define SPCL_OPS(m) STABLE_TORCH_LIBRARY_FRAGMENT(spcl_fast_cuda, m)
#define SPCL_OPS_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cuda, CUDA, m)
#endif

namespace spcl::gpu {

inline void check(Status status, const char* op) {
  STD_TORCH_CHECK(status == nullptr, "spcl_fast cuda backend, ", op, ": ", status ? status : "");
}

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
  const size_t width = type == ScalarType::Long || type == ScalarType::Double                                  ? 8
                       : type == ScalarType::Byte                                                              ? 1
                       : type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Short ? 2
                                                                                                               : 4;
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0;) strides[i] = count, count *= sizes[i];
  if (count == 0) return torch::stable::new_empty(like, sizes, type);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(emulator_allocate(count * width, 16), sizes, strides, cpu, type,
                                  [](void* data) { emulator_free(data); });
#else
  return torch::stable::new_empty(like, sizes, type);
#endif
}

inline Tensor empty_floats(const Tensor& like, std::vector<int64_t> sizes) {
  return empty(like, std::move(sizes), ScalarType::Float);
}

template <class T> T* data_of(const Tensor& t) { return t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr; }

// labels [B, H, W] read on a grid of height x width; flag [] int64 (see backends/labels.py).
inline Labels as_labels(const Tensor& t, int64_t height, int64_t width, int64_t ignore_index, int64_t num_classes,
                        const Tensor& flag) {
  STD_TORCH_CHECK(t.dim() == 3, "spcl_fast cuda backend: labels must be [B, H, W]");
  STD_TORCH_CHECK(flag.scalar_type() == ScalarType::Long && flag.numel() == 1,
                  "spcl_fast cuda backend: the flag must be one int64");
  const auto size = t.sizes(), stride = t.strides();
  return {t.data_ptr(),
          label_type(t),
          size[1],
          size[2],
          stride[0],
          stride[1],
          stride[2],
          static_cast<float>(size[1]) / static_cast<float>(height),
          static_cast<float>(size[2]) / static_cast<float>(width),
          ignore_index,
          num_classes,
          static_cast<int64_t*>(flag.data_ptr())};
}

}  // namespace spcl::gpu
