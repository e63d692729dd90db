// The native ops: schemas, what the tensors mean in raw pointers, threads, partial sums in a fixed order. No arithmetic on features here.
//
// Through libtorch's stable ABI (target 2.11), so one binary serves every torch from 2.11 on; pybind11 binds only the module's own facts.
#include <Python.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "cpu/kernels.h"

namespace {

using spcl::Contrast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- which instruction set --------------------------------------------------------------------------------------

struct Kernels {
  const char* name;
  decltype(&spcl::baseline::contrast_forward_scratch) contrast_forward_scratch;
  decltype(&spcl::baseline::contrast_forward) contrast_forward;
  decltype(&spcl::baseline::contrast_backward_scratch) contrast_backward_scratch;
  decltype(&spcl::baseline::contrast_backward) contrast_backward;
  decltype(&spcl::baseline::class_moments_scratch) class_moments_scratch;
  decltype(&spcl::baseline::class_moments) class_moments;
};

#define SPCL_KERNELS(ISA)                                                                                                         \
  Kernels { #ISA, &spcl::ISA::contrast_forward_scratch, &spcl::ISA::contrast_forward, &spcl::ISA::contrast_backward_scratch, \
            &spcl::ISA::contrast_backward, &spcl::ISA::class_moments_scratch, &spcl::ISA::class_moments }

const Kernels kLevels[] = {
    SPCL_KERNELS(baseline),
#if defined(SPCL_HAS_X86_LEVELS)
    SPCL_KERNELS(avx2),
    SPCL_KERNELS(avx512),
#endif
};

size_t best_level() {
#if defined(SPCL_HAS_X86_LEVELS)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? 2 : 1;
#else
  return 0;
#endif
}

// The best level of this processor, or the lower one that SPCL_FAST_CPU_CAPABILITY names.
const Kernels& kernels() {
  static const Kernels* chosen = [] {
    const size_t best = best_level();
    const char* asked = std::getenv("SPCL_FAST_CPU_CAPABILITY");
    for (size_t i = 0; asked && i < best; ++i)
      if (std::string(asked) == kLevels[i].name) return &kLevels[i];
    return &kLevels[best];
  }();
  return *chosen;
}

// ---- tensors to plain structs -----------------------------------------------------------------------------------

spcl::Features as_features(const Tensor& t) {
  spcl::FloatType type;
  switch (t.scalar_type()) {
    case ScalarType::Float: type = spcl::kFloat32; break;
    case ScalarType::BFloat16: type = spcl::kBFloat16; break;
    case ScalarType::Half: type = spcl::kFloat16; break;
    default: STD_TORCH_CHECK(false, "spcl_fast_native: features must be float32, bfloat16 or float16");
  }
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4, "spcl_fast_native: features must be a CPU tensor [B, D, h, w]");
  const auto size = t.sizes(), stride = t.strides();
  return {t.data_ptr(), type, size[0], size[1], size[2], size[3], stride[0], stride[1], stride[2], stride[3]};
}

// The nearest rule of F.interpolate, in its own float32 arithmetic; the stride is multiplied in.
std::vector<int64_t> nearest_offsets(int64_t size, int64_t out, int64_t stride) {
  std::vector<int64_t> offset(out);
  const float scale = static_cast<float>(size) / static_cast<float>(out);
  for (int64_t i = 0; i < out; ++i)
    offset[i] = stride * (size == out ? i : std::min(static_cast<int64_t>(static_cast<float>(i) * scale), size - 1));
  return offset;
}

struct LabelMap {
  std::vector<int64_t> row, col;
  spcl::Labels view;
  int64_t stride_h, stride_w;

