#!/usr/bin/env bash
# Versions: pyoxipng==9.1.1, pillow==13.0.0, numpy==2.4.6
# Behaviour: oxipng is lossless for what a viewer shows, not for the samples. A grey label PNG of five ids becomes a
#   palette PNG whose five entries are the ids as greys, in an order of its own, so the samples are 0 to 4. A palette
#   PNG loses its unused entries and the rest are sorted anew. A grey one of 0 and 255 becomes a 1-bit PNG. At every
#   level, 0 too; only keeping colour type, depth and palette by hand leaves the samples.
# Seen:
#   ids 255, 0, 7, 13, 18 in a grey PNG: samples [1, 4, 3, 2, 0], palette greys [18, 255, 13, 7, 0]
#   the same in a palette PNG: samples [2, 4, 3, 1, 0], 5 of 256 entries left
#   ids 0 and 255 in a grey PNG: mode 1, samples [0, 1]
#   with every reduction off: samples [255, 0, 7, 13, 18]
# Why it matters here: Label folders are large and are optimised before they are shared. Read by their samples, as
#   palette labels are, void becomes class 1 here, and another class in the next picture.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  pyoxipng==9.1.1 pillow==13.0.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import io

import numpy as np
import oxipng
from PIL import Image


def as_png(image):
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def samples(data):
    image = Image.open(io.BytesIO(data))
    return image, np.asarray(image).astype(int)


rng = np.random.default_rng(0)
ids = rng.choice(np.array([255, 0, 7, 13, 18], np.uint8), (64, 64))
ids[0, :5] = 255, 0, 7, 13, 18
grey = Image.fromarray(ids)
coloured = grey.copy()
coloured.putpalette([c for k in range(256) for c in ((k * 37 + 10) % 256, (k * 91 + 20) % 256, (k * 13 + 30) % 256)])
for level in range(5):
    image, got = samples(oxipng.optimize_from_memory(as_png(grey), level=level))
    greys = image.getpalette()[::3]
    assert image.mode == "P" and [greys[k] for k in got[0, :5]] == [255, 0, 7, 13, 18] and got.max() == 4
print("ids 255, 0, 7, 13, 18 in a grey PNG: samples", got[0, :5].tolist(), "palette greys", greys)
image, got = samples(oxipng.optimize_from_memory(as_png(coloured)))
entries = len(image.getpalette()) // 3
print("the same in a palette PNG: samples", got[0, :5].tolist(), entries, "of 256 entries left")
assert got.max() == 4 and entries == 5
two = np.where(ids == 255, 255, 0).astype(np.uint8)
image, got = samples(oxipng.optimize_from_memory(as_png(Image.fromarray(two))))
print("ids 0 and 255 in a grey PNG: mode", image.mode, "samples", np.unique(got).tolist())
assert image.mode == "1"
kept = oxipng.optimize_from_memory(
    as_png(grey), bit_depth_reduction=False, color_type_reduction=False, palette_reduction=False, grayscale_reduction=False
)
print("with every reduction off: samples", samples(kept)[1][0, :5].tolist())
assert np.array_equal(samples(kept)[1], ids)
EOF
