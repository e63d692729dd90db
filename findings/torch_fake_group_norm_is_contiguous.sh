#!/usr/bin/env bash
# Versions: torch==2.14.1, numpy==2.4.6
# Behaviour: Under FakeTensorMode GroupNorm of a channels_last tensor comes out contiguous, while the real one on the CPU keeps
#   channels_last. With torch 2.13.0 the fake one keeps it, too (a meta tensor does not in either).
# Seen:
#   real (96, 1, 32, 8)
#   fake (96, 12, 4, 1)
#   meta (96, 12, 4, 1)
# Why it matters here: `spcl-fast plan` runs a step on fake tensors. Convolutions behind such a norm were counted as if they copied their
#   input into another layout: 8 % more than the real step of the tiny net takes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  torch==2.14.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.functional import group_norm


def image():
    return torch.empty(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)


real = group_norm(image(), 2).stride()
with FakeTensorMode():
    fake = group_norm(image(), 2).stride()
meta = group_norm(image().to("meta"), 2).stride()
print("real", real)
print("fake", fake)
print("meta", meta)
assert real == (96, 1, 32, 8)
assert fake == (96, 12, 4, 1)
EOF
