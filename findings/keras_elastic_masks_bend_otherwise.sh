#!/usr/bin/env bash
# Versions: keras==3.15.1 on jax==0.10.2, numpy==2.4.6 (the same on torch==2.13.0)
# Behaviour: RandomElasticTransform hands its generator of random numbers to the images and then to the segmentation
#   masks, and each draws a field of its own: the labels are bent in another way than the picture.
# Seen:
#   columns moved by up to 8 pixels, picture and labels by up to 12 apart; the same in 10% of the pixels
#   RandomShear: 0 apart
# Why it matters here: Thin classes lie next to their labels in every image that is bent, and nothing fails.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  keras==3.15.1 numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2
cd "$work"
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore - <<'EOF'
import keras
import numpy as np

columns = np.tile(np.arange(96, dtype=np.float32)[None, None, :, None], (2, 64, 1, 1))
args = {"interpolation": "nearest", "data_format": "channels_last", "seed": 2}


def bent(layer):
    out = layer({"images": columns.repeat(3, -1), "segmentation_masks": columns}, training=True)
    image, mask = (keras.ops.convert_to_numpy(out[name])[..., 0] for name in ("images", "segmentation_masks"))
    inner = np.s_[:, 8:-8, 16:-16]  # without what the border fills in
    return np.abs(image - columns[..., 0])[inner].max(), np.abs(image - mask)[inner]


elastic = keras.layers.RandomElasticTransform(factor=(1.0, 1.0), scale=(1.0, 1.0), value_range=(0, 255), **args)
moved, apart = bent(elastic)
print(
    f"columns moved by up to {moved:.0f} pixels, picture and labels by up to {apart.max():.0f} apart;",
    f"the same in {(apart == 0).mean():.0%} of the pixels",
)
_, sheared = bent(keras.layers.RandomShear(x_factor=(0.1, 0.1), **args))
print(f"RandomShear: {sheared.max():.0f} apart")
assert sheared.max() == 0
assert apart.max() > 5 and (apart == 0).mean() < 0.3
EOF
