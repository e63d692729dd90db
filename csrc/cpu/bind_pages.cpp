#include "cpu/bind_pages.h"

#include <sys/mman.h>

#include <mutex>
#include <unordered_map>

namespace spcl {
namespace {

// A fresh gradient costs more in page faults than in arithmetic. So large outputs live in huge pages, and when one is
// freed its pages are kept for the next one of about that size, marked MADV_FREE: the system takes them back whenever
// it is short of memory, and until then the next step faults nothing and clears nothing. At most kKept buffers
// (gradient and logits of a source and a target batch) wait like this.
class OutputPages {
 public:
  static constexpr size_t kHugePage = size_t{1} << 21;

  // nullptr where the system gives no memory.
  void* take(size_t bytes) {
    bytes = round_up(bytes);
    const std::lock_guard<std::mutex> hold(lock_);
    auto best = waiting_.end();
    for (auto block = waiting_.begin(); block != waiting_.end(); ++block)
      if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4 &&
          (best == waiting_.end() || block->bytes < best->bytes))
        best = block;
    Block found{nullptr, 0};
    if (best != waiting_.end()) {
      found = *best;
      waiting_.erase(best);
    } else {
      found = {map(bytes), bytes};
    }
    if (found.data) taken_[found.data] = found.bytes;
    return found.data;
  }

  void give(void* data) {
    const std::lock_guard<std::mutex> hold(lock_);
    const Block block{data, taken_.at(data)};
    taken_.erase(data);
    if (madvise(data, block.bytes, MADV_FREE) != 0) {
      munmap(data, block.bytes);
      return;
    }
    waiting_.push_back(block);
    if (waiting_.size() <= kKept) return;
    munmap(waiting_.front().data, waiting_.front().bytes);
    waiting_.erase(waiting_.begin());
  }

 private:
  static constexpr size_t kKept = 4;
  struct Block {
    void* data;
    size_t bytes;
  };

  static size_t round_up(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

  static void* map(size_t bytes) {
    char* data = static_cast<char*>(
        mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (data == MAP_FAILED) return nullptr;
    char* first = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(data)));
    if (first > data) munmap(data, first - data);
    munmap(first + bytes, data + kHugePage - first);
#if defined(MADV_HUGEPAGE)
    madvise(first, bytes, MADV_HUGEPAGE);
#endif
    return first;
  }

  std::mutex lock_;
  std::vector<Block> waiting_;
  std::unordered_map<void*, size_t> taken_;
};

// Never destroyed: tensors may outlive every static.
OutputPages& output_pages() {
  static OutputPages* pages = new OutputPages;
  return *pages;
}

Tensor empty_output(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type,
                    size_t bytes) {
  void* data = output_pages().take(bytes);
  STD_TORCH_CHECK(data != nullptr, "spcl_fast_cpu: out of memory for an output of ", bytes, " bytes");
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(data, sizes, strides, cpu, type, [](void* mine) { output_pages().give(mine); });
}

}  // namespace

Tensor empty_gradient(Tensor like, std::vector<int64_t> strides) {
  const std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  return empty_output(sizes, strides, like.scalar_type(), like.numel() * like.element_size());
}

Tensor empty_logits(int64_t batch, int64_t num_classes, int64_t pixels) {
  const size_t bytes = batch * num_classes * pixels * sizeof(float);
  if (bytes < OutputPages::kHugePage) return empty_floats({batch, num_classes, pixels});
  return empty_output({batch, num_classes, pixels}, {num_classes * pixels, pixels, 1}, ScalarType::Float, bytes);
}

}  // namespace spcl
