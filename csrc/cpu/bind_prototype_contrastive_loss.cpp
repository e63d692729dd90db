// prototype_contrastive_loss and prototype_logits: their schemas, tensors as plain structs, partial sums in a fixed
// order. No arithmetic on features here.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/bind_contrast.h"
#include "cpu/bind_levels.h"
#include "cpu/bind_pages.h"

namespace spcl {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Numbers = std::vector<double>;
using Choices = std::vector<int64_t>;

constexpr int64_t kPastCacheBytes = 16 << 20;
enum Reduction : int64_t { kMean, kSum, kNone };

// The part of a label's role that hard labels and probabilities differ in.
struct Targets {
  std::optional<LabelMap> map;
  OptionalTensor probabilities;

  Targets(const Tensor& labels, const ContrastSettings& s, Contrast* a) {
    if (is_floating(labels))
      probabilities = labels;
    else
      map.emplace(labels, a->x, s.num_classes, s.ignore_index), a->labels = map->view;
  }

  Tensor report(const Contrast& a, int64_t first_bad) const {
    return map ? map->report(first_bad, a.x) : report_probability(as_features(*probabilities), first_bad);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prototype_contrastive_forward(
    Tensor features, Tensor labels, Tensor prototypes, OptionalTensor class_weight, OptionalTensor pixel_weight,
    OptionalTensor bias, OptionalTensor variances, OptionalTensor prototype_class, OptionalTensor given_denominator,
    Numbers numbers, Choices choices, int64_t reduction, bool save, bool save_logits) {
  const ContrastSettings s(numbers, choices);
  ContrastForward a{};
  ContrastProblem problem({features, prototypes, class_weight, pixel_weight, bias, variances, prototype_class}, s, &a,
                          true, false);
  const Targets targets(labels, s, &a);
  if (problem.needs_options() || targets.probabilities)
    problem.set_options(&a, s.sigmoid ? kSigmoid : kSoftmax, targets.probabilities);
  const int64_t P = a.x.height * a.x.width, B = a.x.batch;
  a.tiles = make_tiles(a.x, 128 + a.num_rows);

  Tensor loss = reduction == kNone ? empty_floats({B, a.x.height, a.x.width}) : empty_floats({});
  Tensor denominator = empty_floats({});
  Tensor lse = save ? empty_floats({B, P}) : empty_floats({0}),
         inv_norm = save ? empty_floats({B, P}) : empty_floats({0});
  Tensor logits = save && save_logits ? empty_logits(B, a.num_rows, P) : empty_floats({0});
  a.loss_map = reduction == kNone ? floats(loss) : nullptr;
  if (save) a.lse = floats(lse), a.inv_norm = floats(inv_norm);
  if (save && save_logits) a.logits = floats(logits);
  std::vector<double> partial(2 * a.tiles.count);
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  a.partial_loss = partial.data(), a.partial_weight = partial.data() + a.tiles.count, a.first_bad = &first_bad;

  const Kernels& isa = kernels();
  for_each_group(a.tiles.count, isa.contrast_forward_scratch(a),
                 [&](int64_t tile, float* scratch) { isa.contrast_forward(a, tile, scratch); });

  double total = 0, weight = 0;
  for (int64_t tile = 0; tile < a.tiles.count; ++tile) total += a.partial_loss[tile], weight += a.partial_weight[tile];
  if (given_denominator) weight = *as_floats(*given_denominator);
  *floats(denominator) = reduction == kMean ? static_cast<float>(weight) : 1.0f;
  if (reduction != kNone)
    *floats(loss) = static_cast<float>(reduction == kMean ? (weight != 0 ? total / weight : 0.0) : total);
  return {loss, denominator, lse, inv_norm, logits, targets.report(a, first_bad)};
}

// ---- backward ---------------------------------------------------------------------------------------------------

// partial [groups][D][stride] -> out [M, D], summed in the order of the groups; row m of the partial sums is row
// order[m] of out.
void sum_prototype_partials(const float* partial, int64_t groups, int64_t dim, int64_t stride, int64_t rows,
                            const RowOrder& order, float* out) {
  torch::stable::parallel_for(0, dim, 64, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d)
      for (int64_t m = 0; m < rows; ++m) {
        double sum = 0;
        for (int64_t g = 0; g < groups; ++g) sum += partial[(g * dim + d) * stride + m];
        out[order[m] * dim + d] = static_cast<float>(sum);
      }
  });
}

// Which gradients there are beside the features', and room for their partial sums.
struct SmallGradients {
  bool prototypes, bias, temperature;
  int64_t groups, images;
  std::vector<float> dproto;
  std::vector<double> dbias, dtemperature;

