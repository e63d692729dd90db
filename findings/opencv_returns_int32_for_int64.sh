#!/usr/bin/env bash
# Versions: opencv-python-headless==5.0.0.93, numpy==2.4.6; albumentations==2.0.8 passes it on
# Behaviour: OpenCV takes int64 and uint64 arrays and works on an int32 copy of them: the result is int32, and ids
#   wrap at 2^32. 2^32 + 5 becomes 5, 2^53 becomes 0. Functions that draw in place raise. albumentations gives such
#   labels back as int32 from a flip, and as int64 from a crop.
# Seen:
#   flip(int64): int32 [5, 2147483647, -2147483648, 5, 0] of [5, 2147483647, 2147483648, 4294967301, 9007199254740992]
#   flip(uint32): uint32 [5, 2147483653]
#   albumentations: HorizontalFlip int32, Crop int64
# Why it matters here: Labels that came from torch are int64, and a loader that flips half of them hands out two
#   dtypes, one of which torch's cross-entropy refuses ('Long or Byte, but got Int'). Packed instance ids wrap.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  opencv-python-headless==5.0.0.93 albumentations==2.0.8 numpy==2.4.6
cd "$work"
NO_ALBUMENTATIONS_UPDATE=1 "$work/venv/bin/python" -W ignore - <<'EOF'
import albumentations as A
import cv2
import numpy as np

values = [5, 2**31 - 1, 2**31, 2**32 + 5, 2**53]
ids = np.array([values])
for dtype in (np.int64, np.uint64):
    got = cv2.flip(ids.astype(dtype), 0)
    assert got.dtype == np.int32 and got[0].tolist() == [5, 2**31 - 1, -(2**31), 5, 0]
print("flip(int64):", got.dtype, got[0].tolist(), "of", values)
unsigned = cv2.flip(np.array([[5, 2**31 + 5]], np.uint32), 0)
print("flip(uint32):", unsigned.dtype, unsigned[0].tolist())
assert unsigned.dtype == np.uint32 and unsigned[0].tolist() == [5, 2**31 + 5]
image, labels = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.int64)
flipped = A.Compose([A.HorizontalFlip(p=1)])(image=image, mask=labels)["mask"]
cropped = A.Compose([A.Crop(0, 0, 4, 4, p=1)])(image=image, mask=labels)["mask"]
print("albumentations: HorizontalFlip", f"{flipped.dtype}, Crop {cropped.dtype}")
assert flipped.dtype == np.int32 and cropped.dtype == np.int64
EOF
