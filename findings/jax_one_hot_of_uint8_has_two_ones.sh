#!/usr/bin/env bash
# Versions: jax==0.10.2, jaxlib==0.10.2, numpy==2.4.6
# Behaviour: jax.nn.one_hot(labels, 300) of uint8 labels compares in uint8, so columns 256 to 299 repeat columns 0
#   to 43: the row of label 0 has two ones, and sums to 2. jnp.clip(labels, -1, 300) of uint8 makes every label 44.
#   With int32 labels both are right; nothing warns.
# Seen:
#   uint8: row sums [2.0, 2.0, 1.0, 1.0], ones of label 0 at [0, 256]
#   int32: row sums [1.0, 1.0, 1.0, 1.0], ones of label 0 at [0]
#   clip(labels, -1, 300): [44, 44, 44, 44] ; int32: [0, 43, 44, 255]
# Why it matters here: Label maps are uint8 from the file, and open-vocabulary or ADE-847 heads have more than 256
#   classes: a soft target that sums to 2 doubles the loss of the first 44 classes and pulls them to foreign ones.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore - <<'EOF'
import jax
import jax.numpy as jnp

labels = jnp.array([0, 43, 44, 255], jnp.uint8)
rows = {}
for dtype in (jnp.uint8, jnp.int32):
    one_hot = jax.nn.one_hot(labels.astype(dtype), 300)
    rows[dtype] = one_hot.sum(1).tolist()
    print(f"{jnp.dtype(dtype).name}: row sums {rows[dtype]}, ones of label 0 at {jnp.flatnonzero(one_hot[0]).tolist()}")
clipped = jnp.clip(labels, -1, 300).tolist()
print("clip(labels, -1, 300):", clipped, "; int32:", jnp.clip(labels.astype(jnp.int32), -1, 300).tolist())
assert rows[jnp.int32] == [1.0, 1.0, 1.0, 1.0]
assert rows[jnp.uint8] == [2.0, 2.0, 1.0, 1.0]
assert clipped == [44] * 4
EOF
