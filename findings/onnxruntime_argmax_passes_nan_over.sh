#!/usr/bin/env bash
# Versions: onnxruntime==1.32.0, onnx==1.23.2, torch==2.13.0, numpy==2.4.6
# Behaviour: In torch (and numpy) NaN is the largest number, and argmax finds it. ArgMax on the CPU provider of ONNX
#   Runtime passes a NaN over unless it comes first, and then takes it whatever follows. TopK finds it, as torch does.
# Seen:
#   logits [1, nan, 3]: torch.argmax 1, ArgMax 2, TopK 1
#   logits [nan, 1, 3]: torch.argmax 0, ArgMax 0, TopK 0
#   logits [3, 1, nan]: torch.argmax 2, ArgMax 0, TopK 2
# Why it matters here: An exported net that gives labels ends with an ArgMax. Where a class's logit has overflowed, the
#   pixel gets another class, and the labels look sound.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  onnxruntime==1.32.0 onnx==1.23.2 torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import math

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

onnxruntime.set_default_logger_severity(3)


def run(op, x, outputs=(TensorProto.FLOAT,), more=(), **attributes):
    names = [f"i{k}" for k in range(len(more))]
    results = [f"y{k}" for k in range(len(outputs))]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *names], results, **attributes)],
        "one_op",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(results, outputs)],
        [numpy_helper.from_array(value, name) for value, name in zip(more, names)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


found = {}
for logits in ([1, math.nan, 3], [math.nan, 1, 3], [3, 1, math.nan]):
    x = np.array([logits], np.float32)
    theirs = torch.from_numpy(x).argmax(1).item()
    first = run("ArgMax", x, (TensorProto.INT64,), axis=1)[0].item()
    top = run("TopK", x, (TensorProto.FLOAT, TensorProto.INT64), (np.array([1]),))[1].item()
    print(f"logits {logits}: torch.argmax {theirs}, ArgMax {first}, TopK {top}")
    found[str(logits)] = theirs, first, top
assert list(found.values()) == [(1, 2, 1), (0, 0, 0), (2, 0, 2)]
EOF
