"""CamVid by day -> CamVid at dusk, a labelled real pair to tune on. Its sequence 0001TP was filmed at dusk, all others by day.

Source: the day frames of the training split; its validation split (all by day) validates. Target: the dusk frames in the order they were
filmed, the first two thirds to train, the last quarter to evaluate; what is between is left out, as neighbours are nearly the same picture.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from spcl_fast.errors import DataError

DUSK = "0001TP"


def make_pair(camvid: Path, folder: Path) -> dict[Path, int]:
    """Copy files into folder/camvid_day and folder/camvid_dusk, each a root of the layout `folders`. -> images by root."""
    train, val = (sorted(path for path in (camvid / "images" / split).glob("*")) for split in ("train", "val"))
    dusk = [path for path in train if path.name.startswith(DUSK)]
    day = [path for path in train if not path.name.startswith(DUSK)]
    if not dusk or not day or not val:
        raise DataError(
            f"{camvid}: found {len(day)} day and {len(dusk)} dusk ({DUSK}*) training images, {len(val)} of val; expected some of each"
        )
    n = len(dusk)
    splits = {
        folder / "camvid_day": {"train": day, "val": val},
        folder / "camvid_dusk": {"train": dusk[: n * 2 // 3], "val": dusk[n - n // 4 :]},
    }
    for root, images in splits.items():
        for split, paths in images.items():
            for path in paths:
                copy(path, root / "images" / split / path.name)
                label = camvid / "labels" / path.parent.name / f"{path.stem}.png"
                copy(label, root / "labels" / split / label.name)
        copy(camvid / "classes.json", root / "classes.json")
    return {root: sum(map(len, images.values())) for root, images in splits.items()}


def copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)
