// The loss over many classes, streamed: its schemas, tensors as plain structs, the order in which tiles and
// groups of classes are worked on. No arithmetic on features here.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>

#include "cpu/bind_levels.h"
#include "cpu/bind_pages.h"
#include "cpu/bind_tensors.h"
#include "cpu/bind_threads.h"

namespace spcl {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGroups =
    16;  // of classes: what threads share; a constant, so that sums do not depend on their number
constexpr int64_t kRowsOfTile =
    2048;  // packed rows of a backward's tile: its features are 512 KB, and so is a group's gradient
enum Reduction : int64_t { kMean, kSum, kNone };

// As Python lists it: temperature, label_smoothing, margin, the teacher's temperature.
struct StreamedSettings {
  double temperature, label_smoothing, margin, teacher_temperature;
  explicit StreamedSettings(const std::vector<double>& numbers) {
    STD_TORCH_CHECK(numbers.size() == 4, "spcl_fast_cpu: expected 4 numbers");
    temperature = numbers[0], label_smoothing = numbers[1], margin = numbers[2], teacher_temperature = numbers[3];
  }
};

struct Teacher {
  const OptionalTensor &features, &prototypes, &u, &v;
};

// The tensors behind a Streamed.
struct StreamedProblem {
  std::vector<float> bias, share, background, class_scale;
  std::optional<LabelMap> map;

  StreamedProblem(Streamed* a, const Tensor& features, const Tensor& prototypes, const OptionalTensor& class_weight,
                  const OptionalTensor& bias_tensor, const OptionalTensor& variances, const StreamedSettings& s,
                  bool normalize, bool sigmoid) {
    a->x = as_features(features);
    const bool per_image = prototypes.dim() == 3;
    const int64_t K = prototypes.size(per_image);
    a->num_classes = K, a->prototypes = as_floats(prototypes), a->prototypes_stride = per_image ? K * a->x.dim : 0;
    a->temperature = static_cast<float>(s.temperature), a->normalize = normalize;
    a->margin = static_cast<float>(s.margin / s.temperature);
    a->class_weight = as_floats(class_weight), a->variances = as_floats(variances), a->sigmoid = sigmoid;
    if (bias_tensor)
      a->bias = as_floats(*bias_tensor), a->bias_stride = bias_tensor->dim() == 2 ? K : 0;
    else
      bias.resize(K), a->bias = bias.data();
    for (int64_t k = 0; k < K; ++k) {
      const double scale = a->class_weight ? a->class_weight[k] : 1.0, weight = sigmoid ? 1.0 : scale;
      if (sigmoid) class_scale.push_back(static_cast<float>(scale));
      share.push_back(static_cast<float>((1 - s.label_smoothing) * weight));
      if (s.label_smoothing != 0) background.push_back(static_cast<float>(s.label_smoothing / K * weight));
      a->background_sum += s.label_smoothing / K * weight;
    }
    a->share = share.data(), a->background = background.empty() ? nullptr : background.data();
    a->class_scale = class_scale.data();
    if (sigmoid) a->class_weight = nullptr;  // the denominator counts pixels
  }
  StreamedProblem(const StreamedProblem&) = delete;

