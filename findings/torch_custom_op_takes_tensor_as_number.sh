#!/usr/bin/env bash
# Versions: torch==2.13.0, numpy==2.4.6
# Behaviour: A torch.library.custom_op argument declared `float` accepts a tensor of one element, even an
#   nn.Parameter: its value is read and the graph to it is cut, without an error or a warning. Declared `int`, it
#   takes tensor(2.7) as 2, while the Python number 2.7 is refused.
# Seen:
#   scaled(1, Parameter([0.5])) = [2.0, 2.0, 2.0] x.grad [2.0, 2.0, 2.0] temperature.grad None
#   repeat(1, tensor(2.7)) = [2.0, 2.0]
#   repeat(1, 2.7): finding::repeat() Expected a value of type 'int' for argument 'times' but instead found type
#     'float'.
# Why it matters here: A learnable temperature (CLIP's logit_scale) handed to a custom loss never learns: its .grad
#   stays None and the loss is right. The read is a host sync on a GPU as well.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch

@torch.library.custom_op("finding::scaled", mutates_args=())
def scaled(x: torch.Tensor, temperature: float) -> torch.Tensor:
    return x / temperature

scaled.register_autograd(
    lambda ctx, g: (g / ctx.temperature, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "temperature", inputs[1]),
)

@torch.library.custom_op("finding::repeat", mutates_args=())
def repeat(x: torch.Tensor, times: int) -> torch.Tensor:
    return x * times

x = torch.ones(3, requires_grad=True)
temperature = torch.nn.Parameter(torch.tensor([0.5]))
out = scaled(x, temperature)
out.sum().backward()
print("scaled(1, Parameter([0.5])) =", out.tolist(), "x.grad", x.grad.tolist(), "temperature.grad", temperature.grad)
assert out.tolist() == [2.0] * 3 and temperature.grad is None and x.grad.tolist() == [2.0] * 3
cut = repeat(torch.ones(2), torch.tensor(2.7))
print("repeat(1, tensor(2.7)) =", cut.tolist())
assert cut.tolist() == [2.0, 2.0]
try:
    repeat(torch.ones(2), 2.7)
    raise SystemExit("2.7 was taken as an int")
except RuntimeError as error:
    print("repeat(1, 2.7):", str(error).splitlines()[0])
EOF
