"""Which checkpoint a stage goes on from, and what it must have in common with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..config import LoopConfig
from ..errors import CheckpointError
from ..runs.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from ..runs.identity import flat_settings, settings_difference


def identity_of(stage: str, identity: Any, iterations: int, seed: int, settings: LoopConfig) -> dict[str, Any]:
    """`identity` and whatever of the loop decides the bits of a stage's result, flat."""
    own = {
        "iterations": iterations,
        "seed": seed,
        "precision": settings.precision,
        "channels_last": settings.channels_last,
    }
    # these change the order of additions; at their defaults they are left out, so that runs of before they existed go on
    default = LoopConfig()
    own |= {
        name: value
        for name in ("accumulate", "absorb_gradients")
        if (value := getattr(settings, name)) != getattr(default, name)
    }
    return {**flat_settings(identity or {}), "stage": stage, **own}


def checkpoint_to_resume(
    store: CheckpointStore, resume: str, stage: str, identity: Mapping[str, Any]
) -> Checkpoint | None:
    """The checkpoint to go on from, as `LoopConfig.resume` says; None: from the start.

    Raises CheckpointError where there is one and must not be, or where it has another identity.
    """
    if resume == "never":
        if store.paths():
            raise CheckpointError(
                f"{store.folder} holds checkpoints and loop.resume is 'never'. Use 'auto', or another run name."
            )
        return None
    checkpoint = store.latest()
    if checkpoint is None and resume != "auto":
        given = read_checkpoint(Path(resume))
        # one path for a run of many stages: it is for the stage that it names
        checkpoint = given if given.meta.get("stage") == stage else None
    if checkpoint is not None:
        _check_identity(checkpoint, identity, store.folder.parent)
    return checkpoint


def _check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any], stage_folder: Path) -> None:
    stored = checkpoint.meta.get("settings")
    if not isinstance(stored, dict):
        raise CheckpointError(f"{checkpoint.path} was not written by a training loop: it holds no settings.")
    difference = settings_difference(stored, identity)
    if difference:
        raise CheckpointError(
            f"{checkpoint.path} belongs to other settings ({difference}). "
            f"Set them back to go on, give this run another name, or remove {stage_folder}."
        )


def load_modules(checkpoint: Checkpoint | None, modules: Mapping[str, nn.Module], wanted: str) -> None:
    """Load the named modules from a checkpoint of the earlier stage `wanted`. Raises CheckpointError if there is none or it misfits."""
    if checkpoint is None:
        raise CheckpointError(f"No checkpoint of {wanted} in this run: do that stage first.")
    for name, module in modules.items():
        try:
            module.load_state_dict(checkpoint.group(name))
        except RuntimeError as error:
            odd = " ".join(str(error).splitlines()[1:2]).strip() or str(error)
            raise CheckpointError(
                f"{checkpoint.path / (name + '.safetensors')} does not fit {type(module).__name__}: {odd} Was it trained for other classes "
                "or with other settings of the model?"
            ) from error
