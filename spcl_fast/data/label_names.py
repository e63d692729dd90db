"""Which label file belongs to an image, and what to say where there is none."""

from __future__ import annotations

import difflib
import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePath


@dataclass(frozen=True)
class LabelBelow:
    """The label file of a name: folder/<name><ending>, where `renamed` may know the name by another.

    Where that is missing, a file of the same name whose ending has other capitals, or whose letters are written with other Unicode.
    """

    folder: Path
    ending: str = ".png"
    renamed: dict[str, str] = field(default_factory=dict)
    _listed: dict[Path, dict[str, str]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, name: str) -> Path:
        expected = self.folder / (self.renamed.get(name, name) + self.ending)
        if expected.is_file():
            return expected
        if expected.parent not in self._listed:
            self._listed[expected.parent] = {
                same_name(file): file for file in sorted(_files(expected.parent), reverse=True)
            }
        return expected.with_name(self._listed[expected.parent].get(same_name(expected.name), expected.name))


def same_name(file: str) -> str:
    """Equal for file names that people take for one: "ä.PNG" however its letters are composed is "ä.png"."""
    path = PurePath(unicodedata.normalize("NFC", file))
    return path.stem + path.suffix.lower()


def missing_label(image: Path, expected: Path) -> str:
    """Says that an image has no label, and which file may be meant."""
    text = f"image {image} has no label: expected {expected}."
    if not expected.parent.is_dir():
        text += f" The folder {expected.parent} does not exist{folders_there(expected.parent)}."
    others = {PurePath(file).stem.casefold() for file in _files(image.parent)} - {image.stem.casefold()}
    for folder in dict.fromkeys((expected.parent, image.parent)):
        files = [file for file in _files(folder) if folder / file != image]
        if folder != image.parent:  # what is called after another image is that one's label
            files = [file for file in files if PurePath(file).stem.casefold() not in others]
        near = _nearest(image.stem, files)
        if near is None:
            continue
        ending = near.removeprefix(image.stem)
        way = "Rename it"
        if PurePath(near).suffix.lower() in (".jpg", ".jpeg"):
            way = "A label is never a JPEG: export it as PNG"
        elif PurePath(near).suffix.lower() != ".png" and folder == expected.parent:
            way = "Labels are read from PNG files alone: save it as one, with the ending .png"
        elif ending != near and not ending[:1].isalnum() and folder == expected.parent:
            way = f"If labels are named so, pass --source.label_ending {ending} (or --target.label_ending)"
        elif folder == image.parent:
            way = f"Labels lie in a folder of their own: move it to {expected}"
        return f"{text} The nearest name is {folder / near}. {way}."
    return text


def folders_there(missing: Path) -> str:
    """ ", where there are images, masks" of the nearest folder above a missing one; empty where that has none."""
    above = next((folder for folder in missing.parents if folder.is_dir()), None)
    if above is None:
        return ""
    there = sorted(path.name for path in above.iterdir() if path.is_dir() and not path.name.startswith("."))
    return f"; in {above} there are {', '.join(there[:6])}" if there else ""


def _nearest(stem: str, files: list[str]) -> str | None:
    longer = sorted((file for file in files if file.startswith(stem)), key=lambda file: (len(file), file))
    # a name with a number more is another image's: f1 is not the label of f10
    longer = [file for file in longer if not file[len(stem) :][:1].isalnum()]
    longer += sorted((file for file in files if PurePath(file).stem.endswith(stem)), key=lambda file: (len(file), file))
    by_stem = {PurePath(file).stem.casefold(): file for file in files[:10_000]}
    close = difflib.get_close_matches(stem.casefold(), by_stem, n=1, cutoff=0.75)
    return next(iter(longer), None) or next((by_stem[one] for one in close), None)


def _files(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return []
