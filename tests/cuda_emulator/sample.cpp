// A kernel that does one of everything, right or wrong on purpose: what test_cuda_emulator.py runs.
#include "pixels.cuh"

namespace spcl::gpu {
namespace {

enum Fault : int {
  kNone,
  kReadBeyond,
  kWriteBeyond,
  kSharedBeyond,
  kNoBarrier,
  kNoWait,
  kDivergent,
  kUnwritten,
  kLanesDiverge
};

// out[i] = sum over the block's numbers; in through cp.async, across the warp by shuffles, across warps by shared
// memory.
__global__ void sample_kernel(const float* in, float* out, int n, int fault) {
  float* staged = shared_memory<float>();
  float* totals = staged + blockDim.x;
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t, warp = t / 32;
  copy_async<4>(staged + t + (fault == kSharedBeyond ? 1 << 16 : 0),
                in + (fault == kReadBeyond ? i + 1 : min(i, n - 1)), i < n ? 4 : 0);
  copy_async_commit();
  if (fault != kNoWait) copy_async_wait<0>();
  if (fault == kLanesDiverge && t == 3) __syncwarp();
  const float value = staged[t];
  copy_async_wait<0>();
  if (fault == kDivergent && t == 5) return;
  const float sum = warp_sum(value);
  if (t % 32 == 0 && !(fault == kUnwritten && warp == 1)) totals[warp] = sum;
  if (fault != kNoBarrier) __syncthreads();
  float all = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) all += totals[w];
  if (i < n || fault == kWriteBeyond) out[i] = all;
}

// out[block] = 1 + the number of the next block of its cluster, told by that block.
__global__ void cluster_kernel(float* out, int size, bool waits) {
  float* told = shared_memory<float>();
  if (threadIdx.x == 0) *told = 1.0f + blockIdx.x;
  cluster_barrier();
  const int next = (cluster_rank() + 1) % size;
  if (threadIdx.x == 0) out[blockIdx.x] = *shared_of(told, next);
  if (waits) cluster_barrier();
}

}  // namespace
}  // namespace spcl::gpu

extern "C" __attribute__((visibility("default"))) const char* sample_cluster(float* out, int clusters, int size,
                                                                             int waits) {
  using namespace spcl::gpu;
  return launch(cluster_kernel,
                Grid{static_cast<unsigned>(clusters * size), 32, sizeof(float), static_cast<unsigned>(size)}, nullptr,
                out, size, waits);
}

extern "C" __attribute__((visibility("default"))) const char* sample(const float* in, float* out, int n, int fault) {
  using namespace spcl::gpu;
  const unsigned threads = 64, blocks = (n + threads - 1) / threads;
  return launch(sample_kernel, Grid{blocks, threads, (threads + threads / 32) * sizeof(float)}, nullptr, in, out, n,
                fault);
}
