// CUDA on one CPU thread, for tests: the kernels of csrc/cuda compiled by an ordinary C++ compiler and run with the
// semantics of a block.
//
// Every thread of a block is a fiber. A fiber runs until it waits (__syncthreads, a warp collective) or ends, in an
// order that the test picks (emulator_order): a missing barrier shows as other bits in another order. Beyond that it
// finds
//   * reads and writes out of bounds: shared memory, stacks and every buffer made here lie between guards that may not
//   be touched;
//   * what was never written: shared memory and buffers start as 0xff bytes, which is NaN in every float type;
//   * a missing wait: a cp.async leaves 0xff until it is waited for;
//   * a read of a cluster's block that has ended: its shared memory may not be touched any more;
//   * a barrier or a collective that not all threads reach: "deadlock", instead of a hang.
// Collectives take the full mask only, blocks are multiples of 32 threads, and shared memory is dynamic
// (shared_memory<T>() of launch.h).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __shared__ static_assert(false, "shared memory is dynamic here: see shared_memory<T>() in csrc/cuda/launch.h")

// ---- vector types -----------------------------------------------------------------------------------------------

#define EMULATOR_VECTORS(T, NAME, ALIGN)                             \
  struct __align__(2 * sizeof(T)) NAME##2 { T x, y; };               \
  struct NAME##3 { T x, y, z; };                                     \
  struct __align__(ALIGN) NAME##4 { T x, y, z, w; };                 \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }         \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; } \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMULATOR_VECTORS(float, float, 16)
EMULATOR_VECTORS(int, int, 16)
EMULATOR_VECTORS(unsigned, uint, 16)
EMULATOR_VECTORS(short, short, 8)
EMULATOR_VECTORS(unsigned short, ushort, 8)
EMULATOR_VECTORS(signed char, char, 4)
EMULATOR_VECTORS(unsigned char, uchar, 4)
EMULATOR_VECTORS(double, double, 16)
EMULATOR_VECTORS(long long, longlong, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- half floats ------------------------------------------------------------------------------------------------

struct __half {
  unsigned short bits;
};
struct __align__(4) __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  unsigned short bits;
};
struct __align__(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  return u;
}
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }
inline int __float_as_int(float f) { return static_cast<int>(__float_as_uint(f)); }

inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<unsigned>(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const unsigned u = __float_as_uint(f);
  if (f != f) return {0x7fff};
  return {static_cast<unsigned short>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
inline float __half2float(__half v) {
  _Float16 h;
  memcpy(&h, &v, 2);
  return static_cast<float>(h);
}
inline __half __float2half_rn(float f) {
  const _Float16 h = static_cast<_Float16>(f);
  __half v;
  memcpy(&v, &h, 2);
  return v;
}
inline __half __float2half(float f) { return __float2half_rn(f); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline __half __ushort_as_half(unsigned short v) { return {v}; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return {v}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }

// ---- arithmetic -------------------------------------------------------------------------------------------------

using std::max;
using std::min;
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmul_rn(float a, float b) {
  volatile float c = a * b;
  return c;
}
inline float __fadd_rn(float a, float b) {
  volatile float c = a + b;
  return c;
}
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldca(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }

template <class T> inline T atomicAdd(T* p, T v) {
  static_assert(static_cast<T>(0.5) == 0, "float atomics make the result depend on the order");
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T> inline T atomicMax(T* p, T v) {
  const T old = *p;
  *p = old < v ? v : old;
  return old;
}
template <class T> inline T atomicMin(T* p, T v) {
  const T old = *p;
  *p = v < old ? v : old;
  return old;
}
template <class T> inline T atomicOr(T* p, T v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <class T> inline T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T> inline T atomicCAS(T* p, T compare, T v) {
  const T old = *p;
  if (old == compare) *p = v;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- threads ----------------------------------------------------------------------------------------------------

namespace emulator {

constexpr int kWarp = 32;
constexpr int kExchangeBytes = 64;

struct Place {
  dim3 thread, block, block_size, grid;
  int lane, rank;  // rank: of the block in its cluster
};
const Place& here();

char* shared();                     // of this block
char* shared_of(int rank);          // of another block of the cluster
void barrier();                     // all threads of the block
void cluster_barrier();             // all threads of the cluster
int barrier_count(bool predicate);  // the same, and how many predicates are true
void copy_async(void* to, const void* from, int bytes,
                int given);  // lands when waited for; bytes beyond `given` become 0
void copy_async_commit();
void copy_async_wait(int pending);
// Every lane gives `bytes` (at most kExchangeBytes) and finds what lane i gave at i * kExchangeBytes. `kind`: all lanes
// must name the same.
const char* exchange(const char* kind, unsigned mask, const void* mine, int bytes);
[[noreturn]] void fail(const char* format, ...);

template <class T> inline T from_lane(const char* all, int lane) {
  T value;
  memcpy(&value, all + (lane & 31) * kExchangeBytes, sizeof(T));
  return value;
}

using Body = void (*)(void*);
// Runs body(argument), a call of `kernel`, as every thread of every block; nullptr, or what went wrong.
const char* run(const void* kernel, Body body, void* argument, dim3 blocks, unsigned threads, unsigned cluster,
                size_t shared_bytes);
int shared_limit();  // bytes a block may have

template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 blocks, unsigned threads, unsigned cluster, size_t shared_bytes,
                   A&&... given) {
  std::tuple<void (*)(P...), std::tuple<P...>> call{kernel, std::tuple<P...>(std::forward<A>(given)...)};
  auto body = [](void* argument) {
    auto& [function, arguments] = *static_cast<decltype(call)*>(argument);
    std::apply(function, arguments);
  };
  return run(reinterpret_cast<const void*>(kernel), body, &call, blocks, threads, cluster, shared_bytes);
}

// What an address is on a card: the emulator's own memory (stacks, places, exchanges of a warp) stands for registers.
enum class Memory { kRegisters, kShared, kGlobal };
Memory memory_of(const void* address);
bool running();  // is a thread of a kernel?

// Defined where traffic is counted (traffic.cpp), nullptr elsewhere.
struct Shape {
  dim3 blocks;
  unsigned threads;
  size_t shared_bytes;
};
__attribute__((weak)) void on_launch(const void* kernel, const Shape& shape);
__attribute__((weak)) void on_copy(const void* place, void* to, const void* from, int bytes, int given);
__attribute__((weak)) void on_wait(int bytes);             // of this thread's copies that were not waited for so far
__attribute__((weak)) void on_blocks_ended(int barriers);  // of the blocks of one cluster

}  // namespace emulator

#define threadIdx (emulator::here().thread)
#define blockIdx (emulator::here().block)
#define blockDim (emulator::here().block_size)
#define gridDim (emulator::here().grid)
constexpr int warpSize = 32;

inline void __syncthreads() { emulator::barrier(); }
inline int __syncthreads_count(int p) { return emulator::barrier_count(p != 0); }
inline int __syncthreads_or(int p) { return emulator::barrier_count(p != 0) > 0; }
inline int __syncthreads_and(int p) { return emulator::barrier_count(p == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange("syncwarp", mask, nullptr, 0); }

template <class T> inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const int from = (emulator::here().lane & ~(width - 1)) | (lane & (width - 1));
  return emulator::from_lane<T>(emulator::exchange("shfl", mask, &value, sizeof(T)), from);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int mine = emulator::here().lane, from = mine ^ lanes;
  return emulator::from_lane<T>(emulator::exchange("shfl_xor", mask, &value, sizeof(T)),
                                from / width == mine / width ? from : mine);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int mine = emulator::here().lane, from = mine + lanes;
  return emulator::from_lane<T>(emulator::exchange("shfl_down", mask, &value, sizeof(T)),
                                from / width == mine / width ? from : mine);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int mine = emulator::here().lane, from = mine - lanes;
  const bool inside = from >= 0 && from / width == mine / width;
  return emulator::from_lane<T>(emulator::exchange("shfl_up", mask, &value, sizeof(T)), inside ? from : mine);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const char* all = emulator::exchange("ballot", mask, &predicate, sizeof(int));
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (emulator::from_lane<int>(all, lane) != 0 ? 1u : 0u) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
template <class T> inline unsigned __match_any_sync(unsigned mask, T value) {
  const char* all = emulator::exchange("match_any", mask, &value, sizeof(T));
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (emulator::from_lane<T>(all, lane) == value ? 1u : 0u) << lane;
  return bits;
}
#define EMULATOR_REDUCE(NAME, T, EXPRESSION)                              \
  inline T NAME(unsigned mask, T value) {                                 \
    const char* all = emulator::exchange(#NAME, mask, &value, sizeof(T)); \
    T a = emulator::from_lane<T>(all, 0);                                 \
    for (int lane = 1; lane < 32; ++lane) {                               \
      const T b = emulator::from_lane<T>(all, lane);                      \
      a = EXPRESSION;                                                     \
    }                                                                     \
    return a;                                                             \
  }
EMULATOR_REDUCE(__reduce_add_sync, int, a + b)
EMULATOR_REDUCE(__reduce_add_sync, unsigned, a + b)
EMULATOR_REDUCE(__reduce_max_sync, int, max(a, b))
EMULATOR_REDUCE(__reduce_min_sync, int, min(a, b))
EMULATOR_REDUCE(__reduce_max_sync, unsigned, max(a, b))
EMULATOR_REDUCE(__reduce_min_sync, unsigned, min(a, b))
EMULATOR_REDUCE(__reduce_or_sync, unsigned, a | b)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, a& b)
