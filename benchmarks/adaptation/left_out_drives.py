"""CamVid evaluated on a drive that no stage saw: in turn one of its three drives is evaluated, and the other two are trained on.

CamVid's own validation frames are of one drive that more than half of its training frames come from, too.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.adaptation.day_to_dusk import copy
from spcl_fast.errors import DataError
from spcl_fast.runs import layout

DRIVES = ("0001TP", "0006R0", "0016E5")


def make_folds(camvid: Path, folder: Path) -> dict[Path, int]:
    """Copy files into folder/camvid_without_DRIVE of each drive, roots of the layout `folders`: the drive is the split val, the frames of
    the other two are train. -> images by root.
    """
    images = sorted(path for split in ("train", "val") for path in (camvid / "images" / split).glob("*"))
    by_drive = {drive: [path for path in images if path.name.startswith(drive)] for drive in DRIVES}
    if not all(by_drive.values()):
        absent = ", ".join(drive for drive, found in by_drive.items() if not found)
        raise DataError(f"{camvid}: no image below images/train or images/val is called after {absent}")
    roots = {}
    for left_out in DRIVES:
        root = folder / f"camvid_without_{left_out}"
        for drive, paths in by_drive.items():
            split = "val" if drive == left_out else "train"
            for path in paths:
                copy(path, root / "images" / split / path.name)
                label = camvid / "labels" / path.parent.name / f"{path.stem}.png"
                copy(label, root / "labels" / split / label.name)
        copy(camvid / layout.CLASSES, root / layout.CLASSES)
        roots[root] = len(images)
    return roots
