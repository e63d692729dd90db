// prototype_contrastive_loss: tensors in, workspaces, tensors out.
#include <tuple>

#include "../bind.h"

namespace spcl::gpu {
namespace {

// [K, D], or [B, K, D] where each image has its own.
void set_input(Contrast& a, const Tensor& features, const Tensor& prototypes, const std::optional<Tensor>& class_weight,
               const std::optional<Tensor>& pixel_weight, double temperature, bool normalize) {
  a.x = as_features(features);
  const int64_t dims = prototypes.dim();
  a.num_classes = prototypes.size(dims - 2);
  STD_TORCH_CHECK(prototypes.scalar_type() == features.scalar_type() && prototypes.is_contiguous() &&
                      prototypes.size(dims - 1) == a.x.dim && (dims == 2 || prototypes.size(0) == a.x.batch),
                  "spcl_fast cuda backend: prototypes must be contiguous [K, D] or [B, K, D] of the features' dtype");
  a.prototypes = prototypes.data_ptr();
  a.class_weight = as_floats(class_weight), a.pixel_weight = as_pixel_map(pixel_weight);
  a.temperature = static_cast<float>(temperature), a.normalize = normalize;
  if (dims == 3) a.options.used = true, a.options.prototypes_stride_b = a.num_classes * a.x.dim;
}

// Integers of any size, or floats [B, K, h, w]: probabilities. The workspace of the latter.
Tensor set_labels(Contrast& a, const Tensor& labels, int64_t ignore_index, const Tensor& flag) {
  if (labels.dim() != 4) {
    a.labels = as_labels(labels, a.x.height, a.x.width, ignore_index, a.num_classes, flag);
    return empty_floats(flag, {0});
  }
  a.options.used = true, a.options.targets = as_features(labels);
  const Features& t = a.options.targets;
  STD_TORCH_CHECK(t.batch == a.x.batch && t.dim == a.num_classes && t.height == a.x.height && t.width == a.x.width,
                  "spcl_fast cuda backend: probabilities must be [B, K, h, w]");
  a.labels.flag = static_cast<int64_t*>(flag.data_ptr());
  const Tensor sums = empty_floats(labels, {a.x.batch, a.x.height * a.x.width});
  a.options.target_sums = data_of<float>(sums);
  return sums;
}

void set_options(Contrast& a, const std::optional<Tensor>& bias, const std::optional<Tensor>& temperature,
                 const std::optional<Tensor>& weight_sum, double label_smoothing, double margin, bool sigmoid,
                 const std::optional<Tensor>& variances, bool positive_variance) {
  ContrastOptions& o = a.options;
  o.bias = as_floats(bias), o.temperature = as_floats(temperature), o.weight_sum = as_floats(weight_sum);
  if (bias && bias->dim() == 2) o.bias_stride_b = a.num_classes;
  o.label_smoothing = static_cast<float>(label_smoothing), o.margin = static_cast<float>(margin), o.sigmoid = sigmoid;
  o.positive_variance = positive_variance;
  if (variances) {
    STD_TORCH_CHECK(variances->scalar_type() != ScalarType::Half && variances->is_contiguous() &&
                        float_type(*variances) == a.x.type && (variances->dim() == 3) == (o.prototypes_stride_b != 0) &&
                        variances->numel() == (variances->dim() == 3 ? a.x.batch : 1) * a.num_classes * a.x.dim,
                    "spcl_fast cuda backend: variances must be as the prototypes, float32 or bfloat16");
    o.variances = variances->data_ptr();
  }
  o.used = o.used || o.variances || o.bias || o.temperature || label_smoothing != 0 || margin != 0 || sigmoid;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor features, Tensor labels, Tensor prototypes, std::optional<Tensor> class_weight,
    std::optional<Tensor> pixel_weight, Tensor flag, double temperature, bool normalize, int64_t ignore_index,
    std::optional<Tensor> bias, std::optional<Tensor> tensor_temperature, std::optional<Tensor> weight_sum,
    double label_smoothing, double margin, bool sigmoid, std::optional<Tensor> variances, bool positive_variance,
    std::optional<Tensor> given_denominator, bool mean, bool per_pixel, bool save, bool save_logits) {
  const OnDevice device(features);
  ContrastForward a{};
  set_input(a, features, prototypes, class_weight, pixel_weight, temperature, normalize);
  const Tensor sums = set_labels(a, labels, ignore_index, flag);
  set_options(a, bias, tensor_temperature, weight_sum, label_smoothing, margin, sigmoid, variances, positive_variance);
  a.options.denominator = as_floats(given_denominator), a.options.used = a.options.used || given_denominator;
  const int64_t B = a.x.batch, P = a.x.height * a.x.width;
  const Tensor loss = per_pixel ? empty_floats(features, {B, a.x.height, a.x.width}) : empty_floats(features, {});
  const Tensor denominator = empty_floats(features, {});
  const Tensor partial = empty_floats(features, {per_pixel ? 0 : 2 * contrast_blocks(a.x)});
  const std::vector<int64_t> none{0}, pixels{B, P}, rows{B, a.num_classes, P};
  const Tensor lse = empty(features, save ? pixels : none, ScalarType::Double);
  const Tensor inv_norm = empty_floats(features, save ? pixels : none);
  const Tensor logits = empty_floats(features, save && save_logits ? rows : none);
  a.mean = mean;
  a.loss_map = per_pixel ? data_of<float>(loss) : nullptr, a.loss = per_pixel ? nullptr : data_of<float>(loss);
  a.denominator = data_of<float>(denominator), a.partial = data_of<float>(partial);
  a.lse = data_of<double>(lse), a.inv_norm = data_of<float>(inv_norm), a.logits = data_of<float>(logits);
  check(prototype_contrastive_forward(a, device.stream()), "prototype_contrastive_loss");
  return {loss, denominator, lse, inv_norm, logits};
}

// dfeatures is written whole; or has no element where it is not wanted. Returns dprototypes, dbias, dtemperature, [0]
// where not wanted.
std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad_loss, Tensor features, Tensor labels, Tensor prototypes, std::optional<Tensor> class_weight,
    std::optional<Tensor> pixel_weight, Tensor lse, Tensor inv_norm, Tensor logits, Tensor denominator,
    Tensor dfeatures, Tensor flag, double temperature, bool normalize, int64_t ignore_index, std::optional<Tensor> bias,
    std::optional<Tensor> tensor_temperature, std::optional<Tensor> weight_sum, double label_smoothing, double margin,
    bool sigmoid, std::optional<Tensor> variances, bool positive_variance, bool needs_dfeatures, bool needs_dprototypes,
    bool needs_dbias, bool needs_dtemperature) {
  const OnDevice device(features);
  ContrastBackward a{};
  set_input(a, features, prototypes, class_weight, pixel_weight, temperature, normalize);
  const Tensor sums = set_labels(a, labels, ignore_index, flag);
  set_options(a, bias, tensor_temperature, weight_sum, label_smoothing, margin, sigmoid, variances, positive_variance);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Double && lse.is_contiguous(),
                  "spcl_fast cuda backend: lse must be contiguous float64");
  a.grad = as_pixel_map(grad_loss), a.denominator = as_floats(denominator);
  a.lse = static_cast<const double*>(lse.data_ptr()), a.inv_norm = as_floats(inv_norm);
  a.logits = logits.numel() ? as_floats(logits) : nullptr;
  if (needs_dfeatures) a.dx = as_features(dfeatures);
  const std::vector<int64_t> none{0}, classes(prototypes.sizes().begin(), prototypes.sizes().end());
  const bool own_bias = bias && bias->dim() == 2;
  const Tensor dprototypes = empty_floats(features, needs_dprototypes ? classes : none);
  const Tensor dbias = empty_floats(features, !needs_dbias ? none
                                              : own_bias   ? std::vector<int64_t>{a.x.batch, a.num_classes}
                                                           : std::vector<int64_t>{a.num_classes});
  const Tensor dtemperature = empty_floats(features, needs_dtemperature ? std::vector<int64_t>{} : none);
  a.dprototypes = data_of<float>(dprototypes), a.dbias = data_of<float>(dbias);
  a.dtemperature = data_of<float>(dtemperature);
  a.options.used = a.options.used || needs_dbias || needs_dtemperature;
  const auto [of_prototypes, of_bias, of_temperature] = contrast_partial(a);
  const Tensor partial = empty_floats(features, {of_prototypes + of_bias + of_temperature});
  a.partial = data_of<float>(partial);
  check(prototype_contrastive_backward(a, device.stream()), "prototype_contrastive_loss");
  return {dprototypes, dbias, dtemperature};
}

