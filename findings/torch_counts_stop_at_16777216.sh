#!/usr/bin/env bash
# Versions: torch==2.13.0, numpy==2.4.6
# Behaviour: torch.bincount with float32 weights returns float32 and adds one by one in it, and torch.histc and
#   torch.histogram count in the dtype of the input: all three stop at 16777216. With float16 weights bincount
#   returns float64 and is exact; numpy.bincount is float64 for both.
# Seen:
#   pixels 16778216
#   bincount, float32 weights torch.float32 16777216 ; float16 weights torch.float64 16778216
#   histc 16777216 ; histogram 16777216 ; numpy.bincount float64 16778216
# Why it matters here: Eight labels of 2048 x 1024 already have 16.8 million pixels: class frequencies, class
#   weights and confidence histograms of a common class stand still from there on, and rare classes go on counting.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import torch

torch.set_num_threads(1)
n = 2**24 + 1000
labels = torch.zeros(n, dtype=torch.uint8)
weighted = torch.bincount(labels, weights=torch.ones(n))
half = torch.bincount(labels, weights=torch.ones(n, dtype=torch.float16))
bins = torch.histc(torch.zeros(n), bins=2, min=-1, max=1)
hist = torch.histogram(torch.zeros(n), bins=2, range=(-1.0, 1.0)).hist
theirs = np.bincount(labels.numpy(), weights=np.ones(n, np.float32))
print("pixels", n)
print("bincount, float32 weights", weighted.dtype, int(weighted[0]), "; float16 weights", half.dtype, int(half[0]))
print("histc", int(bins.max()), "; histogram", int(hist.max()), "; numpy.bincount", theirs.dtype, int(theirs[0]))
assert weighted.dtype == torch.float32 and weighted[0] == 2**24
assert half.dtype == torch.float64 and half[0] == n
assert bins.max() == hist.max() == 2**24
assert theirs[0] == n
EOF
