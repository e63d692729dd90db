// What the kernels take and give: plain structs, raw pointers, no torch and no std. The kernels are compiled once per
// instruction set, so nothing here or in arrays.h may define a function that is not static: two instruction sets must
// never share a compiled body.
#pragma once
#include "../arrays.h"

namespace spcl {

constexpr int kPanel = 64;     // pixels that are worked on together; every packed buffer is [..][kPanel]
constexpr int kMaxPanels = 4;  // panels in a tile
constexpr float kClampedInvNorm = 1.0f / kNormEps;  // the inv_norm of a pixel whose norm is under the clamp

// [B, H, W]; pixel (i, j) of the features' grid reads row[i], col[j]: offsets in elements, nearest rule and strides
// already in them.
struct Labels {
  const void* data;
  LabelType type;
  int64_t stride_b;
  const int64_t* row;
  const int64_t* col;
  bool rows_of_pixels;  // the features' grid is the labels' own, and consecutive pixels of a row are consecutive in
                        // memory
  int64_t ignore_index, num_classes;
};

// A matrix operand cut into blocks of `rows` rows: [blocks][length][rows], rows beyond `count` are zero.
struct Panels {
  const float* data;
  int64_t count, length, blocks, rows;
  int64_t stride_image;  // floats between the matrices of two images; 0: all images share one
};

// How the pixels are cut: tile t is `panels` panels of image t / tiles_per_image. Depends on shapes only, never on
// threads.
struct Tiles {
  int64_t panels, tiles_per_image, count;
};

enum ContrastLoss : int {
  kSoftmax,
  kSigmoid,
  kLogits,  // no loss: the logits themselves, and their incoming gradient in `targets`
};

// What a loss beyond the plain one is made of. M rows of prototypes, K classes. With target t and label_smoothing e,
// all of (1 - e) t_k + e / K stands in two arrays: share_k t_k + background_k (softmax: both times the class weight).
struct ContrastOptions {
  ContrastLoss loss;
  int64_t num_classes;
  const float* bias;        // [M], zeros where there is none
  int64_t bias_stride;      // floats between two images' biases; 0: shared
  const float* share;       // [K]
  const float* background;  // [K]
  double background_sum;
  const float* class_scale;  // [K]: class weights of the sigmoid loss
  Features targets;          // [B, K, h, w] probabilities, or the incoming gradient of logits; no data: labels
  const int64_t*
      first_row;  // [K + 1]: class k pools the rows [first_row[k], first_row[k + 1]); nullptr: a row is a class
  bool pool_max;
  float margin;                                     // over the temperature
  Panels variances_by_class, variances_by_channel;  // no data: none
  bool positive_variance;
};

struct Contrast {
  Features x;
  Labels labels;
  const float* class_weight;  // [K] or nullptr: what a labelled pixel adds to the denominator, and, without options,
                              // its loss's factor
  PixelMap pixel_weight;
  Panels by_class;    // prototypes, blocks of rows: [kb][D][rows]
  Panels by_channel;  // prototypes transposed, blocks of channels: [db][M][rows]
  Tiles tiles;
  int64_t num_rows;  // M; K without options
  float temperature;
  bool normalize;
  const ContrastOptions* options;  // nullptr: the plain loss, whose code knows nothing of them
};

struct ContrastForward : Contrast {
  float* loss_map;         // [B, P] or nullptr
  float* lse;              // [B, P] or nullptr
  float* inv_norm;         // [B, P] or nullptr
  float* logits;           // [B, M, P] or nullptr: without bias and variance term
  float* class_logits;     // [B, K, P], kLogits alone
  double* partial_loss;    // [tiles]
  double* partial_weight;  // [tiles]
  int64_t* first_bad;      // smallest b * P + p with a label out of range; INT64_MAX if none
};

struct ContrastBackward : Contrast {
  PixelMap grad;  // the incoming gradient, a scalar as a map with strides 0
  float denominator;
  const float* lse;       // [B, P]
  const float* inv_norm;  // [B, P]
  const float* logits;    // [B, M, P] or nullptr: computed again
  bool past_cache;        // dx is too large to be found in a cache by who reads it: write it to memory directly
  Features dx;            // same shape as x; data == nullptr: not wanted
  float* dproto;          // [groups][D][dproto_stride], zeroed; nullptr: not wanted
  int64_t dproto_stride;  // M rounded up to a multiple of 32
  double* dbias;          // [groups][M], zeroed; nullptr: not wanted
  double* dtemperature;   // [groups], zeroed; nullptr: not wanted
};

// The loss with its classes streamed: prototypes are read as they lie, a block of rows at a time, and neither logits
// nor packed prototypes of all classes are held. Of labels, or of a teacher whose targets are exp(<f, Q_k> /
// temperature + u
// + v_k).
struct Streamed {
  Features x;
  Labels labels;
  PixelMap pixel_weight;
  const float* class_weight;  // [K] or nullptr: what a labelled pixel adds to the denominator
  const float* prototypes;    // [K][D], or one such matrix for each image
  int64_t prototypes_stride;  // floats between two images'; 0: shared
  const float* variances;     // of the prototypes' shape; nullptr: none
  int64_t num_classes;
  float temperature;
  bool normalize;
  const float* bias;  // [K], zeros where there is none
  int64_t bias_stride;
  const float* share;       // [K], as in ContrastOptions; nullptr: no loss, only the logsumexp
  const float* background;  // [K] or nullptr
  double background_sum;
  const float* class_scale;  // [K], the sigmoid loss alone
  bool sigmoid;
  float margin;                     // over the temperature
  Features teacher;                 // [B, E, h, w]; no data: labels
  const float* teacher_prototypes;  // [K][E]
  float teacher_temperature;
  const double* teacher_u;  // [B, P]: of scores in the thousands the seventh digit is not enough
  const float* teacher_v;   // [K]
  Tiles tiles;
};

struct StreamedForward : Streamed {
  float* loss_map;         // [B, P] or nullptr
  double* lse;             // [B, P] or nullptr: logsumexp less the log of the targets' sum
  float* inv_norm;         // [B, P] or nullptr
  double* partial_loss;    // [tiles]
  double* partial_weight;  // [tiles]
  int64_t* first_bad;
};

// Tile after tile; within a tile each group of classes [g * K / groups, (g + 1) * K / groups) is one piece of work.
struct StreamedBackward : Streamed {
  PixelMap grad;
  float denominator;
  const double* lse;
  const float* inv_norm;
  int64_t groups;
  Features dx;           // data == nullptr: not wanted
  float* dproto;         // of the prototypes' shape, zeroed; nullptr: not wanted
  double* dbias;         // of the bias's shape, zeroed; nullptr: not wanted
  double* dtemperature;  // [groups], zeroed; nullptr: not wanted
  // A tile's pixels, which all groups read
  float* packed;             // [panels][D][kPanel]
  float* packed_teacher;     // [panels][E][kPanel]
  float* turned;             // [panels][chunks of kPanel channels][kPanel pixels][kPanel]: unit features / temperature
  float* gradient;           // [groups][panels][D][kPanel]: each group's sum_k w_k P_k
  float* variance_gradient;  // the same of the variances
  struct StreamedPixels* pixels;  // [panels]
};

struct StreamedPixels {
  int32_t label[kPanel];  // -1: none
  float inv_norm[kPanel];
  float factor[kPanel];             // inv_norm / temperature
  float scale[kPanel];              // of the loss's slope
  float high[kPanel], low[kPanel];  // their sum is lse
  float u[kPanel], u_low[kPanel];   // of the teacher, the same way
  int labelled;
};

struct Moments {
  Features x;
  Labels labels;
  PixelMap pixel_weight;  // no data: none
  Tiles tiles;
  int64_t groups;  // group g takes the tiles [g * count / groups, (g + 1) * count / groups)
  int64_t num_classes;
  bool normalize;
  float* sums;      // [groups][K][D], zeroed
  float* squares;   // the same, or nullptr
  int64_t* counts;  // [groups][K], zeroed
  double* weights;  // the same of pixel_weight's sums
  int64_t* first_bad;
};

// How one axis is up-sampled: pixel i lies between the nodes lower[i] and upper[i], weight[i] of the way to the upper
// one. All three are padded with their last entry to a multiple of kPanel.
struct Axis {
  int64_t nodes, pixels;
  const int32_t* lower;
  const int32_t* upper;  // lower + 1; at the last node the node itself, with weight 0
  const float* weight;
};

// Logits between whose nodes the pixels lie. Cell (row) c holds the rows of pixels [first_row[c], first_row[c + 1]),
// between the rows of nodes c and c + 1; band i of an image is its cells [i * h / bands, (i + 1) * h / bands).
struct Upsampled {
  Features logits;  // [B, K, h, w]
  Axis y, x;
  const int64_t* first_row;  // [h + 1]
  int64_t bands;
  int64_t panel_nodes;  // nodes that kPanel pixels of a row lie between, at most
  float factor;         // log2(e) / temperature
};

// What an up-sampled loss beyond the plain cross-entropy is made of; share, background and class_scale as in
// ContrastOptions.
struct UpsampledOptions {
  bool binary;  // the sum of each class's binary cross-entropy, focal with gamma > 0
  float gamma;
  const float* share;       // [K]
  const float* background;  // [K]
  double background_sum;
  const float* class_scale;  // [K]
  Upsampled targets;         // probabilities [B, K, g, f] and where the pixels lie between their nodes; no data: labels
};

struct UpsampledCrossEntropy : Upsampled {
  Features pixels;  // no data: the sizes of the labels' grid [B, H, W]
  Labels labels;
  const float* class_weight;  // [K] or nullptr: as in Contrast
  PixelMap pixel_weight;
  const UpsampledOptions* options;  // nullptr: the plain cross-entropy
  float* loss_map;                  // [B, H, W] or nullptr
  float* dlogits;                   // [B, K, h, w], of the sum of the losses by logits * factor; nullptr: not wanted
  float* overlap;                   // [B * bands][K][w]: what a band gives to the first row of nodes of the next one
  double* partial_loss;             // [B * bands]
  double* partial_weight;           // [B * bands]
  int64_t* first_bad;               // as in ContrastForward
};

struct UpsampledPrediction : Upsampled {
  const float* thresholds;  // [K] or nullptr
  int64_t ignore_index;
  bool wide_labels;   // int32, else uint8
  void* labels;       // [B, H, W]
  float* confidence;  // [B, H, W]
};

struct UpsampledConfusion : Upsampled {
  Features pixels;  // no data: the sizes of the labels' grid [B, H, W]
  Labels labels;
  int64_t* counts;  // [K][K], row = label, column = prediction; added to
  int64_t* first_bad;
};

// The kernels of one instruction set, each for one tile or band. `scratch` (its size in floats from the function before
// it) is 64-byte aligned and the calling thread's own; `group` says which partial sum to add to.
#define SPCL_DECLARE_KERNELS(ISA)                                                               \
  namespace ISA {                                                                               \
  int64_t contrast_forward_scratch(const ContrastForward&);                                     \
  void contrast_forward(const ContrastForward&, int64_t tile, float* scratch);                  \
  int64_t contrast_backward_scratch(const ContrastBackward&);                                   \
  void contrast_backward(const ContrastBackward&, int64_t tile, int64_t group, float* scratch); \
  int64_t streamed_forward_scratch(const StreamedForward&);                                     \
  void streamed_forward(const StreamedForward&, int64_t tile, float* scratch);                  \
  int64_t streamed_backward_scratch(const StreamedBackward&);                                   \
  void streamed_take(const StreamedBackward&, int64_t tile, int64_t panel);                     \
  void streamed_backward(const StreamedBackward&, int64_t tile, int64_t group, float* scratch); \
  void streamed_give(const StreamedBackward&, int64_t tile, int64_t panel);                     \
  int64_t class_moments_scratch(const Moments&);                                                \
  void class_moments(const Moments&, int64_t group, float* scratch);                            \
  int64_t upsampled_cross_entropy_scratch(const UpsampledCrossEntropy&);                        \
  void upsampled_cross_entropy(const UpsampledCrossEntropy&, int64_t band, float* scratch);     \
  int64_t upsampled_prediction_scratch(const UpsampledPrediction&);                             \
  void upsampled_prediction(const UpsampledPrediction&, int64_t band, float* scratch);          \
  int64_t upsampled_confusion_scratch(const UpsampledConfusion&);                               \
  void upsampled_confusion(const UpsampledConfusion&, int64_t band, float* scratch);            \
  }

SPCL_DECLARE_KERNELS(avx512)
SPCL_DECLARE_KERNELS(avx2)
SPCL_DECLARE_KERNELS(baseline)

}  // namespace spcl
