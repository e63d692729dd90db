// prototype_contrastive_loss, forward, one tile of pixels at a time. Compiled once per instruction set (SPCL_ISA).
//
// Neither unit features nor a transposed copy exist: a chunk of channels is packed into L1/L2, its logits accumulate,
// and the norm is folded into the logits afterwards.
#include "contrast_options.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

struct ForwardBuffers : OptionBuffers {
  float *packed, *logits;
};

int64_t place(const ContrastForward& a, float* scratch, ForwardBuffers* to) {
  const int64_t panels = a.tiles.panels * kPanel, packed = panels * kChunk, logits = panels * padded(a.by_class);
  to->packed = scratch, to->logits = scratch + packed;
  return packed + logits + place_options(a, to->logits + logits, to);
}

void write_rows(const ContrastForward& a, const Span& s, int64_t rows, const float* from, float* to) {
  const int64_t pixels = a.x.height * a.x.width;
  for (int64_t m = 0; m < rows; ++m) {
    float* row = to + (s.image * rows + m) * pixels + s.first;
    if (from)
      memcpy(row, from + m * kPanel, s.count * sizeof(float));
    else
      memset(row, 0, s.count * sizeof(float));
  }
}

void write_skipped(const ContrastForward& a, const Span& s) {
  const int64_t pixels = a.x.height * a.x.width, at = s.image * pixels + s.first;
  for (int p = 0; p < s.count; ++p) {
    if (a.loss_map) a.loss_map[at + p] = 0;
    if (a.lse) a.lse[at + p] = 0, a.inv_norm[at + p] = 0;
  }
  if (a.logits) write_rows(a, s, a.num_rows, nullptr, a.logits);
}

// What is saved for the backward, and the losses of a panel; the rest of write_panel's and write_panel_with_options'
// work.
void write_losses(const ContrastForward& a, const Panel& panel, const float* top, const float* log_sum,
                  const float* map, double* loss) {
  const int64_t at = panel.span.image * a.x.height * a.x.width + panel.span.first;
  for (int p = 0; p < panel.span.count; ++p) *loss += map[p];
  if (a.loss_map) memcpy(a.loss_map + at, map, panel.span.count * sizeof(float));
  if (!a.lse) return;
  memcpy(a.inv_norm + at, panel.inv_norm, panel.span.count * sizeof(float));
  for (int p = 0; p < panel.span.count; ++p) a.lse[at + p] = top[p] + log_sum[p];
}

void write_panel(const ContrastForward& a, const Panel& panel, float* z, double* loss, double* weight) {
  const Span& s = panel.span;
  alignas(64) float top[kPanel], log_sum[kPanel], scale[kPanel], map[kPanel];
  finish_logits(z, a.num_rows, panel.inv_norm, a.temperature, top, log_sum);
  for (int p = 0; p < kPanel; ++p)
    scale[p] = panel.label[p] < 0 ? 0.0f : a.class_weight ? a.class_weight[panel.label[p]] : 1.0f;
  for (int p = 0; p < kPanel; ++p) *weight += scale[p];
  scale_by(a.pixel_weight, a.x, s, panel.label, scale);
  for (int p = 0; p < s.count; ++p)
    map[p] = panel.label[p] < 0 ? 0.0f : ((top[p] - z[panel.label[p] * kPanel + p]) + log_sum[p]) * scale[p];
  write_losses(a, panel, top, log_sum, map, loss);
  if (a.logits) write_rows(a, s, a.num_rows, z, a.logits);
}

