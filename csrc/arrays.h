// What every kernel reads and writes, in C++ and in CUDA: plain structs, raw pointers, no torch and no std, no
// functions (see cpu/kernels.h).
#pragma once
#include <stdint.h>

namespace spcl {

constexpr float kNormEps = 1e-12f;  // of F.normalize

enum FloatType : int { kFloat32, kBFloat16, kFloat16 };
enum LabelType : int { kUInt8, kInt8, kUInt16, kInt16, kUInt32, kInt32, kUInt64, kInt64 };

// [B, D, h, w] with any strides, counted in elements.
struct Features {
  void* data;
  FloatType type;
  int64_t batch, dim, height, width;
  int64_t stride_b, stride_d, stride_h, stride_w;
};

// One float per pixel; data == nullptr stands for ones, strides 0 for one number.
struct PixelMap {
  const float* data;
  int64_t stride_b, stride_h, stride_w;
};

}  // namespace spcl
