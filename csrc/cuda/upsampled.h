// The geometry of bilinear up-sampling by cells, for upsampled_cross_entropy and upsampled_prediction: integers only,
// on both sides.
//
// A cell is the square between four low-resolution nodes; along an axis cell c lies between nodes c and c + 1, c from
// -1 (before the first node) to size - 1 (after the last). Every output pixel lies in exactly one cell. Positions are
// fractions of two integers, so no rounding can lose a pixel or count it twice, and the weights are those of
// F.interpolate in float64, rounded once.
#pragma once
#include "sizes.h"

namespace spcl::gpu {

// Pixel p lies (p * step + offset) / denominator nodes from node 0.
struct Axis {
  int size, out;  // nodes, pixels
  int64_t step, offset, denominator;
};

// [begin, end)
struct Range {
  int begin, end;
  SPCL_BOTH int count() const { return end > begin ? end - begin : 0; }
};

// Weight of a cell's second node: start at a range's first pixel, slope more at each further one.
struct Ramp {
  float start, slope;
};

SPCL_BOTH Axis make_axis(int size, int out, bool align_corners) {
  if (!align_corners)
    return {size, out, 2 * static_cast<int64_t>(size), static_cast<int64_t>(size) - out, 2 * static_cast<int64_t>(out)};
  if (out == 1) return {size, out, 0, 0, 1};
  return {size, out, size - 1, 0, out - 1};
}

// The first pixel in `cell` or beyond; axis.out where there is none.
SPCL_BOTH int first_pixel(const Axis& axis, int cell) {
  const int64_t distance = cell * axis.denominator - axis.offset;
  if (cell < 0 || distance <= 0) return 0;
  if (axis.step == 0) return axis.out;
  const int64_t pixel = ceil_div(distance, axis.step);
  return pixel < axis.out ? static_cast<int>(pixel) : axis.out;
}

SPCL_BOTH Range pixels_of(const Axis& axis, int cell) {
  if (cell >= axis.size) return {axis.out, axis.out};
  return {first_pixel(axis, cell), first_pixel(axis, cell + 1)};
}

// The most pixels that a cell can hold.
SPCL_BOTH int64_t most_pixels(const Axis& axis) {
  return axis.step == 0 ? axis.out : ceil_div(axis.denominator, axis.step);
}

// Part `part` of `parts` of a range, as even as can be: consecutive, none left out.
SPCL_BOTH Range part_of(const Range& range, int part, int parts) {
  const int64_t count = range.count();
  return {range.begin + static_cast<int>(count * part / parts),
          range.begin + static_cast<int>(count * (part + 1) / parts)};
}

// At most `length` pixels of a range, from its `index`-th such window on; empty beyond the range.
SPCL_BOTH Range window_of(const Range& range, int index, int length) {
  const int64_t begin = range.begin + static_cast<int64_t>(index) * length;
  if (begin >= range.end) return {range.end, range.end};
  return {static_cast<int>(begin), begin + length < range.end ? static_cast<int>(begin + length) : range.end};
}

// Outside the first and last node both nodes are one: the weight goes to the one that exists. One pixel needs no slope.
SPCL_BOTH Ramp ramp_of(const Axis& axis, int cell, const Range& pixels) {
  if (cell < 0) return {1.0f, 0.0f};
  if (cell >= axis.size - 1 || pixels.count() == 0) return {0.0f, 0.0f};  // beyond the cell logits have no bound
  const float whole = static_cast<float>(axis.denominator);
  const int64_t beyond = pixels.begin * axis.step + axis.offset - cell * axis.denominator;
  return {static_cast<float>(beyond) / whole, pixels.count() > 1 ? static_cast<float>(axis.step) / whole : 0.0f};
}

SPCL_BOTH int clamp_node(int node, int size) { return node < 0 ? 0 : node < size ? node : size - 1; }

// A cell's second node; where an axis keeps its size the first one: no pixel may meet another's NaN there.
SPCL_BOTH int second_node(const Axis& axis, int cell) {
  return clamp_node(axis.size == axis.out ? cell : cell + 1, axis.size);
}

// ---- how a map is cut into blocks -------------------------------------------------------------------------------

constexpr int kUpWarps = 8;  // a block
constexpr int kUpThreads = 32 * kUpWarps;

// A function of sizes only, never of the number of multiprocessors. A warp has the cells of a piece of one row,
// `lanes_per_cell` lanes each; a block has `row_warps` warps for each of `group_rows` cell rows, and works through
// `groups` of these. `halo` 1: blocks own nodes and also form the cells left of and above them, which are others' too;
// 0: they own cells.
struct CellPlan {
  int lanes_per_cell, column_steps;  // a cell's columns are cut into lanes_per_cell * column_steps even parts
  int row_warps, row_windows;        // a cell's rows are cut into windows, of which row_warps are taken at a time
  int groups, halo;
  int tiles, strips;  // blocks along a row, along a column
  SPCL_BOTH int cells() const { return 32 / lanes_per_cell; }
  SPCL_BOTH int group_rows() const { return kUpWarps / row_warps; }
  SPCL_BOTH int first_column(int tile) const { return tile * (cells() - halo) - 1; }
  SPCL_BOTH int first_row(int strip) const { return strip * (group_rows() * groups - halo) - 1; }
};

// rows, columns: the window of pixels that a lane holds at once.
inline CellPlan plan_cells(const Axis& y, const Axis& x, int64_t images, int rows, int columns, bool owns_nodes,
                           int most_lanes) {
  CellPlan plan{1, 1, 1, 1, 1, owns_nodes ? 1 : 0, 1, 1};
  while (plan.lanes_per_cell < most_lanes && plan.lanes_per_cell * static_cast<int64_t>(columns) < most_pixels(x))
    plan.lanes_per_cell *= 2;
  plan.column_steps = static_cast<int>(ceil_div(most_pixels(x), static_cast<int64_t>(columns) * plan.lanes_per_cell));
  plan.row_windows = static_cast<int>(ceil_div(most_pixels(y), rows));
  plan.row_warps = plan.row_windows > 1 ? 2 : 1;
  const int node_columns = x.size + 1 - plan.halo, node_rows = y.size + 1 - plan.halo;
  plan.tiles = static_cast<int>(ceil_div(node_columns, plan.cells() - plan.halo));
  const int64_t enough =
      512;  // blocks; with more than twice as many, a block walks over several groups and so spares halo
  const auto strips = [&] {
    return static_cast<int>(ceil_div(node_rows, plan.group_rows() * plan.groups - plan.halo));
  };
  while (plan.halo && plan.groups < 8 && images * plan.tiles * strips() >= 2 * enough) plan.groups *= 2;
  plan.strips = strips();
  return plan;
}

}  // namespace spcl::gpu
