#!/usr/bin/env bash
# Versions: keras==3.15.1 on jax==0.10.2, numpy==2.4.6 (the same on torch==2.13.0)
# Behaviour: MixUp mixes a batch of segmentation masks with single values: it takes elements of the flattened batch
#   where it means masks, so the B first pixels of the first mask are blended into all, and [B, H, W, 1] comes back as
#   [B, H, W, B]. AugMix blends class ids, too: a pixel that is 7 in one chain and 18 in another gets a number between.
# Seen:
#   MixUp: masks (2, 4, 4, 1) of 7 and 18 become (2, 4, 4, 2); pixel [2, 2] is [1.05, 2.04] and [16.45, 16.54]
#   AugMix: masks of 7 and 18 become 7.0 7.15 7.49 7.83 8.14 ... (other numbers in every run)
# Why it matters here: Both layers take segmentation masks without an error. Ids between two classes are other
#   classes after a cast to integers: 7 and 18 make 10, sky.
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

masks = np.zeros((2, 4, 4, 1), np.float32)
masks[0], masks[1] = 7, 18
masks[0, 0, :2, 0] = 1, 2
data = {"images": np.zeros((2, 4, 4, 3), np.float32), "labels": np.eye(2, dtype=np.float32), "segmentation_masks": masks}
mixed = keras.ops.convert_to_numpy(keras.layers.MixUp(alpha=0.2, seed=1)(data, training=True)["segmentation_masks"])
pixels = [[round(float(x), 2) for x in mixed[k, 2, 2]] for k in (0, 1)]
print("MixUp: masks", masks.shape, "of 7 and 18 become", f"{mixed.shape};", f"pixel [2, 2] is {pixels[0]} and {pixels[1]}")
assert mixed.shape == (2, 4, 4, 2)
columns = np.tile(np.arange(96)[None, None, :, None], (2, 64, 1, 1))
halves = np.where(columns > 40, 7, 18).astype(np.float32)
found = set()
for seed in range(4):
    layer = keras.layers.AugMix(seed=seed, data_format="channels_last")
    out = layer({"images": columns.repeat(3, -1).astype(np.float32), "segmentation_masks": halves}, training=True)
    found |= {round(x, 2) for x in np.unique(keras.ops.convert_to_numpy(out["segmentation_masks"])).tolist()}
print("AugMix: masks of 7 and 18 become", *sorted(found)[:5], "...")
assert any(7.5 < value < 17.5 for value in found)
EOF
