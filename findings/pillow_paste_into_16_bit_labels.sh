#!/usr/bin/env bash
# Versions: pillow==13.0.0, numpy==2.4.6
# Behaviour: Image.paste(id, box) on a 16-bit grey picture (mode I;16) writes the id's low byte into both bytes: 5
#   becomes 1285, 255 becomes 65535, 256 becomes 0. Image.new, putpixel, ImageDraw and paste with a mask write 5.
# Seen:
#   id 0: paste 0; new, putpixel, draw, paste with mask [0, 0, 0, 0]
#   id 1: paste 257; new, putpixel, draw, paste with mask [1, 1, 1, 1]
#   id 5: paste 1285; new, putpixel, draw, paste with mask [5, 5, 5, 5]
#   id 255: paste 65535; new, putpixel, draw, paste with mask [255, 255, 255, 255]
#   id 256: paste 0; new, putpixel, draw, paste with mask [256, 256, 256, 256]
#   id 300: paste 11308; new, putpixel, draw, paste with mask [300, 300, 300, 300]
# Why it matters here: Ignore boxes (ego vehicle, time stamps) are painted into label files this way; in 16-bit ids
#   (Cityscapes instances, SYNTHIA, Mapillary) 255 turns into 65535 and 300 into 11308.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  pillow==13.0.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from PIL import Image, ImageDraw

pasted = {}
for value in (0, 1, 5, 255, 256, 300):
    blank = Image.fromarray(np.zeros((2, 2), np.uint16))
    paste, pixel, draw, mask = (blank.copy() for _ in range(4))
    paste.paste(value, (0, 0, 1, 1))
    pixel.putpixel((0, 0), value)
    ImageDraw.Draw(draw).point((0, 0), fill=value)
    mask.paste(value, (0, 0, 1, 1), Image.new("L", (1, 1), 255))
    others = [int(np.asarray(image)[0, 0]) for image in (Image.new("I;16", (1, 1), value), pixel, draw, mask)]
    pasted[value] = int(np.asarray(paste)[0, 0])
    print(f"id {value}: paste {pasted[value]}; new, putpixel, draw, paste with mask {others}")
    assert others == [value] * 4, others
assert pasted == {0: 0, 1: 257, 5: 1285, 255: 65535, 256: 0, 300: 11308}, pasted
EOF
