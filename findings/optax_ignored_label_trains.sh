#!/usr/bin/env bash
# Versions: optax==0.2.8, jax==0.10.2, jaxlib==0.10.2, numpy==2.4.6
# Behaviour: optax.softmax_cross_entropy_with_integer_labels of label 255 (19 classes) gives a loss of NaN and a
#   finite gradient: the softmax itself, which pushes every class of that pixel down. Label -1 gives loss and
#   gradient of the last class.
# Seen:
#   label  18: loss 2.5913, gradient finite True, sum 0.0000, largest 0.9251
#   label  -1: loss 2.5913, gradient finite True, sum 0.0000, largest 0.9251
#   label 255: loss nan, gradient finite True, sum 1.0000, largest 0.1829
# Why it matters here: The label conventions 255 and -1 of segmentation meet a library without ignore_index: a guard
#   that looks for NaN gradients sees none, so ignored pixels train the net, or train the last class.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore - <<'EOF'
import jax
import jax.numpy as jnp
import numpy as np
import optax

logits = jnp.asarray(np.random.default_rng(0).normal(size=19), jnp.float32)
loss = lambda z, label: optax.softmax_cross_entropy_with_integer_labels(z, jnp.asarray(label))
found = {}
for label in (18, -1, 255):
    value, gradient = jax.value_and_grad(loss)(logits, label)
    found[label] = float(value), np.asarray(gradient)
    print(f"label {label:3}: loss {float(value):.4f}, gradient finite {bool(jnp.isfinite(gradient).all())}, "
          f"sum {float(gradient.sum()):.4f}, largest {float(jnp.abs(gradient).max()):.4f}")
assert np.isnan(found[255][0]) and np.allclose(found[255][1], jax.nn.softmax(logits), atol=1e-6)
assert found[-1][0] == found[18][0] and np.array_equal(found[-1][1], found[18][1])
EOF
