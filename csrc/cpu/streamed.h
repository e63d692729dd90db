// A block of classes against a panel of pixels: what the streamed forward and backward share.
#pragma once
#include "contrast_panel.h"

namespace spcl {
namespace SPCL_ISA {

constexpr int64_t kBlock = 96;  // classes at a time: their logits are 24 KB

SPCL_INLINE
const float* prototypes_of(const Streamed& a, int64_t image) { return a.prototypes + image * a.prototypes_stride; }
SPCL_INLINE
const float* streamed_bias_of(const Streamed& a, int64_t image) { return a.bias + image * a.bias_stride; }

// rows [count][dim], as they lie, times packed [dim][kPanel] -> out [count][kPanel].
SPCL_LOCAL
void block_product(const float* rows, int64_t count, int64_t dim, const float* packed, float* out) {
  for (int64_t d = 0; d < dim; d += kChunk)
    strided_product(rows + d, count, dim, 1, smaller(kChunk, dim - d), packed + d * kPanel, out, kPanel, d > 0);
}

// The teacher's products of a block [count][kPanel] -> share_k t_k + background_k; raw [kPanel] gathers the sum of t,
// or is nullptr.
SPCL_LOCAL
void teacher_targets(const Streamed& a, int64_t first, int64_t count, const float* u, float* block, LongSum* raw) {
  for (int v = 0; v < kPanel; v += V) {
    vf sum = {};
    for (int64_t k = 0; k < count; ++k) {
      vf s = load(block + k * kPanel + v) / a.teacher_temperature + (load(u + v) + a.teacher_v[first + k]);
      vf t = exp(s);
      sum += t;
      t = t * a.share[first + k] + (a.background ? a.background[first + k] : 0.0f);
      store(block + k * kPanel + v, t);
    }
    if (raw) raw[v / V].add(sum);
  }
}

}  // namespace SPCL_ISA
}  // namespace spcl