// Loss [], and the gradient of the features for an incoming gradient of 1 -> dfeatures, written whole.
Tensor one_pass(Tensor features, Tensor labels, Tensor prototypes, std::optional<Tensor> class_weight,
                std::optional<Tensor> pixel_weight, Tensor dfeatures, Tensor flag, double temperature, bool normalize,
                int64_t ignore_index, bool mean) {
  const OnDevice device(features);
  ContrastOnePass a{};
  set_input(a, features, prototypes, class_weight, pixel_weight, temperature, normalize);
  const Tensor sums = set_labels(a, labels, ignore_index, flag);
  STD_TORCH_CHECK(!a.options.used, "spcl_fast cuda backend: no option goes in one pass");
  const Tensor loss = empty_floats(features, {}), denominator = empty_floats(features, {}),
               partial = empty_floats(features, {one_pass_floats(a)});
  a.mean = mean, a.dx = as_features(dfeatures);
  a.loss = data_of<float>(loss), a.denominator = data_of<float>(denominator), a.partial = data_of<float>(partial);
  check(prototype_contrastive_one_pass(a, device.stream()), "prototype_contrastive_loss");
  return loss;
}

// dfeatures *= grad_loss [], in place; only the launch where it is 1.
void scale(Tensor dfeatures, Tensor grad_loss) {
  const OnDevice device(dfeatures);
  STD_TORCH_CHECK(grad_loss.scalar_type() == ScalarType::Float && grad_loss.numel() == 1,
                  "spcl_fast cuda backend: expected one float32");
  check(scale_gradient({dfeatures.data_ptr(), float_type(dfeatures), dfeatures.numel(),
                        static_cast<const float*>(grad_loss.data_ptr())},
                       device.stream()),
        "prototype_contrastive_loss");
}

}  // namespace
}  // namespace spcl::gpu

