#!/usr/bin/env bash
# Versions: pycocotools==2.0.11, numpy==2.4.6
# Behaviour: mask.encode of a map with more than one non-zero value neither takes 'non-zero' nor refuses it: it
#   starts a new run at every change of value and alternates background and object, so neighbouring classes cancel.
#   The same objects as a 0/1 mask are right, and so is 0/255.
# Seen:
#   labels         [0, 1, 2, 2, 1, 0, 3, 3]
#   encode(labels) [0, 1, 0, 0, 1, 0, 1, 1] area 4
#   encode(!= 0)   [0, 1, 1, 1, 1, 0, 1, 1] area 6
#   IoU of the two 0.6666666666666666
# Why it matters here: A foreground mask taken from a label map by 'labels != 0' is one typo away from the label map
#   itself (both are uint8); areas and IoU of the COCO tools are then of a striped mask.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  pycocotools==2.0.11 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from pycocotools import mask

ids = np.array([0, 1, 2, 2, 1, 0, 3, 3], np.uint8)
column = np.asfortranarray(ids[:, None])
wrong, right = mask.encode(column), mask.encode(np.asfortranarray((column != 0).astype(np.uint8)))
print("labels        ", ids.tolist())
print("encode(labels)", mask.decode(wrong).ravel().tolist(), "area", int(mask.area(wrong)))
print("encode(!= 0)  ", mask.decode(right).ravel().tolist(), "area", int(mask.area(right)))
print("IoU of the two", mask.iou([wrong], [right], [0]).item())
assert mask.decode(right).ravel().tolist() == [0, 1, 1, 1, 1, 0, 1, 1]
assert mask.decode(wrong).ravel().tolist() == [0, 1, 0, 0, 1, 0, 1, 1]
assert int(mask.area(wrong)) == 4 and int(mask.area(right)) == 6
EOF
