// The kernels of one instruction set without torch: `ops NAME [FILE]` runs one op on a small problem, and writes x
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <string>

#include "cpu/operands.h"

using namespace spcl;

namespace {

constexpr int64_t kIgnore = 255;
using Part = std::vector<float>;
using Out = std::vector<Part>;  // parts of one size and unit each, to be compared each by itself
using Work = std::function<void(float* scratch)>;

}  // namespace

// callgrind counts what happens in here, by this name.
extern "C" __attribute__((noinline)) void spcl_counted(const Work& work, float* scratch) {
  work(scratch);
  __asm__ volatile("" ::: "memory");
}

namespace {

// ---- inputs: exact in float32, the same on every machine ----------------------------------------------------------

struct Draw {
  uint64_t state = 0x9e3779b97f4a7c15u;
  uint32_t bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
  }
  float number() { return static_cast<float>(static_cast<int32_t>(bits()) >> 8) / 4194304.0f; }  // -2 to 2
  std::vector<float> numbers(int64_t count) {
    std::vector<float> out(count);
    for (float& x : out) x = number();
    return out;
  }
};

struct Shape {
  int64_t batch, dim, height, width;
};

enum Layout { kPlanes, kChannelsLast };

// float32 or bfloat16, as planes or with the channels last.
struct FeatureBuffer {
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  Features view;

  FeatureBuffer(const Shape& s, std::vector<float> values, FloatType type = kFloat32, Layout layout = kPlanes)
      : floats(std::move(values)) {
    const int64_t P = s.height * s.width;
    view = {floats.data(), type, s.batch, s.dim, s.height, s.width, s.dim * P, P, s.width, 1};
    if (layout == kChannelsLast) view.stride_d = 1, view.stride_w = s.dim, view.stride_h = s.dim * s.width;
    if (type == kFloat32) return;
    for (float x : floats) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      halves.push_back(static_cast<uint16_t>(bits >> 16));
    }
    view.data = halves.data();
  }
  FeatureBuffer(const FeatureBuffer&) = delete;

  Part values() const {
    if (view.type == kFloat32) return floats;
    Part out;
    for (uint16_t half : halves) {
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      out.push_back(x);
    }
    return out;
  }
};

// In blocks of 8 x 8, a tenth of them ignored.
struct LabelBuffer {
  std::vector<uint8_t> data;
  std::vector<int64_t> row, col;
  Labels view;

  LabelBuffer(Draw& draw, const Shape& grid, int64_t num_classes) : data(grid.batch * grid.height * grid.width) {
    const int64_t across = grid.width / 8 + 1, down = grid.height / 8 + 1;
    std::vector<uint8_t> block(grid.batch * down * across);
    for (uint8_t& k : block) k = draw.bits() % 10 == 0 ? kIgnore : draw.bits() % num_classes;
    for (int64_t i = 0; i < static_cast<int64_t>(data.size()); ++i) {
      const int64_t b = i / (grid.height * grid.width), y = i / grid.width % grid.height, x = i % grid.width;
      data[i] = block[(b * down + y / 8) * across + x / 8];
    }
    row = nearest_offsets(grid.height, grid.height, grid.width), col = nearest_offsets(grid.width, grid.width, 1);
    view = {data.data(), kUInt8, grid.height * grid.width, row.data(), col.data(), true, kIgnore, num_classes};
  }
  LabelBuffer(const LabelBuffer&) = delete;
};

// ---- running ------------------------------------------------------------------------------------------------------

void run(int64_t scratch_floats, const Work& work, bool count = true) {
  const size_t bytes = (std::max<int64_t>(scratch_floats, 16) * sizeof(float) + 63) / 64 * 64;
  const std::unique_ptr<float, decltype(&std::free)> scratch(static_cast<float*>(std::aligned_alloc(64, bytes)),
                                                             &std::free);
  std::memset(scratch.get(), 0, bytes);
  if (count) return spcl_counted(work, scratch.get());
  work(scratch.get());
}

// What every form of prototype_contrastive_loss shares.
struct ContrastCase {
  Draw draw;
  Shape shape;
  FeatureBuffer features, gradient;
  LabelBuffer labels;
  std::vector<float> prototypes;
  PanelBuffer by_class, by_channel;
  std::vector<double> partial;
  int64_t first_bad = std::numeric_limits<int64_t>::max();

  ContrastCase(const Shape& s, int64_t num_classes, FloatType type = kFloat32, Layout layout = kPlanes)
      : shape(s),
        features(s, draw.numbers(s.batch * s.dim * s.height * s.width), type, layout),
        gradient(s, std::vector<float>(features.floats.size(), 7.0f), type, layout),
        labels(draw, s, num_classes),
        prototypes(draw.numbers(num_classes * s.dim)),
        by_class(prototypes.data(), num_classes, s.dim, s.dim, 1),
        by_channel(prototypes.data(), s.dim, num_classes, 1, s.dim) {}