// What the schemas have in common.
#define SPCL_SETTINGS "float temperature, bool normalize, int ignore_index"
#define SPCL_OPTIONS                                                                                    \
  "Tensor? bias, Tensor? tensor_temperature, Tensor? weight_sum, float label_smoothing, float margin, " \
  "bool sigmoid, Tensor? variances, bool positive_variance"
#define SPCL_PROBLEM "Tensor features, Tensor labels, Tensor prototypes, Tensor? class_weight, Tensor? pixel_weight"

SPCL_OPS(m) {
  m.def("prototype_contrastive_forward(" SPCL_PROBLEM ", Tensor(a!) flag, " SPCL_SETTINGS ", " SPCL_OPTIONS
        ", Tensor? given_denominator, bool mean, bool per_pixel, bool save, bool save_logits) "
        "-> (Tensor loss, Tensor denominator, Tensor lse, Tensor inv_norm, Tensor logits)");
  m.def("prototype_contrastive_backward(Tensor grad_loss, " SPCL_PROBLEM
        ", Tensor lse, Tensor inv_norm, Tensor logits, Tensor denominator, Tensor(a!) dfeatures, Tensor(b!) "
        "flag, " SPCL_SETTINGS ", " SPCL_OPTIONS
        ", bool needs_dfeatures, bool needs_dprototypes, bool needs_dbias, bool needs_dtemperature) "
        "-> (Tensor dprototypes, Tensor dbias, Tensor dtemperature)");
  m.def("prototype_contrastive_one_pass(" SPCL_PROBLEM ", Tensor(a!) dfeatures, Tensor(b!) flag, " SPCL_SETTINGS
        ", bool mean) -> Tensor loss");
  m.def("prototype_contrastive_scale(Tensor(a!) dfeatures, Tensor grad_loss) -> ()");
}

SPCL_OPS_IMPL(m) {
  m.impl("prototype_contrastive_forward", TORCH_BOX(&spcl::gpu::forward));
  m.impl("prototype_contrastive_backward", TORCH_BOX(&spcl::gpu::backward));
  m.impl("prototype_contrastive_one_pass", TORCH_BOX(&spcl::gpu::one_pass));
  m.impl("prototype_contrastive_scale", TORCH_BOX(&spcl::gpu::scale));
}
