// What a kernel file needs besides its arithmetic: the launch, shared memory, cp.async, half floats, clusters.
//
// Under nvcc these are CUDA; with SPCL_EMULATED they are the test's emulator, so that an ordinary compiler builds and
// runs the same kernels. Rules that keep this so: launch() instead of <<<>>>, shared_memory<T>() instead of __shared__,
// collectives with the full mask, blocks of a multiple of 32 threads along x.
#pragma once
#include <type_traits>

#include "kernels.h"
#include "sizes.h"

#if defined(SPCL_EMULATED)
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace spcl::gpu {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Grid {
  dim3 blocks;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks along x that share their memory (sm_90 and newer)
};

#if defined(SPCL_EMULATED)

template <class... P, class... A> Status launch(void (*kernel)(P...), const Grid& grid, Stream, A&&... arguments) {
  return emulator::launch(kernel, grid.blocks, grid.threads, grid.cluster, grid.shared_bytes,
                          std::forward<A>(arguments)...);
}

// The most shared memory that a block may ask for on the current device.
inline int shared_memory_limit() { return emulator::shared_limit(); }

// Whether the blocks of a cluster can share their memory on the current device.
inline bool has_clusters() { return true; }

template <class T> inline T* shared_memory() { return reinterpret_cast<T*>(emulator::shared()); }

// 4, 8 or 16 bytes from global to shared memory, both so aligned; there after copy_async_wait. Of the bytes beyond
// `given` zeros are written.
template <int kBytes> inline void copy_async(void* shared, const void* global, int given = kBytes) {
  emulator::copy_async(shared, global, kBytes, given);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int kPending> inline void copy_async_wait() { emulator::copy_async_wait(kPending); }

inline int cluster_rank() { return emulator::here().rank; }
inline void cluster_barrier() { emulator::cluster_barrier(); }
// The same place in the shared memory of another block of the cluster.
template <class T> inline T* shared_of(T* mine, int rank) {
  return reinterpret_cast<T*>(emulator::shared_of(rank) + (reinterpret_cast<char*>(mine) - emulator::shared()));
}

#else

template <class... P, class... A>
Status launch(void (*kernel)(P...), const Grid& grid, Stream stream, A&&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (grid.shared_bytes > 48 << 10) {
    const cudaError_t set = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(grid.shared_bytes));
    if (set != cudaSuccess) return cudaGetErrorString(set);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks, config.blockDim = dim3(grid.threads), config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {grid.cluster, 1, 1};
  if (grid.cluster > 1) config.attrs = &cluster, config.numAttrs = 1;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

inline int shared_memory_limit() {
  int device = 0, bytes = 48 << 10;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

inline bool has_clusters() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

template <class T> __device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

template <int kBytes> __device__ __forceinline__ void copy_async(void* shared, const void* global, int given = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(given) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global), "r"(given), "n"(kBytes)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
template <class T> __device__ __forceinline__ T* shared_of(T* mine, int rank) {
  T* other;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(mine), "r"(rank));
  return other;
}
#endif

#endif

// ---- floats of the features -------------------------------------------------------------------------------------

SPCL_BOTH float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <> __device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }

// 16 bytes of features as floats.
template <class T> __device__ __forceinline__ void unpack(uint4 raw, float (&out)[16 / sizeof(T)]) {
  const unsigned word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      out[i] = __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      out[2 * i] = __uint_as_float(word[i] << 16), out[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    } else {
      out[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(word[i] & 0xffffu)));
      out[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word[i] >> 16)));
    }
  }
}

// call(T{}) for the C++ type of a feature type.
template <class Call> auto with_float_type(FloatType type, const Call& call) {
  switch (type) {
    case kFloat32: return call(float{});
    case kBFloat16: return call(__nv_bfloat16{});
    default: return call(__half{});
  }
}

}  // namespace spcl::gpu