  void fill(Contrast* a, int64_t rows_of_tile) {
    a->x = features.view, a->labels = labels.view, a->by_class = by_class.view, a->by_channel = by_channel.view;
    a->num_rows = labels.view.num_classes, a->temperature = 4.0f, a->normalize = true;
    a->tiles = make_tiles(a->x, rows_of_tile + a->num_rows);
    partial.assign(2 * a->tiles.count, 0.0);
  }
  double sum(int64_t part, int64_t tiles) const {
    return std::accumulate(partial.begin() + part * tiles, partial.begin() + (part + 1) * tiles, 0.0);
  }
};

// The forward, and the backward to the features: of saved logits, or of logits that are computed again, which keeps
// fewer bytes. Either of the two is counted.
struct Passes {
  Shape shape;
  int64_t num_classes;
  bool save_logits = false;
  bool prototypes = false;  // their gradient, too
  FloatType type = kFloat32;
  Layout layout = kPlanes;
};

Out contrast(const Passes& p, bool count_backward) {
  ContrastCase c(p.shape, p.num_classes, p.type, p.layout);
  ContrastForward f{};
  c.fill(&f, 128);
  const int64_t pixels = p.shape.batch * p.shape.height * p.shape.width;
  std::vector<float> lse(pixels), inv_norm(pixels), logits(pixels * p.num_classes);
  f.lse = lse.data(), f.inv_norm = inv_norm.data(), f.first_bad = &c.first_bad;
  f.logits = p.save_logits ? logits.data() : nullptr;
  f.partial_loss = c.partial.data(), f.partial_weight = c.partial.data() + f.tiles.count;
  run(
      SPCL_ISA::contrast_forward_scratch(f),
      [&](float* scratch) {
        for (int64_t tile = 0; tile < f.tiles.count; ++tile) SPCL_ISA::contrast_forward(f, tile, scratch);
      },
      !count_backward);
  const float loss = static_cast<float>(c.sum(0, f.tiles.count)), weight = static_cast<float>(c.sum(1, f.tiles.count));
  if (!count_backward) return {{loss}, {weight}, lse, inv_norm};
  ContrastBackward a{};
  const float one = 1;
  a.denominator = weight, a.grad = {&one, 0, 0, 0}, a.lse = lse.data(), a.inv_norm = inv_norm.data();
  a.logits = f.logits;
  c.fill(&a, a.logits ? 48 : p.shape.dim);
  a.dx = c.gradient.view, a.dproto_stride = p.prototypes ? (p.num_classes + 31) / 32 * 32 : 0;
  Part dproto(p.shape.dim * a.dproto_stride);
  a.dproto = p.prototypes ? dproto.data() : nullptr;
  run(SPCL_ISA::contrast_backward_scratch(a), [&](float* scratch) {
    for (int64_t tile = 0; tile < a.tiles.count; ++tile) SPCL_ISA::contrast_backward(a, tile, 0, scratch);
  });
  if (!p.prototypes) return {c.gradient.values()};
  return {c.gradient.values(), dproto};
}

Out moments(const Shape& shape, int64_t num_classes, FloatType type, Layout layout) {
  Draw draw;
  FeatureBuffer features(shape, draw.numbers(shape.batch * shape.dim * shape.height * shape.width), type, layout);
  LabelBuffer labels(draw, shape, num_classes);
  Part sums(num_classes * shape.dim), squares(num_classes * shape.dim);
  std::vector<int64_t> counts(num_classes);
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  Moments a{};
  a.x = features.view, a.labels = labels.view, a.num_classes = num_classes, a.normalize = true;
  a.tiles = make_tiles(a.x, 512), a.groups = 1, a.first_bad = &first_bad;
  a.sums = sums.data(), a.squares = squares.data(), a.counts = counts.data();
  run(SPCL_ISA::class_moments_scratch(a), [&](float* scratch) { SPCL_ISA::class_moments(a, 0, scratch); });
  return {sums, squares, Part(counts.begin(), counts.end())};
}

// Logits [B, K, h, w], and the labels' grid.
struct UpsampledCase {
  Draw draw;
  FeatureBuffer logits;
  Shape grid;
  LabelBuffer labels;
  UpsamplingTables tables;

  UpsampledCase(const Shape& nodes, int64_t height, int64_t width)
      : logits(nodes, draw.numbers(nodes.batch * nodes.dim * nodes.height * nodes.width)),
        grid{nodes.batch, 0, height, width},
        labels(draw, grid, nodes.dim),
        tables(logits.view, height, width, 1.0, true) {}

  int64_t bands() const { return grid.batch * tables.view.bands; }
  Features pixels() const { return {nullptr, kFloat32, grid.batch, 0, grid.height, grid.width, 0, 0, 0, 0}; }
};

