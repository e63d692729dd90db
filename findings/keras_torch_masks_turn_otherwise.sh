#!/usr/bin/env bash
# Versions: keras==3.15.1 with torch==2.13.0, numpy==2.4.6, jax==0.10.2
# Behaviour: On the torch backend affine_transform writes into the matrix that it is given. RandomRotation computes one
#   matrix and uses it for the images, then for the segmentation masks: the masks are turned by another one, about
#   another point. On the JAX backend the two agree.
# Seen:
#   torch: a quarter turn of a square at (8, 8) of 32 pixels: image (20.5, 10.5), mask nowhere
#   matrix after a call [0.0, -1.0, 0.0, 1.0, 0.0, 8.0] before [0.0, -1.0, 8.0, 1.0, 0.0, 0.0]
#   jax: a quarter turn of a square at (8, 8) of 32 pixels: image (20.5, 10.5), mask (20.5, 10.5)
# Why it matters here: The labels of every turned image are wrong, and the picture that one looks at is right. Training
#   runs and gives a bad net.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  keras==3.15.1 torch==2.13.0 numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2
cd "$work"
cat > one.py <<'EOF'
import os

import keras
import numpy as np

square = np.zeros((1, 32, 32, 3), np.float32)
square[0, 8:14, 8:14] = 1
turn = keras.layers.RandomRotation((0.25, 0.25), interpolation="nearest", fill_mode="constant", data_format="channels_last")
turned = turn({"images": square, "segmentation_masks": square[..., :1]}, training=True)


def centre(name):
    found = np.argwhere(keras.ops.convert_to_numpy(turned[name])[0, ..., 0] > 0)
    return tuple(found.mean(0).round(1).tolist()) if len(found) else "nowhere"


image, mask = centre("images"), centre("segmentation_masks")
backend = os.environ["KERAS_BACKEND"]
print(f"{backend}: a quarter turn of a square at (8, 8) of 32 pixels: image {image}, mask {mask}")
if backend == "torch":
    matrix = keras.ops.convert_to_tensor([[0.0, -1, 8, 1, 0, 0, 0, 0]])
    before = matrix[0, :6].tolist()
    keras.ops.image.affine_transform(keras.ops.convert_to_tensor(square), matrix, data_format="channels_last")
    print("matrix after a call", matrix[0, :6].tolist(), "before", before)
    assert matrix[0, :6].tolist() != before and image != mask
else:
    assert image == mask
EOF
for backend in torch jax; do KERAS_BACKEND=$backend JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore one.py; done
