// Integers that count things: for the host, the device and the tests, read by any C++ compiler.
#pragma once
#include <stdint.h>

// A function of both sides.
#if defined(__CUDACC__)
#define SPCL_BOTH __host__ __device__ __forceinline__ constexpr
#else
#define SPCL_BOTH constexpr
#endif

namespace spcl::gpu {

SPCL_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SPCL_BOTH int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
SPCL_BOTH int64_t between(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

}  // namespace spcl::gpu
