// What the kernels are given next to the tensors themselves, made from plain numbers: cuts, tables, packed matrices. No
// torch, so that a program without it can call the kernels, too (benchmarks/levels).
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/kernels.h"

namespace spcl {

// Pixels to tiles. `rows` is how many packed rows a panel needs; a tile's should stay within about half of an L2 cache.
inline Tiles make_tiles(const Features& x, int64_t rows) {
  const int64_t panels = std::clamp<int64_t>(2048 / std::max<int64_t>(rows, 1), 1, kMaxPanels),
                pixels = x.height * x.width;
  const int64_t per_image = (pixels + panels * kPanel - 1) / (panels * kPanel);
  return {panels, per_image, per_image * x.batch};
}

// Partial [K, D] sums: as many as stay small beside the features, at most 32. A function of shapes only.
inline int64_t partial_groups(const Features& x, int64_t num_classes, int64_t tiles) {
  const int64_t affordable = x.batch * x.height * x.width / (4 * num_classes);
  return std::clamp<int64_t>(std::min(affordable, tiles), 1, 32);
}

// The nearest rule of F.interpolate, in its own float32 arithmetic; the stride is multiplied in.
inline std::vector<int64_t> nearest_offsets(int64_t size, int64_t out, int64_t stride) {
  std::vector<int64_t> offset(out);
  const float scale = static_cast<float>(size) / static_cast<float>(out);
  for (int64_t i = 0; i < out; ++i)
    offset[i] = stride * (size == out ? i : std::min(static_cast<int64_t>(static_cast<float>(i) * scale), size - 1));
  return offset;
}

// A matrix in blocks of equal height, at most 6 rows: 19 rows make 4 blocks of 5. One for each image where they differ.
// Without `from` only the shape.
struct PanelBuffer {
  std::vector<float> data;
  Panels view;

  PanelBuffer(const float* from, int64_t count, int64_t length, int64_t stride_row, int64_t stride_column,
              int64_t images = 1, int64_t stride_image = 0) {
    const int64_t blocks = (count + 5) / 6, rows = (count + blocks - 1) / blocks, size = blocks * rows * length;
    if (from) data.resize(images * size);
    float* to = data.data();
    for (int64_t image = 0; from && image < images; ++image, from += stride_image)
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t j = 0; j < length; ++j)
          for (int64_t i = block * rows; i < (block + 1) * rows; ++i)
            *to++ = i < count ? from[i * stride_row + j * stride_column] : 0.0f;
    view = {data.data(), count, length, blocks, rows, stride_image ? size : 0};
  }
};

// Positions as F.interpolate(mode="bilinear") has them, in float64; exact on nodes. nodes: 1 to 2**31 - 1.
struct AxisTable {
  std::vector<int32_t> lower, upper;
  std::vector<float> weight;
  Axis view;

  AxisTable(int64_t nodes, int64_t pixels, bool align_corners) {
    const double most = static_cast<double>(std::max<int64_t>(pixels - 1, 1)), size = static_cast<double>(nodes);
    for (int64_t i = 0; i < (pixels + kPanel - 1) / kPanel * kPanel; ++i) {
      const int64_t pixel = std::min(i, pixels - 1);
      const double at =
          align_corners ? pixel * (size - 1.0) / most : std::max((pixel + 0.5) * size / pixels - 0.5, 0.0);
      const int64_t node = std::min(static_cast<int64_t>(at), nodes - 1);
      lower.push_back(static_cast<int32_t>(node));
      upper.push_back(static_cast<int32_t>(std::min(node + 1, nodes - 1)));
      weight.push_back(node + 1 < nodes ? static_cast<float>(at - node) : 0.0f);
    }
    view = {nodes, pixels, lower.data(), upper.data(), weight.data()};
  }

  // [nodes + 1]: the first pixel at or beyond each node.
  std::vector<int64_t> first_pixels() const {
    std::vector<int64_t> first(view.nodes + 1);
    for (int64_t node = 0; node <= view.nodes; ++node)
      first[node] = std::lower_bound(lower.begin(), lower.begin() + view.pixels, node) - lower.begin();
    return first;
  }

  int64_t panel_nodes() const {
    int64_t most = 0;
    for (int64_t i = 0; i < view.pixels; i += kPanel)
      most = std::max<int64_t>(most, upper[i + kPanel - 1] - lower[i] + 1);
    return most;
  }
};

// The tables behind an Upsampled; must outlive it.
struct UpsamplingTables {
  AxisTable y, x;
  std::vector<int64_t> first_row;
  Upsampled view;

  UpsamplingTables(const Features& nodes, int64_t height, int64_t width, double temperature, bool align_corners)
      : y(nodes.height, height, align_corners), x(nodes.width, width, align_corners), first_row(y.first_pixels()) {
    // Each band hands one row of nodes to the next: 32 in all share the work well, and a few rows each keep what is
    // handed over small.
    const int64_t bands = std::clamp<int64_t>(32 / std::max<int64_t>(nodes.batch, 1), 1, nodes.height);
    view = {nodes,
            y.view,
            x.view,
            first_row.data(),
            bands,
            x.panel_nodes(),
            static_cast<float>(1.4426950408889634 / temperature)};
  }
  UpsamplingTables(const UpsamplingTables&) = delete;
};

}  // namespace spcl
