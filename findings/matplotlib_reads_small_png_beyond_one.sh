#!/usr/bin/env bash
# Versions: matplotlib==3.11.2, pillow==13.0.0, numpy==2.4.6, pypng==0.20220715.0
# Behaviour: matplotlib.image.imread promises PNG values from 0 to 1. Of a grey PNG with 2 bits it returns values up
#   to 85, with 4 bits up to 17: Pillow has already spread the samples to 0..255, and matplotlib divides by 2**bits
#   - 1 on top of it.
# Seen:
#   2 bits: samples [0, 1, 2, 3], imread [0.0, 28.3333, 56.6667, 85.0], Pillow [0, 85, 170, 255]
#   4 bits: samples [0, 1, 2, 15], imread [0.0, 1.1333, 2.2667, 17.0], Pillow [0, 17, 34, 255]
#   8 bits: samples [0, 1, 2, 255], imread [0.0, 0.0039, 0.0078, 1.0], Pillow [0, 1, 2, 255]
# Why it matters here: Label PNGs of up to 4 or 16 classes are often stored so. (imread(f) * 255).astype(uint8), the
#   usual way back to ids, wraps.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  matplotlib==3.11.2 pillow==13.0.0 numpy==2.4.6 pypng==0.20220715.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import matplotlib.image
import numpy as np
import png
from PIL import Image

top = {}
for bits in (2, 4, 8):
    highest = 2**bits - 1
    with open("grey.png", "wb") as file:
        png.Writer(4, 1, greyscale=True, bitdepth=bits).write(file, [[0, 1, 2, highest]])
    read = matplotlib.image.imread("grey.png")
    top[bits] = float(read.max())
    print(f"{bits} bits: samples [0, 1, 2, {highest}], imread {[round(v, 4) for v in read.ravel().tolist()]}, "
          f"Pillow {np.asarray(Image.open('grey.png')).ravel().tolist()}")
assert top == {2: 85.0, 4: 17.0, 8: 1.0}, top
EOF