  LabelMap(const Tensor& t, const spcl::Features& x, int64_t num_classes, int64_t ignore_index) {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 3 && t.size(0) == x.batch, "spcl_fast_native: labels must be a CPU tensor [B, H, W]");
    STD_TORCH_CHECK(x.height * x.width == 0 || t.size(1) * t.size(2) > 0, "spcl_fast_native: labels hold no pixel");
    stride_h = t.stride(1), stride_w = t.stride(2);
    row = nearest_offsets(t.size(1), x.height, stride_h);
    col = nearest_offsets(t.size(2), x.width, stride_w);
    view = {t.data_ptr(), type_of(t), t.stride(0), row.data(), col.data(), ignore_index, num_classes};
  }

  static spcl::LabelType type_of(const Tensor& t) {
    switch (t.scalar_type()) {
      case ScalarType::Byte: return spcl::kUInt8;
      case ScalarType::Char: return spcl::kInt8;
      case ScalarType::UInt16: return spcl::kUInt16;
      case ScalarType::Short: return spcl::kInt16;
      case ScalarType::UInt32: return spcl::kUInt32;
      case ScalarType::Int: return spcl::kInt32;
      case ScalarType::UInt64: return spcl::kUInt64;
      case ScalarType::Long: return spcl::kInt64;
      default: STD_TORCH_CHECK(false, "spcl_fast_native: labels must have an integer dtype");
    }
  }

  int64_t value_at(int64_t offset) const {
    switch (view.type) {
      case spcl::kUInt8: return static_cast<const uint8_t*>(view.data)[offset];
      case spcl::kInt8: return static_cast<const int8_t*>(view.data)[offset];
      case spcl::kUInt16: return static_cast<const uint16_t*>(view.data)[offset];
      case spcl::kInt16: return static_cast<const int16_t*>(view.data)[offset];
      case spcl::kUInt32: return static_cast<const uint32_t*>(view.data)[offset];
      case spcl::kInt32: return static_cast<const int32_t*>(view.data)[offset];
      default: return static_cast<const int64_t*>(view.data)[offset];
    }
  }

  // [5] int64: 1 if a label was out of range, its value, and its place (b, i, j) on the labels' own grid.
  Tensor report(int64_t first_bad, const spcl::Features& x) const {
    Tensor out = torch::stable::empty({5}, ScalarType::Long);
    int64_t* to = static_cast<int64_t*>(out.data_ptr());
    std::fill(to, to + 5, 0);
    if (first_bad == std::numeric_limits<int64_t>::max()) return out;
    const int64_t b = first_bad / (x.height * x.width), i = first_bad / x.width % x.height, j = first_bad % x.width;
    to[0] = 1, to[1] = value_at(b * view.stride_b + row[i] + col[j]), to[2] = b;
    to[3] = stride_h ? row[i] / stride_h : 0, to[4] = stride_w ? col[j] / stride_w : 0;
    return out;
  }
};

// [B, h, w] float32, or a scalar that stands for every pixel.
spcl::PixelMap as_pixel_map(const std::optional<Tensor>& t) {
  if (!t) return {nullptr, 0, 0, 0};
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && (t->dim() == 3 || t->numel() == 1), "spcl_fast_native: expected float32 [B, h, w]");
  const float* data = static_cast<const float*>(t->data_ptr());
  return t->dim() == 3 ? spcl::PixelMap{data, t->stride(0), t->stride(1), t->stride(2)} : spcl::PixelMap{data, 0, 0, 0};
}

const float* as_floats(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), "spcl_fast_native: expected contiguous float32");
  return static_cast<const float*>(t.data_ptr());
}

Tensor empty_floats(std::vector<int64_t> shape) { return torch::stable::empty(shape, ScalarType::Float); }
float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// A matrix in blocks of equal height, at most 6 rows: 19 rows make 4 blocks of 5. Without `from` only the shape.
struct PanelBuffer {
  std::vector<float> data;
  spcl::Panels view;

  PanelBuffer(const float* from, int64_t count, int64_t length, int64_t stride_row, int64_t stride_column) {
    const int64_t blocks = (count + 5) / 6, rows = (count + blocks - 1) / blocks;
    if (from) data.resize(blocks * rows * length);
    float* to = data.data();
    for (int64_t block = 0; from && block < blocks; ++block)
      for (int64_t j = 0; j < length; ++j)
        for (int64_t i = block * rows; i < (block + 1) * rows; ++i) *to++ = i < count ? from[i * stride_row + j * stride_column] : 0.0f;
    view = {data.data(), count, length, blocks, rows};
  }
};

// ---- threads ----------------------------------------------------------------------------------------------------

float* thread_scratch(int64_t size) {
  struct Buffer {
    std::unique_ptr<float, decltype(&std::free)> data{nullptr, &std::free};
    int64_t size = 0;
  };
  static thread_local Buffer buffer;
  if (buffer.size < size) {
    buffer.data.reset(static_cast<float*>(std::aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64)));
    STD_TORCH_CHECK(buffer.data != nullptr, "spcl_fast_native: out of memory for ", size * sizeof(float), " bytes of scratch");
    buffer.size = size;
  }
  return buffer.data.get();
}

