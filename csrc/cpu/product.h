// The matrix products: a panel of pixels against blocks of rows, packed or as they lie.
#pragma once
#include "vec.h"

namespace spcl {
namespace SPCL_ISA {

// Memory that is wanted soon: rows of `lines` cache lines. Asked for a few lines at a time between blocks of
// arithmetic, because a burst of prefetches stalls where the same ones spread out are hidden.
struct Ahead {
  const char* from;
  int64_t stride, rows;
  int lines;
};

// Fetches part after part.
struct Fetch {
  const Ahead& ahead;
  int64_t parts, part = 0;
  SPCL_INLINE_MEMBER void operator()() {
    for (int64_t row = ahead.rows * part / parts; row < ahead.rows * (part + 1) / parts; ++row)
      for (int line = 0; line < ahead.lines; ++line)
        __builtin_prefetch(ahead.from + row * ahead.stride + line * 64, 0, 3);
    ++part;
  }
};

// c[M][kPanel] (+)= a[n][M]^T b[n][kPanel]: the one kernel under the logits and the gradient.
// The chunk's sum starts at 0 and is added whole: a blocked sum, which loses less than one long chain. `fetch` is
// called kSteps times, so that memory hides behind the arithmetic.
constexpr int kSteps = kPanel / (kStep * V);
template <int M> SPCL_INLINE
void product_block(const float* __restrict a, int64_t n, const float* __restrict b, float* __restrict c, bool add,
                   Fetch& fetch) {
  for (int s = 0; s < kPanel; s += kStep * V) {
    fetch();
    vf acc[M][kStep];
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < kStep; ++v) acc[i][v] = vf{};
    for (int64_t j = 0; j < n; ++j) {
      vf row[kStep];
      for (int v = 0; v < kStep; ++v) row[v] = load(b + j * kPanel + s + v * V);
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < kStep; ++v) acc[i][v] += a[j * M + i] * row[v];
    }
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < kStep; ++v) {
        float* to = c + i * kPanel + s + v * V;
        store(to, add ? load(to) + acc[i][v] : acc[i][v]);
      }
  }
}

// The same of an operand that lies anywhere, a[i * stride_i + j * stride_j], and rows of c that are stride_c apart.
template <int M> SPCL_INLINE
void strided_block(const float* __restrict a, int64_t stride_i, int64_t stride_j, int64_t n, const float* __restrict b,
                   float* __restrict c, int64_t stride_c, bool add) {
  for (int s = 0; s < kPanel; s += kStep * V) {
    vf acc[M][kStep];
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < kStep; ++v) acc[i][v] = vf{};
    const float* at = a;
    for (int64_t j = 0; j < n; ++j, at += stride_j) {
      vf row[kStep];
      for (int v = 0; v < kStep; ++v) row[v] = load(b + j * kPanel + s + v * V);
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < kStep; ++v) acc[i][v] += at[i * stride_i] * row[v];
    }
    for (int i = 0; i < M; ++i)
      for (int v = 0; v < kStep; ++v) {
        float* to = c + i * stride_c + s + v * V;
        store(to, add ? load(to) + acc[i][v] : acc[i][v]);
      }
  }
}

SPCL_LOCAL
void strided_product(const float* a, int64_t rows, int64_t stride_i, int64_t stride_j, int64_t n, const float* b,
                     float* c, int64_t stride_c, bool add) {
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6)
    strided_block<6>(a + i * stride_i, stride_i, stride_j, n, b, c + i * stride_c, stride_c, add);
  for (; i < rows; ++i) strided_block<1>(a + i * stride_i, stride_i, stride_j, n, b, c + i * stride_c, stride_c, add);
}

template <int M> SPCL_INLINE
void product_blocks(const Panels& a, int64_t first, int64_t last, int64_t j0, int64_t n, const float* b, float* c,
                    bool add, Fetch& fetch) {
  for (int64_t block = first; block < last; ++block, c += M * kPanel)
    product_block<M>(a.data + (block * a.length + j0) * M, n, b, c, add, fetch);
}

// Blocks [first, last) of `a`, contraction over its [j0, j0 + n).
SPCL_LOCAL
void product(const Panels& a, int64_t first, int64_t last, int64_t j0, int64_t n, const float* b, float* c, bool add,
             const Ahead& ahead) {
  Fetch fetch = {ahead, (last - first) * kSteps};
  switch (a.rows) {
    case 1: return product_blocks<1>(a, first, last, j0, n, b, c, add, fetch);
    case 2: return product_blocks<2>(a, first, last, j0, n, b, c, add, fetch);
    case 3: return product_blocks<3>(a, first, last, j0, n, b, c, add, fetch);
    case 4: return product_blocks<4>(a, first, last, j0, n, b, c, add, fetch);
    case 5: return product_blocks<5>(a, first, last, j0, n, b, c, add, fetch);
    default: return product_blocks<6>(a, first, last, j0, n, b, c, add, fetch);
  }
}

}  // namespace SPCL_ISA
}  // namespace spcl