  SmallGradients(const Choices& wanted, ContrastBackward* a, bool per_image)
      : prototypes(wanted[1]), bias(wanted[2]), temperature(wanted[3]), images(per_image ? a->x.batch : 1) {
    const bool some = prototypes || bias || temperature;
    groups = !some        ? a->tiles.count
             : !per_image ? partial_groups(a->x, a->num_rows, a->tiles.count)
                          : images * groups_of_image(*a);
    a->dproto_stride = prototypes ? (a->num_rows + 31) / 32 * 32 : 0;
    dproto.resize(prototypes ? groups * a->x.dim * a->dproto_stride : 0);
    dbias.resize(bias ? groups * a->num_rows : 0), dtemperature.resize(temperature ? groups : 0);
    if (prototypes) a->dproto = dproto.data();
    if (bias) a->dbias = dbias.data();
    if (temperature) a->dtemperature = dtemperature.data();
  }

  static int64_t groups_of_image(const ContrastBackward& a) {
    Features one = a.x;
    one.batch = 1;
    const int64_t most = std::max<int64_t>(1, 32 / std::max<int64_t>(1, a.x.batch));
    return std::min(most, partial_groups(one, a.num_rows, a.tiles.tiles_per_image));
  }

  // The gradients of [M, D] or [B, M, D] prototypes, [M] or [B, M] biases and the temperature; [0] where not wanted.
  std::tuple<Tensor, Tensor, Tensor> sums(const ContrastBackward& a, const std::vector<int64_t>& shape,
                                          int64_t bias_dim, const RowOrder& order) const {
    const int64_t rows = a.num_rows, dim = a.x.dim, each = groups / std::max<int64_t>(1, images);
    Tensor out = prototypes ? empty_floats(shape) : empty_floats({0});
    const int64_t copies = shape.size() == 3 ? images : 1, of_copy = copies == images ? each : groups;
    for (int64_t i = 0; prototypes && i < copies; ++i)
      sum_prototype_partials(dproto.data() + i * of_copy * dim * a.dproto_stride, of_copy, dim, a.dproto_stride, rows,
                             order, floats(out) + i * rows * dim);
    Tensor out_bias = !bias ? empty_floats({0}) : bias_dim == 2 ? empty_floats({images, rows}) : empty_floats({rows});
    std::vector<double> total(bias ? out_bias.numel() : 0);
    for (int64_t g = 0; bias && g < groups; ++g)
      for (int64_t m = 0; m < rows; ++m) total[(bias_dim == 2 ? g / each : 0) * rows + order[m]] += dbias[g * rows + m];
    for (size_t i = 0; i < total.size(); ++i) floats(out_bias)[i] = static_cast<float>(total[i]);
    Tensor out_temperature = temperature ? empty_floats({}) : empty_floats({0});
    if (temperature)
      *floats(out_temperature) =
          static_cast<float>(-std::accumulate(dtemperature.begin(), dtemperature.end(), 0.0) / a.temperature);
    return {out, out_bias, out_temperature};
  }
};

std::tuple<Tensor, Tensor, Tensor> run_backward(ContrastBackward& a, const ContrastProblem& problem,
                                                const Tensor& prototypes, const OptionalTensor& bias,
                                                const Choices& wanted) {
  a.past_cache = a.x.batch * a.x.dim * a.x.height * a.x.width * (a.x.type == kFloat32 ? 4 : 2) >= kPastCacheBytes;
  const bool tile = !a.logits || wanted[1] || (a.options && a.options->variances_by_class.data);
  a.tiles = make_tiles(a.x, (tile ? a.x.dim : 48) + a.num_rows);
  SmallGradients small(wanted, &a, problem.per_image());
  const Kernels& isa = kernels();
  for_each_group(small.groups, isa.contrast_backward_scratch(a), [&](int64_t group, float* scratch) {
    for (int64_t tile = group * a.tiles.count / small.groups; tile < (group + 1) * a.tiles.count / small.groups; ++tile)
      isa.contrast_backward(a, tile, group, scratch);
  });
  return small.sums(a, {prototypes.sizes().begin(), prototypes.sizes().end()}, bias ? bias->dim() : 0, problem.order());
}

// dfeatures is written whole; or has no element where it is not wanted.
std::tuple<Tensor, Tensor, Tensor> prototype_contrastive_backward(
    Tensor grad_loss, Tensor features, Tensor labels, Tensor prototypes, OptionalTensor class_weight,
    OptionalTensor pixel_weight, OptionalTensor bias, OptionalTensor variances, OptionalTensor prototype_class,
    Tensor lse, Tensor inv_norm, Tensor logits, Tensor denominator, Tensor dfeatures, Numbers numbers, Choices choices,
    Choices wanted) {
  const ContrastSettings s(numbers, choices);
  ContrastBackward a{};
  ContrastProblem problem({features, prototypes, class_weight, pixel_weight, bias, variances, prototype_class}, s, &a,
                          logits.numel() == 0, true);
  const Targets targets(labels, s, &a);
  if (problem.needs_options() || targets.probabilities) {
    problem.set_options(&a, s.sigmoid ? kSigmoid : kSoftmax, targets.probabilities);
    a.class_weight = nullptr;  // it is in the options' shares
  }
  a.grad = as_pixel_map(grad_loss);
  a.denominator = *as_floats(denominator), a.lse = as_floats(lse), a.inv_norm = as_floats(inv_norm);
  a.logits = logits.numel() ? as_floats(logits) : nullptr;
  if (wanted[0]) a.dx = as_features(dfeatures);
  return run_backward(a, problem, prototypes, bias, wanted);
}

// ---- logits -----------------------------------------------------------------------------------------------------

Tensor prototype_logits_forward(Tensor features, Tensor prototypes, OptionalTensor bias, OptionalTensor variances,
                                OptionalTensor prototype_class, Numbers numbers, Choices choices) {
  const ContrastSettings s(numbers, choices);
  ContrastForward a{};
  const OptionalTensor none;
  ContrastProblem problem({features, prototypes, none, none, bias, variances, prototype_class}, s, &a, true, false);
  problem.set_options(&a, kLogits, none);
  a.tiles = make_tiles(a.x, 128 + a.num_rows);
  Tensor logits = empty_logits(a.x.batch, s.num_classes, a.x.height * a.x.width);
  a.class_logits = floats(logits);
  std::vector<double> partial(2 * a.tiles.count);
  a.partial_loss = partial.data(), a.partial_weight = partial.data() + a.tiles.count;
  const Kernels& isa = kernels();
  for_each_group(a.tiles.count, isa.contrast_forward_scratch(a),
                 [&](int64_t tile, float* scratch) { isa.contrast_forward(a, tile, scratch); });
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> prototype_logits_backward(Tensor grad_logits, Tensor features, Tensor prototypes,
                                                             OptionalTensor bias, OptionalTensor variances,
                                                             OptionalTensor prototype_class, Tensor dfeatures,
                                                             Numbers numbers, Choices choices, Choices wanted) {
  const ContrastSettings s(numbers, choices);
  ContrastBackward a{};
  const OptionalTensor none;
  ContrastProblem problem({features, prototypes, none, none, bias, variances, prototype_class}, s, &a, true, true);
  problem.set_options(&a, kLogits, grad_logits);
  if (wanted[0]) a.dx = as_features(dfeatures);
  return run_backward(a, problem, prototypes, bias, wanted);
}

}  // namespace
}  // namespace spcl