// work(group, scratch) for every group, on torch's own threads, each taking the next group that is left: a slow core delays nobody.
// What a group computes does not depend on who computes it.
template <class Work>
void for_each_group(int64_t groups, int64_t scratch, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(groups, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    float* mine = thread_scratch(scratch);
    for (int64_t group; (group = next.fetch_add(1, std::memory_order_relaxed)) < groups;) work(group, mine);
  });
}

// Pixels to tiles. `rows` is how many packed rows a panel needs; a tile's should stay within about half of an L2 cache.
spcl::Tiles make_tiles(const spcl::Features& x, int64_t rows) {
  const int64_t panels = std::clamp<int64_t>(2048 / std::max<int64_t>(rows, 1), 1, spcl::kMaxPanels), pixels = x.height * x.width;
  const int64_t per_image = (pixels + panels * spcl::kPanel - 1) / (panels * spcl::kPanel);
  return {panels, per_image, per_image * x.batch};
}

// Partial [K, D] sums: as many as stay small beside the features, at most 32. A function of shapes only.
int64_t partial_groups(const spcl::Features& x, int64_t num_classes, int64_t tiles) {
  const int64_t affordable = x.batch * x.height * x.width / (4 * num_classes);
  return std::clamp<int64_t>(std::min(affordable, tiles), 1, 32);
}

// ---- memory of large outputs ------------------------------------------------------------------------------------

// A fresh gradient costs more in page faults than in arithmetic. So large outputs live in huge pages, and when one is freed its pages are
// kept for the next one of about that size, marked MADV_FREE: the system takes them back whenever it is short of memory, and until then the
// next step faults nothing and clears nothing. At most kKept buffers (gradient and logits of a source and a target batch) wait like this.
class OutputPages {
 public:
  static constexpr size_t kHugePage = size_t{1} << 21;

  // nullptr where the system gives no memory.
  void* take(size_t bytes) {
    bytes = round_up(bytes);
    const std::lock_guard<std::mutex> hold(lock_);
    auto best = waiting_.end();
    for (auto block = waiting_.begin(); block != waiting_.end(); ++block)
      if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4 && (best == waiting_.end() || block->bytes < best->bytes)) best = block;
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
    char* data = static_cast<char*>(mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
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

Tensor empty_output(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type, size_t bytes) {
  void* data = output_pages().take(bytes);
  STD_TORCH_CHECK(data != nullptr, "spcl_fast_native: out of memory for an output of ", bytes, " bytes");
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(data, sizes, strides, cpu, type, [](void* mine) { output_pages().give(mine); });
}

// An uninitialised tensor of the shape and dtype of `like`, with these (dense) strides.
Tensor empty_gradient(Tensor like, std::vector<int64_t> strides) {
  const std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  return empty_output(sizes, strides, like.scalar_type(), like.numel() * like.element_size());
}

Tensor empty_logits(int64_t batch, int64_t num_classes, int64_t pixels) {
  const size_t bytes = batch * num_classes * pixels * sizeof(float);
  if (bytes < OutputPages::kHugePage) return empty_floats({batch, num_classes, pixels});
  return empty_output({batch, num_classes, pixels}, {num_classes * pixels, pixels, 1}, ScalarType::Float, bytes);
}

// ---- prototype_contrastive_loss ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prototype_contrastive_forward(
    Tensor features, Tensor labels, Tensor prototypes, std::optional<Tensor> class_weight, std::optional<Tensor> pixel_weight, double temperature,
    bool normalize, int64_t ignore_index, bool mean, bool per_pixel, bool save, bool save_logits) {
  spcl::ContrastForward a{};
  a.x = as_features(features);
  const int64_t K = prototypes.size(0), D = a.x.dim, P = a.x.height * a.x.width, B = a.x.batch;
  const LabelMap map(labels, a.x, K, ignore_index);
  const PanelBuffer by_class(as_floats(prototypes), K, D, D, 1);
  a.labels = map.view, a.by_class = by_class.view, a.num_classes = K;
  a.class_weight = class_weight ? as_floats(*class_weight) : nullptr;
  a.pixel_weight = as_pixel_map(pixel_weight);
  a.temperature = static_cast<float>(temperature), a.normalize = normalize;
  a.tiles = make_tiles(a.x, 128 + K);

  Tensor loss = per_pixel ? empty_floats({B, a.x.height, a.x.width}) : empty_floats({});
  Tensor denominator = empty_floats({});
  Tensor lse = save ? empty_floats({B, P}) : empty_floats({0}), inv_norm = save ? empty_floats({B, P}) : empty_floats({0});
  Tensor logits = save && save_logits ? empty_logits(B, K, P) : empty_floats({0});
  a.loss_map = per_pixel ? floats(loss) : nullptr;
  if (save) a.lse = floats(lse), a.inv_norm = floats(inv_norm);
  if (save && save_logits) a.logits = floats(logits);
  std::vector<double> partial(2 * a.tiles.count);
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  a.partial_loss = partial.data(), a.partial_weight = partial.data() + a.tiles.count, a.first_bad = &first_bad;

  const Kernels& isa = kernels();
  for_each_group(a.tiles.count, isa.contrast_forward_scratch(a), [&](int64_t tile, float* scratch) { isa.contrast_forward(a, tile, scratch); });

  double total = 0, weight = 0;
  for (int64_t tile = 0; tile < a.tiles.count; ++tile) total += a.partial_loss[tile], weight += a.partial_weight[tile];
  *floats(denominator) = mean ? static_cast<float>(weight) : 1.0f;
  if (!per_pixel) *floats(loss) = static_cast<float>(mean && weight != 0 ? total / weight : total);
  return {loss, denominator, lse, inv_norm, logits, map.report(first_bad, a.x)};
}

// partial [groups][D][stride] -> out [K, D], summed in the order of the groups.
void sum_prototype_partials(const std::vector<float>& partial, int64_t groups, int64_t dim, int64_t stride, int64_t num_classes, float* out) {
  torch::stable::parallel_for(0, dim, 64, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d)
      for (int64_t k = 0; k < num_classes; ++k) {
        double sum = 0;
        for (int64_t g = 0; g < groups; ++g) sum += partial[(g * dim + d) * stride + k];
        out[k * dim + d] = static_cast<float>(sum);
      }
  });
}

