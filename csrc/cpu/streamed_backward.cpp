// The loss over many classes, backward: a tile of pixels is packed once for all, then each group of classes
// streams past it, adds its part of the pixels' gradient to its own sum and its classes' gradient where it belongs:
// nobody else writes there. Compiled once per instruction set.
#include "streamed.h"

namespace spcl {
namespace SPCL_ISA {
namespace {

int64_t turned_size(const StreamedBackward& a) { return (a.x.dim + kPanel - 1) / kPanel * kPanel * kPanel; }

Span span_of(const Features& x, const TileSpan& t, int64_t panel) {
  return make_span(x, t.image, t.first + panel * kPanel, t.pixels - panel * kPanel);
}

void read_pixels(const StreamedBackward& a, const Span& s, StreamedPixels& to) {
  const int64_t at = s.image * a.x.height * a.x.width + s.first;
  alignas(64) float scale[kPanel];
  for (int p = 0; p < kPanel; ++p) to.label[p] = p < s.count && a.inv_norm[at + p] != 0 ? 0 : -1;
  to.labelled = s.count;
  if (!a.teacher.data) to.labelled = read_labels(a.labels, a.x, s, to.label, nullptr);
  for (int p = 0; p < kPanel; ++p) {
    const bool use = to.label[p] >= 0;
    to.inv_norm[p] = use ? a.inv_norm[at + p] : 0.0f;
    to.factor[p] = to.inv_norm[p] / a.temperature;
    split(use ? a.lse[at + p] : 0.0, to.high + p, to.low + p);
    split(use && a.teacher.data ? a.teacher_u[at + p] : 0.0, to.u + p, to.u_low + p);
    scale[p] = use && a.denominator != 0 ? 1.0f / a.denominator : 0.0f;
  }
  scale_by(a.pixel_weight, a.x, s, to.label, scale);
  scale_by(a.grad, a.x, s, to.label, scale);
  for (int p = 0; p < kPanel; ++p) to.scale[p] = a.denominator == 0 || to.label[p] < 0 ? 0.0f : scale[p];
}

// packed [D][kPanel] -> unit features / temperature with a pixel a row, kPanel channels at a time; 0 where there is no
// label.
void turn(const StreamedBackward& a, const float* packed, const StreamedPixels& pixels, float* out) {
  for (int64_t d = 0; d < a.x.dim; d += V) {
    float* to = out + d / kPanel * kPanel * kPanel + d % kPanel;
    for (int p = 0; p < kPanel; p += V) {
      const vi used = load(pixels.label + p) >= 0;
      vf block[V];
      for (int i = 0; i < V; ++i)
        block[i] =
            d + i < a.x.dim ? select(used, load(packed + (d + i) * kPanel + p) * load(pixels.factor + p), vf{}) : vf{};
      transpose(block);
      for (int i = 0; i < V; ++i) store(to + (p + i) * kPanel, block[i]);
    }
  }
}

struct Buffers : BlockBuffers {
  float* rest;  // [kBlock][kPanel]
};

int64_t place(const StreamedBackward& a, float* scratch, Buffers* to) {
  to->rest = scratch;
  return kBlock * kPanel + place_block(a, scratch + kBlock * kPanel, to);
}

// The slope of log(1 + exp(z)) - t z, without cancellation where t is 0 or 1.
SPCL_INLINE
vf sigmoid_slope(vf z, vf t) {
  vf e = exp(-magnitude(z)), small = e / (1.0f + e);
  return select(z != z, z, select(z > 0.0f, (1.0f - t) - small, small - t));
}

// Products of a block -> the loss's slopes by its logits; their part of the temperature's joins `dtemperature`.
template <bool kSigmoid, bool kTemperature>
void weigh_block(const StreamedBackward& a, const StreamedPixels& pixels, int64_t image, int64_t first, int64_t count,
                 const BlockBuffers& b, double* dtemperature) {
  vf slopes = {};
  for (int v = 0; v < kPanel; v += V) {
    const BlockLogits logit(a, image, first, pixels.factor, v, b);
    const BlockTargets target(a, first, pixels.label, v, b.targets);
    const vf high = load(pixels.high + v), low = load(pixels.low + v), scale = load(pixels.scale + v);
    const vi used = load(pixels.label + v) >= 0;
    vf slope = {};
    for (int64_t k = 0; k < count; ++k) {
      const vf margin = select(target.own == (int32_t)k, splat(a.margin), vf{}), z = logit.at(k) - margin,
               t = target.at(k);
      vf w;
      if constexpr (kSigmoid)
        w = sigmoid_slope(z, t) * (scale * a.class_scale[first + k]);
      else
        w = (exp((z - high) - low) - t) * scale;
      w = select(used, w, vf{});
      if constexpr (kTemperature) slope += w * (logit.slope(k) - margin);
      store(b.dots + k * kPanel + v, w);
    }
    slopes += select(used, slope, vf{});
  }
  for (int i = 0; kTemperature && i < V; ++i) *dtemperature += slopes[i];
}

void weigh_block(const StreamedBackward& a, const StreamedPixels& pixels, int64_t image, int64_t first, int64_t count,
                 const BlockBuffers& b, int64_t group) {
  double* to = a.dtemperature ? a.dtemperature + group : nullptr;
  if (a.sigmoid)
    (to ? weigh_block<true, true> : weigh_block<true, false>)(a, pixels, image, first, count, b, to);
  else
    (to ? weigh_block<false, true> : weigh_block<false, false>)(a, pixels, image, first, count, b, to);
}

void add_to_bias(int64_t count, const float* weights, double* dbias) {
  for (int64_t k = 0; k < count; ++k) {
    vf sum = {};
    for (int v = 0; v < kPanel; v += V) sum += load(weights + k * kPanel + v);
    for (int i = 0; i < V; ++i) dbias[k] += sum[i];
  }
}

// dproto [count][D] += weights [count][kPanel] x turned pixels.
void add_to_prototypes(const StreamedBackward& a, int64_t count, const float* weights, const float* turned, float* rest,
                       float* dproto) {
  for (int64_t d = 0; d < a.x.dim; d += kPanel, turned += kPanel * kPanel) {
    if (d + kPanel <= a.x.dim) {
      strided_product(weights, count, kPanel, 1, kPanel, turned, dproto + d, a.x.dim, true);
      continue;
    }
    strided_product(weights, count, kPanel, 1, kPanel, turned, rest, kPanel, false);
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; d + i < a.x.dim; ++i) dproto[k * a.x.dim + d + i] += rest[k * kPanel + i];
  }
}

}  // namespace

// Panel `panel` of a tile is made ready.
void streamed_take(const StreamedBackward& a, int64_t tile, int64_t panel) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  StreamedPixels& pixels = a.pixels[panel];
  pixels.labelled = 0;
  if (panel >= t.panels) return;
  const Span span = span_of(a.x, t, panel);
  read_pixels(a, span, pixels);
  if (!pixels.labelled) return;
  float* packed = a.packed + panel * a.x.dim * kPanel;
  pack(a.x, span, 0, a.x.dim, packed);
  if (a.teacher.data)
    pack(a.teacher, span_of(a.teacher, t, panel), 0, a.teacher.dim, a.packed_teacher + panel * a.teacher.dim * kPanel);
  if (a.dproto) turn(a, packed, pixels, a.turned + panel * turned_size(a));
}

