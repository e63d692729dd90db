// The softmax loss over many classes, forward, one tile of pixels at a time, all classes streamed past it. Compiled
// once per instruction set.
#include "streamed.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

constexpr int kVectors = kPanel / V;
constexpr int64_t kTerms = 8;  // of a sum before it is added to the total: many small equal ones lose more than others

// What a pixel has gathered from the classes so far.
struct Gathered {
  vf top[kVectors];          // the largest logit
  LongSum sum[kVectors];     // of exp(logit - top)
  LongSum target[kVectors];  // of t_k
  LongSum aimed[kVectors];   // of t_k logit_k
  LongSum raw[kVectors];     // of the teacher's own targets
};

struct Buffers {
  float *packed, *teacher;  // [panels][D or E][kPanel]
  float *block, *targets;   // [kBlock][kPanel]
};

int64_t place(const StreamedForward& a, float* scratch, Buffers* to) {
  const int64_t panels = a.tiles.panels;
  const int64_t rows[] = {panels * a.x.dim, a.teacher.data ? panels * a.teacher.dim : 0, kBlock,
                          a.teacher.data ? kBlock : 0};
  float** parts[] = {&to->packed, &to->teacher, &to->block, &to->targets};
  int64_t used = 0;
  for (int i = 0; i < 4; ++i) *parts[i] = scratch + used, used += rows[i] * kPanel;
  return used;
}

struct StreamedPanel : Panel {
  alignas(64) float u[kPanel];
  Gathered gathered;
};

void start_panel(const StreamedForward& a, const TileSpan& t, int64_t m, const Buffers& b, StreamedPanel& panel) {
  panel.span = make_span(a.x, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
  const Span& s = panel.span;
  for (int p = 0; p < kPanel; ++p) panel.inv_norm[p] = a.normalize ? 0.0f : 1.0f, panel.label[p] = p < s.count ? 0 : -1;
  panel.labelled = s.count;
  if (a.share && !a.teacher.data) panel.labelled = read_labels(a.labels, a.x, s, panel.label, a.first_bad);
  for (int v = 0; v < kVectors; ++v) panel.gathered.top[v] = splat(-__builtin_inff());
  if (!panel.labelled) return;
  float* packed = b.packed + m * a.x.dim * kPanel;
  pack(a.x, s, 0, a.x.dim, packed);
  for (int64_t d = 0; a.normalize && d < a.x.dim; d += kChunk)
    add_squares(packed + d * kPanel, smaller(kChunk, a.x.dim - d), panel.inv_norm);
  if (a.normalize) invert_norms(panel.inv_norm);
  if (!a.teacher.data) return;
  const int64_t at = s.image * a.x.height * a.x.width + s.first;
  for (int p = 0; p < kPanel; ++p) panel.u[p] = p < s.count ? a.teacher_u[at + p] : 0.0f;
  pack(a.teacher, make_span(a.teacher, t.image, s.first, s.count), 0, a.teacher.dim,
       b.teacher + m * a.teacher.dim * kPanel);
}

// Products of a block -> logits; their largest and the sum of their exponentials join what was gathered.
void gather_block(const StreamedForward& a, StreamedPanel& panel, int64_t first, int64_t count, float* block) {
  const float* bias = streamed_bias_of(a, panel.span.image) + first;
  for (int v = 0; v < kPanel; v += V) {
    Gathered& g = panel.gathered;
    const int i = v / V;
    const vf factor = load(panel.inv_norm + v) / a.temperature, before = g.top[i];
    const vi own = load(panel.label + v) - (int32_t)first;
    const vf margin = splat(a.teacher.data || !a.share ? 0.0f : a.margin);
    vf top = before;
    for (int64_t k = 0; k < count; ++k) {
      vf z = load(block + k * kPanel + v) * factor + bias[k];
      z -= select(own == (int32_t)k, margin, vf{});
      store(block + k * kPanel + v, z);
      top = larger(z, top);
    }
    const vf shrink = select(before == -__builtin_inff(), vf{}, exp(before - top));
    g.sum[i].total *= shrink, g.sum[i].lost *= shrink;
    for (int64_t k = 0; k < count; k += kTerms) {
      vf part = {};
      for (int64_t j = k; j < smaller(k + kTerms, count); ++j) {
        vf z = load(block + j * kPanel + v);
        part += select(z == -__builtin_inff(), vf{}, exp(z - top));
      }
      g.sum[i].add(part);
    }
    g.top[i] = top;
  }
}

// Targets of a block join, too. targets: the teacher's, or nullptr.
void gather_targets(const StreamedForward& a, StreamedPanel& panel, int64_t first, int64_t count, const float* block,
                    const float* targets) {
  Gathered& g = panel.gathered;
  if (!targets && !a.background) {
    for (int p = 0; p < kPanel; ++p) {
      const int64_t k = panel.label[p] - first;
      if (panel.label[p] < 0 || k < 0 || k >= count) continue;
      g.target[p / V].total[p % V] = a.share[panel.label[p]];
      g.aimed[p / V].total[p % V] = a.share[panel.label[p]] * block[k * kPanel + p];
    }
    return;
  }
  for (int v = 0; v < kPanel; v += V)
    for (int64_t k = 0; k < count; k += kTerms) {
      vf part = {}, aimed = {};
      for (int64_t j = k; j < smaller(k + kTerms, count); ++j) {
        vf t = targets ? load(targets + j * kPanel + v)
                       : select(load(panel.label + v) == (int32_t)(first + j), splat(a.share[first + j]), vf{}) +
                             a.background[first + j];
        part += t;
        aimed += select(t == 0.0f, vf{}, t * load(block + j * kPanel + v));
      }
      g.target[v / V].add(part);
      g.aimed[v / V].add(aimed);
    }
}

// Of a target without weight: so low that no class has a share in the backward, and finite, since that splits the
// difference in two floats.
double log_of_target(double target) { return target == 0 ? -1e30 : __builtin_log(target); }

void finish_panel(const StreamedForward& a, const StreamedPanel& panel, double* loss, double* weight) {
  const Gathered& g = panel.gathered;
  const Span& s = panel.span;
  const int64_t at = s.image * a.x.height * a.x.width + s.first;
  alignas(64) float scale[kPanel], log_sum[kPanel];
  alignas(64) int32_t label[kPanel];
  for (int v = 0; v < kVectors; ++v) store(log_sum + v * V, log(g.sum[v].total));
  for (int p = 0; p < kPanel; ++p) {
    label[p] = panel.label[p] >= 0 && a.teacher.data && g.raw[p / V].total[p % V] == 0 ? -1 : panel.label[p];
    scale[p] = 1;
  }
  scale_by(a.pixel_weight, a.x, s, label, scale);
  for (int p = 0; p < s.count; ++p) {
    const double lse = (double)g.top[p / V][p % V] + log_sum[p];
    double target = g.target[p / V].total[p % V];
    if (a.share && !a.teacher.data && label[p] >= 0) target = a.share[label[p]] + a.background_sum;
    const double nll = label[p] < 0 || !a.share ? 0.0 : (target * lse - g.aimed[p / V].total[p % V]) * scale[p];
    if (label[p] >= 0) *weight += a.class_weight ? a.class_weight[label[p]] : 1.0f;
    *loss += nll;
    if (a.loss_map) a.loss_map[at + p] = (float)nll;
    if (a.inv_norm) a.inv_norm[at + p] = label[p] < 0 ? 0.0f : panel.inv_norm[p];
    if (a.lse) a.lse[at + p] = !a.share ? lse : label[p] < 0 ? 0.0 : lse - log_of_target(target);
  }
}

}  // namespace

