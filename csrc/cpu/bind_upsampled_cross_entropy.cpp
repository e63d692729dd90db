// upsampled_cross_entropy: its schema, tensors as plain structs, partial sums in a fixed order.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/bind_levels.h"
#include "cpu/bind_tensors.h"
#include "cpu/bind_threads.h"
#include "cpu/bind_upsample.h"

namespace spcl {
namespace {

// Adds what each band handed to the next one, then scales: by now the denominator is known.
void finish_gradient(const UpsampledCrossEntropy& a, float scale) {
  const int64_t height = a.logits.height, width = a.logits.width, num_classes = a.logits.dim;
  torch::stable::parallel_for(0, a.logits.batch * num_classes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      float* nodes = a.dlogits + plane * height * width;
      for (int64_t band = 1; band < a.bands; ++band) {
        const float* from =
            a.overlap + (((plane / num_classes) * a.bands + band - 1) * num_classes + plane % num_classes) * width;
        float* to = nodes + band * height / a.bands * width;
        for (int64_t j = 0; j < width; ++j) to[j] += from[j];
      }
      for (int64_t j = 0; j < height * width; ++j) nodes[j] *= scale;
    }
  });
}

// What stands behind UpsampledOptions; as Python lists it: settings {temperature, label_smoothing, gamma}.
struct LossOptions {
  std::vector<float> share, background, class_scale;
  std::optional<Upsampling> targets;
  UpsampledOptions view{};

  LossOptions(const std::vector<double>& settings, bool binary, int64_t num_classes, const float* class_weight) {
    const double smoothing = settings[1];
    view.binary = binary, view.gamma = static_cast<float>(settings[2]);
    for (int64_t k = 0; k < num_classes; ++k) {
      class_scale.push_back(class_weight ? class_weight[k] : 1.0f);
      const double weight = binary ? 1.0 : class_scale[k];
      share.push_back(static_cast<float>((1 - smoothing) * weight));
      background.push_back(static_cast<float>(smoothing / num_classes * weight));
      view.background_sum += smoothing / num_classes * weight;
    }
    view.share = share.data(), view.background = background.data(), view.class_scale = class_scale.data();
  }
  LossOptions(const LossOptions&) = delete;
};

std::tuple<Tensor, Tensor, Tensor> upsampled_loss_forward(
    Tensor logits, Tensor labels, std::optional<Tensor> class_weight, std::optional<Tensor> pixel_weight,
    std::optional<Tensor> denominator, int64_t H, int64_t W, std::vector<double> settings, bool align_corners,
    int64_t ignore_index, bool mean, bool per_pixel, bool binary, bool needs_dlogits) {
  const int64_t B = logits.size(0), K = logits.size(1), h = logits.size(2), w = logits.size(3);
  const double temperature = settings[0];
  const Upsampling up(logits, H, W, temperature, align_corners);
  UpsampledCrossEntropy a{up.view};
  a.pixels.batch = B, a.pixels.height = H, a.pixels.width = W;
  a.class_weight = as_floats(class_weight);
  a.pixel_weight = as_pixel_map(pixel_weight);
  LossOptions options(settings, binary, K, a.class_weight);
  std::optional<LabelMap> map;
  if (is_floating(labels))
    options.view.targets = options.targets.emplace(labels, H, W, 1.0, align_corners).view;
  else
    a.labels = map.emplace(labels, a.pixels, K, ignore_index).view;
  if (!map || binary || settings[1] != 0) a.options = &options.view;
  if (!map || binary) a.class_weight = nullptr;  // the denominator counts pixels

  const int64_t bands = B * a.bands;
  Tensor loss = per_pixel ? empty_floats({B, H, W}) : empty_floats({});
  Tensor dlogits = needs_dlogits ? empty_floats({B, K, h, w}) : empty_floats({0});
  Tensor overlap = needs_dlogits ? empty_floats({bands, K, w}) : empty_floats({0});
  if (needs_dlogits) a.dlogits = floats(dlogits), a.overlap = floats(overlap);
  a.loss_map = per_pixel ? floats(loss) : nullptr;
  std::vector<double> partial(2 * bands);
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  a.partial_loss = partial.data(), a.partial_weight = partial.data() + bands, a.first_bad = &first_bad;

  const Kernels& isa = kernels();
  for_each_group(bands, isa.upsampled_cross_entropy_scratch(a),
                 [&](int64_t band, float* scratch) { isa.upsampled_cross_entropy(a, band, scratch); });

  double total = 0, weight = 0;
  for (int64_t band = 0; band < bands; ++band) total += a.partial_loss[band], weight += a.partial_weight[band];
  if (denominator) weight = *as_floats(*denominator);
  const double inverse = !mean ? 1.0 : weight == 0 ? 0.0 : 1.0 / weight;
  if (!per_pixel) *floats(loss) = static_cast<float>(mean && weight == 0 ? 0.0 : total * inverse);
  if (needs_dlogits) finish_gradient(a, static_cast<float>(inverse / temperature));
  return {loss, dlogits, map ? map->report(first_bad, a.pixels) : report_probability(a.pixels, first_bad)};
}

}  // namespace
}  // namespace spcl

STABLE_TORCH_LIBRARY_FRAGMENT(spcl_fast_cpu, m) {
  // of upsampled_cross_entropy and (binary) upsampled_binary_cross_entropy; settings: temperature, label_smoothing,
  // gamma
  m.def(
      "upsampled_loss_forward(Tensor logits, Tensor labels, Tensor? class_weight, Tensor? pixel_weight, Tensor? "
      "denominator, int height, "
      "int width, float[] settings, bool align_corners, int ignore_index, bool mean, bool per_pixel, bool binary, bool "
      "needs_dlogits) "
      "-> (Tensor loss, Tensor dlogits, Tensor report)");
}

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cpu, CPU, m) {
  m.impl("upsampled_loss_forward", TORCH_BOX(&spcl::upsampled_loss_forward));
}
