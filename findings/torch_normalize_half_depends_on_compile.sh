#!/usr/bin/env bash
# Versions: torch==2.13.0, numpy==2.4.6
# Behaviour: F.normalize of a float16 vector of zeros is NaN, for eps=1e-12 is 0 in float16; of a vector whose norm
#   exceeds 65504 it is all 0. The same function under torch.compile (inductor) computes in float32 and gives 0 and
#   the right unit vector. bfloat16 is fine in both.
# Seen:
#   zeros float16: eager nan, compiled 0.0
#   zeros bfloat16: eager 0.0, compiled 0.0
#   large float16: eager 0.0, compiled 0.5
#   large bfloat16: eager 0.5, compiled 0.5
#   plain float16: eager 0.5, compiled 0.5
#   plain bfloat16: eager 0.5, compiled 0.5
# Why it matters here: Cosine prototypes normalise every pixel; dead (all-zero) pixels are common after ReLU. Code
#   that is fine compiled turns NaN when run eagerly, and a loss compared with the eager formula is compared with
#   NaN.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
compiled = torch.compile(F.normalize)
cases = {"zeros": torch.zeros(1, 4), "large": torch.full((1, 4), 4e4), "plain": torch.full((1, 4), 2.0)}
out = {}
for name, x in cases.items():
    for dtype in (torch.float16, torch.bfloat16):
        out[name, dtype] = F.normalize(x.to(dtype))[0, 0].item(), compiled(x.to(dtype))[0, 0].item()
        print(f"{name} {str(dtype)[6:]}: eager {out[name, dtype][0]}, compiled {out[name, dtype][1]}")
half, brain = torch.float16, torch.bfloat16
assert out["zeros", half][0] != out["zeros", half][0] and out["zeros", half][1] == 0
assert out["large", half] == (0.0, 0.5)
assert out["plain", half] == out["plain", brain] == out["large", brain] == (0.5, 0.5)
assert out["zeros", brain] == (0.0, 0.0)
EOF
