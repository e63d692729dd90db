#!/usr/bin/env bash
# Versions: torch==2.14.1, numpy==2.4.6
# Behaviour: torch.profiler has no event of a torch.library.custom_op that takes tensors alone when it is called by
#   its Python name; the same op called through torch.ops is there, and so is an op with a number among its
#   arguments, called either way. torch 2.13.0 has all four events.
# Seen:
#   by its name: finding::scaled_by
#   through torch.ops: finding::doubled finding::scaled_by
# Why it matters here: A custom op is missing from a profile, its time is given to whatever called it, and nothing
#   says so. (Its arguments go to the Python kernel directly since 2.14; the C++ dispatcher, where profilers
#   listen, is skipped.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  torch==2.14.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import torch


@torch.library.custom_op("finding::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("finding::scaled_by", mutates_args=())
def scaled_by(x: torch.Tensor, by: float) -> torch.Tensor:
    return x * by


def profiled(*calls) -> set[str]:
    with torch.profiler.profile() as profile:
        for call in calls:
            call()
    return {event.key for event in profile.key_averages() if event.key.startswith("finding::")}


x, ops = torch.ones(3), torch.ops.finding
by_name = profiled(lambda: doubled(x), lambda: scaled_by(x, 2.0))
through_ops = profiled(lambda: ops.doubled(x), lambda: ops.scaled_by(x, 2.0))
print("by its name:", *sorted(by_name))
print("through torch.ops:", *sorted(through_ops))
assert by_name == {"finding::scaled_by"}
assert through_ops == {"finding::doubled", "finding::scaled_by"}
EOF
