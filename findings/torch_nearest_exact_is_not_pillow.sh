#!/usr/bin/env bash
# Versions: torch==2.13.0, pillow==13.0.0, numpy==2.4.6, opencv-python-headless==5.0.0.93
# Behaviour: The documentation says F.interpolate(mode='nearest-exact') matches Pillow's and scikit-image's nearest
#   neighbour. Where an output centre falls on a pixel edge it does not: torch takes the upper pixel, Pillow (and
#   OpenCV's INTER_NEAREST_EXACT, in agreement with it) sometimes the lower one. From 2048 to 1280 columns every
#   tenth column differs.
# Seen:
#   2048 -> 1280: torch and Pillow differ in 133 columns, OpenCV's exact and Pillow in 0; largest step 1
#   1440 -> 1080: torch and Pillow differ in 151 columns, OpenCV's exact and Pillow in 0; largest step 1
#   1024 -> 768: torch and Pillow differ in 99 columns, OpenCV's exact and Pillow in 0; largest step 1
#   512 -> 384: torch and Pillow differ in 74 columns, OpenCV's exact and Pillow in 0; largest step 1
#   2048 -> 1024: torch and Pillow differ in 0 columns, OpenCV's exact and Pillow in 0; largest step 0
#   1914 -> 1280: torch and Pillow differ in 0 columns, OpenCV's exact and Pillow in 0; largest step 0
#   8 -> 6: torch [0, 2, 3, 4, 6, 7] Pillow [0, 2, 3, 4, 5, 7]
# Why it matters here: Labels are resized by Pillow in a loader and by torch in a loss or an evaluation: thin
#   classes (poles) move by a pixel between the two, at the usual size of Cityscapes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  torch==2.13.0 pillow==13.0.0 numpy==2.4.6 opencv-python-headless==5.0.0.93
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

def torch_index(n, m):
    ramp = torch.arange(n, dtype=torch.float64)[None, None]
    return F.interpolate(ramp, size=m, mode="nearest-exact")[0, 0].long().numpy()

def pillow_index(n, m):
    ramp = Image.fromarray(np.arange(n, dtype=np.int32)[None])
    return np.asarray(ramp.resize((m, 1), Image.Resampling.NEAREST))[0]

def opencv_index(n, m):
    ramp = np.arange(n, dtype=np.int32)[None]
    return cv2.resize(ramp, (m, 1), interpolation=cv2.INTER_NEAREST_EXACT)[0]

differ = {}
for n, m in ((2048, 1280), (1440, 1080), (1024, 768), (512, 384), (2048, 1024), (1914, 1280)):
    ours, theirs, third = torch_index(n, m), pillow_index(n, m), opencv_index(n, m)
    differ[n, m] = int((ours != theirs).sum())
    print(f"{n} -> {m}: torch and Pillow differ in {differ[n, m]} columns, OpenCV's exact and Pillow in "
          f"{int((third != theirs).sum())}; largest step {int(np.abs(ours - theirs).max())}")
    assert (third == theirs).all()
assert differ[2048, 1280] > 100 and differ[512, 384] > 50 and differ[2048, 1024] == differ[1914, 1280] == 0
print("8 -> 6: torch", torch_index(8, 6).tolist(), "Pillow", pillow_index(8, 6).tolist())
assert torch_index(8, 6).tolist() == [0, 2, 3, 4, 6, 7] and pillow_index(8, 6).tolist() == [0, 2, 3, 4, 5, 7]
EOF
