#!/usr/bin/env bash
# Versions: numba==0.68.1, numpy==2.4.6
# Behaviour: array.mean() of float32 inside numba.njit adds one by one in float32: the mean of 20 million ones is
#   0.8389, not 1. numpy's own mean of the same array is exact (pairwise sums). array.sum() under numba adds one by
#   one, too, and stops at 16777216.
# Seen:
#   numpy mean 1.0 sum 20000000.0
#   numba mean 0.838860809803009 sum 16777216.0
# Why it matters here: A mean confidence or a mean loss over ten label maps of 2048 x 1024, moved into a jitted loop
#   for speed, drops by a sixth without a change of code.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  numba==0.68.1 numpy==2.4.6
cd "$work"
OPENBLAS_NUM_THREADS=1 "$work/venv/bin/python" -W ignore - <<'EOF'
import numba
import numpy as np

mean = lambda a: a.mean()
total = lambda a: a.sum()
ones = np.ones(20_000_000, np.float32)
jitted = float(numba.njit(mean)(ones)), float(numba.njit(total)(ones))
print("numpy mean", float(ones.mean()), "sum", float(ones.sum()))
print("numba mean", jitted[0], "sum", jitted[1])
assert ones.mean() == 1 and ones.sum() == 20_000_000
assert jitted[1] == 2**24 and abs(jitted[0] - 2**24 / 20_000_000) < 1e-6
assert float(numba.njit(mean)(ones.astype(np.float64))) == 1
EOF