int64_t streamed_backward_scratch(const StreamedBackward& a) {
  Buffers none;
  return place(a, nullptr, &none);
}

void streamed_backward(const StreamedBackward& a, int64_t tile, int64_t group, float* scratch) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  const int64_t start = group * a.num_classes / a.groups, end = (group + 1) * a.num_classes / a.groups, dim = a.x.dim;
  Buffers b;
  place(a, scratch, &b);
  for (int64_t first = start; first < end; first += kBlock) {
    const int64_t count = smaller(kBlock, end - first), at = t.image * a.prototypes_stride + first * dim;
    for (int64_t m = 0; m < t.panels; ++m) {
      const StreamedPixels& pixels = a.pixels[m];
      if (!pixels.labelled) continue;
      block_products(a, t.image, first, count, a.packed + m * dim * kPanel, b);
      if (a.teacher.data) {
        const int64_t E = a.teacher.dim;
        block_product(a.teacher_prototypes + first * E, count, E, a.packed_teacher + m * E * kPanel, b.targets);
        teacher_targets(a, first, count, pixels.u, pixels.u_low, b.targets);
      }
      weigh_block(a, pixels, t.image, first, count, b, group);
      if (a.dbias) add_to_bias(count, b.dots, a.dbias + t.image * a.bias_stride + first);
      if (a.dproto) add_to_prototypes(a, count, b.dots, a.turned + m * turned_size(a), b.rest, a.dproto + at);
      if (!a.dx.data) continue;
      const int64_t to = (group * a.tiles.panels + m) * dim * kPanel;
      strided_product(a.prototypes + at, dim, 1, dim, count, b.dots, a.gradient + to, kPanel, first > start);
      if (a.variances)
        strided_product(a.variances + at, dim, 1, dim, count, b.dots, a.variance_gradient + to, kPanel, first > start);
    }
  }
}

// The groups' sums of panel `panel` -> the features' gradient.
void streamed_give(const StreamedBackward& a, int64_t tile, int64_t panel) {
  const TileSpan t = tile_span(a.tiles, a.x, tile);
  if (panel >= t.panels) return;
  const StreamedPixels& pixels = a.pixels[panel];
  const Span span = span_of(a.dx, t, panel);
  const int64_t size = a.x.dim * kPanel, stride = a.tiles.panels * size;
  float* sum = a.gradient + panel * size;
  const float* variance = a.variances ? a.variance_gradient + panel * size : nullptr;
  const float* x = a.packed + panel * size;
  if (!pixels.labelled) memset(sum, 0, size * sizeof(float));
  for (int v = 0; pixels.labelled && v < kPanel; v += V) {
    const vf factor = load(pixels.factor + v), inv = load(pixels.inv_norm + v);
    const vi used = load(pixels.label + v) >= 0;
    LongSum radial;
    for (int64_t i = v; i < size; i += kPanel) {
      vf total = load(sum + i), of_variances = {};
      for (int64_t g = 1; g < a.groups; ++g) total += load(sum + g * stride + i);
      for (int64_t g = 0; variance && g < a.groups; ++g) of_variances += load(variance + g * stride + i);
      if (variance) total += of_variances * (load(x + i) * factor);
      total *= factor;
      store(sum + i, total);
      radial.add(total * load(x + i));
    }
    const vi constant = inv >= kClampedInvNorm;  // a clamped norm
    const vf inward = a.normalize ? select(constant, vf{}, radial.total * inv * inv) : vf{};
    for (int64_t i = v; i < size; i += kPanel) {
      vf value = load(sum + i);
      if (a.normalize) value -= load(x + i) * inward;
      store(sum + i, select(used, value, vf{}));
    }
  }
  unpack(a.dx, span, 0, a.x.dim, sum);
}

}  // namespace SPCL_ISA
}  // namespace spcl
