#!/usr/bin/env bash
# Versions: albumentations==2.0.8, opencv-python-headless==5.0.0.93, numpy==2.4.6
# Behaviour: Resize, RandomResizedCrop, RandomScale and LongestMaxSize read the image by pixel centres and the mask by
#   INTER_NEAREST, which rounds the corner down: at a quarter of the size each label comes from 1.5 pixels up and left of
#   what the image shows. mask_interpolation=INTER_NEAREST_EXACT removes it. Up-scaling shifts by less than half a pixel.
# Seen:
#   512 -> 128: labels lie 1.5 pixels left of the image; NEAREST_EXACT -0.5
#   512 -> 205: labels lie 1.246 pixels left of the image; NEAREST_EXACT -0.002
# Why it matters here: Every boundary of a down-scaled data set is moved up and left, in training and in the labels that
#   score it, so no figure shows it; at full size it is the width of a thin pole.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  albumentations==2.0.8 opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$work"
NO_ALBUMENTATIONS_UPDATE=1 "$work/venv/bin/python" -W ignore - <<'EOF'
import albumentations as A
import cv2
import numpy as np

columns = np.tile(np.arange(512, dtype=np.float32), (512, 1))


def shift(size, **args):
    out = A.Compose([A.Resize(size, size, p=1, **args)])(image=columns.copy(), mask=columns.copy())
    return round(float((out["image"] - out["mask"]).mean()), 3)


seen = {}
for size in (128, 205):
    seen[size] = shift(size), shift(size, mask_interpolation=cv2.INTER_NEAREST_EXACT)
    print(f"512 -> {size}: labels lie {seen[size][0]} pixels left of the image; NEAREST_EXACT {seen[size][1]}")
assert seen[128][0] == 1.5 and seen[205][0] > 1
EOF