  void set_targets(Streamed* a, const OptionalTensor& labels, const Teacher& teacher,
                   const OptionalTensor& pixel_weight, int64_t ignore_index, const StreamedSettings& s) {
    a->pixel_weight = as_pixel_map(pixel_weight);
    if (labels) {
      a->labels = map.emplace(*labels, a->x, a->num_classes, ignore_index).view;
      return;
    }
    a->class_weight = nullptr;  // the denominator counts pixels
    a->teacher = as_features(*teacher.features), a->teacher_prototypes = as_floats(*teacher.prototypes);
    a->teacher_temperature = static_cast<float>(s.teacher_temperature);
    STD_TORCH_CHECK(teacher.u->scalar_type() == ScalarType::Double && teacher.u->is_contiguous(),
                    "spcl_fast_cpu: the teacher's u must be contiguous float64");
    a->teacher_u = static_cast<const double*>(teacher.u->data_ptr()), a->teacher_v = as_floats(*teacher.v);
  }
};

void run_forward(StreamedForward& a, std::vector<double>& partial) {
  a.tiles = make_tiles(a.x, a.x.dim + (a.teacher.data ? a.teacher.dim : 0));
  partial.resize(2 * a.tiles.count);
  a.partial_loss = partial.data(), a.partial_weight = partial.data() + a.tiles.count;
  const Kernels& isa = kernels();
  for_each_group(a.tiles.count, isa.streamed_forward_scratch(a),
                 [&](int64_t tile, float* scratch) { isa.streamed_forward(a, tile, scratch); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> streamed_forward(
    Tensor features, OptionalTensor labels, Tensor prototypes, OptionalTensor class_weight, OptionalTensor pixel_weight,
    OptionalTensor bias, OptionalTensor variances, OptionalTensor given_denominator, OptionalTensor teacher_features,
    OptionalTensor teacher_prototypes, OptionalTensor u, OptionalTensor v, std::vector<double> numbers, bool normalize,
    bool sigmoid, int64_t ignore_index, int64_t reduction, bool save) {
  const StreamedSettings s(numbers);
  StreamedForward a{};
  StreamedProblem problem(&a, features, prototypes, class_weight, bias, variances, s, normalize, sigmoid);
  problem.set_targets(&a, labels, {teacher_features, teacher_prototypes, u, v}, pixel_weight, ignore_index, s);
  const int64_t B = a.x.batch, P = a.x.height * a.x.width;
  Tensor loss = reduction == kNone ? empty_floats({B, a.x.height, a.x.width}) : empty_floats({}),
         denominator = empty_floats({});
  Tensor lse = torch::stable::empty(save ? std::vector<int64_t>{B, P} : std::vector<int64_t>{0}, ScalarType::Double);
  Tensor inv_norm = save ? empty_floats({B, P}) : empty_floats({0});
  a.loss_map = reduction == kNone ? floats(loss) : nullptr;
  if (save) a.lse = static_cast<double*>(lse.data_ptr()), a.inv_norm = floats(inv_norm);
  int64_t first_bad = std::numeric_limits<int64_t>::max();
  a.first_bad = &first_bad;
  std::vector<double> partial;
  run_forward(a, partial);
  double total = 0, weight = 0;
  for (int64_t tile = 0; tile < a.tiles.count; ++tile) total += a.partial_loss[tile], weight += a.partial_weight[tile];
  if (given_denominator) weight = *as_floats(*given_denominator);
  *floats(denominator) = reduction == kMean ? static_cast<float>(weight) : 1.0f;
  if (reduction != kNone)
    *floats(loss) = static_cast<float>(reduction == kMean ? (weight != 0 ? total / weight : 0.0) : total);
  return {loss, denominator, lse, inv_norm,
          problem.map ? problem.map->report(first_bad, a.x) : report_probability(a.x, first_bad)};
}

// logsumexp over the classes of <x, P_k> / temperature + bias_k -> [B, P] float64.
Tensor streamed_log_sum_exp(Tensor features, Tensor prototypes, OptionalTensor bias, double temperature) {
  StreamedForward a{};
  const StreamedProblem problem(&a, features, prototypes, std::nullopt, bias, std::nullopt,
                                StreamedSettings({temperature, 0, 0, 1}), false, false);
  a.share = nullptr;
  Tensor lse = torch::stable::empty({a.x.batch, a.x.height * a.x.width}, ScalarType::Double);
  a.lse = static_cast<double*>(lse.data_ptr());
  std::vector<double> partial;
  run_forward(a, partial);
  return lse;
}

// ---- backward ---------------------------------------------------------------------------------------------------

// What the groups of a tile share.
struct TileBuffers {
  std::unique_ptr<float, decltype(&std::free)> data{nullptr, &std::free};
  std::vector<StreamedPixels> pixels;

  explicit TileBuffers(StreamedBackward* a) {
    const int64_t panels = a->tiles.panels, D = a->x.dim, E = a->teacher.data ? a->teacher.dim : 0;
    const int64_t chunks = a->dproto ? (D + kPanel - 1) / kPanel * kPanel : 0;
    const int64_t gradient = a->dx.data ? a->groups * panels * D : 0;
    const int64_t rows[] = {panels * D, panels * E, panels * chunks, gradient, a->variances ? gradient : 0};
    float** parts[] = {&a->packed, &a->packed_teacher, &a->turned, &a->gradient, &a->variance_gradient};
    const int64_t all = std::accumulate(rows, rows + 5, int64_t{0}) * kPanel;
    data.reset(static_cast<float*>(std::aligned_alloc(64, std::max<int64_t>(all, 16) * sizeof(float))));
    STD_TORCH_CHECK(data != nullptr, "spcl_fast_cpu: out of memory for ", all * sizeof(float), " bytes of scratch");
    float* next = data.get();
    for (int i = 0; i < 5; ++i) *parts[i] = next, next += rows[i] * kPanel;
    pixels.resize(panels), a->pixels = pixels.data();
  }
};

void run_backward(StreamedBackward& a) {
  const int64_t panels = std::clamp<int64_t>(kRowsOfTile / std::max<int64_t>(1, a.x.dim), 1, 16),
                P = a.x.height * a.x.width;
  const int64_t per_image = (P + panels * kPanel - 1) / (panels * kPanel);
  a.tiles = {panels, per_image, per_image * a.x.batch};
  const TileBuffers buffers(&a);
  const Kernels& isa = kernels();
  for (int64_t tile = 0; tile < a.tiles.count; ++tile) {
    for_each_group(panels, 16, [&](int64_t panel, float*) { isa.streamed_take(a, tile, panel); });
    for_each_group(a.groups, isa.streamed_backward_scratch(a),
                   [&](int64_t group, float* scratch) { isa.streamed_backward(a, tile, group, scratch); });
    if (a.dx.data) for_each_group(panels, 16, [&](int64_t panel, float*) { isa.streamed_give(a, tile, panel); });
  }
}

Tensor zeros_like_large(const Tensor& t) {
  Tensor out = torch::stable::empty(std::vector<int64_t>(t.sizes().begin(), t.sizes().end()), ScalarType::Float);
  std::fill_n(floats(out), out.numel(), 0.0f);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> streamed_backward(Tensor grad_loss, Tensor features, OptionalTensor labels,
                                                     Tensor prototypes, OptionalTensor class_weight,
                                                     OptionalTensor pixel_weight, OptionalTensor bias,
                                                     OptionalTensor variances, OptionalTensor teacher_features,
                                                     OptionalTensor teacher_prototypes, OptionalTensor u,
                                                     OptionalTensor v, Tensor lse, Tensor inv_norm, Tensor denominator,
                                                     Tensor dfeatures, std::vector<double> numbers, bool normalize,
                                                     bool sigmoid, int64_t ignore_index, std::vector<int64_t> wanted) {
  const StreamedSettings s(numbers);
  StreamedBackward a{};
  StreamedProblem problem(&a, features, prototypes, class_weight, bias, variances, s, normalize, sigmoid);
  problem.set_targets(&a, labels, {teacher_features, teacher_prototypes, u, v}, pixel_weight, ignore_index, s);
  a.grad = as_pixel_map(grad_loss), a.denominator = *as_floats(denominator);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Double && lse.is_contiguous(),
                  "spcl_fast_cpu: expected contiguous float64");
  a.lse = static_cast<const double*>(lse.data_ptr()), a.inv_norm = as_floats(inv_norm);
  a.groups = std::min(kGroups, a.num_classes);
  if (wanted[0]) a.dx = as_features(dfeatures);
  Tensor dprototypes = wanted[1] ? zeros_like_large(prototypes) : empty_floats({0});
  if (wanted[1]) a.dproto = floats(dprototypes);
  std::vector<double> bias_sums(wanted[2] ? bias->numel() : 0), temperature_sums(wanted[3] ? a.groups : 0);
  if (wanted[2]) a.dbias = bias_sums.data();
  if (wanted[3]) a.dtemperature = temperature_sums.data();
  run_backward(a);
  Tensor dbias = wanted[2] ? zeros_like_large(*bias) : empty_floats({0}),
         dtemperature = wanted[3] ? empty_floats({}) : empty_floats({0});
  for (size_t k = 0; k < bias_sums.size(); ++k) floats(dbias)[k] = static_cast<float>(bias_sums[k]);
  if (wanted[3])
    *floats(dtemperature) =
        static_cast<float>(-std::accumulate(temperature_sums.begin(), temperature_sums.end(), 0.0) / s.temperature);
  return {dprototypes, dbias, dtemperature};
}

}  // namespace
}  // namespace spcl

STABLE_TORCH_LIBRARY_FRAGMENT(spcl_fast_cpu, m) {
  // numbers: temperature, label_smoothing, margin, the teacher's temperature; either labels or the four tensors of a
  // teacher
  m.def(
      "streamed_forward(Tensor features, Tensor? labels, Tensor prototypes, Tensor? class_weight, Tensor? "
      "pixel_weight, Tensor? bias, Tensor? variances, "
      "Tensor? denominator, Tensor? teacher_features, Tensor? teacher_prototypes, Tensor? u, Tensor? v, float[] "
      "numbers, bool normalize, bool sigmoid, "
      "int ignore_index, int reduction, bool save) -> (Tensor loss, Tensor denominator, Tensor lse, Tensor inv_norm, "
      "Tensor report)");
  m.def(
      "streamed_backward(Tensor grad_loss, Tensor features, Tensor? labels, Tensor prototypes, Tensor? class_weight, "
      "Tensor? pixel_weight, "
      "Tensor? bias, Tensor? variances, Tensor? teacher_features, Tensor? teacher_prototypes, Tensor? u, Tensor? v, "
      "Tensor lse, Tensor "
      "inv_norm, "
      "Tensor denominator, Tensor(a!) dfeatures, float[] numbers, bool normalize, bool sigmoid, int ignore_index, "
      "int[] wanted) "
      "-> (Tensor dprototypes, Tensor dbias, Tensor dtemperature)");
  m.def("streamed_log_sum_exp(Tensor features, Tensor prototypes, Tensor? bias, float temperature) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(spcl_fast_cpu, CPU, m) {
  m.impl("streamed_forward", TORCH_BOX(&spcl::streamed_forward));
  m.impl("streamed_backward", TORCH_BOX(&spcl::streamed_backward));
  m.impl("streamed_log_sum_exp", TORCH_BOX(&spcl::streamed_log_sum_exp));
}
