"""target.labelled names the images that it says, and no other image needs a label."""

from __future__ import annotations

from pathlib import Path

import pytest

from spcl_fast.config.fold import Fold
from spcl_fast.data.labelled import Chosen, choose, part_of
from spcl_fast.errors import ConfigError, DataError

NAMES = [f"drive_{i:02d}" for i in range(20)]


def test_fewer_images_are_a_part_of_more_and_another_seed_draws_others():
    few, more = choose("3", NAMES, 1), choose("8", NAMES, 1)
    assert few.count == 3 and more.count == 8 and few.names == more.names and sorted(few.names) == NAMES
    assert choose("3", NAMES, 2).names != few.names


def test_names_and_a_list_file_are_taken_in_their_order(tmp_path):
    assert choose("drive_07, drive_01", NAMES, 0) == Chosen(("drive_07", "drive_01"))
    (tmp_path / "picked.txt").write_text("# mine\ndrive_03.png\n\ndrive_02\n")
    assert choose(str(tmp_path / "picked.txt"), NAMES, 0) == Chosen(("drive_03", "drive_02"))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("0", "expected a whole number from 1 to 20"),
        ("21", "expected a whole number from 1 to 20"),
        ("-3", "expected a whole number from 1 to 20"),
        ("2.5", "expected a whole number from 1 to 20"),
        ("5%", "expected a whole number from 1 to 20"),
        (" , ", "got nothing"),
        ("drive_7", "no such file, nor a training image called 'drive_7'; the nearest name is 'drive_"),
    ],
)
def test_what_names_no_image_is_refused(wanted, said):
    with pytest.raises(ConfigError, match=said):
        choose(wanted, NAMES, 0)


def test_names_with_and_without_their_ending_and_twice_are_one():
    assert choose("drive_03.jpg,drive_03, drive_02.PNG", NAMES, 0) == Chosen(("drive_03", "drive_02"))


def test_an_image_that_is_evaluated_is_named_as_such():
    with pytest.raises(ConfigError, match="'held_1' is an image of the validation split"):
        choose("held_1", NAMES, 0, evaluated=["held_0", "held_1"])


def test_a_list_with_an_unknown_name_says_which_file(tmp_path):
    path = tmp_path / "picked.txt"
    path.write_text("elsewhere\n")
    with pytest.raises(ConfigError, match="picked.txt names 'elsewhere', which is no training image"):
        choose(str(path), NAMES, 0)


def test_a_number_passes_over_images_without_a_label(tmp_path):
    images = {name: Path(f"{name}.png") for name in NAMES}
    for name in ("drive_04", "drive_09", "drive_11"):
        (tmp_path / f"{name}.png").touch()

    def label_of(name: str) -> Path:
        return tmp_path / f"{name}.png"

    chosen = choose("2", NAMES, 0)
    found = list(chosen.labelled(images, label_of))
    assert len(found) == 2 and set(found) < {"drive_04", "drive_09", "drive_11"}
    assert found == [name for name in chosen.names if label_of(name).is_file()][:2]
    with pytest.raises(DataError, match="asks for 4 labelled images, and 3 of the 20"):
        choose("4", NAMES, 0).labelled(images, label_of)


# ---- folds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 7, 20])
def test_the_parts_are_disjoint_cover_every_name_and_are_about_as_large(parts):
    found = [part_of(NAMES, Fold(part, parts), 5) for part in range(1, parts + 1)]
    assert sorted(name for part in found for name in part) == NAMES
    sizes = {len(part) for part in found}
    assert max(sizes) - min(sizes) <= 1


def test_the_parts_are_drawn_by_the_seed_and_not_by_the_order_of_the_names():
    fold = Fold(1, 4)
    assert part_of(NAMES, fold, 5) == part_of(NAMES[::-1], fold, 5)
    assert len({part_of(NAMES, fold, seed) for seed in range(10)}) == 10


def test_more_parts_than_images_are_refused():
    with pytest.raises(
        ConfigError, match="target.fold: got 2/21, expected at most 20 parts: target.labelled names 20 images"
    ):
        part_of(NAMES, Fold(2, 21), 0)