STABLE_TORCH_LIBRARY_FRAGMENT(spcl_fast_cpu, m) {
  // numbers, choices: ContrastSettings in bind_contrast.h; reduction 0 mean, 1 sum, 2 none; wanted: of features,
  // prototypes, bias, temperature
  m.def(
      "prototype_contrastive_forward(Tensor features, Tensor labels, Tensor prototypes, Tensor? class_weight, Tensor? "
      "pixel_weight, "
      "Tensor? bias, Tensor? variances, Tensor? prototype_class, Tensor? denominator, float[] numbers, int[] choices, "
      "int reduction, "
      "bool save, bool save_logits) -> (Tensor loss, Tensor denominator, Tensor lse, Tensor inv_norm, Tensor logits, "
      "Tensor report)");
  m.def(
      "prototype_contrastive_backward(Tensor grad_loss, Tensor features, Tensor labels, Tensor prototypes, Tensor? "
      "class_weight, "
      "Tensor? pixel_weight, Tensor? bias, Tensor? variances, Tensor? prototype_class, Tensor lse, Tensor inv_norm, "
      "Tensor logits, "
      "Tensor denominator, Tensor(a!) dfeatures, float[] numbers, int[] choices, int[] wanted) "
      "-> (Tensor dprototypes, Tensor dbias, Tensor dtemperature)");
  m.def(
      "prototype_logits_forward(Tensor features, Tensor prototypes, Tensor? bias, Tensor? variances, Tensor? "
      "prototype_class, "
      "float[] numbers, int[] choices) -> Tensor");
  m.def(
      "prototype_logits_backward(Tensor grad_logits, Tensor features, Tensor prototypes, Tensor? bias, Tensor? "
      "variances, "
      "Tensor? prototype_class, Tensor(a!) dfeatures, float[] numbers, int[] choices, int[] wanted) "
      "-> (Tensor dprototypes, Tensor dbias, Tensor dtemperature)");
}

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cpu, CPU, m) {
  m.impl("prototype_contrastive_forward", TORCH_BOX(&spcl::prototype_contrastive_forward));
  m.impl("prototype_contrastive_backward", TORCH_BOX(&spcl::prototype_contrastive_backward));
  m.impl("prototype_logits_forward", TORCH_BOX(&spcl::prototype_logits_forward));
  m.impl("prototype_logits_backward", TORCH_BOX(&spcl::prototype_logits_backward));
}
