#!/usr/bin/env bash
# Versions: torch==2.13.0, numpy==2.4.6
# Behaviour: F.linear_cross_entropy promises that options=LinearCrossEntropyOptions() (chunked) only saves memory. A
#   NaN in a row whose label is ignore_index leaves the loss of the reference path as it is and makes the chunked
#   loss NaN (gradients are NaN in both); where no row is labelled the reference gradient is 0 and the chunked one
#   NaN; forward-mode AD of the chunked path returns a tangent of exactly 0, where the documentation says it is not
#   supported.
# Seen:
#   plain, reference: loss 10.5823, finite gradients: input True, weight True
#   plain, chunked: loss 10.5823, finite gradients: input True, weight True
#   NaN in an ignored row, reference: loss 10.5823, finite gradients: input False, weight False
#   NaN in an ignored row, chunked: loss nan, finite gradients: input False, weight False
#   nothing labelled, reference: loss nan, finite gradients: input True, weight True
#   nothing labelled, chunked: loss nan, finite gradients: input False, weight False
#   tangent: {'reference': 9.909991264343262, 'chunked': 0.0}
# Why it matters here: Padding and ignored pixels may hold anything (NaN of an overflowed border, uninitialised
#   memory). It is the built-in peer of the prototype loss, so a comparison must know it.
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

torch.manual_seed(0)
chunked = torch.nn.LinearCrossEntropyOptions()
x, w, y = torch.randn(64, 32), torch.randn(19, 32), torch.randint(0, 19, (64,))
y[:10] = 255

def run(x, y, options):
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = F.linear_cross_entropy(a, b, y, ignore_index=255, options=options)
    loss.backward()
    return loss.item(), a.grad.isfinite().all().item(), b.grad.isfinite().all().item()

poisoned = x.clone()
poisoned[5] = float("nan")  # row 5 is ignored
found = {}
nothing = torch.full_like(y, 255)
cases = {"plain": (x, y), "NaN in an ignored row": (poisoned, y), "nothing labelled": (x, nothing)}
for name, (rows, labels) in cases.items():
    for kind, options in (("reference", None), ("chunked", chunked)):
        found[name, kind] = run(rows, labels, options)
        print(f"{name}, {kind}: loss %.4f, finite gradients: input %s, weight %s" % found[name, kind])
assert abs(found["plain", "reference"][0] - found["plain", "chunked"][0]) < 1e-4
assert found["NaN in an ignored row", "reference"][0] == found["plain", "reference"][0]
loss = found["NaN in an ignored row", "chunked"][0]
assert loss != loss
assert found["nothing labelled", "reference"][1] and not found["nothing labelled", "chunked"][1]
keep = y != 255
jvp = {}
for kind, options in (("reference", None), ("chunked", chunked)):
    f = lambda q: F.linear_cross_entropy(q, w, y[keep], options=options)
    jvp[kind] = torch.func.jvp(f, (x[keep],), (x[keep],))[1].item()
print("tangent:", jvp)
assert jvp["chunked"] == 0 and jvp["reference"] != 0
EOF
