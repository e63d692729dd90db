#!/usr/bin/env bash
# Versions: monai==1.6.1, torch==2.13.0, numpy==2.4.6
# Behaviour: MaskedDiceLoss(to_onehot_y=True) multiplies the class ids by the mask before it makes them one-hot, so every
#   pixel out of the mask is a pixel of class 0 that the net misses. Its page says that only the masked region
#   contributes. With a one-hot target, or with ignore_index of DiceLoss, it is so.
# Seen:
#   right everywhere, half of the picture out of the mask: loss by class [0.7273, 0.0, 0.0, 0.0, 0.0]
#   one-hot target:       [0.0, 0.0, 0.0, 0.0, 0.0]
#   ignore_index instead: [0.0, 0.0, 0.0, 0.0, 0.0]
#   gradient at a pixel of class 0 in the mask: 3.6e-03 to_onehot_y, 7.8e-03 one-hot target
# Why it matters here: Class 0 is road. With void as the mask, the more void a picture has, the worse road's Dice and the
#   weaker its gradient, however good the prediction is.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  monai==1.6.1 torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from monai.losses import DiceLoss, MaskedDiceLoss

torch.set_num_threads(1)
K = 5
labels = torch.arange(64).view(1, 1, 8, 8) % K
one_hot = torch.nn.functional.one_hot(labels[:, 0], K).movedim(-1, 1).float()
mask = torch.ones(1, 1, 8, 8)
mask[:, :, :4] = 0
args = {"softmax": True, "reduction": "none"}


def by_class(loss):
    return [round(x, 4) for x in loss.flatten().tolist()]


sure = 40 * one_hot
ids = by_class(MaskedDiceLoss(to_onehot_y=True, **args)(sure, labels, mask))
flags = by_class(MaskedDiceLoss(**args)(sure, one_hot, mask))
ignored = by_class(DiceLoss(to_onehot_y=True, ignore_index=255, **args)(sure, torch.where(mask == 0, 255, labels)))
print("right everywhere, half of the picture out of the mask: loss by class", ids)
print("one-hot target:      ", flags)
print("ignore_index instead:", ignored)
gradients = []
for loss, target in ((MaskedDiceLoss(to_onehot_y=True, softmax=True), labels), (MaskedDiceLoss(softmax=True), one_hot)):
    logits = one_hot.clone().requires_grad_()
    loss(logits, target, mask).backward()
    gradients.append(logits.grad[0, 0, 4:][labels[0, 0, 4:] == 0].abs().mean().item())
print("gradient at a pixel of class 0 in the mask: {:.1e} to_onehot_y, {:.1e} one-hot target".format(*gradients))
assert gradients[0] < 0.8 * gradients[1]
assert flags == ignored == [0.0] * K
assert ids[1:] == [0.0] * 4 and ids[0] == 0.7273
EOF
