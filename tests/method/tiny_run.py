"""A run of every stage in seconds: generated scenes of 48x32, two iterations a stage."""

from __future__ import annotations

from spcl_fast import catalog
from spcl_fast.config import Config
from spcl_fast.config.load import load_config

TINY = {
    "source.size": "[48, 32]",
    "source.eval_size": "[48, 32]",
    "source.train_images": "6",
    "target.size": "[48, 32]",
    "target.eval_size": "[48, 32]",
    "target.train_images": "6",
    "evaluate.images": "4",
    "evaluate.overlays": "2",
    "loop.workers": "0",
    "loop.log_every": "1",
}
TRAINED = catalog.names(catalog.trained())
STAGES = catalog.names(catalog.STAGES)


def tiny_config(tmp_path, name="run", preset="demo", sets=(), **changes) -> Config:
    iterations = {f"{stage}.iterations": "2" for stage in TRAINED} | {f"{stage}.batch_size": "2" for stage in TRAINED}
    given = {**TINY, **iterations, "runs_dir": str(tmp_path), "name": name, **changes}
    return load_config(preset, (), sets, list(given.items()))
