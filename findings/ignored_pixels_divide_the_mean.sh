#!/usr/bin/env bash
# Versions: kornia==0.9.0, segmentation-models-pytorch==0.6.0, torch==2.13.0, numpy==2.4.6
# Behaviour: ignore_index gives an ignored pixel loss 0 and no gradient, and then the mean is over all pixels, ignored
#   ones too: kornia's focal_loss(reduction='mean') and SoftCrossEntropyLoss of segmentation-models-pytorch. The same
#   pixels give half the loss where half of the picture is ignored. torch's cross_entropy divides by what it counts,
#   and so do DiceLoss, LovaszLoss and FocalLoss of segmentation-models-pytorch and kornia's dice_loss.
# Seen:
#   half ignored, over the loss of the other half alone: torch cross_entropy 1.0, torch with smoothing 1.0,
#   kornia focal_loss 0.5, kornia dice_loss 1.0, smp SoftCrossEntropyLoss 0.5, smp FocalLoss 1.0, smp LovaszLoss 1.0
# Why it matters here: Pseudo-labels ignore a part of every image, and the part changes from round to round: the step
#   size and the weight next to other losses then follow the share that is labelled.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 kornia==0.9.0
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check --no-deps segmentation-models-pytorch==0.6.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import importlib.util
import sys
import types

import torch
from kornia.losses import dice_loss, focal_loss
from torch.nn.functional import cross_entropy

# its losses alone: the package itself imports encoders, which need torchvision
package = types.ModuleType("segmentation_models_pytorch")
package.__path__ = list(importlib.util.find_spec("segmentation_models_pytorch").submodule_search_locations)
sys.modules["segmentation_models_pytorch"] = package
from segmentation_models_pytorch.losses import FocalLoss, LovaszLoss, SoftCrossEntropyLoss  # noqa: E402

torch.set_num_threads(1)
torch.manual_seed(0)
logits, labels = torch.randn(2, 5, 8, 8), torch.randint(0, 5, (2, 8, 8))
half = labels.clone()
half[:, :4] = 255
losses = {
    "torch cross_entropy": lambda x, y: cross_entropy(x, y, ignore_index=255),
    "torch with smoothing": lambda x, y: cross_entropy(x, y, ignore_index=255, label_smoothing=0.1),
    "kornia focal_loss": lambda x, y: focal_loss(x, y, 0.5, reduction="mean", ignore_index=255),
    "kornia dice_loss": lambda x, y: dice_loss(x, y, ignore_index=255),
    "smp SoftCrossEntropyLoss": SoftCrossEntropyLoss(smooth_factor=0.1, ignore_index=255),
    "smp FocalLoss": FocalLoss("multiclass", ignore_index=255),
    "smp LovaszLoss": LovaszLoss("multiclass", ignore_index=255),
}
ratios = {}
for name, loss in losses.items():
    ratios[name] = round((loss(logits, half) / loss(logits[:, :, 4:], labels[:, 4:])).item(), 4)
print("half ignored, over the loss of the other half alone:", ", ".join(f"{name} {x}" for name, x in ratios.items()))
low = {name for name, ratio in ratios.items() if ratio == 0.5}
assert all(ratio in (0.5, 1.0) for ratio in ratios.values())
assert low == {"kornia focal_loss", "smp SoftCrossEntropyLoss"}
EOF
