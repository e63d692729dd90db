"""How wrong the CUDA kernels of prototype_contrastive_loss are where float32 cannot hold a logsumexp."""

from __future__ import annotations

import oracle
import torch
from on_backends import run

import spcl_fast as sf


def error_at_large_logits() -> float:
    """Of the prototypes' gradient, relative; the logits are 65536 + k exactly, and float32 cannot hold their logsumexp."""
    k = torch.arange(5)
    given = {
        "features": torch.full((1, 1, 1, 5), 65536.0),
        "labels": k.view(1, 1, 5),
        "prototypes": (1 + k / 65536)[:, None],
    }
    given |= {"temperature": 1.0, "normalize": False, "reduction": "sum", "bias": torch.zeros(5)}
    got = run(sf.prototype_contrastive_loss, given, ("features", "prototypes"), "cuda")[2].double()
    truth = run(oracle.contrast, given, ("features", "prototypes"), leaf_dtype=torch.float64)[2]
    return ((got - truth).abs().max() / truth.abs().max()).item()
