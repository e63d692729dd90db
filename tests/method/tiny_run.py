"""A run of every stage in seconds: generated scenes of 48x32, two iterations a stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from spcl_fast import catalog
from spcl_fast.config import Config
from spcl_fast.config.load import load_config
from spcl_fast.data import build_dataset

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
# what a run without more settings can do
STAGES = tuple(row.name for row in catalog.STAGES if not row.needs)
TRAINED = tuple(row.name for row in catalog.trained() if row.name in STAGES)


def tiny_config(tmp_path, name="run", preset="demo", sets=(), **changes) -> Config:
    short = {"iterations": "2", "batch_size": "2"}
    iterations = {f"{row.section}.{key}": value for row in catalog.trained() for key, value in short.items()}
    given = {**TINY, **iterations, "runs_dir": str(tmp_path), "name": name, **changes}
    return load_config(preset, (), sets, list(given.items()))


def save_scenes(root: Path, kind: str, splits: Sequence[str] = ("train", "val"), count: int = 4) -> Path:
    """`count` generated scenes of each split as a data set in folders, with labels and classes.json."""
    for split in splits:
        scenes = build_dataset(kind, "", split)
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        for i in range(count):
            scenes.image(i).save(root / "images" / split / f"{i}.png")
            Image.fromarray(scenes.label(i)).save(root / "labels" / split / f"{i}.png")
    palette = [list(colour) for colour in scenes.classes.palette]
    (root / "classes.json").write_text(json.dumps({"names": scenes.classes.names, "palette": palette}))
    return root
