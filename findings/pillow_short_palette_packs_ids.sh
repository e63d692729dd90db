#!/usr/bin/env bash
# Versions: pillow==13.0.0, numpy==2.4.6
# Behaviour: A palette picture whose palette has 16 colours or fewer is saved as a 1-, 2- or 4-bit PNG, and Pillow
#   keeps only the low bits of every id that does not fit. No error, no warning. With the 11 colours of an 11-class
#   set, the ignore id 255 is written as 15, and id 20 as 4; BMP and TIFF of the same picture keep all ids.
# Seen:
#    2 colours: wrote [0, 1, 10, 20, 255], PNG holds [0, 1, 1, 1, 1]
#    4 colours: wrote [0, 1, 10, 20, 255], PNG holds [0, 1, 2, 0, 3]
#   11 colours: wrote [0, 1, 10, 20, 255], PNG holds [0, 1, 10, 4, 15]
#   16 colours: wrote [0, 1, 10, 20, 255], PNG holds [0, 1, 10, 4, 15]
#   17 colours: wrote [0, 1, 10, 20, 255], PNG holds [0, 1, 10, 20, 255]
# Why it matters here: A pseudo-label map with a palette of its K <= 16 classes loses its ignore pixels: 255 comes
#   back as 15, or with 2 colours as class 1.
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

ids = np.array([[0, 1, 10, 20, 255]], np.uint8)
read = {}
for colours in (2, 4, 11, 16, 17):
    image = Image.fromarray(ids)
    image.putpalette([channel for k in range(colours) for channel in (k, 100 + k, 200)])  # L becomes P
    image.save("label.png")
    read[colours] = np.asarray(Image.open("label.png")).tolist()[0]
    print(f"{colours:2} colours: wrote {ids[0].tolist()}, PNG holds {read[colours]}")
    image.save("label.bmp")
    assert np.array_equal(np.asarray(Image.open("label.bmp")), ids)
assert read[11] == read[16] == [0, 1, 10, 4, 15], "255 was kept or refused"
assert read[4] == [0, 1, 2, 0, 3]
assert read[2] == [0, 1, 1, 1, 1], "one bit: everything but 0 is 1"
assert read[17] == ids[0].tolist()
EOF
