#!/usr/bin/env bash
# Versions: numpy==2.4.6
# Behaviour: mean() of a float16 array adds up in float32; std(), var() and average(weights=...) of the same array add
#   up in float16, where sums end at 65504. Of a picture of 512 x 512 values around 0.5 the mean is right, the standard
#   deviation is inf and the weighted mean NaN. Of 64 x 64 values all are right.
# Seen:
#   64 x 64: mean 0.4963 std 0.2881 average 0.4963
#   512 x 512: mean 0.4998 std inf average nan
#   512 x 512 as float32: mean 0.4998 std 0.2885 average 0.4998
# Why it matters here: Features and confidences are kept in float16 to halve their size; a threshold of mean and standard
#   deviation over a map of one is inf, and then no pixel is chosen.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np


def figures(x):
    return [round(float(f), 4) for f in (x.mean(), x.std(), np.average(x, weights=np.ones_like(x)))]


rng = np.random.default_rng(0)
seen = {}
for side in (64, 512):
    x = rng.random((side, side)).astype(np.float16)
    seen[side] = figures(x)
    print("{0} x {0}: mean {1} std {2} average {3}".format(side, *seen[side]))
wide = figures(x.astype(np.float32))
print("512 x 512 as float32: mean {} std {} average {}".format(*wide))
assert abs(seen[64][1] - wide[1]) < 0.01 and abs(seen[512][0] - wide[0]) < 0.001
assert np.isinf(seen[512][1]) and np.isnan(seen[512][2])
EOF
