// The index maps of csrc/cuda/contrast_plan.h for tests/test_cuda_contrast_plan.py. An ordinary C++ file: no CUDA, no
// emulator.
#include "prototype_contrastive_loss/contrast_plan.h"

using namespace spcl::gpu;

#define SPCL_EXPORT extern "C" __attribute__((visibility("default")))

SPCL_EXPORT int plan_forward_pixel(int product, int column) { return forward_pixel(product, column); }
SPCL_EXPORT int plan_backward_pixel(int product, int column) { return backward_pixel(product, column); }
SPCL_EXPORT int plan_weight_place(int cls, int pixel) { return weight_place(cls, pixel); }
SPCL_EXPORT int plan_word_begin(int word, int shifted) { return word_begin(word, shifted); }
SPCL_EXPORT int plan_word_given(int begin, int count) { return word_given(begin, count); }
SPCL_EXPORT void plan_tile(int64_t tile, int64_t pixels, int64_t* out) {
  const ContrastTile t = contrast_tile(tile, pixels);
  out[0] = t.image, out[1] = t.first, out[2] = t.count;
}
SPCL_EXPORT void plan_groups(int64_t tiles, int64_t blocks, int64_t floats, int64_t* out) {
  const ContrastGroups g = contrast_groups(tiles, blocks, floats);
  out[0] = g.tiles_per_group, out[1] = g.groups;
}
SPCL_EXPORT void plan_warps(int64_t num_classes, int classes_of_warp, int64_t* out) {
  const ContrastWarps w = contrast_warps(num_classes, classes_of_warp);
  out[0] = w.groups, out[1] = w.slices, out[2] = w.count;
}

namespace {
template <int kBytes> void write(const ContrastShared& s, int64_t* out) {
  const int64_t all[] = {
      s.stages, s.x_step, s.proto_at, s.weights_at, s.pixels_at, s.bytes, ContrastShape<kBytes>::kClasses};
  for (int i = 0; i < 7; ++i) out[i] = all[i];
}

template <int kBytes> void write_one_pass(int64_t classes, int64_t dim, int64_t* out) {
  const OnePassPlan plan = one_pass_plan<kBytes>(classes, dim);
  const ContrastShared& s = plan.shared;
  const int64_t all[] = {plan.blocks,
                         plan.chunks,
                         s.stages,
                         s.x_step,
                         s.proto_at,
                         s.proto_step,
                         s.exchange_at,
                         s.logits_at,
                         s.weights_at,
                         s.pixels_at,
                         s.bytes,
                         x_slot(s, plan.chunks - 1, 0),
                         proto_slot(s, s.stages - 1),
                         proto_slot(s, s.stages)};
  for (const int64_t value : all) *out++ = value;
  for (int rank = 0; rank < plan.blocks; ++rank) {
    const ContrastChannels c = channels_of_rank<kBytes>(plan, dim, rank);
    *out++ = c.first, *out++ = c.chunks;
  }
}
}  // namespace

SPCL_EXPORT void plan_shared(int bytes, int64_t classes, int64_t gradient_classes, int64_t* out) {
  if (bytes == 4)
    write<4>(contrast_shared<4>(classes, gradient_classes), out);
  else
    write<2>(contrast_shared<2>(classes, gradient_classes), out);
}
SPCL_EXPORT void plan_one_pass(int bytes, int64_t classes, int64_t dim, int64_t* out) {
  if (bytes == 4)
    write_one_pass<4>(classes, dim, out);
  else
    write_one_pass<2>(classes, dim, out);
}
SPCL_EXPORT int plan_pixel_of_word(int bytes, int word) {
  return bytes == 4 ? pixel_of_word<4>(word) : pixel_of_word<2>(word);
}
SPCL_EXPORT void plan_one_pass_count(int64_t pixels, int64_t* out) {
  const OnePassCount c = one_pass_count(pixels);
  out[0] = c.each, out[1] = c.blocks;
}
SPCL_EXPORT void plan_prototype_shared(int bytes, int forms_logits, int groups, int64_t* out) {
  if (bytes == 4)
    write<4>(prototype_shared<4>(forms_logits, groups), out);
  else
    write<2>(prototype_shared<2>(forms_logits, groups), out);
}

// out: bytes without the sums of a slice, its chunks of channels, bytes of a forward that streams.
template <int kBytes> static void write_streamed(int forms_logits, int64_t dim, int64_t limit, int64_t* out) {
  const int64_t streamed = streamed_warps<kBytes>(!forms_logits, limit) * ContrastShape<kBytes>::kClasses;
  out[0] = contrast_shared<kBytes>(forms_logits ? streamed : 0, streamed).bytes + kSlopesBytes;
  out[1] = streamed_chunks<kBytes>(dim, limit - out[0]);
  const auto warps = contrast_warps(forward_classes<kBytes>(limit), ContrastShape<kBytes>::kClasses);
  out[2] = contrast_shared<kBytes>(padded_classes<kBytes>(warps), 0).bytes + kSeenBytes;
}
SPCL_EXPORT void plan_streamed(int bytes, int forms_logits, int64_t dim, int64_t limit, int64_t* out) {
  if (bytes == 4)
    write_streamed<4>(forms_logits, dim, limit, out);
  else
    write_streamed<2>(forms_logits, dim, limit, out);
}
