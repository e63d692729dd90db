#!/usr/bin/env bash
# Versions: mmsegmentation 1.1.2 and 1.2.2, mmengine==0.10.7, mmcv-lite==2.0.1, torch==2.13.0
# Behaviour: CrossEntropyLoss(class_weight=...) divides its mean by the number of pixels up to 1.1.2 and by the summed class
#   weights of the labels from 1.2.0 on, with the same arguments: the loss, and with it the learning rate that it works with,
#   changes by the mean class weight. And from 1.2.0 on a label 255 with ignore_index=255, which every head passes, is looked up
#   in the class weights before it is ignored: IndexError on the CPU.
# Seen:
#   1.1.2: mean 0.0347, with a pixel of 255: 0.0260
#   1.2.2: mean 0.6931, with a pixel of 255: IndexError
# Why it matters here: compat.mmseg stands in for this loss. It divides as the installed version does, and takes 255.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy mmengine==0.10.7 mmcv-lite==2.0.1 \
  prettytable ftfy regex
for version in 1.1.2 1.2.2; do
  "$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check --no-deps --target "$work/$version" "mmsegmentation==$version"
done
cat > "$work/look.py" <<'EOF'
import importlib
import os
import sys
import types

import mmseg
import torch

# the package's models import compiled ops that mmcv-lite has not: only the file of the loss is loaded
for name in ("mmseg.models", "mmseg.models.losses"):
    package = types.ModuleType(name)
    package.__path__ = [os.path.join(os.path.dirname(mmseg.__file__), *name.split(".")[1:])]
    sys.modules[name] = package
CrossEntropyLoss = importlib.import_module("mmseg.models.losses.cross_entropy_loss").CrossEntropyLoss
criterion = CrossEntropyLoss(class_weight=[0.05, 0.05])
scores = torch.zeros(1, 2, 2, 2)  # every pixel's loss is ln 2 times its class weight
whole = criterion(scores, torch.tensor([[[0, 1], [1, 0]]]), ignore_index=255).item()
try:
    ignored = f"{criterion(scores, torch.tensor([[[0, 1], [1, 255]]]), ignore_index=255).item():.4f}"
except IndexError as error:
    ignored = type(error).__name__
print(f"{mmseg.__version__}: mean {whole:.4f}, with a pixel of 255: {ignored}")
expected = {"1.1.2": ("0.0347", "0.0260"), "1.2.2": ("0.6931", "IndexError")}
assert (f"{whole:.4f}", ignored) == expected[mmseg.__version__]
EOF
cd "$work"
for version in 1.1.2 1.2.2; do
  PYTHONPATH="$work/$version" "$work/venv/bin/python" -W ignore look.py
done