int64_t streamed_forward_scratch(const StreamedForward& a) {
  Buffers none;
  return place(a, nullptr, &none);
}

void streamed_forward(const StreamedForward& a, int64_t tile, float* scratch) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  const float* prototypes = prototypes_of(a, t.image);
  Buffers b;
  place(a, scratch, &b);
  StreamedPanel panel[kMaxPanels];
  for (int64_t m = 0; m < t.panels; ++m) start_panel(a, t, m, b, panel[m]);
  for (int64_t first = 0; first < a.num_classes; first += kBlock) {
    const int64_t count = smaller(kBlock, a.num_classes - first);
    for (int64_t m = 0; m < t.panels; ++m) {
      if (!panel[m].labelled) continue;
      block_product(prototypes + first * a.x.dim, count, a.x.dim, b.packed + m * a.x.dim * kPanel, b.block);
      gather_block(a, panel[m], first, count, b.block);
      if (!a.share) continue;
      if (a.teacher.data) {
        block_product(a.teacher_prototypes + first * a.teacher.dim, count, a.teacher.dim,
                      b.teacher + m * a.teacher.dim * kPanel, b.targets);
        teacher_targets(a, first, count, panel[m].u, b.targets, panel[m].gathered.raw);
      }
      gather_targets(a, panel[m], first, count, b.block, a.teacher.data ? b.targets : nullptr);
    }
  }
  double loss = 0, weight = 0;
  for (int64_t m = 0; m < t.panels; ++m) {
    if (panel[m].labelled) {
      finish_panel(a, panel[m], &loss, &weight);
      continue;
    }
    const Span& s = panel[m].span;
    const int64_t at = s.image * a.x.height * a.x.width + s.first;
    for (int p = 0; p < s.count; ++p) {
      if (a.loss_map) a.loss_map[at + p] = 0;
      if (a.lse) a.lse[at + p] = 0;
      if (a.inv_norm) a.inv_norm[at + p] = 0;
    }
  }
  a.partial_loss[tile] = loss;
  a.partial_weight[tile] = weight;
}

}  // namespace SPCL_ISA
}  // namespace spcl
