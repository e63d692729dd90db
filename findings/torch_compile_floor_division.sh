#!/usr/bin/env bash
# Versions: torch==2.13.0, numpy==2.4.6
# Behaviour: Floor division of floats differs between eager and compiled code: 1.0 // 0.1 is 9 in eager torch (as in
#   Python: 0.1 is a little more than a tenth) and 10 under torch.compile (inductor: floor of the rounded quotient).
# Seen:
#   confidence [0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0]
#   eager      [1.0, 2.0, 3.0, 4.0, 6.0, 6.0, 8.0, 9.0]
#   compiled   [1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 9.0, 10.0]
#   python      9.0
# Why it matters here: Bins of confidences (calibration, thresholds by bin) are p // width: pixels on a bin's edge,
#   where saturated confidences of exactly 1.0 lie, change bin with compilation.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch

torch.set_num_threads(1)
divide = lambda p, width: p // width
p = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0])
eager = divide(p, 0.1)
compiled = torch.compile(divide)(p, 0.1)
print("confidence", [round(v, 1) for v in p.tolist()])
print("eager     ", eager.tolist())
print("compiled  ", compiled.tolist())
print("python     ", 1.0 // 0.1)
assert eager[-1] == 9 and compiled[-1] == 10 and 1.0 // 0.1 == 9
assert int((eager != compiled).sum()) >= 1
EOF
