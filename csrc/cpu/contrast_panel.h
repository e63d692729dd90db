// One panel of prototype_contrastive_loss: what its forward and its backward share, and the plain loss's softmax.
#pragma once
#include "tile.h"

namespace spcl {
namespace SPCL_ISA {

constexpr int64_t kChunk = 64;     // channels packed at a time: 16 KB a panel
constexpr int64_t kSumBlock = 32;  // terms of a sum over classes before it is added to the total
constexpr int64_t kTerms = 8;      // the same where they may be equal: many small equal ones lose more than others

SPCL_INLINE
int64_t padded(const Panels& p) { return p.blocks * p.rows; }

// The operand of one image.
SPCL_INLINE
Panels of_image(Panels p, int64_t image) {
  p.data += image * p.stride_image;
  return p;
}

struct Panel {
  Span span;
  int labelled;
  alignas(64) int32_t label[kPanel];
  alignas(64) float inv_norm[kPanel];
};

// A sum of block sums with what each addition lost carried along (Kahan): as good for 2000 classes as for 20.
struct LongSum {
  vf total = {}, lost = {};
  SPCL_INLINE_MEMBER void add(vf part) {
    vf corrected = part - lost, next = total + corrected;
    lost = (next - total) - corrected;
    total = next;
  }
  // Of what may be infinite: inf - inf is no correction.
  SPCL_INLINE_MEMBER void add_any(vf part) {
    add(part);
    lost = select(lost == lost, lost, vf{});
  }
};

// logits [K][kPanel]: dot products in, logits out (times inv_norm / temperature). Gives the maximum and the log of the
// sum of exponentials.
SPCL_LOCAL
void finish_logits(float* z, int64_t num_classes, const float* inv_norm, float temperature, float* top,
                   float* log_sum) {
  for (int v = 0; v < kPanel; v += V) {
    vf factor = load(inv_norm + v) / temperature;
    vf most = splat(-__builtin_inff());
    for (int64_t k = 0; k < num_classes; ++k) {
      vf value = load(z + k * kPanel + v) * factor;
      store(z + k * kPanel + v, value);
      most = larger(value, most);
    }
    LongSum sum;
    for (int64_t first = 0; first < num_classes; first += kSumBlock) {
      vf part = {};
      for (int64_t k = first; k < smaller(first + kSumBlock, num_classes); ++k)
        part += exp(load(z + k * kPanel + v) - most);
      sum.add(part);
    }
    store(top + v, most);
    store(log_sum + v, log(sum.total));
  }
}

// z [K][kPanel] logits -> w, in place; radial [kPanel] = sum_k w_k z_k.
// w_y is minus the sum of the others, and p is normalised again, so neither carries the rounding of lse.
SPCL_LOCAL
void loss_weights(float* z, int64_t num_classes, const int32_t* label, const float* lse, const float* scale,
                  float* radial) {
  float own_z[kPanel];
  for (int p = 0; p < kPanel; ++p) own_z[p] = label[p] >= 0 ? z[label[p] * kPanel + p] : 0.0f;
  for (int v = 0; v < kPanel; v += V) {
    vi own = load(label + v);
    vf zero_point = load(lse + v), own_logit = load(own_z + v);
    LongSum other_sum, slope_sum;
    for (int64_t first = 0; first < num_classes; first += kSumBlock) {
      vf part = {}, part_slope = {};
      for (int64_t k = first; k < smaller(first + kSumBlock, num_classes); ++k) {
        vf value = load(z + k * kPanel + v);
        vf e = select(own == (int32_t)k, vf{}, exp(value - zero_point));
        store(z + k * kPanel + v, e);
        part += e;
        part_slope += select(own == (int32_t)k, vf{}, e * (value - own_logit));
      }
      other_sum.add(part);
      slope_sum.add(part_slope);
    }
    const vf others = other_sum.total, slope = slope_sum.total;
    vf total = others + exp(own_logit - zero_point);
    vf factor = select(own < 0, vf{}, load(scale + v) / total);
    for (int64_t k = 0; k < num_classes; ++k) {
      vf e = load(z + k * kPanel + v);
      vf w = select(own == (int32_t)k, -others, e) * factor;
      store(z + k * kPanel + v, select(own < 0, vf{}, w));
    }
    store(radial + v, select(own < 0, vf{}, slope * factor));
  }
}

}  // namespace SPCL_ISA
}  // namespace spcl
