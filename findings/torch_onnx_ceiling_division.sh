#!/usr/bin/env bash
# Versions: torch==2.13.0, onnx==1.23.2, onnxscript==0.7.2, onnxruntime==1.32.0
# Behaviour: torch.onnx.export of a module that rounds a free size up as -(-h // 2) writes Neg, Div, Neg. ONNX divides
#   integers towards 0, Python downwards: for odd h the exported net rounds down. No warning; checks at the example's
#   own even size pass. (h + 1) // 2 is exported right.
# Seen:
#   h 8: torch 4 4, ONNX Runtime 4 4
#   h 9: torch 5 5, ONNX Runtime 4 5
# Why it matters here: SAME padding and strided grids round up, and -(-a // b) is how Python people write it. The net of
#   EfficientNet-Lite0 had one column too few for images of odd width; export compares at odd sides for it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import logging

import numpy as np
import onnxruntime
import torch

logging.disable(logging.WARNING)


class Halved(torch.nn.Module):
    def forward(self, images):
        height = images.shape[2]
        return images.new_zeros(-(-height // 2)), images.new_zeros((height + 1) // 2)


torch.onnx.export(
    Halved(), (torch.rand(2, 3, 8, 8),), "halved.onnx", input_names=["images"], dynamo=True, verbose=False,
    dynamic_shapes={"images": {2: "height"}},
)
session = onnxruntime.InferenceSession("halved.onnx")
seen = {}
for height in (8, 9):
    images = torch.rand(2, 3, height, 8)
    ours = [len(part) for part in Halved()(images)]
    theirs = [len(part) for part in session.run(None, {"images": images.numpy()})]
    print(f"h {height}: torch {ours[0]} {ours[1]}, ONNX Runtime {theirs[0]} {theirs[1]}")
    seen[height] = ours, theirs
assert seen[8] == ([4, 4], [4, 4])
assert seen[9] == ([5, 5], [4, 5]), "rounded as Python does"
EOF
