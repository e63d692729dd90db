#!/usr/bin/env bash
# Versions: pycocotools==2.0.11, pillow==13.0.0, opencv-python-headless==5.0.0.93, numpy==2.4.6
# Behaviour: pycocotools fills the pixels whose centres lie within a polygon, Pillow and OpenCV fill those and the whole
#   outline. A square from 1 to 4 has 9 pixels or 16; of a pole from 3 to 5 pycocotools keeps two columns, the others
#   three. Two polygons that share an edge share its pixels in Pillow and OpenCV: the later one gets them.
# Seen:
#   square [1, 4] x [1, 4]: pycocotools 9, Pillow 16, OpenCV 16 pixels
#   pole [3, 5] x [0, 9]: pycocotools 18, Pillow 30, OpenCV 30 pixels
#   two squares with an edge in common, pixels of both: pycocotools 0, Pillow 4, OpenCV 4
# Why it matters here: Label maps are drawn from polygons by one and scored by the other: the IoU of a pole with itself is
#   0.6 before any net has seen it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  pycocotools==2.0.11 pillow==13.0.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import cv2
import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask


def box(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def coco(points):
    return mask.decode(mask.merge(mask.frPyObjects([points], 12, 12))) > 0


def pillow(points):
    image = Image.new("L", (12, 12))
    ImageDraw.Draw(image).polygon(points, fill=1)
    return np.asarray(image) > 0


def opencv(points):
    return cv2.fillPoly(np.zeros((12, 12), np.uint8), [np.array(points).reshape(-1, 2)], 1) > 0


draw = {"pycocotools": coco, "Pillow": pillow, "OpenCV": opencv}


def listed(count):
    return {name: int(count(fill)) for name, fill in draw.items()}


square = listed(lambda fill: fill(box(1, 1, 4, 4)).sum())
pole = listed(lambda fill: fill(box(3, 0, 5, 9)).sum())
shared = listed(lambda fill: (fill(box(1, 1, 4, 4)) & fill(box(4, 1, 7, 4))).sum())
for title, counts in (("square [1, 4] x [1, 4]", square), ("pole [3, 5] x [0, 9]", pole)):
    print(f"{title}:", ", ".join(f"{name} {count}" for name, count in counts.items()), "pixels")
print("two squares with an edge in common, pixels of both:", ", ".join(f"{name} {count}" for name, count in shared.items()))
assert square == {"pycocotools": 9, "Pillow": 16, "OpenCV": 16}
assert pole == {"pycocotools": 18, "Pillow": 30, "OpenCV": 30}
assert list(shared.values()) == [0, 4, 4]
EOF
