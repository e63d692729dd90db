#!/usr/bin/env bash
# Versions: torch==2.13.0, opencv-python-headless==5.0.0.93, pillow==13.0.0, numpy==2.4.6
# Behaviour: grid_sample(mode='nearest') rounds half to even, and a shift by half a pixel puts every pixel on a half:
#   columns 0, 2, 2, 4, 4, 6, ... are read, every second one of the labels is lost. At half size it reads an even
#   column, or where rounding of the grid leaves less or more than a half, any of the two: regular from 1024 to 512,
#   mixed from 480 to 240. cv2.remap does the same; cv2.warpAffine and Pillow take the next column throughout.
# Seen:
#   half a pixel to the left, columns read from 16:
#   grid_sample    [0, 2, 2, 4, 4, 6, 7, 8, 8, 10, 10, 12, 12, 14, 14, 15]
#   cv2.remap      [0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14, 15]
#   cv2.warpAffine [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15]
#   Pillow         [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15]
#   1024 -> 512: of each pair the column [0]; 480 -> 240: [0, 1]
# Why it matters here: Label maps are warped by grid_sample for consistency losses and for flow between frames. A pole
#   one pixel wide vanishes or doubles at half-pixel shifts, and the loss calls that a wrong prediction.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  torch==2.13.0 opencv-python-headless==5.0.0.93 pillow==13.0.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample

torch.set_num_threads(1)


def sampled(size, out, shift):
    """The columns that grid_sample reads: each pixel holds the number of its column."""
    theta = torch.tensor([[[1.0, 0, 2 * shift / size], [0, 1, 0]]])
    grid = affine_grid(theta, [1, 1, out, out], align_corners=False)
    columns = torch.arange(float(size)).expand(1, 1, size, size)
    read = grid_sample(columns, grid, mode="nearest", padding_mode="border", align_corners=False)
    return read[0, 0, 0].int().tolist()


size = 16
columns = np.arange(size, dtype=np.int32)[None].repeat(size, 0)
x, y = np.meshgrid(np.arange(size, dtype=np.float32) + 0.5, np.arange(size, dtype=np.float32))
shift = np.float32([[1, 0, 0.5], [0, 1, 0]])
flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
edge = np.pad(columns, ((0, 0), (0, 1)), mode="edge")
read = {
    "grid_sample": sampled(size, size, 0.5),
    "cv2.remap": cv2.remap(columns, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)[0].tolist(),
    "cv2.warpAffine": cv2.warpAffine(columns, shift, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)[0].tolist(),
    "Pillow": np.asarray(Image.fromarray(edge).transform((size, size), Image.Transform.AFFINE, (1, 0, 0.5, 0, 1, 0)))[0].tolist(),
}
print("half a pixel to the left, columns read from 16:")
for name, got in read.items():
    print(f"{name:14} {got}")
pairs = {n: sorted({c - 2 * k for k, c in enumerate(sampled(n, n // 2, 0.0))}) for n in (1024, 480)}
print(f"1024 -> 512: of each pair the column {pairs[1024]}; 480 -> 240: {pairs[480]}")
assert pairs == {1024: [0], 480: [0, 1]}
assert read["cv2.warpAffine"] == read["Pillow"] == [*range(1, size), size - 1]
assert len(set(read["grid_sample"])) < 12 and read["grid_sample"][:6] == read["cv2.remap"][:6] == [0, 2, 2, 4, 4, 6]
EOF
