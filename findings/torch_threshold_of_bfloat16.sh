#!/usr/bin/env bash
# Versions: torch==2.13.0, numpy==2.4.6
# Behaviour: Whether a bfloat16 confidence of 0.8984375 passes a threshold of 0.9 depends on how 0.9 is written: the
#   Python number is rounded to bfloat16 first (passes), a tensor of one dimension is compared in float32 (fails),
#   and a 0-dim tensor passes eagerly and fails under torch.compile. float16 does the same. F.threshold is strict
#   and fails in all.
# Seen:
#   bfloat16, confidence 0.8984375
#     >= 0.9 as number: eager True, compiled True
#     >= 0.9 as 0-dim tensor: eager True, compiled False
#     >= 0.9 as tensor [1]: eager False, compiled False
#   float16, confidence 0.89990234375
#     >= 0.9 as number: eager True, compiled True
#     >= 0.9 as 0-dim tensor: eager True, compiled False
#     >= 0.9 as tensor [1]: eager False, compiled False
#   float32, confidence 0.8999999761581421
#     >= 0.9 as number: eager True, compiled True
#     >= 0.9 as 0-dim tensor: eager True, compiled True
#     >= 0.9 as tensor [1]: eager True, compiled True
#   pixels kept of 1048576 {'number': 466600, '0-dim tensor': 466600, 'tensor [1]': 457296}
# Why it matters here: Confidences under autocast are bfloat16 with a step of 1/256 near 0.9: all pixels of one step
#   are kept or dropped as pseudo-labels by the type of the threshold (a number, a buffer, one per class) and by
#   compilation.
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
forms = {
    "number": lambda c: c >= 0.9,
    "0-dim tensor": lambda c: c >= torch.tensor(0.9),
    "tensor [1]": lambda c: c >= torch.tensor([0.9]),
}
passes = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    confidence = torch.tensor([0.9]).to(dtype)
    print(f"{str(dtype)[6:]}, confidence {confidence.item()}")
    for name, form in forms.items():
        torch._dynamo.reset()
        passes[dtype, name] = form(confidence).item(), torch.compile(form)(confidence).item()
        print(f"  >= 0.9 as {name}: eager %s, compiled %s" % passes[dtype, name])
for dtype in (torch.bfloat16, torch.float16):
    assert passes[dtype, "number"] == (True, True)
    assert passes[dtype, "0-dim tensor"] == (True, False)
    assert passes[dtype, "tensor [1]"] == (False, False)
# one label map: softmax confidences of two classes in bfloat16
torch.manual_seed(0)
logits = torch.randn(2, 1 << 20) * 2
confidence = logits.softmax(0).amax(0).bfloat16()
kept = {name: int(form(confidence).sum()) for name, form in forms.items()}
print("pixels kept of", confidence.numel(), kept)
assert kept["number"] == kept["0-dim tensor"] > kept["tensor [1]"]
EOF