constexpr int64_t kPastCacheBytes = 16 << 20;

// dfeatures is written whole; or has no element where it is not wanted. Returns dprototypes [K, D] or [0].
Tensor prototype_contrastive_backward(
    Tensor grad_loss, Tensor features, Tensor labels, Tensor prototypes, std::optional<Tensor> class_weight, std::optional<Tensor> pixel_weight,
    Tensor lse, Tensor inv_norm, Tensor logits, Tensor denominator, Tensor dfeatures, double temperature, bool normalize, int64_t ignore_index,
    bool needs_dfeatures, bool needs_dprototypes) {
  spcl::ContrastBackward a{};
  a.x = as_features(features);
  const int64_t K = prototypes.size(0), D = a.x.dim;
  const LabelMap map(labels, a.x, K, ignore_index);
  const float* proto = as_floats(prototypes);
  const PanelBuffer by_class(logits.numel() ? nullptr : proto, K, D, D, 1), by_channel(proto, D, K, 1, D);
  a.labels = map.view, a.by_class = by_class.view, a.by_channel = by_channel.view, a.num_classes = K;
  a.class_weight = class_weight ? as_floats(*class_weight) : nullptr;
  a.pixel_weight = as_pixel_map(pixel_weight), a.grad = as_pixel_map(grad_loss);
  a.temperature = static_cast<float>(temperature), a.normalize = normalize;
  a.denominator = *as_floats(denominator), a.lse = as_floats(lse), a.inv_norm = as_floats(inv_norm);
  a.logits = logits.numel() ? as_floats(logits) : nullptr;
  if (needs_dfeatures) a.dx = as_features(dfeatures);
  a.past_cache = features.numel() * features.element_size() >= kPastCacheBytes;
  a.tiles = make_tiles(a.x, (!a.logits || needs_dprototypes ? D : 48) + K);

  const int64_t groups = needs_dprototypes ? partial_groups(a.x, K, a.tiles.count) : a.tiles.count;
  a.dproto_stride = needs_dprototypes ? (K + 31) / 32 * 32 : 0;
  std::vector<float> partial(needs_dprototypes ? groups * D * a.dproto_stride : 0);
  a.dproto = needs_dprototypes ? partial.data() : nullptr;
  const Kernels& isa = kernels();
  for_each_group(groups, isa.contrast_backward_scratch(a), [&](int64_t group, float* scratch) {
    for (int64_t tile = group * a.tiles.count / groups; tile < (group + 1) * a.tiles.count / groups; ++tile)
      isa.contrast_backward(a, tile, group, scratch);
  });
  Tensor dprototypes = needs_dprototypes ? empty_floats({K, D}) : empty_floats({0});
  if (needs_dprototypes) sum_prototype_partials(partial, groups, D, a.dproto_stride, K, floats(dprototypes));
  return dprototypes;
}

