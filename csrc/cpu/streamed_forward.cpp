// The loss over many classes, forward, one tile of pixels at a time, all classes streamed past it. Compiled once per
// instruction set.
#include "streamed.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

constexpr int kVectors = kPanel / V;

// What a pixel has gathered from the classes so far. Large logits cancel in the end, so sums are kept less the largest
// one (0 while that is -inf).
struct Gathered {
  vf top[kVectors];          // the largest logit
  LongSum sum[kVectors];     // of exp(logit - top)
  LongSum target[kVectors];  // of t_k
  LongSum aimed[kVectors];   // of t_k (logit_k - top); the sigmoid loss itself
  vf own[kVectors];          // the label's logit
};

struct Buffers : BlockBuffers {
  float *packed, *teacher;  // [panels][D or E][kPanel]
};

int64_t place(const StreamedForward& a, float* scratch, Buffers* to) {
  const int64_t panels = a.tiles.panels * kPanel, packed = panels * a.x.dim,
                teacher = a.teacher.data ? panels * a.teacher.dim : 0;
  to->packed = scratch, to->teacher = scratch + packed;
  return packed + teacher + place_block(a, to->teacher + teacher, to);
}

struct StreamedPanel : Panel {
  alignas(64) float factor[kPanel];  // inv_norm / temperature
  alignas(64) float u[kPanel];
  alignas(64) float u_low[kPanel];
  Gathered gathered;
};

// A label alone: nothing but its own logit is looked up.
bool aims_at_one(const StreamedForward& a) { return !a.teacher.data && !a.background && !a.sigmoid; }

