// The tensor core as two functions. With SPCL_EMULATED the lanes exchange their registers and multiply in float, by the
// same fragment layout.
#pragma once
#include "launch.h"

namespace spcl::gpu {

// c [16 x 8] += a [16 x 16] b [16 x 8], T half floats, c float. With q = lane % 4 and g = lane / 4 a lane holds
//   a: rows g, g + 8, g, g + 8 at columns 2q, 2q, 2q + 8, 2q + 8 (and the next column, in the high half)
//   b: column g at rows 2q, 2q + 8 (and the next row)        c: row g at columns 2q, 2q + 1, then row g + 8
#if defined(SPCL_EMULATED)

template <class T> inline float half_of(uint32_t word, int high) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * high));
  T value;
  memcpy(&value, &bits, sizeof(value));
  return to_float(value);
}

template <class T> inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const char* all = emulator::exchange("multiply_add", kAllLanes, mine, sizeof(mine));
  struct Fragment {
    uint32_t word[6];
  };
  const int q = emulator::here().lane % 4, g = emulator::here().lane / 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) {
      const int from = (k % 8) / 2;
      const Fragment left = emulator::from_lane<Fragment>(all, g * 4 + from),
                     right = emulator::from_lane<Fragment>(all, (2 * q + i % 2) * 4 + from);
      c[i] += half_of<T>(left.word[i / 2 + 2 * (k / 8)], k % 2) * half_of<T>(right.word[4 + k / 8], k % 2);
    }
}

// Four 8 x 8 matrices of half floats, transposed: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, so
// aligned) and gets, of each matrix, rows 2q and 2q + 1 of column g.
inline void load_transposed(uint32_t (&out)[4], const void* row) {
  const char* all = emulator::exchange("load_transposed", kAllLanes, &row, sizeof(row));
  const int q = emulator::here().lane % 4, g = emulator::here().lane / 4;
  for (int m = 0; m < 4; ++m) {
    const auto* first = static_cast<const uint16_t*>(emulator::from_lane<const void*>(all, 8 * m + 2 * q));
    const auto* second = static_cast<const uint16_t*>(emulator::from_lane<const void*>(all, 8 * m + 2 * q + 1));
    out[m] = first[g] | static_cast<uint32_t>(second[g]) << 16;
  }
}

inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

#else

template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}

__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

#endif

}  // namespace spcl::gpu
