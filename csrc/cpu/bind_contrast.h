// One problem of prototype_contrastive_loss or prototype_logits: tensors and settings to the structs of kernels.h, and
// the arrays behind them.
#pragma once
#include <array>
#include <numeric>
#include <optional>

#include "cpu/bind_tensors.h"
#include "cpu/bind_threads.h"

namespace spcl {

// As Python lists them: numbers {temperature, label_smoothing, margin}, choices in the order of the fields below.
struct ContrastSettings {
  double temperature, label_smoothing, margin;
  bool normalize;
  int64_t ignore_index, num_classes;
  bool sigmoid, pool_max, positive_variance;

  ContrastSettings(const std::vector<double>& numbers, const std::vector<int64_t>& choices) {
    STD_TORCH_CHECK(numbers.size() == 3 && choices.size() == 6, "spcl_fast_cpu: expected 3 numbers and 6 choices");
    temperature = numbers[0], label_smoothing = numbers[1], margin = numbers[2];
    normalize = choices[0], ignore_index = choices[1], num_classes = choices[2];
    sigmoid = choices[3], pool_max = choices[4], positive_variance = choices[5];
  }
};

struct ContrastOperands {
  const Tensor &features, &prototypes;
  const std::optional<Tensor>&class_weight, &pixel_weight, &bias, &variances, &prototype_class;
};

// Rows of prototypes in the order of their classes: row i of the kernels is row order[i] of the tensors.
struct RowOrder {
  std::vector<int64_t> order, first_row;

  RowOrder(const std::optional<Tensor>& prototype_class, int64_t num_classes) {
    if (!prototype_class) return;
    STD_TORCH_CHECK(prototype_class->scalar_type() == ScalarType::Long && prototype_class->is_contiguous(),
                    "spcl_fast_cpu: prototype_class must be contiguous int64");
    const int64_t* of = static_cast<const int64_t*>(prototype_class->data_ptr());
    const int64_t rows = prototype_class->size(0);
    order.resize(rows), first_row.assign(num_classes + 1, 0);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [of](int64_t a, int64_t b) { return of[a] < of[b]; });
    for (int64_t m = 0; m < rows; ++m) {
      STD_TORCH_CHECK(of[m] >= 0 && of[m] < num_classes, "spcl_fast_cpu: prototype_class is outside [0, num_classes)");
      ++first_row[of[m] + 1];
    }
    std::partial_sum(first_row.begin(), first_row.end(), first_row.begin());
  }

  int64_t operator[](int64_t row) const { return order.empty() ? row : order[row]; }

  // [images, rows, length] -> the same in this order; the tensor's own memory where the order is its own.
  const float* sorted(const float* from, int64_t images, int64_t rows, int64_t length, std::vector<float>* room) const {
    if (order.empty()) return from;
    room->resize(images * rows * length);
    for (int64_t i = 0; i < images * rows; ++i)
      std::copy_n(from + (i / rows * rows + order[i % rows]) * length, length, room->data() + i * length);
    return room->data();
  }
};

// [M, D] or [B, M, D] as both operands of the products. A side that is not needed has a shape alone.
struct MatrixPanels {
  std::vector<float> sorted;
  std::optional<PanelBuffer> by_class, by_channel;

  MatrixPanels(const Tensor& matrix, const RowOrder& order, bool needs_by_class, bool needs_by_channel) {
    const bool per_image = matrix.dim() == 3;
    const int64_t images = per_image ? matrix.size(0) : 1, rows = matrix.size(per_image),
                  dim = matrix.size(per_image + 1);
    const float* data = order.sorted(as_floats(matrix), images, rows, dim, &sorted);
    const int64_t stride_image = per_image ? rows * dim : 0;
    by_class.emplace(needs_by_class ? data : nullptr, rows, dim, dim, 1, images, stride_image);
    by_channel.emplace(needs_by_channel ? data : nullptr, dim, rows, 1, dim, images, stride_image);
  }
};