void start_panel(const StreamedForward& a, const TileSpan& t, int64_t m, const Buffers& b, StreamedPanel& panel) {
  panel.span = make_span(a.x, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
  const Span& s = panel.span;
  for (int p = 0; p < kPanel; ++p) panel.inv_norm[p] = a.normalize ? 0.0f : 1.0f, panel.label[p] = p < s.count ? 0 : -1;
  panel.labelled = s.count;
  if (a.share && !a.teacher.data) panel.labelled = read_labels(a.labels, a.x, s, panel.label, a.first_bad);
  for (int v = 0; v < kVectors; ++v) panel.gathered.top[v] = splat(-__builtin_inff()), panel.gathered.own[v] = vf{};
  if (!panel.labelled) return;
  float* packed = b.packed + m * a.x.dim * kPanel;
  pack(a.x, s, 0, a.x.dim, packed);
  for (int64_t d = 0; a.normalize && d < a.x.dim; d += kChunk)
    add_squares(packed + d * kPanel, smaller(kChunk, a.x.dim - d), panel.inv_norm);
  if (a.normalize) invert_norms(panel.inv_norm);
  for (int v = 0; v < kPanel; v += V) store(panel.factor + v, load(panel.inv_norm + v) / a.temperature);
  if (!a.teacher.data) return;
  const double* u = a.teacher_u + s.image * a.x.height * a.x.width + s.first;
  for (int p = 0; p < kPanel; ++p) split(p < s.count ? u[p] : 0.0, panel.u + p, panel.u_low + p);
  pack(a.teacher, make_span(a.teacher, t.image, s.first, s.count), 0, a.teacher.dim,
       b.teacher + m * a.teacher.dim * kPanel);
}

vf finite_or_0(vf top) { return select(top == -__builtin_inff(), vf{}, top); }

// What V pixels have gathered, less a new largest logit. Returns what logits are then taken less.
vf move_top(Gathered& g, int i, vf top) {
  const vf base = finite_or_0(top), shift = base - finite_or_0(g.top[i]), shrink = exp(-shift);
  g.sum[i].total *= shrink, g.sum[i].lost *= shrink;
  g.aimed[i].add_any(-g.target[i].total * shift);
  g.top[i] = top;
  return base;
}

// Adds exp of a block's logits to the sum, and the targets to theirs.
template <bool kAims>
void add_softmax(const StreamedForward& a, Gathered& g, const int32_t* label, int64_t first, int64_t count, int v,
                 vf base, const BlockBuffers& b) {
  const float* logits = b.dots + v;
  const BlockTargets target(a, first, label, v, b.targets);
  for (int64_t k = 0; k < count; k += kTerms) {
    vf part = {}, targets = {}, aimed = {};
    for (int64_t j = k; j < smaller(k + kTerms, count); ++j) {
      vf z = load(logits + j * kPanel) - base;
      part += exp(z);
      if constexpr (kAims) {
        vf t = target.at(j);
        targets += t;
        aimed += select(t == 0.0f, vf{}, t * z);
      }
    }
    g.sum[v / V].add(part);
    if constexpr (kAims) g.target[v / V].add(targets), g.aimed[v / V].add_any(aimed);
  }
}

// sum_k scale_k (log(1 + exp(z_k)) - t_k z_k)
void add_sigmoid(const StreamedForward& a, Gathered& g, const int32_t* label, int64_t first, int64_t count, int v,
                 const BlockBuffers& b) {
  const BlockTargets target(a, first, label, v, b.targets);
  for (int64_t k = 0; k < count; ++k) {
    vf z = load(b.dots + k * kPanel + v), t = target.at(k);
    vf linear = select(z > 0.0f, (1.0f - t) * z, -t * z);
    linear = select((z == -__builtin_inff()) & (t == 0.0f), vf{}, linear);
    g.aimed[v / V].add_any(a.class_scale[first + k] * (linear + log1p(exp(-magnitude(z)))));
  }
}

// Adds the products of a block to what was gathered.
void gather_block(const StreamedForward& a, StreamedPanel& panel, int64_t first, int64_t count, const BlockBuffers& b) {
  const bool is_one = aims_at_one(a);
  const vf margin = splat(a.teacher.data || !a.share ? 0.0f : a.margin);
  for (int v = 0; v < kPanel; v += V) {
    Gathered& g = panel.gathered;
    const BlockLogits logit(a, panel.span.image, first, panel.factor, v, b);
    const vi own = load(panel.label + v) - (int32_t)first;
    vf top = g.top[v / V];
    for (int64_t k = 0; k < count; ++k) {
      vf z = logit.at(k) - select(own == (int32_t)k, margin, vf{});
      store(b.dots + k * kPanel + v, z);
      top = larger(z, top);
    }
    if (a.sigmoid) {
      add_sigmoid(a, g, panel.label, first, count, v, b);
      continue;
    }
    const vf base = move_top(g, v / V, top);
    if (is_one || !a.share)
      add_softmax<false>(a, g, panel.label, first, count, v, base, b);
    else
      add_softmax<true>(a, g, panel.label, first, count, v, base, b);
  }
  for (int p = 0; is_one && a.share && p < kPanel; ++p) {
    const int64_t k = panel.label[p] - first;
    if (panel.label[p] >= 0 && k >= 0 && k < count) panel.gathered.own[p / V][p % V] = b.dots[k * kPanel + p];
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
  for (int v = 0; v < kVectors; ++v) store(log_sum + v * V, log(g.sum[v].total));
  for (int p = 0; p < kPanel; ++p) scale[p] = 1;
  scale_by(a.pixel_weight, a.x, s, panel.label, scale);
  for (int p = 0; p < s.count; ++p) {
    const int v = p / V, i = p % V, label = panel.label[p];
    const bool used = label >= 0 && a.share;
    const double lse = (double)g.top[v][i] + log_sum[p], aimed = g.aimed[v].total[i];
    double target = g.target[v].total[i];
    if (used && !a.teacher.data) target = a.share[label] + a.background_sum;
    double nll = !used ? 0.0 : a.sigmoid ? aimed : target * log_sum[p] - aimed;
    if (used && aims_at_one(a)) nll = target * (lse - g.own[v][i]);
    nll = used ? nll * scale[p] : 0.0;
    if (used) *weight += a.class_weight ? a.class_weight[label] : 1.0f;
    *loss += nll;
    if (a.loss_map) a.loss_map[at + p] = (float)nll;
    if (a.inv_norm) a.inv_norm[at + p] = label < 0 ? 0.0f : panel.inv_norm[p];
    if (a.lse) a.lse[at + p] = !a.share ? lse : !used || a.sigmoid ? 0.0 : lse - log_of_target(target);
  }
}

void finish_unlabelled(const StreamedForward& a, const Span& s) {
  const int64_t at = s.image * a.x.height * a.x.width + s.first;
  for (int p = 0; p < s.count; ++p) {
    if (a.loss_map) a.loss_map[at + p] = 0;
    if (a.lse) a.lse[at + p] = 0;
    if (a.inv_norm) a.inv_norm[at + p] = 0;
  }
}

}  // namespace

int64_t streamed_forward_scratch(const StreamedForward& a) {
  Buffers none;
  return place(a, nullptr, &none);
}

void streamed_forward(const StreamedForward& a, int64_t tile, float* scratch) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  Buffers b;
  place(a, scratch, &b);
  StreamedPanel panel[kMaxPanels];
  for (int64_t m = 0; m < t.panels; ++m) start_panel(a, t, m, b, panel[m]);
  for (int64_t first = 0; first < a.num_classes; first += kBlock) {
    const int64_t count = smaller(kBlock, a.num_classes - first);
    for (int64_t m = 0; m < t.panels; ++m) {
      if (!panel[m].labelled) continue;
      block_products(a, t.image, first, count, b.packed + m * a.x.dim * kPanel, b);
      if (a.teacher.data) {
        block_product(a.teacher_prototypes + first * a.teacher.dim, count, a.teacher.dim,
                      b.teacher + m * a.teacher.dim * kPanel, b.targets);
        teacher_targets(a, first, count, panel[m].u, panel[m].u_low, b.targets);
      }
      gather_block(a, panel[m], first, count, b);
    }
  }
  double loss = 0, weight = 0;
  for (int64_t m = 0; m < t.panels; ++m) {
    if (panel[m].labelled)
      finish_panel(a, panel[m], &loss, &weight);
    else
      finish_unlabelled(a, panel[m].span);
  }
  a.partial_loss[tile] = loss;
  a.partial_weight[tile] = weight;
}

}  // namespace SPCL_ISA
}  // namespace spcl
