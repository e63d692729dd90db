#!/usr/bin/env bash
# Versions: opencv-python-headless==5.0.0.93 and 4.14.0.94, numpy==2.4.6
# Behaviour: An array [H, W, C] is a picture of C channels up to C = 128 in OpenCV 5, up to 512 in 4.x. Beyond that it
#   is taken for a volume of one channel: resize, flip, warpAffine, copyMakeBorder and GaussianBlur raise, with an
#   assertion on 'dims' that names no channel; split and mean do something else without an error.
# Seen:
#   OpenCV 4.14.0: resize of 128 channels (16, 16, 128), of 150 (16, 16, 150), split of 150: 150 of (8, 8)
#   OpenCV 5.0.0: resize of 128 channels (16, 16, 128), of 150 error, split of 150: 1 of (8, 8, 150)
# Why it matters here: Maps of ADE20K's 150 classes are resized with cv2 in many evaluation loops: it works until the
#   package is updated, and a net of 19 classes never shows it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 4.14.0.94 5.0.0.93; do
  python3 -m venv "$work/venv$version"
  "$work/venv$version/bin/pip" install -q --no-compile --disable-pip-version-check \
    opencv-python-headless==$version numpy==2.4.6
  "$work/venv$version/bin/python" -W ignore - <<'EOF'
import cv2
import numpy as np


def resized(channels):
    try:
        return cv2.resize(np.zeros((8, 8, channels), np.float32), (16, 16)).shape
    except cv2.error as error:
        assert "dims" in str(error)
        return "error"


parts = cv2.split(np.zeros((8, 8, 150), np.float32))
print(
    f"OpenCV {cv2.__version__}: resize of 128 channels {resized(128)}, of 150 {resized(150)},",
    f"split of 150: {len(parts)} of {parts[0].shape}",
)
assert resized(128) == (16, 16, 128)
new = cv2.__version__.startswith("5.")
assert resized(150) == ("error" if new else (16, 16, 150))
assert (len(parts), parts[0].shape) == ((1, (8, 8, 150)) if new else (150, (8, 8)))
EOF
done