// ---- class_moments ----------------------------------------------------------------------------------------------

void sum_partials(const std::vector<float>& partial, int64_t groups, float* out, int64_t size) {
  torch::stable::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      for (int64_t g = 0; g < groups; ++g) sum += partial[g * size + i];
      out[i] = static_cast<float>(sum);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_moments(Tensor features, Tensor labels, int64_t num_classes, bool normalize, bool squares,
                                                         int64_t ignore_index) {
  spcl::Moments a{};
  a.x = as_features(features);
  const int64_t K = num_classes, D = a.x.dim;
  const LabelMap map(labels, a.x, K, ignore_index);
  a.labels = map.view, a.num_classes = K, a.normalize = normalize, a.tiles = make_tiles(a.x, 512);
  const int64_t groups = partial_groups(a.x, K, a.tiles.count);
  std::vector<float> sums(groups * K * D), square_sums(squares ? groups * K * D : 0);
  std::vector<int64_t> counts(groups * K);
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  a.sums = sums.data(), a.squares = squares ? square_sums.data() : nullptr, a.counts = counts.data(), a.first_bad = &first_bad;

  const Kernels& isa = kernels();
  for_each_group(groups, isa.class_moments_scratch(a), [&](int64_t group, float* scratch) {
    for (int64_t tile = group * a.tiles.count / groups; tile < (group + 1) * a.tiles.count / groups; ++tile)
      isa.class_moments(a, tile, group, scratch);
  });
  Tensor out = empty_floats({K, D}), out_squares = squares ? empty_floats({K, D}) : empty_floats({0});
  Tensor out_counts = torch::stable::empty({K}, ScalarType::Long);
  sum_partials(sums, groups, floats(out), K * D);
  if (squares) sum_partials(square_sums, groups, floats(out_squares), K * D);
  int64_t* total = static_cast<int64_t*>(out_counts.data_ptr());
  std::fill(total, total + K, 0);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t k = 0; k < K; ++k) total[k] += counts[g * K + k];
  return {out, out_counts, out_squares, map.report(first_bad, a.x)};
}

// ---- the module -------------------------------------------------------------------------------------------------

#if !defined(SPCL_CXX_FLAGS)
#define SPCL_CXX_FLAGS ""
#endif

pybind11::dict build_info() {
  pybind11::dict info;
  std::vector<std::string> levels;
  for (const Kernels& level : kLevels) levels.push_back(level.name);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["flags"] = SPCL_CXX_FLAGS;
  info["cpu_levels"] = levels;
  info["cuda_archs"] = std::vector<std::string>();
  info["torch_target"] = "2.11";
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY(spcl_fast_native, m) {
  m.def(
      "prototype_contrastive_forward(Tensor features, Tensor labels, Tensor prototypes, Tensor? class_weight, Tensor? pixel_weight, "
      "float temperature, bool normalize, int ignore_index, bool mean, bool per_pixel, bool save, bool save_logits) "
      "-> (Tensor loss, Tensor denominator, Tensor lse, Tensor inv_norm, Tensor logits, Tensor report)");
  m.def(
      "prototype_contrastive_backward(Tensor grad_loss, Tensor features, Tensor labels, Tensor prototypes, Tensor? class_weight, "
      "Tensor? pixel_weight, Tensor lse, Tensor inv_norm, Tensor logits, Tensor denominator, Tensor(a!) dfeatures, float temperature, "
      "bool normalize, int ignore_index, bool needs_dfeatures, bool needs_dprototypes) -> Tensor dprototypes");
  m.def("empty_gradient(Tensor like, int[] strides) -> Tensor");
  m.def(
      "class_moments(Tensor features, Tensor labels, int num_classes, bool normalize, bool squares, int ignore_index) "
      "-> (Tensor sums, Tensor counts, Tensor squares, Tensor report)");
}

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_native, CPU, m) {
  m.impl("prototype_contrastive_forward", TORCH_BOX(&prototype_contrastive_forward));
  m.impl("prototype_contrastive_backward", TORCH_BOX(&prototype_contrastive_backward));
  m.impl("empty_gradient", TORCH_BOX(&empty_gradient));
  m.impl("class_moments", TORCH_BOX(&class_moments));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of spcl_fast; importing this registers torch.ops.spcl_fast_native.";
  m.def("build_info", &build_info, "compiler, flags, cpu_levels, cuda_archs, torch_target");
  m.def("cpu_capability", [] { return std::string(kernels().name); }, "avx512, avx2 or baseline: the level in use");
}
