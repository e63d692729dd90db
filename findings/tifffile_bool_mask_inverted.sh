#!/usr/bin/env bash
# Versions: tifffile==2026.3.3, pillow==13.0.0, numpy==2.4.6, opencv-python-headless==5.0.0.93
# Behaviour: tifffile writes a boolean array as a 1-bit TIFF with PhotometricInterpretation WhiteIsZero. tifffile
#   itself reads it back as it was; Pillow and OpenCV read the opposite mask. For grey uint8 with
#   photometric='miniswhite' they invert too (0 becomes 255), for uint16 they do not.
# Seen:
#   mask      [0, 1, 1, 0, 1]
#   tifffile  [0, 1, 1, 0, 1]
#   Pillow    [1, 0, 0, 1, 0]
#   OpenCV    [1, 0, 0, 1, 0]
#   uint8 miniswhite {'tifffile': [0, 1, 2, 3], 'Pillow': [255, 254, 253, 252], 'OpenCV': [255, 254, 253, 252]}
#   uint16 miniswhite {'tifffile': [0, 1, 2, 3], 'Pillow': [0, 1, 2, 3], 'OpenCV': [0, 1, 2, 3]}
# Why it matters here: A defect or ignore mask saved as TIFF by one library and read by another is its own
#   complement; the share of labelled pixels still looks plausible.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  tifffile==2026.3.3 pillow==13.0.0 numpy==2.4.6 opencv-python-headless==5.0.0.93
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import cv2
import numpy as np
import tifffile
from PIL import Image

mask = np.array([[False, True, True, False, True]])
tifffile.imwrite("mask.tif", mask)
readers = {
    "tifffile": lambda f: tifffile.imread(f),
    "Pillow": lambda f: np.asarray(Image.open(f)),
    "OpenCV": lambda f: cv2.imread(f, cv2.IMREAD_UNCHANGED),
}
got = {name: (read("mask.tif") != 0) for name, read in readers.items()}
print("mask     ", mask[0].astype(int).tolist())
for name, value in got.items():
    print(f"{name:9}", value[0].astype(int).tolist())
assert np.array_equal(got["tifffile"], mask)
assert np.array_equal(got["Pillow"], ~mask) and np.array_equal(got["OpenCV"], ~mask)
inverted = {}
for dtype in ("uint8", "uint16"):
    ids = np.array([[0, 1, 2, 3]], dtype)
    tifffile.imwrite("ids.tif", ids, photometric="miniswhite")
    values = {name: read("ids.tif")[0].tolist() for name, read in readers.items()}
    inverted[dtype] = [name for name, value in values.items() if value != ids[0].tolist()]
    print(dtype, "miniswhite", values)
assert inverted == {"uint8": ["Pillow", "OpenCV"], "uint16": []}, inverted
EOF
