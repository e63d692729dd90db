"""Labels drawn in colours: the ids of a palette that is known, exact matches only; nothing is guessed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import DataError
from .classes import IGNORE

Colour = tuple[int, int, int]
_SHOWN = 3  # colours that an error spells out


@dataclass(frozen=True)
class LabelColours:
    """The id of each colour that a label may hold. `names_indices`: the ids are those of palette PNGs, too."""

    pairs: tuple[tuple[Colour, int], ...]
    names_indices: bool = False

    @property
    def ids(self) -> dict[Colour, int]:
        return dict(self.pairs)

    def of(self, pixels: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 [H, W, 3] -> ids uint16 [H, W] and, bool [H, W], where the colour is one of the palette."""
        colours = sorted(self.ids)
        if len(colours) < len(self.pairs):
            twice = next(colour for colour in colours if [one for one, _ in self.pairs].count(colour) > 1)
            both = " and ".join(str(k) for colour, k in self.pairs if colour == twice)
            raise DataError(
                f"{where} is in colours, and {twice} is the colour of both {both} in classes.json. Give every class a colour of its own."
            )
        codes = _codes(np.array(colours, np.uint8))
        found = _codes(pixels)
        place = np.searchsorted(codes, found).clip(max=len(codes) - 1)
        return np.array([self.ids[colour] for colour in colours], np.uint16)[place], codes[place] == found

    def check_indices(self, image: Image.Image, where: str) -> None:
        """Raises DataError where a palette PNG's own colours all mean classes, but other ones than its indices."""
        if not self.names_indices or len(self.ids) < len(self.pairs):
            return
        flat = image.getpalette("RGB") or []
        used = np.flatnonzero(
            np.bincount(np.asarray(image).ravel(), minlength=256)[:IGNORE]
        ).tolist()  # void has any colour
        shown = {k: (flat[3 * k], flat[3 * k + 1], flat[3 * k + 2]) for k in used if 3 * k + 2 < len(flat)}
        if len(shown) < len(used) or not all(colour in self.ids for colour in shown.values()):
            return
        wrong = next((k for k, colour in shown.items() if self.ids[colour] != k), None)
        if wrong is not None:
            raise DataError(
                f"{where} contradicts classes.json: its palette shows index {wrong} as {_text(shown[wrong])}, which is the colour of "
                f"class {self.ids[shown[wrong]]}. Save the labels as grey PNGs of class ids, or correct the palette in classes.json "
                "(without one the indices are taken)."
            )


def check_grey_palette(image: Image.Image, colours: LabelColours | None, where: str) -> None:
    """Raises DataError where a palette PNG's own colours are greys that look like the ids: an optimiser turns a grey PNG of five ids into
    indices 0 to 4 of a palette with the five greys, each once. Black to white in even steps and what classes.json names are indices."""
    flat = image.getpalette("RGB") or []
    table = np.array(flat[: len(flat) // 3 * 3], np.int64).reshape(-1, 3)
    count, grey = len(table), table[:, 0] if len(table) else table.ravel()
    used = np.flatnonzero(np.bincount(np.asarray(image).ravel(), minlength=256)[:count])
    if not 0 < count < 256 or (table != grey[:, None]).any() or (grey[used] == used).all() or len(set(grey)) < count:
        return
    ramp = np.linspace(0, 255, count)
    if min(np.abs(grey - ramp).max(), np.abs(grey[::-1] - ramp).max()) <= 1:
        return
    if colours is not None and all(
        colours.ids.get((int(r), int(g), int(b))) == k for k, (r, g, b) in zip(used, table[used], strict=True)
    ):
        return
    wrong = next(k for k in used if grey[k] != k)
    raise DataError(
        f"{where} has a palette of {count} greys, and index {wrong} is shown as grey {grey[wrong]}: a PNG optimiser makes such a file "
        "from a grey one, and the ids are then in the greys, not in the indices. Take the labels from before they were optimised, or "
        "convert them to mode L; if the indices are the ids, save them as grey PNGs of class ids."
    )


def ids_of_colours(pixels: np.ndarray, colours: LabelColours | None, where: str) -> np.ndarray:
    """RGB or RGBA pixels uint8 [H, W, 3 or 4] of a label -> ids [H, W].

    By `colours` where they name every pixel's; the ids themselves where the three channels are equal. Raises DataError for all else.
    """
    if pixels.shape[2] == 4:
        if (pixels[..., 3] != 255).any():
            raise DataError(
                f"{where} is partly transparent; expected one class id per pixel: save it as a grey PNG of class ids."
            )
        pixels = pixels[..., :3]
    equal = bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())
    if colours is not None:
        ids, known = colours.of(pixels, where)
        if known.all():
            grey = pixels[..., 0]
            if equal and ((ids != grey) & np.isin(grey, list(colours.ids.values())) & (grey != 255)).any():
                raise DataError(
                    f"{where} has three equal channels and can be read both as ids and as colours of the palette, with another result. "
                    "Save the labels as grey PNGs of class ids."
                )
            return ids
        if not equal:
            raise DataError(f"{where} has colours that the palette lacks: {_listed(pixels[~known])}. {_REMEDY}")
    if equal:
        return np.ascontiguousarray(pixels[..., 0])
    raise DataError(
        f"{where} has mode RGB and different channels; expected one class id per pixel (a grey or palette PNG). It looks like a coloured "
        'rendering of a label: give the folder with class ids, or a "palette" in classes.json with the exact colour of every class.'
    )


_REMEDY = (
    'Only exact matches are read: add the colour to "palette" in classes.json, or to its list "void" if it means no class. '
    "Colours between two classes' come from resizing or JPEG: export the labels again."
)


def _codes(pixels: np.ndarray) -> np.ndarray:
    wide = pixels.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _listed(pixels: np.ndarray) -> str:
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:_SHOWN]
    more = f" and {len(found) - len(most)} more" if len(found) > len(most) else ""
    return ", ".join(f"{_text(found[k])} ({counts[k]} pixel{'s' * int(counts[k] != 1)})" for k in most) + more


def _text(colour: object) -> str:
    return str(tuple(int(part) for part in colour))  # type: ignore[attr-defined]  # a row of numbers
