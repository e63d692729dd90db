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
        const float* from = a.overlap + (((plane / num_classes) * a.bands + band - 1) * num_classes + plane % num_classes) * width;
        float* to = nodes + band * height / a.bands * width;
        for (int64_t j = 0; j < width; ++j) to[j] += from[j];
      }
      for (int64_t j = 0; j < height * width; ++j) nodes[j] *= scale;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> upsampled_cross_entropy_forward(
    Tensor logits, Tensor labels, std::optional<Tensor> class_weight, std::optional<Tensor> pixel_weight, double temperature,
    bool align_corners, int64_t ignore_index, bool mean, bool per_pixel, bool needs_dlogits) {
  const int64_t B = labels.size(0), H = labels.size(1), W = labels.size(2), K = logits.size(1), h = logits.size(2), w = logits.size(3);
  const Upsampling up(logits, H, W, temperature, align_corners);
  UpsampledCrossEntropy a{up.view};
  a.pixels.batch = B, a.pixels.height = H, a.pixels.width = W;
  const LabelMap map(labels, a.pixels, K, ignore_index);
  a.labels = map.view;
  a.class_weight = as_floats(class_weight);
  a.pixel_weight = as_pixel_map(pixel_weight);

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
  const double inverse = !mean ? 1.0 : weight == 0 ? 0.0 : 1.0 / weight;
  if (!per_pixel) *floats(loss) = static_cast<float>(total * inverse);
  if (needs_dlogits) finish_gradient(a, static_cast<float>(inverse / temperature));
  return {loss, dlogits, map.report(first_bad, a.pixels)};
}

}  // namespace
}  // namespace spcl

STABLE_TORCH_LIBRARY_FRAGMENT(spcl_fast_cpu, m) {
  m.def(
      "upsampled_cross_entropy_forward(Tensor logits, Tensor labels, Tensor? class_weight, Tensor? pixel_weight, float temperature, "
      "bool align_corners, int ignore_index, bool mean, bool per_pixel, bool needs_dlogits) "
      "-> (Tensor loss, Tensor dlogits, Tensor report)");
}

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cpu, CPU, m) {
  m.impl("upsampled_cross_entropy_forward", TORCH_BOX(&spcl::upsampled_cross_entropy_forward));
}
