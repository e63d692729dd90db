// What the up-sampled ops share: where the pixels lie between the nodes, and how an image is cut into bands.
#pragma once
#include <cmath>

#include "cpu/bind_tensors.h"

namespace spcl {

// Positions as F.interpolate(mode="bilinear") has them, in float64.
struct AxisTable {
  std::vector<int32_t> lower, upper;
  std::vector<float> weight;
  Axis view;

  AxisTable(int64_t nodes, int64_t pixels, bool align_corners) {
    STD_TORCH_CHECK(nodes > 0 && nodes < (int64_t{1} << 31), "spcl_fast_cpu: an axis must have 1 to 2**31 - 1 nodes");
    const double corners = pixels > 1 ? static_cast<double>(nodes - 1) / (pixels - 1) : 0.0;
    const double step = align_corners ? corners : static_cast<double>(nodes) / pixels;
    for (int64_t i = 0; i < (pixels + kPanel - 1) / kPanel * kPanel; ++i) {
      const int64_t pixel = std::min(i, pixels - 1);
      const double at = align_corners ? pixel * step : std::max((pixel + 0.5) * step - 0.5, 0.0);
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
struct Upsampling {
  AxisTable y, x;
  std::vector<int64_t> first_row;
  Upsampled view;

  Upsampling(const Tensor& logits, int64_t height, int64_t width, double temperature, bool align_corners)
      : y(logits.size(2), height, align_corners), x(logits.size(3), width, align_corners), first_row(y.first_pixels()) {
    const Features nodes = as_features(logits);
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
  Upsampling(const Upsampling&) = delete;
};

}  // namespace spcl
