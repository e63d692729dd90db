// What the CUDA launchers take and give: plain structs, raw pointers, a stream; no torch. Every launcher only enqueues:
// no host sync, no allocation, capturable in a CUDA graph. A section for each op.
#pragma once
#include "../arrays.h"

namespace spcl::gpu {

using Stream = void*;        // a cudaStream_t
using Status = const char*;  // nullptr, or what CUDA said in words that last

// [B, H, W] with any strides. Pixel (i, j) of a grid of other size reads (nearest(i, scale_h, H), nearest(j, scale_w,
// W)): see pixels.cuh.
struct Labels {
  const void* data;
  LabelType type;
  int64_t height, width;
  int64_t stride_b, stride_h, stride_w;
  float scale_h, scale_w;  // H / h and W / w, divided in float32 as F.interpolate does
  int64_t ignore_index, num_classes;
  int64_t* flag;  // maximum of the bad labels that were met: see backends/labels.py
};

// ---- class_moments ----------------------------------------------------------------------------------------------

// How the pixels are cut: range r is `tiles_per_range` tiles of `tile_pixels` pixels, tile t lies in image t /
// tiles_per_image. A function of the problem's sizes (and of the shared memory a block may have), never of the number
// of multiprocessors.
struct MomentsPlan {
  int64_t tile_pixels, tiles_per_image, tiles, tiles_per_range, ranges;
  int64_t slice;  // channels of a block; all of them where it forms the norms itself
  int64_t slices;
  bool own_norms;  // the block forms the norms; else norms [B * P] are a pass of their own
  bool weighted;   // pixels have weights
  int threads;
  int64_t sums_floats;  // sizes of the workspaces: partial sums (squares: the same again), counts, norms
  int64_t counts_ints, norms_floats;
};

struct Moments {
  Features x;
  Labels labels;
  MomentsPlan plan;
  int64_t num_classes;
  bool normalize;
  const float* pixel_weight;  // [B, P] or nullptr
  float* norms;               // [B, P] 1 / |x|, workspace; nullptr where it is not needed
  float* partial_sums;        // [ranges][K][D], workspace
  float* partial_squares;     // the same, or nullptr
  int* partial_counts;        // [ranges][K], workspace
  float* partial_weights;     // the same of the pixels' weights, or nullptr
  float* sums;                // [K][D]
  float* squares;             // [K][D] or nullptr
  int64_t* counts;            // [K]; or the sums of the weights
  float* weights;             // [K]
};

MomentsPlan plan_moments(const Features& x, int64_t num_classes, bool normalize, bool weighted);
Status class_moments(const Moments& a, Stream stream);

// ---- move_prototypes --------------------------------------------------------------------------------------------

// The moving average that the sums feed: prototype <- keep * prototype + (1 - keep) * sum / count, in the kernel that
// adds the partial sums.
struct PrototypeMove {
  float* prototypes;  // [K][D], in place
  float keep;
  int64_t min_pixels;  // a class with fewer is absent
  bool decay_absent;   // an absent class: prototype <- keep * prototype; else it stays
};

// a.sums, a.squares and a.counts are not written and may be nullptr.
Status move_prototypes(const Moments& a, const PrototypeMove& move, Stream stream);

// ---- prototype_contrastive_loss ---------------------------------------------------------------------------------

// What a loss may have beyond labels, prototypes [K, D] and a temperature that the host knows. `used`: any of it. Then,
// and where a block's shared memory does not hold the K logits of its pixels, the general kernels do the work; the
// plain ones know nothing of all this.
struct ContrastOptions {
  bool used;
  int64_t prototypes_stride_b;  // elements from an image's prototypes to the next one's; 0: all images share them
  const float* bias;            // [K], [B, K] or nullptr
  int64_t bias_stride_b;
  const float* temperature;  // [], or nullptr: Contrast::temperature
  float label_smoothing;
  const float* weight_sum;  // [] of class_weight; read with label_smoothing and class_weight alone
  float margin;
  bool sigmoid;
  const void* variances;     // like the prototypes, or nullptr: adds 1/2 x̂²·V_k / tau² to a logit; not of float16
  bool positive_variance;    // false: not to the label's own logit in the numerator
  Features targets;          // [B, K, h, w] probabilities with any strides; data == nullptr: labels
  float* target_sums;        // [B, P], workspace, with probabilities
  const float* denominator;  // [], or nullptr: what is labelled
};

struct Contrast {
  Features x;
  Labels labels;
  const void* prototypes;     // [K, D] or [B, K, D] contiguous, x's type
  const float* class_weight;  // [K] or nullptr
  PixelMap pixel_weight;
  int64_t num_classes;
  float temperature;
  bool normalize;
  ContrastOptions options;
};

struct ContrastForward : Contrast {
  bool mean;
  float* loss_map;     // [B, P], or nullptr: then loss is formed
  float* loss;         // []
  float* denominator;  // []
  float* partial;      // [2][contrast_blocks], workspace
  double* lse;         // [B, P] or nullptr
  float* inv_norm;     // [B, P] or nullptr
  float* logits;       // [B, K, P] or nullptr
};

struct ContrastBackward : Contrast {
  PixelMap grad;             // the incoming gradient, a scalar as a map with strides 0
  const float* denominator;  // []
  const double* lse;         // [B, P]
  const float* inv_norm;     // [B, P]
  const float* logits;       // [B, K, P] or nullptr: computed again
  Features dx;               // same shape and type as x; data == nullptr: not wanted
  float* dprototypes;        // [K, D] or [B, K, D], or nullptr: not wanted
  float* dbias;              // [K] or [B, K], or nullptr: not wanted
  float* dtemperature;       // [] or nullptr: not wanted
  float* partial;            // [contrast_partial_floats], workspace
};

// Floats of the workspace of a backward, in order: the groups' prototype gradients, their bias gradients, the blocks'
// temperature gradients.
struct ContrastPartial {
  int64_t prototypes, bias, temperature;
};

// Loss and gradient of the features together, for an incoming gradient of 1: features and prototypes of float32 or
// bfloat16, at most kMaxOnePassClasses, a device with clusters (sm_90 on).
struct ContrastOnePass : Contrast {
  bool mean;
  float* loss;         // []
  float* denominator;  // []
  float* partial;      // [one_pass_floats], workspace
  Features dx;         // same shape and type as x
};

// data *= *factor, in place; `factor` is on the device, and is 1 as a rule.
struct ScaledGradient {
  void* data;  // 16-byte aligned
  FloatType type;
  int64_t count;
  const float* factor;
};

int64_t one_pass_floats(const Contrast& a);
Status prototype_contrastive_one_pass(const ContrastOnePass& a, Stream stream);
Status scale_gradient(const ScaledGradient& a, Stream stream);

int64_t contrast_blocks(const Features& x);  // of the forward
ContrastPartial contrast_partial(const ContrastBackward& a);
Status prototype_contrastive_forward(const ContrastForward& a, Stream stream);
Status prototype_contrastive_backward(const ContrastBackward& a, Stream stream);

// ---- upsampled_cross_entropy and upsampled_prediction -----------------------------------------------------------

// Logits [B, K, h, w] on the way to height x width pixels. Sizes, and offsets within one image and class, under 2^31.
struct Upsampling {
  Features logits;
  int64_t height, width;
  bool align_corners;
  double temperature;
};

struct UpsampledCrossEntropy : Upsampling {
  Labels labels;              // [B, height, width]
  const float* class_weight;  // [K] or nullptr
  PixelMap pixel_weight;
  bool mean;
  const float* denominator;  // [] what the mean divides by, or nullptr: the labelled pixels' class weights
  float* loss_map;           // [B, height, width], or nullptr: then the loss is formed
  float* loss;               // []
  float* dlogits;            // [B, K, h, w], for an incoming gradient of 1, or nullptr: not wanted
  double* workspace;         // of upsampled_cross_entropy_workspace doubles
};

constexpr int64_t kMaxByteClasses = 255;

struct UpsampledPrediction : Upsampling {
  const float* thresholds;  // [K] or nullptr
  int ignore_index;
  void* labels;       // [B, height, width] uint8, or int32 beyond kMaxByteClasses classes
  float* confidence;  // the same
};

struct UpsampledConfusion : Upsampling {
  Labels labels;   // [B, height, width]
  int* counts;     // [copies, K, K], added to; row = label, column = prediction. K * K under 2^31
  int64_t copies;  // share the atomics
};

int64_t upsampled_cross_entropy_workspace(const UpsampledCrossEntropy& a);
Status upsampled_cross_entropy(const UpsampledCrossEntropy& a, Stream stream);
Status upsampled_prediction(const UpsampledPrediction& a, Stream stream);
Status upsampled_confusion(const UpsampledConfusion& a, Stream stream);

}  // namespace spcl::gpu
