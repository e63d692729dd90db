#!/usr/bin/env bash
# Versions: pyvips==3.2.0, pyvips-binary==8.18.7, numpy==2.4.6
# Behaviour: A uint16 array [H, W] becomes a picture that is called 'b-w', which libvips takes for 8 bits when it
#   writes a PNG: ids above 255 are clipped to 255, without a warning. bitdepth=16 does not help: the ids are shifted
#   up by 257 first and then clipped at 65535. An array [H, W, 3] keeps its 16 bits, and so does TIFF.
# Seen:
#   ids                            [0, 1, 255, 300, 1000]
#   PNG                            [0, 1, 255, 255, 255]
#   PNG, bitdepth=16               [0, 257, 65535, 65535, 65535]
#   PNG of copy(interpretation='grey16') [0, 1, 255, 300, 1000]
#   TIFF                           [0, 1, 255, 300, 1000]
#   PNG of three channels          [0, 1, 255, 300, 1000]
# Why it matters here: Class ids above 255 (ADE-847) all become 255, which is the ignore id: those classes are never
#   trained nor scored, and the file looks sound.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  pyvips==3.2.0 pyvips-binary==8.18.7 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import pyvips

ids = np.array([[0, 1, 255, 300, 1000]] * 2, np.uint16)
labels = pyvips.Image.new_from_array(ids)
assert labels.interpretation == "b-w" and labels.format == "ushort"


def read(data):
    return pyvips.Image.new_from_buffer(data, "").numpy()[0].astype(int)


three = pyvips.Image.new_from_array(np.repeat(ids[..., None], 3, 2))
seen = {
    "PNG": read(labels.write_to_buffer(".png")),
    "PNG, bitdepth=16": read(labels.pngsave_buffer(bitdepth=16)),
    "PNG of copy(interpretation='grey16')": read(labels.copy(interpretation="grey16").write_to_buffer(".png")),
    "TIFF": read(labels.write_to_buffer(".tif")),
    "PNG of three channels": read(three.write_to_buffer(".png"))[:, 0],
}
print(f"{'ids':30}", ids[0].tolist())
for name, got in seen.items():
    print(f"{name:30}", got.tolist())
assert seen["PNG"].tolist() == [0, 1, 255, 255, 255]
assert seen["PNG, bitdepth=16"].tolist() == [0, 257, 65535, 65535, 65535]
for name in ("PNG of copy(interpretation='grey16')", "TIFF", "PNG of three channels"):
    assert seen[name].tolist() == ids[0].tolist(), name
EOF
