#!/usr/bin/env bash
# Versions: safetensors==0.8.0, numpy==2.4.6
# Behaviour: safetensors.numpy.save_file writes the bytes that start at the array's pointer and its shape, whatever
#   the strides. A transposed, Fortran-ordered or sliced array is saved without an error and loads with its numbers
#   in other places. safetensors.torch refuses the same tensor ('non contiguous tensor').
# Seen:
#   transposed: saved [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] loaded [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
#   Fortran order: saved [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] loaded [[0.0, 3.0, 1.0], [4.0, 2.0, 5.0]]
#   two columns: saved [[1.0, 2.0], [5.0, 6.0], [9.0, 10.0]] loaded [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
#   contiguous: saved [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] loaded [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
# Why it matters here: Prototypes are [K, D] here and [D, K] in the release: saving `means.T` from numpy gives
#   prototypes that mix classes, with the right shape.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  safetensors==0.8.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from safetensors.numpy import load_file, save_file

prototypes = np.arange(6, dtype=np.float32).reshape(2, 3)  # [D, K]
cases = {
    "transposed": prototypes.T,
    "Fortran order": np.asfortranarray(prototypes),
    "two columns": np.arange(12, dtype=np.float32).reshape(3, 4)[:, 1:3],
    "contiguous": np.ascontiguousarray(prototypes.T),
}
same = {}
for name, array in cases.items():
    save_file({"x": array}, "x.safetensors")
    loaded = load_file("x.safetensors")["x"]
    same[name] = bool(np.array_equal(loaded, array))
    print(f"{name}: saved {array.tolist()} loaded {loaded.tolist()}")
    assert loaded.shape == array.shape
assert same == {"transposed": False, "Fortran order": False, "two columns": False, "contiguous": True}, same
EOF