// dots: products with the prototypes; variance: with the variances, of the features' squares, or nullptr.
void write_panel_with_options(const ContrastForward& a, const Panel& panel, float* dots, float* variance,
                              const float* targets, const OptionBuffers& b, double* loss, double* weight) {
  const ContrastOptions& o = *a.options;
  alignas(64) float top[kPanel] = {}, log_sum[kPanel] = {}, map[kPanel], scale[kPanel];
  scale_dots(a.num_rows, panel.inv_norm, a.temperature, dots);
  if (variance) scale_variance(a.num_rows, panel.inv_norm, a.temperature, variance);
  if (a.logits) write_rows(a, panel.span, a.num_rows, dots, a.logits);
  class_logits(a, panel, dots, variance, b);
  if (o.loss == kLogits) return write_rows(a, panel.span, o.num_classes, b.z, a.class_logits);
  Aims aims;
  set_aims(o, panel, targets, b.z, o.positive_variance ? nullptr : variance, &aims);
  if (o.loss == kSoftmax)
    log_sum_exp(b.z, o.num_classes, top, log_sum), softmax_loss(o, b.z, aims, top, log_sum, map);
  else
    sigmoid_loss(o, b.z, panel.label, aims, map);
  for (int p = 0; p < kPanel; ++p) {
    scale[p] = 1;
    if (panel.label[p] >= 0) *weight += a.class_weight ? a.class_weight[panel.label[p]] : 1.0f;
  }
  scale_by(a.pixel_weight, a.x, panel.span, panel.label, scale);
  for (int p = 0; p < kPanel; ++p) map[p] = panel.label[p] < 0 ? 0.0f : map[p] * scale[p];
  write_losses(a, panel, top, log_sum, map, loss);
}

// logits of every panel: products of all channels, a chunk at a time.
void accumulate(const ContrastForward& a, const TileSpan& t, Panel* panel, const ForwardBuffers& b) {
  const Panels by_class = of_image(a.by_class, t.image);
  const int64_t logits_size = padded(by_class) * kPanel;
  for (int64_t d = 0; d < a.x.dim; d += kChunk) {
    const int64_t n = smaller(kChunk, a.x.dim - d);
    for (int64_t m = 0; m < t.panels; ++m) {
      if (!panel[m].labelled) continue;
      float* chunk = b.packed + m * kChunk * kPanel;
      pack(a.x, panel[m].span, d, n, chunk);
      if (a.normalize) add_squares(chunk, n, panel[m].inv_norm);
      Ahead ahead = {};
      if (m + 1 < t.panels)
        ahead = ahead_of(a.x, panel[m + 1].span, d, n);
      else if (d + n < a.x.dim)
        ahead = ahead_of(a.x, panel[0].span, d + n, smaller(kChunk, a.x.dim - d - n));
      product(by_class, 0, by_class.blocks, d, n, chunk, b.logits + m * logits_size, d > 0, ahead);
      if (a.options && a.options->variances_by_class.data)
        add_variance_product(*a.options, t.image, d, n, chunk, b.squared, b.variance + m * logits_size);
    }
  }
}

}  // namespace

int64_t contrast_forward_scratch(const ContrastForward& a) {
  ForwardBuffers none;
  return place(a, nullptr, &none);
}

void contrast_forward(const ContrastForward& a, int64_t tile, float* scratch) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  const int64_t logits_size = padded(a.by_class) * kPanel,
                targets_size = a.options ? a.options->num_classes * kPanel : 0;
  ForwardBuffers b = {};
  place(a, scratch, &b);
  Panel panel[kMaxPanels];
  for (int64_t m = 0; m < t.panels; ++m) {
    panel[m].span = make_span(a.x, t.image, t.first + m * kPanel, t.pixels - m * kPanel);
    panel[m].labelled = a.options
                            ? read_aims(a, panel[m].span, panel[m].label, b.targets + m * targets_size, a.first_bad)
                            : read_labels(a.labels, a.x, panel[m].span, panel[m].label, a.first_bad);
    for (int p = 0; p < kPanel; ++p) panel[m].inv_norm[p] = 0;
  }
  accumulate(a, t, panel, b);
  double loss = 0, weight = 0;
  for (int64_t m = 0; m < t.panels; ++m) {
    if (!panel[m].labelled) {
      write_skipped(a, panel[m].span);
      continue;
    }
    if (a.normalize)
      invert_norms(panel[m].inv_norm);
    else
      for (int p = 0; p < kPanel; ++p) panel[m].inv_norm[p] = 1;
    float* z = b.logits + m * logits_size;
    if (!a.options) {
      write_panel(a, panel[m], z, &loss, &weight);
      continue;
    }
    float* variance = a.options->variances_by_class.data ? b.variance + m * logits_size : nullptr;
    write_panel_with_options(a, panel[m], z, variance, b.targets + m * targets_size, b, &loss, &weight);
  }
  a.partial_loss[tile] = loss;
  a.partial_weight[tile] = weight;
}

}  // namespace SPCL_ISA
}  // namespace spcl
