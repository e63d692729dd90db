// Getting pixels in and out: whichever layout and dtype the features have, the kernels see packed float panels
// [channel][kPanel].
#pragma once
#include "product.h"

namespace spcl {
namespace SPCL_ISA {

SPCL_INLINE
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SPCL_INLINE
int64_t size_of(FloatType type) { return type == kFloat32 ? 4 : 2; }

// Up to kPanel consecutive pixels of one image.
struct Span {
  int64_t image, first;  // pixel index within the image
  int count;
  bool rows_of_pixels;     // consecutive pixels are consecutive in memory (NCHW)
  int64_t offset[kPanel];  // of pixel j's channel 0, in elements from data; the last one repeated beyond count
};

SPCL_LOCAL
Span make_span(const Features& x, int64_t image, int64_t first, int64_t count) {
  Span span;
  span.image = image, span.first = first, span.count = (int)(count < kPanel ? count : kPanel);
  span.rows_of_pixels = x.stride_w == 1 && (x.stride_h == x.width || x.height == 1);
  int64_t i = first / x.width, j = first % x.width;
  int64_t at = image * x.stride_b + i * x.stride_h + j * x.stride_w;
  if (span.rows_of_pixels) {
    for (int p = 0; p < kPanel; ++p) span.offset[p] = at + (p < span.count ? p : span.count - 1);
    return span;
  }
  for (int p = 0; p < kPanel; ++p) {
    span.offset[p] = at;
    if (p + 1 >= span.count) continue;
    at += x.stride_w;
    if (++j == x.width) j = 0, ++i, at = image * x.stride_b + i * x.stride_h;
  }
  return span;
}

// ---- labels -----------------------------------------------------------------------------------------------------

// The common case without a branch per pixel: `count` labels side by side, none of them bad; else false.
template <class T> SPCL_INLINE
bool read_row_of_labels(const T* data, const Labels& labels, int count, int32_t* out, int* labelled) {
  int64_t used = 0, bad = 0;
  for (int p = 0; p < count; ++p) {
    const int64_t value = (int64_t)data[p];
    const bool inside = (uint64_t)value < (uint64_t)labels.num_classes, ignored = value == labels.ignore_index;
    out[p] = inside && !ignored ? (int32_t)value : -1;
    used += inside && !ignored, bad += !inside && (!ignored || (sizeof(T) == 8 && (T)-1 > 0));
  }
  for (int p = count; p < kPanel; ++p) out[p] = -1;
  *labelled = (int)used;
  return bad == 0;
}

template <class T> SPCL_LOCAL
int read_labels(const Labels& labels, const Features& x, const Span& span, int32_t* out, int64_t* first_bad) {
  const T* data = (const T*)labels.data + span.image * labels.stride_b;
  int64_t i = span.first / x.width, j = span.first % x.width;
  int labelled = 0;
  const bool one_row = labels.rows_of_pixels && j + span.count <= x.width;
  if (one_row && read_row_of_labels(data + labels.row[i] + labels.col[j], labels, span.count, out, &labelled))
    return labelled;
  labelled = 0;
  for (int p = 0; p < span.count; ++p) {
    T raw = data[labels.row[i] + labels.col[j]];
    bool huge = (T)-1 > 0 && sizeof(T) == 8 && (int64_t)raw < 0;  // an unsigned value that int64 cannot hold
    int64_t value = (int64_t)raw;
    out[p] = -1;
    if (huge || value != labels.ignore_index) {
      if (!huge && value >= 0 && value < labels.num_classes) {
        out[p] = (int32_t)value, ++labelled;
      } else if (first_bad) {
        int64_t here = (span.image * x.height + i) * x.width + j, seen = __atomic_load_n(first_bad, __ATOMIC_RELAXED);
        while (here < seen &&
               !__atomic_compare_exchange_n(first_bad, &seen, here, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
      }
    }
    if (++j == x.width) j = 0, ++i;
  }
  for (int p = span.count; p < kPanel; ++p) out[p] = -1;
  return labelled;
}

// out [kPanel]: the class, or -1 where there is none. Returns how many pixels have one.
SPCL_LOCAL
int read_labels(const Labels& labels, const Features& x, const Span& span, int32_t* out, int64_t* first_bad) {
  switch (labels.type) {
    case kUInt8: return read_labels<uint8_t>(labels, x, span, out, first_bad);
    case kInt8: return read_labels<int8_t>(labels, x, span, out, first_bad);
    case kUInt16: return read_labels<uint16_t>(labels, x, span, out, first_bad);
    case kInt16: return read_labels<int16_t>(labels, x, span, out, first_bad);
    case kUInt32: return read_labels<uint32_t>(labels, x, span, out, first_bad);
    case kInt32: return read_labels<int32_t>(labels, x, span, out, first_bad);
    case kUInt64: return read_labels<uint64_t>(labels, x, span, out, first_bad);
    default: return read_labels<int64_t>(labels, x, span, out, first_bad);
  }
}

// Multiplies `out` [kPanel] by the map's values at the labelled pixels.
SPCL_LOCAL
void scale_by(const PixelMap& map, const Features& x, const Span& span, const int32_t* label, float* out) {
  if (!map.data) return;
  int64_t i = span.first / x.width, j = span.first % x.width;
  for (int p = 0; p < span.count; ++p) {
    if (label[p] >= 0) out[p] *= map.data[span.image * map.stride_b + i * map.stride_h + j * map.stride_w];
    if (++j == x.width) j = 0, ++i;
  }
}

// ---- features in ------------------------------------------------------------------------------------------------

template <class T> SPCL_LOCAL
void pack_rows(const T* from, int64_t stride_d, int count, int64_t channels, float* out) {
  if (count == kPanel) {
    for (int64_t d = 0; d < channels; ++d, from += stride_d, out += kPanel)
      for (int v = 0; v < kPanel; v += V) store(out + v, load(from + v));
    return;
  }
  for (int64_t d = 0; d < channels; ++d, from += stride_d, out += kPanel)
    for (int p = 0; p < kPanel; ++p) out[p] = p < count ? load_one(from + p) : 0.0f;
}

template <class T> SPCL_LOCAL
void pack_columns(const T* data, const Span& span, int64_t d0, int64_t channels, float* out) {
  for (int p = 0; p < kPanel; p += V) {
    int64_t d = 0;
    for (; d + V <= channels; d += V) {
      vf block[V];
      for (int i = 0; i < V; ++i) block[i] = p + i < span.count ? load(data + span.offset[p + i] + d0 + d) : vf{};
      transpose(block);
      for (int i = 0; i < V; ++i) store(out + (d + i) * kPanel + p, block[i]);
    }
    for (; d < channels; ++d)
      for (int i = p; i < p + V; ++i)
        out[d * kPanel + i] = i < span.count ? load_one(data + span.offset[i] + d0 + d) : 0.0f;
  }
}

template <class T> SPCL_LOCAL
void pack(const Features& x, const Span& span, int64_t d0, int64_t channels, float* out) {
  const T* data = (const T*)x.data;
  if (span.rows_of_pixels)
    return pack_rows(data + span.offset[0] + d0 * x.stride_d, x.stride_d, span.count, channels, out);
  if (x.stride_d == 1) return pack_columns(data, span, d0, channels, out);
  for (int64_t d = 0; d < channels; ++d)
    for (int p = 0; p < kPanel; ++p)
      out[d * kPanel + p] = p < span.count ? load_one(data + span.offset[p] + (d0 + d) * x.stride_d) : 0.0f;
}

// Channels [d0, d0 + channels) of a span -> out [channels][kPanel], zero beyond the span's pixels.
SPCL_LOCAL
void pack(const Features& x, const Span& span, int64_t d0, int64_t channels, float* out) {
  switch (x.type) {
    case kFloat32: return pack<float>(x, span, d0, channels, out);
    case kBFloat16: return pack<bfloat16>(x, span, d0, channels, out);
    default: return pack<float16>(x, span, d0, channels, out);
  }
}

// What pack would read, for fetching it in time; nothing for layouts that are neither rows of pixels nor rows of
// channels.
SPCL_LOCAL
Ahead ahead_of(const Features& x, const Span& span, int64_t d0, int64_t channels) {
  const int64_t size = size_of(x.type);
  const char* from = (const char*)x.data + (span.offset[0] + d0 * x.stride_d) * size;
  const bool aligned = (uintptr_t)from % 64 == 0 && x.stride_d * size % 64 == 0;
  if (span.rows_of_pixels) return {from, x.stride_d * size, channels, (int)(kPanel * size / 64) + !aligned};
  if (x.stride_d == 1) return {from, x.stride_w * size, span.count, (int)((channels * size + 63) / 64)};
  return {from, 0, 0, 0};
}

// Adds the squares of a packed chunk to sum [kPanel]. Chunk by chunk: a blocked sum loses less than one long one.
SPCL_LOCAL
void add_squares(const float* packed, int64_t channels, float* sum) {
  constexpr int kVectors = kPanel / V, kAtOnce = kVectors < 8 ? kVectors : 8;
  for (int s = 0; s < kPanel; s += kAtOnce * V) {
    vf acc[kAtOnce] = {};
    for (int64_t d = 0; d < channels; ++d)
      for (int v = 0; v < kAtOnce; ++v) {
        vf x = load(packed + d * kPanel + s + v * V);
        acc[v] += x * x;
      }
    for (int v = 0; v < kAtOnce; ++v) store(sum + s + v * V, load(sum + s + v * V) + acc[v]);
  }
}

// sum of squares -> 1 / max(norm, eps); NaN stays NaN.
SPCL_LOCAL
void invert_norms(float* sum) {
  for (int v = 0; v < kPanel; v += V) {
    vf norm = square_root(load(sum + v));
    store(sum + v, 1.0f / select(norm < kNormEps, splat(kNormEps), norm));
  }
}

// ---- features out -----------------------------------------------------------------------------------------------

template <class T> SPCL_LOCAL
void unpack(const Features& y, const Span& span, int64_t d0, int64_t channels, const float* in) {
  T* data = (T*)y.data;
  if (span.rows_of_pixels && span.count == kPanel) {
    T* to = data + span.offset[0] + d0 * y.stride_d;
    for (int64_t d = 0; d < channels; ++d, to += y.stride_d, in += kPanel)
      for (int v = 0; v < kPanel; v += V) store(to + v, load(in + v));
    return;
  }
  if (!span.rows_of_pixels && y.stride_d == 1) {
    for (int p = 0; p < kPanel; p += V) {
      int64_t d = 0;
      for (; d + V <= channels; d += V) {
        vf block[V];
        for (int i = 0; i < V; ++i) block[i] = load(in + (d + i) * kPanel + p);
        transpose(block);
        for (int i = 0; i < V && p + i < span.count; ++i) store(data + span.offset[p + i] + d0 + d, block[i]);
      }
      for (; d < channels; ++d)
        for (int i = p; i < p + V && i < span.count; ++i) store_one(data + span.offset[i] + d0 + d, in[d * kPanel + i]);
    }
    return;
  }
  for (int64_t d = 0; d < channels; ++d)
    for (int p = 0; p < span.count; ++p) store_one(data + span.offset[p] + (d0 + d) * y.stride_d, in[d * kPanel + p]);
}

// The inverse of pack: in [channels][kPanel] -> the span's pixels.
SPCL_LOCAL
void unpack(const Features& y, const Span& span, int64_t d0, int64_t channels, const float* in) {
  switch (y.type) {
    case kFloat32: return unpack<float>(y, span, d0, channels, in);
    case kBFloat16: return unpack<bfloat16>(y, span, d0, channels, in);
    default: return unpack<float16>(y, span, d0, channels, in);
  }
}

struct TileSpan {
  int64_t image, first, pixels, panels;
};

SPCL_LOCAL
TileSpan tile_span(const Tiles& tiles, const Features& x, int64_t tile) {
  TileSpan t;
  t.image = tile / tiles.tiles_per_image;
  t.first = tile % tiles.tiles_per_image * tiles.panels * kPanel;
  t.pixels = smaller(tiles.panels * kPanel, x.height * x.width - t.first);
  t.panels = (t.pixels + kPanel - 1) / kPanel;
  return t;
}

}  // namespace SPCL_ISA
}  // namespace spcl
