#!/usr/bin/env bash
# Versions: onnxruntime==1.32.0, onnx==1.23.2, numpy==2.4.6
# Behaviour: ONNX Runtime's Resize with mode='linear' of a uint8 or int32 tensor cuts the interpolated value to an
#   integer; torch's F.interpolate of uint8 rounds, and so does Pillow. A ramp is darker by half a step on average,
#   and int8 overflows are not saturated.
# Seen:
#   float32 [0.0, 0.357, 0.929, 2.0, 21.0, 165.0, 255.0]
#   uint8 [0, 0, 0, 2, 20, 164, 255]
#   int32 [0, 0, 0, 2, 20, 164, 255]
#   rounded [0, 0, 1, 2, 21, 165, 255]
#   mean of a resized noise row: -0.503 grey levels
# Why it matters here: A net exported with its resize inside sees other images than in training: a bias of half a
#   grey level on every interpolated pixel, always downwards.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

def resize(x, width):
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    rule = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    node = helper.make_node("Resize", ["x", "", "", "s"], ["y"], **rule)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", kind, [1, 1, 1, width])],
        [helper.make_tensor("s", TensorProto.INT64, [4], [1, 1, 1, width])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0].ravel()

row = np.array([[[[0, 1, 3, 255]]]])
exact = resize(row.astype(np.float32), 7)
print("float32", [round(v, 3) for v in exact.tolist()])
for dtype in (np.uint8, np.int32):
    got = resize(row.astype(dtype), 7)
    print(dtype.__name__, got.tolist())
    assert got.tolist() == [0, 0, 0, 2, 20, 164, 255], got
rounded = np.floor(exact + 0.5).astype(int).tolist()
print("rounded", rounded)
assert rounded == [0, 0, 1, 2, 21, 165, 255]
rng = np.random.default_rng(0)
noise = rng.integers(0, 256, (1, 1, 1, 4096)).astype(np.uint8)
bias = resize(noise, 6001).astype(float).mean() - resize(noise.astype(np.float32), 6001).mean()
print(f"mean of a resized noise row: {bias:+.3f} grey levels")
assert -0.55 < bias < -0.4
EOF
