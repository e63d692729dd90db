"""Nuclei of three kinds from a clone: pieces of one field of view are found by their edges, and trained on or evaluated together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.adaptation import nuclei
from spcl_fast.data import build_dataset
from spcl_fast.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
BACKGROUNDS = {"fluorescence": (20, 20, 20), "white": (220, 222, 226), "violet": (182, 163, 207)}
PINK = (214, 170, 204)


def field_of_view(rng: np.random.Generator, size: tuple[int, int], background: tuple[int, int, int]) -> np.ndarray:
    """Uneven light and the noise of a camera, as a photograph has them; grey where the background is."""
    coarse = Image.fromarray(rng.uniform(-12, 8, (9, 9)).astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    light = np.asarray(coarse) + rng.normal(0, 2, size[::-1])
    return (np.array(background) + light[..., None]).clip(0, 255).astype(np.uint8)


def quarters(picture: np.ndarray) -> list[np.ndarray]:
    h, w = picture.shape[0] // 2, picture.shape[1] // 2
    return [picture[y : y + h, x : x + w] for y in (0, h) for x in (0, w)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, tuple[str, int]], dict[Path, int]]:
    """A clone of four fields a kind, four pieces a field, in the order of their names at random -> roots of it."""
    clone, folder = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("roots")
    rng, of = np.random.default_rng(0), {}
    wanted = [(kind, (512, 512) if kind == "fluorescence" else (640, 512), back) for kind, back in BACKGROUNDS.items()]
    for kind, size, background in [*wanted, ("pink", (640, 512), PINK), ("other", (400, 300), (20, 20, 20))]:
        for field in range(4):
            for piece in quarters(field_of_view(rng, size, background)):
                name = rng.bytes(8).hex()
                of[name] = (kind, field)
                root = clone / "stage1_train" / name
                for below in ("images", "masks"):
                    (root / below).mkdir(parents=True)
                Image.fromarray(piece).convert("RGBA").save(root / "images" / f"{name}.png")
                for i in range(2):
                    Image.fromarray(mask_of(i, piece.shape[:2])).save(root / "masks" / f"{i}.png")
    return clone, of, nuclei.make_roots(clone, folder)


def mask_of(number: int, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[10 * number : 10 * number + 7, 20:31] = 255
    return mask


def test_every_kind_has_a_root_and_other_stains_and_sizes_are_left_out(made):
    _, of, roots = made
    assert {root.name: images for root, images in roots.items()} == {f"nuclei_{kind}": 16 for kind in BACKGROUNDS}
    for root in roots:
        names = {path.stem for path in (root / "images").rglob("*.png")}
        assert {of[name][0] for name in names} == {root.name.removeprefix("nuclei_")} and len(names) == 16


def test_a_field_of_view_is_trained_on_or_evaluated_as_a_whole(made):
    _, of, roots = made
    for root in roots:
        train, val = (
            {of[path.stem][1] for path in (root / "images" / split).glob("*.png")} for split in ("train", "val")
        )
        assert len(train) == 3 and len(val) == 1 and not train & val


def test_a_label_is_all_nuclei_of_its_image(made):
    for root in made[2]:
        data = build_dataset("folders", root, "val")
        assert data.classes.names == ("background", "nucleus") and len(data) == 4
        for path in (root / "labels" / "val").glob("*.png"):
            label = np.asarray(Image.open(path))
            expected = np.zeros(label.shape, np.uint8)
            expected[0:7, 20:31] = expected[10:17, 20:31] = 1
            np.testing.assert_array_equal(label, expected)


def test_fields_are_found_in_any_order_and_in_both_directions():
    rng = np.random.default_rng(1)
    pictures = [field_of_view(rng, (96, 64), (180, 160, 207)) for _ in range(3)]
    pieces = [
        *quarters(pictures[0]),
        *quarters(pictures[1])[:2],
        *quarters(pictures[2])[::2],
    ]  # a square, a row, a column
    order = rng.permutation(len(pieces))
    found = {frozenset(int(order[i]) for i in field) for field in nuclei.fields([pieces[i] for i in order])}
    assert found == {frozenset(range(4)), frozenset({4, 5}), frozenset({6, 7})}


def test_a_single_image_is_a_field_of_its_own():
    assert nuclei.fields([np.zeros((4, 4, 3), np.uint8)]) == [[0]]


def test_a_folder_that_is_no_clone_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"0 images below stage1_train.*nuclei\.py names"):
        nuclei.make_roots(tmp_path, tmp_path / "out")


def test_the_command_names_the_roots(made, tmp_path):
    command = [sys.executable, "-m", "benchmarks.adaptation", "nuclei", str(made[0]), str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert said.splitlines() == [f"{tmp_path / f'nuclei_{kind}'}: 16 images" for kind in nuclei.DOMAINS]
