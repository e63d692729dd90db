// The vector layer: one source for every instruction set, written with the compiler's vector extensions. V floats a
// register. Include only from files that are compiled per instruction set; everything is static, inside the namespace
// of that set.
#pragma once
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SPCL_V 16
#elif defined(__AVX2__)
#define SPCL_V 8
#else
#define SPCL_V 4
#endif
#define SPCL_INLINE static inline __attribute__((always_inline))
#define SPCL_INLINE_MEMBER inline __attribute__((always_inline))
#define SPCL_LOCAL static __attribute__((unused))

namespace spcl {
namespace SPCL_ISA {

constexpr int V = SPCL_V;
constexpr int kStep =
    V == 16 ? 4 : 2;         // vectors of a row that a matrix microkernel holds: 6 x 4 of 32 registers, 6 x 2 of 16
constexpr int kMaxRows = 6;  // rows of such a microkernel

typedef float vf __attribute__((vector_size(V * 4)));
typedef int32_t vi __attribute__((vector_size(V * 4)));
typedef uint32_t vu __attribute__((vector_size(V * 4)));
typedef uint16_t vh __attribute__((vector_size(V * 2)));

SPCL_INLINE
vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
SPCL_INLINE
vi load(const int32_t* p) {
  vi v;
  memcpy(&v, p, sizeof v);
  return v;
}
SPCL_INLINE
void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
#if defined(__AVX512F__)
SPCL_INLINE
void store_past_cache(float* p, vf v) { _mm512_stream_ps(p, (__m512)v); }
#elif defined(__AVX2__)
SPCL_INLINE
void store_past_cache(float* p, vf v) { _mm256_stream_ps(p, (__m256)v); }
#elif defined(__SSE2__)
SPCL_INLINE
void store_past_cache(float* p, vf v) { _mm_stream_ps(p, (__m128)v); }
#else
SPCL_INLINE
void store_past_cache(float* p, vf v) { store(p, v); }
#endif
// Stores past the cache are not ordered by themselves: call before others may read them.
SPCL_INLINE
void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
SPCL_INLINE
vf splat(float s) { return s - vf{}; }
SPCL_INLINE
vi splat(int32_t s) { return s - vi{}; }
SPCL_INLINE
vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
// a * b + c, fused where the level can: for a sum of two products, where the compiler may fuse either.
#if defined(__AVX512F__)
SPCL_INLINE
vf fused(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__)
SPCL_INLINE
vf fused(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
SPCL_INLINE
vf fused(vf a, vf b, vf c) { return a * b + c; }
#endif
// b where a is NaN: what the instruction does, too.
SPCL_INLINE
vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return select(a > b, a, b);
#endif
}

// ---- 16-bit floats ----------------------------------------------------------------------------------------------

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

SPCL_INLINE
vh load_bits(const void* p) {
  vh v;
  memcpy(&v, p, sizeof v);
  return v;
}
SPCL_INLINE
vf load(const bfloat16* p) { return (vf)(__builtin_convertvector(load_bits(p), vu) << 16); }

SPCL_INLINE
void store(bfloat16* p, vf v) {
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  vi is_nan = v != v;
  vh out = __builtin_convertvector((vu)((is_nan & 0x7fc0) | (~is_nan & (vi)rounded)), vh);
  memcpy(p, &out, sizeof out);
}

#if defined(__AVX512F__)
SPCL_INLINE
vf load(const float16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
SPCL_INLINE
void store(float16* p, vf v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif defined(__AVX2__)
SPCL_INLINE
vf load(const float16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
SPCL_INLINE
void store(float16* p, vf v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
SPCL_INLINE
vf load(const float16* p) {
  vu half = __builtin_convertvector(load_bits(p), vu);
  vu sign = (half & 0x8000) << 16;
  vf normal = (vf)((half & 0x7fff) << 13) * 0x1p112f;  // the exponent's bias, and subnormals come out right
  vi special = (vi)(half & 0x7c00) == 0x7c00;          // inf and NaN
  vu bits = (vu)select(special, (vf)(((half & 0x7fff) << 13) | 0x7f800000), normal);
  return (vf)(bits | sign);
}
SPCL_INLINE
void store(float16* p, vf v) {
  vu bits = (vu)v, sign = (bits >> 16) & 0x8000;
  vf size = (vf)(bits & 0x7fffffff);
  vu small = (vu)(size + 0.5f) - (vu)splat(0.5f);  // subnormals: the addition rounds to multiples of 2^-24
  vu mag = (vu)size;
  vu normal = (mag + 0xfff + ((mag >> 13) & 1) - (112u << 23)) >> 13;
  vu out = (vu)select(size < 0x1p-14f, (vf)small, (vf)normal);
  out = (vu)select(size >= 65520.0f, (vf)(vu)splat((int32_t)0x7c00), (vf)out);
  out = (vu)select(size != size, (vf)(vu)splat((int32_t)0x7e00), (vf)out) | sign;
  vh half = __builtin_convertvector(out, vh);
  memcpy(p, &half, sizeof half);
}
#endif

// One value, by way of a vector: only tails and odd layouts come here.
template <class T> SPCL_INLINE
float load_one(const T* p) {
  T lane[V] = {*p};
  return load(lane)[0];
}
template <> inline __attribute__((always_inline)) float load_one(const float* p) { return *p; }

// The first `count` < V values, and zeros.
template <class T> SPCL_INLINE
vf load_first(const T* p, int64_t count) {
  T lane[V] = {};
  for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
  return load(lane);
}
#if defined(__AVX512F__)
template <> inline __attribute__((always_inline)) vf load_first(const float* p, int64_t count) {
  return (vf)_mm512_maskz_loadu_ps((1u << count) - 1, p);
}
#endif

template <class T> SPCL_INLINE
void store_one(T* p, float value) {
  T lane[V];
  store(lane, splat(value));
  *p = lane[0];
}
template <> inline __attribute__((always_inline)) void store_one(float* p, float value) { *p = value; }

// ---- lanes ------------------------------------------------------------------------------------------------------

// Whether a lane of a comparison is true.
SPCL_INLINE
bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  for (int i = 0; i < V; ++i)
    if (mask[i]) return true;
  return false;
#endif
}

// Lane i: from[index[i]], for indices below V.
SPCL_INLINE
vf permute(vf from, vi index) {
#if defined(__AVX512F__)
  return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)from);
#elif defined(__AVX2__)
  return (vf)_mm256_permutevar8x32_ps((__m256)from, (__m256i)index);
#else
  vf out;
  for (int i = 0; i < V; ++i) out[i] = from[index[i]];
  return out;
#endif
}

SPCL_INLINE
vf gather(const float* from, vi index) {
#if defined(__AVX512F__)
  return (vf)_mm512_i32gather_ps((__m512i)index, from, 4);
#elif defined(__AVX2__)
  return (vf)_mm256_i32gather_ps(from, (__m256i)index, 4);
#else
  vf out;
  for (int i = 0; i < V; ++i) out[i] = from[index[i]];
  return out;
#endif
}

// ---- exp and log ------------------------------------------------------------------------------------------------

// Within 1 ulp on [-87, 88]; 0 below, NaN for NaN.
SPCL_INLINE
vf exp(vf x) {
  const vf magic = splat(0x1.8p23f);  // adding it rounds to an integer, which then stands in the low bits
  vf clipped = select(x > 88.0f, splat(88.0f), select(x < -87.3f, splat(-87.3f), x));
  vf shifted = clipped * 1.44269504088896f + magic;
  vf n = shifted - magic;
  vf r = clipped - n * 0x1.62e4p-1f;
  r = r - n * 0x1.7f7d1cp-20f;
  vf q = splat(1.9875691500e-4f);
  q = q * r + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  q = q * (r * r) + r + 1.0f;
  vf scaled =
      (vf)((vi)q + ((vi)shifted << 23));  // the low bits of `shifted` are n; what is above them leaves by the left
  vf result = select(x < -87.3f, vf{}, scaled);
  return select(x != x, x, result);
}

// 2^x for x <= 100, within 1 ulp; 2^-100 below that; NaN for NaN. Where the sum of such numbers is what counts: no
// subnormals, few steps.
SPCL_INLINE
vf exp2(vf x) {
  x = larger(splat(-100.0f), x);
#if defined(__AVX512F__)
  vf n = (vf)_mm512_roundscale_ps((__m512)x, 0);
#else
  const vf magic = splat(0x1.8p23f);  // as in exp
  vf shifted = x + magic, n = shifted - magic;
#endif
  vf r = x - n, q = splat(1.53473201e-4f);  // minimax on [-1/2, 1/2]: within 2e-9
  q = q * r + 1.34001545e-3f;
  q = q * r + 9.61848424e-3f;
  q = q * r + 5.55032808e-2f;
  q = q * r + 2.402264692e-1f;
  q = q * r + 6.931472062e-1f;
  q = q * r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)q, (__m512)n);
#else
  return (vf)((vi)q + ((vi)shifted << 23));
#endif
}

// Of normal positive numbers, within 1 ulp; NaN for NaN and for infinity (the sums of exponentials here are finite or
// NaN).
SPCL_INLINE
vf log(vf x) {
  vi bits = (vi)x;
  vi over = (bits & 0x007fffff) > 0x003504f3;  // mantissa above sqrt(2): halve it
  vi e = ((bits >> 23) - 127) - over;
  vf m = (vf)((bits & 0x007fffff) | (over & 0x3f000000) | (~over & 0x3f800000));
  vf r = m - 1.0f, z = r * r, n = __builtin_convertvector(e, vf);
  vf q = splat(7.0376836292e-2f);
  q = q * r - 1.1514610310e-1f;
  q = q * r + 1.1676998740e-1f;
  q = q * r - 1.2420140846e-1f;
  q = q * r + 1.4249322787e-1f;
  q = q * r - 1.6668057665e-1f;
  q = q * r + 2.0000714765e-1f;
  q = q * r - 2.4999993993e-1f;
  q = q * r + 3.3333331174e-1f;
  vf y = q * r * z + n * -2.12194440e-4f - 0.5f * z;
  return (r + y) + n * 0.693359375f + (x - x);
}

SPCL_INLINE
vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// log(1 + x) of 0 to 1, without losing a small x.
SPCL_INLINE
vf log1p(vf x) {
  vf sum = 1.0f + x;
  return select(sum == 1.0f, x, log(sum) * (x / (sum - 1.0f)));
}

// ---- transposition ----------------------------------------------------------------------------------------------

#if SPCL_V == 16
#define SPCL_LOW (vi{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define SPCL_HIGH (vi{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#elif SPCL_V == 8
#define SPCL_LOW (vi{0, 8, 1, 9, 2, 10, 3, 11})
#define SPCL_HIGH (vi{4, 12, 5, 13, 6, 14, 7, 15})
#else
#define SPCL_LOW (vi{0, 4, 1, 5})
#define SPCL_HIGH (vi{2, 6, 3, 7})
#endif
#if defined(__clang__)
SPCL_INLINE
vf SPCL_SHUFFLE(vf a, vf b, vi index) {
  float both[2 * V], out[V];
  store(both, a), store(both + V, b);
  for (int i = 0; i < V; ++i) out[i] = both[index[i]];
  return load(out);
}
#else
#define SPCL_SHUFFLE __builtin_shuffle
#endif

SPCL_INLINE
vf square_root(vf x) {
  for (int i = 0; i < V; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// V x V, in place: log2(V) rounds of interleaving row i with row i + V/2.
SPCL_INLINE
void transpose(vf (&r)[V]) {
  for (int width = 1; width < V; width *= 2) {
    vf t[V];
    for (int i = 0; i < V / 2; ++i) {
      t[2 * i] = SPCL_SHUFFLE(r[i], r[i + V / 2], SPCL_LOW);
      t[2 * i + 1] = SPCL_SHUFFLE(r[i], r[i + V / 2], SPCL_HIGH);
    }
    for (int i = 0; i < V; ++i) r[i] = t[i];
  }
}

}  // namespace SPCL_ISA
}  // namespace spcl
