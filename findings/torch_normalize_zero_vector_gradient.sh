#!/usr/bin/env bash
# Versions: torch==2.13.0, numpy==2.4.6
# Behaviour: F.normalize of a zero vector is 0, as documented, but its gradient is neither 0 nor NaN: it is the
#   incoming gradient times 1/eps = 1e12, and inf in float16 (through a float32 normalize). cosine_similarity of a
#   zero vector gives 1e8 times the other unit vector.
# Seen:
#   value [0.0, 0.0]
#   gradient at 0: float32 [600000036864.0, 799999983616.0] float16 [inf, inf] cosine_similarity [60000004.0,
#     80000000.0]
#   gradient at a vector of 0.001: [-70.71066284179688, 70.71066284179688]
#   after clipping to 1: dead pixel 0.9999999403953552 all others together 1.3270272658516546e-09
# Why it matters here: One dead pixel (all features 0, common after ReLU) among millions has a finite loss and a
#   gradient of 1e12 / N: gradient clipping then scales every other gradient to nothing, and a GradScaler skips the
#   step.
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

def gradient(f, x):
    x = x.clone().requires_grad_()
    f(x).backward()
    return x.grad

w = torch.tensor([0.6, 0.8])
plain = gradient(lambda x: F.normalize(x, dim=0) @ w, torch.zeros(2))
half = gradient(lambda x: F.normalize(x.float(), dim=0) @ w, torch.zeros(2, dtype=torch.float16))
cosine = gradient(lambda x: F.cosine_similarity(x, w, dim=0), torch.zeros(2))
small = gradient(lambda x: F.normalize(x, dim=0) @ w, torch.full((2,), 1e-3))
print("value", F.normalize(torch.zeros(2), dim=0).tolist())
print("gradient at 0: float32", plain.tolist(), "float16", half.tolist(), "cosine_similarity", cosine.tolist())
print("gradient at a vector of 0.001:", small.tolist())
assert torch.allclose(plain, w * 1e12) and torch.isinf(half).all() and torch.allclose(cosine, w * 1e8)
assert small.abs().max() < 1e3
# the image of 512 x 1024 pixels, one of which is dead, clipped to norm 1: what is left for the rest
torch.manual_seed(0)
pixels = torch.randn(512 * 1024, 2)
pixels[7] = 0
pixels.requires_grad_()
(F.normalize(pixels) @ w).mean().backward()
torch.nn.utils.clip_grad_norm_([pixels], 1.0)
rest = pixels.grad.clone()
rest[7] = 0
print("after clipping to 1: dead pixel", pixels.grad[7].norm().item(), "all others together", rest.norm().item())
assert rest.norm() < 1e-8
EOF
