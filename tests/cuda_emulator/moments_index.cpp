// The index arithmetic of class_moments and of the labels, as test_cuda_index.py calls it.
#include "class_moments/class_moments.h"
#include "class_moments/class_totals.cuh"
#include "pixels.cuh"

using namespace spcl;
using namespace spcl::gpu;

#define SPCL_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
Features features(int type, const int64_t* shape) {
  const int64_t pixels = shape[2] * shape[3];
  return {nullptr,           static_cast<FloatType>(type),
          shape[0],          shape[1],
          shape[2],          shape[3],
          shape[1] * pixels, pixels,
          shape[3],          1};
}
}  // namespace

// out: tile_pixels, tiles, tiles_per_range, ranges, slice, slices, own_norms, threads, sums_floats, counts_ints,
// norms_floats, shared bytes
SPCL_EXPORT void plan(int type, const int64_t* shape, int64_t num_classes, int normalize, int64_t limit, int64_t* out) {
  const MomentsPlan p = moments_plan(features(type, shape), num_classes, normalize != 0, limit);
  const int64_t values[] = {
      p.tile_pixels, p.tiles,       p.tiles_per_range, p.ranges,
      p.slice,       p.slices,      p.own_norms,       p.threads,
      p.sums_floats, p.counts_ints, p.norms_floats,    moments_memory(p, type == kFloat32 ? 4 : 2, num_classes).bytes};
  for (int i = 0; i < 12; ++i) out[i] = values[i];
}

// out [tiles][3]: image, first, pixels
SPCL_EXPORT void places(int type, const int64_t* shape, int64_t num_classes, int64_t limit, int64_t* out) {
  const MomentsPlan p = moments_plan(features(type, shape), num_classes, true, limit);
  for (int64_t t = 0; t < p.tiles; ++t) {
    const TilePlace place = tile_place(p, shape[2] * shape[3], t);
    out[3 * t] = place.image, out[3 * t + 1] = place.first, out[3 * t + 2] = place.pixels;
  }
}

// seen [K][D] counts who owns each total
SPCL_EXPORT void owners(int type, const int64_t* shape, int64_t num_classes, int64_t limit, int64_t* seen) {
  Moments a{};
  a.x = features(type, shape), a.num_classes = num_classes, a.plan = moments_plan(a.x, num_classes, true, limit);
  for (int64_t block = 0; block < total_blocks(a); ++block)
    for (int thread = 0; thread < kTotalWarps * 32; ++thread) {
      const TotalPlace t = total_place(a, block, thread);
      if (t.inside && t.part == 0) ++seen[t.k * a.x.dim + t.d];
    }
}

SPCL_EXPORT int64_t nearest_index(int64_t i, int64_t size, int64_t out) {
  return nearest(i, static_cast<float>(size) / static_cast<float>(out), size);
}

SPCL_EXPORT int64_t offset(const int64_t* shape, int64_t b, int64_t n) {
  return pixel_offset(features(kBFloat16, shape), b, n);
}
SPCL_EXPORT int code(const int* classes, int count) { return unit_code(classes, count); }
SPCL_EXPORT int class_of(int64_t value, int huge, int64_t ignore_index, int64_t num_classes) {
  return classify(value, huge != 0, ignore_index, num_classes);
}
