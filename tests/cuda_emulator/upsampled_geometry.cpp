// The geometry of csrc/cuda/upsampled.h for the tests, by ctypes.
#include "upsampled.h"

using namespace spcl::gpu;

#pragma GCC visibility push(default)

// begin, end [size + 2]: the pixels of cells -1 to size.
extern "C" void cell_ranges(int size, int out, int align_corners, int* begin, int* end) {
  const Axis axis = make_axis(size, out, align_corners);
  for (int cell = -1; cell <= size; ++cell) {
    const Range pixels = pixels_of(axis, cell);
    begin[cell + 1] = pixels.begin, end[cell + 1] = pixels.end;
  }
}

extern "C" int64_t most_pixels_a_cell(int size, int out, int align_corners) {
  return most_pixels(make_axis(size, out, align_corners));
}

// lower, upper: the nodes of a pixel of `cell`; weight: of the upper one, by the ramp of a window that begins at pixel
// `begin`.
extern "C" void pixel_weight(int size, int out, int align_corners, int cell, int begin, int end, int pixel, int* nodes,
                             float* weight) {
  const Axis axis = make_axis(size, out, align_corners);
  const Ramp ramp = ramp_of(axis, cell, {begin, end});
  nodes[0] = clamp_node(cell, size), nodes[1] = clamp_node(cell + 1, size);
  *weight = ramp.start + static_cast<float>(pixel - begin) * ramp.slope;
}

// Walks the plan as the kernels do. pixels [H][W]: how often a pixel is some block's own; nodes [h][w]: how often a
// node is, by a block that has the cells before it, too. Returns the blocks, or -1 where a part of a cell has more than
// `columns` pixels.
extern "C" int walk_plan(int h, int w, int H, int W, int align_corners, int images, int rows, int columns,
                         int owns_nodes, int most_lanes, int* pixels, int* nodes) {
  const Axis y = make_axis(h, H, align_corners), x = make_axis(w, W, align_corners);
  const CellPlan plan = plan_cells(y, x, images, rows, columns, owns_nodes, most_lanes);
  const int windows = static_cast<int>(ceil_div(most_pixels(y), rows));
  for (int strip = 0; strip < plan.strips; ++strip)
    for (int tile = 0; tile < plan.tiles; ++tile)
      for (int r = 0; r < plan.group_rows() * plan.groups; ++r)
        for (int lane = 0; lane < 32; ++lane) {
          const int c = lane / plan.lanes_per_cell, part = lane % plan.lanes_per_cell;
          const int row = plan.first_row(strip) + r, column = plan.first_column(tile) + c;
          if (part == 0 && plan.halo && r >= 1 && c >= 1 && row < h && column < w) ++nodes[row * w + column];
          if ((r < plan.halo && strip > 0) || (c < plan.halo && tile > 0)) continue;
          for (int window = 0; window < windows; ++window)
            for (int step = 0; step < plan.column_steps; ++step) {
              const Range i = window_of(pixels_of(y, row), window, rows);
              const Range j = part_of(pixels_of(x, column), step * plan.lanes_per_cell + part,
                                      plan.column_steps * plan.lanes_per_cell);
              if (j.count() > columns) return -1;
              for (int a = i.begin; a < i.end; ++a)
                for (int b = j.begin; b < j.end; ++b) ++pixels[a * W + b];
            }
        }
  return plan.strips * plan.tiles;
}

#pragma GCC visibility pop
