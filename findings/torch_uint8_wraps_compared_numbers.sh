#!/usr/bin/env bash
# Versions: torch==2.13.0, numpy==2.4.6
# Behaviour: torch wraps a Python number to the tensor's integer dtype before it compares: of uint8 labels, labels
#   == 300 is True at 44, labels < 256 is False everywhere, labels >= -1 is True at 255 alone, and
#   labels.clamp(min=-1) makes every pixel 255. torch.isin(labels, 300) finds 44, torch.isin(labels, tensor([300]))
#   does not. numpy compares the numbers themselves.
# Seen:
#   labels [0, 44, 156, 255]
#   == 300  torch [False, True, False, False] numpy [False, False, False, False]
#   == -100 torch [False, False, True, False] numpy [False, False, False, False]
#   == -1   torch [False, False, False, True] numpy [False, False, False, False]
#   < 256   torch [False, False, False, False] numpy [True, True, True, True]
#   >= -1   torch [False, False, False, True] numpy [True, True, True, True]
#   clamp(min=-1) [255, 255, 255, 255] ; numpy.clip [0, 44, 156, 255]
#   isin(labels, 300) [False, True, False, False] ; isin(labels, tensor([300])) [False, False, False, False]
#   clamp(max=300): eager: value cannot be converted to type uint8_t without overflow ; compiled: [0, 44, 44, 44]
# Why it matters here: The usual check (labels >= 0) & (labels < num_classes) of uint8 labels refuses every pixel at
#   K = 256, and labels == ignore_index with -1 or -100 ignores class 255 or 156. clamp(max=300) raises eagerly and
#   wraps under torch.compile.
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
labels = torch.tensor([0, 44, 156, 255], dtype=torch.uint8)
checks = {
    "== 300": lambda x: x == 300,
    "== -100": lambda x: x == -100,
    "== -1": lambda x: x == -1,
    "< 256": lambda x: x < 256,
    ">= -1": lambda x: x >= -1,
}
seen = {}
print("labels", labels.tolist())
for name, check in checks.items():
    seen[name] = check(labels).tolist()
    print(f"{name:7} torch {seen[name]} numpy {check(labels.numpy()).tolist()}")
    assert seen[name] != check(labels.numpy()).tolist()
assert seen["== 300"] == [False, True, False, False] and seen["== -100"] == [False, False, True, False]
assert not any(seen["< 256"]) and seen[">= -1"] == seen["== -1"] == [False, False, False, True]
low = labels.clamp(min=-1).tolist()
print("clamp(min=-1)", low, "; numpy.clip", np.clip(labels.numpy(), -1, None).tolist())
assert low == [255] * 4
number, tensor = torch.isin(labels, 300).tolist(), torch.isin(labels, torch.tensor([300])).tolist()
print("isin(labels, 300)", number, "; isin(labels, tensor([300]))", tensor)
assert number == seen["== 300"] and not any(tensor)
limit = lambda x: x.clamp(max=300)
try:
    limit(labels)
    raise SystemExit("eager clamp(max=300) did not raise")
except RuntimeError as error:
    print("clamp(max=300): eager:", str(error), "; compiled:", torch.compile(limit)(labels).tolist())
assert torch.compile(limit)(labels).tolist() == [0, 44, 44, 44]
EOF
