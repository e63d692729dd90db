// How torch's own threads share the pieces that operands.h cuts.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "cpu/operands.h"

namespace spcl {

inline float* thread_scratch(int64_t size) {
  struct Buffer {
    std::unique_ptr<float, decltype(&std::free)> data{nullptr, &std::free};
    int64_t size = 0;
  };
  static thread_local Buffer buffer;
  if (buffer.size < size) {
    buffer.data.reset(static_cast<float*>(std::aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64)));
    STD_TORCH_CHECK(buffer.data != nullptr, "spcl_fast_cpu: out of memory for ", size * sizeof(float),
                    " bytes of scratch");
    buffer.size = size;
  }
  return buffer.data.get();
}

// work(group, scratch) for every group, on torch's own threads, each taking the next group that is left: a slow core
// delays nobody. What a group computes does not depend on who computes it.
template <class Work> void for_each_group(int64_t groups, int64_t scratch, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(groups, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    float* mine = thread_scratch(scratch);
    for (int64_t group; (group = next.fetch_add(1, std::memory_order_relaxed)) < groups;) work(group, mine);
  });
}

}  // namespace spcl