class ContrastProblem {
 public:
  // needs_products: products with the rows (else the dots are saved); needs_gradient: of the features; options: even
  // where none is set.
  ContrastProblem(const ContrastOperands& t, const ContrastSettings& s, Contrast* a, bool needs_products,
                  bool needs_gradient)
      : settings_(s),
        order_(t.prototype_class, s.num_classes),
        prototypes_(t.prototypes, order_, needs_products, needs_gradient) {
    a->x = as_features(t.features);
    a->num_rows = t.prototypes.size(t.prototypes.dim() - 2);
    a->by_class = prototypes_.by_class->view, a->by_channel = prototypes_.by_channel->view;
    a->class_weight = as_floats(t.class_weight), a->pixel_weight = as_pixel_map(t.pixel_weight);
    a->temperature = static_cast<float>(s.temperature), a->normalize = s.normalize;
    per_image_ = t.prototypes.dim() == 3 || (t.bias && t.bias->dim() == 2);
    if (t.variances) variances_.emplace(*t.variances, order_, true, needs_gradient);
    if (t.bias) set_bias(*t.bias, a->num_rows);
    STD_TORCH_CHECK(t.prototype_class || a->num_rows == s.num_classes,
                    "spcl_fast_cpu: expected a prototype for each class");
  }
  ContrastProblem(const ContrastProblem&) = delete;

  bool needs_options() const {
    return !bias_.empty() || variances_ || !order_.order.empty() || settings_.label_smoothing != 0 ||
           settings_.margin != 0 || settings_.sigmoid;
  }

  bool per_image() const { return per_image_; }
  const RowOrder& order() const { return order_; }

  // From here on a->options is there. targets: probabilities, the incoming gradient of logits, or nothing.
  void set_options(Contrast* a, ContrastLoss loss, const std::optional<Tensor>& targets) {
    const int64_t K = settings_.num_classes;
    if (bias_.empty()) bias_.assign(a->num_rows, 0.0f);
    share_.resize(K), background_.resize(K), class_scale_.resize(K);
    options_.background_sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      class_scale_[k] = a->class_weight ? a->class_weight[k] : 1.0f;
      const double weight = loss == kSoftmax ? class_scale_[k] : 1.0;
      share_[k] = static_cast<float>((1 - settings_.label_smoothing) * weight);
      background_[k] = static_cast<float>(settings_.label_smoothing / K * weight);
      options_.background_sum += settings_.label_smoothing / K * weight;
    }
    options_.loss = loss, options_.num_classes = K;
    options_.bias = bias_.data(), options_.bias_stride = bias_stride_;
    options_.share = share_.data(), options_.background = background_.data(),
    options_.class_scale = class_scale_.data();
    if (targets) options_.targets = as_features(*targets);
    options_.first_row = order_.order.empty() ? nullptr : order_.first_row.data();
    options_.pool_max = settings_.pool_max, options_.positive_variance = settings_.positive_variance;
    options_.margin = static_cast<float>(settings_.margin / settings_.temperature);
    if (variances_)
      options_.variances_by_class = variances_->by_class->view,
      options_.variances_by_channel = variances_->by_channel->view;
    if (targets || loss != kSoftmax) a->class_weight = nullptr;  // the denominator counts pixels
    a->options = &options_;
  }

 private:
  void set_bias(const Tensor& bias, int64_t rows) {
    std::vector<float> room;
    const float* data = order_.sorted(as_floats(bias), bias.numel() / rows, rows, 1, &room);
    bias_.assign(data, data + bias.numel());
    bias_stride_ = bias.dim() == 2 ? rows : 0;
  }

  ContrastSettings settings_;
  RowOrder order_;
  MatrixPanels prototypes_;
  std::optional<MatrixPanels> variances_;
  std::vector<float> bias_, share_, background_, class_scale_;
  int64_t bias_stride_ = 0;
  bool per_image_ = false;
  ContrastOptions options_{};
};

}  // namespace spcl
