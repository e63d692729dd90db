#!/usr/bin/env bash
# Versions: pillow==13.0.0, numpy==2.4.6
# Behaviour: Image.rotate and Image.transform with BILINEAR or BICUBIC of a 16-bit grey picture (mode I;16) whose
#   every pixel is 1000 return values below 120: the two bytes are interpolated as if they were pixels. NEAREST is
#   right, resize is right for all filters, and mode I is right everywhere.
# Seen:
#   modes I;16 I
#   rotate NEAREST: centre I;16 1000, I 1000; range I;16 0 to 1000
#   rotate BILINEAR: centre I;16 210, I 1000; range I;16 0 to 232
#   rotate BICUBIC: centre I;16 226, I 1000; range I;16 0 to 255
#   transform by half a pixel, BILINEAR: 117
# Why it matters here: Depth, 12-bit camera images and soft scores are stored as 16-bit PNG; an augmentation by a
#   few degrees destroys them and keeps shape and dtype.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  pillow==13.0.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from PIL import Image

R = Image.Resampling
picture = np.full((8, 8), 1000, np.uint16)
short, wide = Image.fromarray(picture), Image.fromarray(picture.astype(np.int32))
print("modes", short.mode, wide.mode)
for name in ("NEAREST", "BILINEAR", "BICUBIC"):
    a, b = (np.asarray(image.rotate(10, R[name])) for image in (short, wide))
    print(f"rotate {name}: centre I;16 {int(a[4, 4])}, I {int(b[4, 4])}; range I;16 {int(a.min())} to {int(a.max())}")
    assert b[4, 4] == 1000
    assert (a[4, 4] == 1000) == (name == "NEAREST"), name
shifted = np.asarray(short.transform((8, 8), Image.Transform.AFFINE, (1, 0, 0.5, 0, 1, 0.5), R.BILINEAR))
print("transform by half a pixel, BILINEAR:", int(shifted[3, 3]))
assert shifted[3, 3] != 1000
for name in ("BILINEAR", "BICUBIC", "LANCZOS"):
    assert (np.asarray(short.resize((5, 11), R[name])) == 1000).all()
EOF