Out cross_entropy(const Shape& nodes, int64_t height, int64_t width) {
  UpsampledCase c(nodes, height, width);
  UpsampledCrossEntropy a{c.tables.view};
  Part gradient(c.logits.floats.size()), overlap(c.bands() * nodes.dim * nodes.width);
  std::vector<double> partial(2 * c.bands());
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  a.pixels = c.pixels(), a.labels = c.labels.view, a.dlogits = gradient.data(), a.overlap = overlap.data();
  a.partial_loss = partial.data(), a.partial_weight = partial.data() + c.bands(), a.first_bad = &first_bad;
  run(SPCL_ISA::upsampled_cross_entropy_scratch(a), [&](float* scratch) {
    for (int64_t band = 0; band < c.bands(); ++band) SPCL_ISA::upsampled_cross_entropy(a, band, scratch);
  });
  return {gradient, overlap, Part(partial.begin(), partial.end())};
}

Out prediction(const Shape& nodes, int64_t height, int64_t width) {
  UpsampledCase c(nodes, height, width);
  UpsampledPrediction a{c.tables.view};
  std::vector<uint8_t> labels(c.labels.data.size());
  Part confidence(labels.size());
  a.ignore_index = kIgnore, a.labels = labels.data(), a.confidence = confidence.data();
  run(SPCL_ISA::upsampled_prediction_scratch(a), [&](float* scratch) {
    for (int64_t band = 0; band < c.bands(); ++band) SPCL_ISA::upsampled_prediction(a, band, scratch);
  });
  return {confidence, Part(labels.begin(), labels.end())};
}

Out confusion(const Shape& nodes, int64_t height, int64_t width) {
  UpsampledCase c(nodes, height, width);
  UpsampledConfusion a{c.tables.view};
  std::vector<int64_t> counts(nodes.dim * nodes.dim);
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  a.pixels = c.pixels(), a.labels = c.labels.view, a.counts = counts.data(), a.first_bad = &first_bad;
  run(SPCL_ISA::upsampled_confusion_scratch(a), [&](float* scratch) {
    for (int64_t band = 0; band < c.bands(); ++band) SPCL_ISA::upsampled_confusion(a, band, scratch);
  });
  return {Part(counts.begin(), counts.end())};
}

// Few channels, a projection head cut short, and many classes; a whole number of panels, and not.
const Passes kFew = {.shape = {1, 64, 16, 64}, .num_classes = 19};
const Passes kHead = {.shape = {1, 200, 9, 61}, .num_classes = 19, .save_logits = true};
const Passes kMany = {.shape = {1, 128, 8, 64}, .num_classes = 150};
const Passes kLearning = {.shape = {1, 200, 8, 64}, .num_classes = 19, .save_logits = true, .prototypes = true};
const Passes kHalf = {.shape = {1, 64, 16, 64}, .num_classes = 19, .type = kBFloat16};
const Passes kLast = {.shape = {1, 64, 16, 64}, .num_classes = 19, .layout = kChannelsLast};

const std::map<std::string, std::function<Out()>> kOps = {
    {"contrast_forward_D64", [] { return contrast(kFew, false); }},
    {"contrast_backward_D64", [] { return contrast(kFew, true); }},
    {"contrast_forward_D200_odd", [] { return contrast(kHead, false); }},
    {"contrast_backward_D200_odd", [] { return contrast(kHead, true); }},
    {"contrast_forward_K150", [] { return contrast(kMany, false); }},
    {"contrast_backward_K150", [] { return contrast(kMany, true); }},
    {"contrast_backward_prototypes", [] { return contrast(kLearning, true); }},
    {"contrast_backward_bf16", [] { return contrast(kHalf, true); }},
    {"contrast_backward_channels_last", [] { return contrast(kLast, true); }},
    {"class_moments_D64", [] { return moments({1, 64, 16, 64}, 19, kFloat32, kPlanes); }},
    {"class_moments_D200_odd", [] { return moments({1, 200, 9, 61}, 19, kFloat32, kPlanes); }},
    {"class_moments_bf16_channels_last", [] { return moments({1, 64, 16, 64}, 19, kBFloat16, kChannelsLast); }},
    {"upsampled_cross_entropy", [] { return cross_entropy({1, 19, 9, 17}, 65, 129); }},
    {"upsampled_prediction", [] { return prediction({1, 19, 9, 17}, 65, 129); }},
    {"upsampled_confusion", [] { return confusion({1, 19, 9, 17}, 65, 129); }},
};

}  // namespace

int main(int argc, char** argv) {
  const auto op = argc > 1 ? kOps.find(argv[1]) : kOps.end();
  if (op == kOps.end()) {
    for (const auto& [name, call] : kOps) std::puts(name.c_str());
    return argc > 1 ? 2 : 0;
  }
  const Out out = op->second();
  if (argc < 3) return 0;
  std::FILE* file = std::fopen(argv[2], "wb");
  bool written = file != nullptr;
  for (const Part& part : out) {
    const float size = static_cast<float>(part.size());
    written = written && std::fwrite(&size, sizeof size, 1, file) == 1 &&
              std::fwrite(part.data(), sizeof(float), part.size(), file) == part.size();
  }
  return file && std::fclose(file) == 0 && written ? 0 : 1;
}
