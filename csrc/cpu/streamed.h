// A block of classes against a panel of pixels: what the streamed forward and backward share.
#pragma once
#include "contrast_panel.h"

namespace spcl {
namespace SPCL_ISA {

constexpr int64_t kBlock = 96;  // classes at a time: their logits are 24 KB

struct BlockBuffers {
  float* dots;      // [kBlock][kPanel]: products with the prototypes, in the end logits or weights
  float* variance;  // [kBlock][kPanel]: products with the variances
  float* targets;   // [kBlock][kPanel]: the teacher's
  float* squared;   // [D][kPanel]
};

// Returns the floats in use.
SPCL_LOCAL
int64_t place_block(const Streamed& a, float* scratch, BlockBuffers* to) {
  const int64_t rows[] = {kBlock, a.variances ? kBlock : 0, a.teacher.data ? kBlock : 0, a.variances ? a.x.dim : 0};
  float** parts[] = {&to->dots, &to->variance, &to->targets, &to->squared};
  int64_t used = 0;
  for (int i = 0; i < 4; ++i) *parts[i] = scratch + used, used += rows[i] * kPanel;
  return used;
}

// rows [count][dim], as they lie, times packed [dim][kPanel] -> out [count][kPanel].
SPCL_LOCAL
void block_product(const float* rows, int64_t count, int64_t dim, const float* packed, float* out) {
  for (int64_t d = 0; d < dim; d += kChunk)
    strided_product(rows + d, count, dim, 1, smaller(kChunk, dim - d), packed + d * kPanel, out, kPanel, d > 0);
}

// Products of the classes [first, first + count) of an image with packed pixels.
SPCL_LOCAL
void block_products(const Streamed& a, int64_t image, int64_t first, int64_t count, const float* packed,
                    const BlockBuffers& b) {
  const int64_t dim = a.x.dim, at = image * a.prototypes_stride + first * dim;
  block_product(a.prototypes + at, count, dim, packed, b.dots);
  if (!a.variances) return;
  for (int64_t i = 0; i < dim * kPanel; i += V) store(b.squared + i, load(packed + i) * load(packed + i));
  block_product(a.variances + at, count, dim, b.squared, b.variance);
}

// Products -> logits of V pixels. The same operations wherever a logit is computed, so that it has the same bits.
struct BlockLogits {
  const float *dots, *variance, *bias;
  vf factor, half_square;

  SPCL_INLINE_MEMBER BlockLogits(const Streamed& a, int64_t image, int64_t first, const float* factors, int v,
                                 const BlockBuffers& b)
      : dots(b.dots + v),
        variance(a.variances ? b.variance + v : nullptr),
        bias(a.bias + image * a.bias_stride + first),
        factor(load(factors + v)),
        half_square(0.5f * factor * factor) {}
  SPCL_INLINE_MEMBER vf at(int64_t k) const {
    vf z = fused(load(dots + k * kPanel), factor, splat(bias[k]));
    return variance ? fused(load(variance + k * kPanel), half_square, z) : z;
  }
  // What the temperature divides, without the bias.
  SPCL_INLINE_MEMBER vf slope(int64_t k) const {
    vf dot = load(dots + k * kPanel) * factor;
    return variance ? fused(load(variance + k * kPanel), 2.0f * half_square, dot) : dot;
  }
};

// The teacher's products of a block -> share_k t_k + background_k. The score is computed as `streamed_log_sum_exp` does
// it: where u is minus its result, large numbers cancel exactly.
SPCL_LOCAL
void teacher_targets(const Streamed& a, int64_t first, int64_t count, const float* u, const float* u_low,
                     float* block) {
  const vf factor = splat(1.0f) / a.teacher_temperature;
  for (int v = 0; v < kPanel; v += V) {
    const vf high = load(u + v), low = load(u_low + v);
    for (int64_t k = 0; k < count; ++k) {
      vf score = fused(load(block + k * kPanel + v), factor, splat(a.teacher_v[first + k]));
      vf t = exp((score + high) + low) * a.share[first + k];
      store(block + k * kPanel + v, a.background ? t + a.background[first + k] : t);
    }
  }
}

// share_k t_k + background_k of V pixels: a teacher's, or those of labels, whose class counts from the block's first.
struct BlockTargets {
  const float *given, *share, *background;
  vi own;

  SPCL_INLINE_MEMBER BlockTargets(const Streamed& a, int64_t first, const int32_t* label, int v, const float* targets)
      : given(a.teacher.data ? targets + v : nullptr),
        share(a.share + first),
        background(a.background ? a.background + first : nullptr),
        own(a.teacher.data ? splat((int32_t)-1) : load(label + v) - (int32_t)first) {}
  SPCL_INLINE_MEMBER vf at(int64_t k) const {
    if (given) return load(given + k * kPanel);
    vf t = select(own == (int32_t)k, splat(share[k]), vf{});
    return background ? t + background[k] : t;
  }
};

// A number in double as two floats.
SPCL_INLINE
void split(double value, float* high, float* low) {
  *high = (float)value;
  *low = __builtin_isinf(*high) ? 0.0f : (float)(value - *high);
}

}  // namespace SPCL_ISA
}  // namespace spcl
