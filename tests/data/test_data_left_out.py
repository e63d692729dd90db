"""Files that are passed over, labels by another name, and links: nothing is left out without a word, and every refusal has a way on."""

from __future__ import annotations

import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from spcl_fast.cli.entry import main
from spcl_fast.data import build_dataset, check_data
from spcl_fast.errors import DataError


@pytest.fixture
def root(tmp_path):
    top = tmp_path / "set"
    for folder in ("images/train", "labels/train"):
        (top / folder).mkdir(parents=True)
    for index in range(4):
        Image.new("RGB", (8, 6)).save(top / f"images/train/f{index}.png")
        Image.fromarray(np.full((6, 8), index % 2, np.uint8)).save(top / f"labels/train/f{index}.png")
    (top / "classes.json").write_text(json.dumps({"names": ["a", "b"]}))
    return top


def build(root, **how):
    return build_dataset("folders", root, "train", **how)


def check(root, *words):
    size = ["--source.size", "8,6", "--source.eval_size", "8,6", "--source.val_split", "train"]
    return main(["check-data", "--preset", "folders", "--side", "source", "--source.root", str(root), *size, *words])


@pytest.mark.parametrize("ending", [".bmp", ".webp", ".tif", ".TIFF", ".gif", ".ppm", ".heic", ""])
def test_pictures_of_other_formats_are_named_and_a_problem(root, ending, capsys, caplog):
    for index in (0, 2):
        (root / f"images/train/f{index}.png").rename(root / f"images/train/f{index}{ending}")
        (root / f"labels/train/f{index}.png").unlink()
    data = build(root)
    assert data.names == ["f1", "f3"]
    text = check_data(data).text()
    assert f"2 files are neither PNG nor JPEG by name and left out: f0{ending}, f2{ending}. Save them" in text
    assert "2 files" in caplog.text  # a run logs it, too
    assert check(root) == 3 and f"f2{ending}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["notes.txt", "Thumbs.db", ".hidden.bmp", ".cache/x.bmp"])
def test_other_files_are_no_problem(root, name):
    (root / "images/train" / name).parent.mkdir(exist_ok=True)
    (root / "images/train" / name).write_bytes(b"nothing")
    assert not build(root).left_out and check(root) == 0


@pytest.mark.parametrize("ending", [".JPG", ".Jpeg", ".jfif", ".PNG"])
def test_png_and_jpeg_are_read_by_every_usual_ending(root, ending):
    (root / "images/train/f0.png").unlink()
    Image.new("RGB", (8, 6)).save(root / f"images/train/f0{ending}", "PNG" if ending == ".PNG" else "JPEG")
    assert build(root).names == ["f0", "f1", "f2", "f3"] and not build(root).left_out


def test_labels_without_an_image_are_counted_and_a_problem(root, capsys):
    for index in (1, 3):
        (root / f"images/train/f{index}.png").unlink()
    assert [problem.what for problem in build(root).left_out] == [
        "2 labels without an image: f1.png, f3.png. Add the images, or take the labels out."
    ]
    assert not build(root, labels=False).left_out
    assert check(root) == 3 and "2 labels without an image" in capsys.readouterr().out


def test_a_list_that_picks_some_images_leaves_no_label_alone(root):
    (root / "train.txt").write_text("f0\nf3\n")
    assert build(root).names == ["f0", "f3"] and check_data(build(root)).ok


def test_a_folder_of_nothing_but_other_formats_says_so(root):
    for path in (root / "images/train").iterdir():
        path.rename(path.with_suffix(".tif"))
    with pytest.raises(DataError, match="no images found.*4 files are neither PNG nor JPEG by name"):
        build(root)


# ---- names of labels ----


@pytest.mark.parametrize("ending", [".PNG", ".Png"])
def test_a_label_is_found_whatever_capitals_its_ending_has(root, ending):
    (root / "labels/train/f0.png").rename(root / f"labels/train/f0{ending}")
    data = build(root)
    assert len(data) == 4 and data.load(0)[1].shape == (6, 8) and not data.left_out


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_composed_otherwise_is_the_same_name(root, forms):
    image, label = (unicodedata.normalize(form, "Straße é") for form in forms)
    (root / "images/train/f0.png").rename(root / f"images/train/{image}.png")
    (root / "labels/train/f0.png").rename(root / f"labels/train/{label}.png")
    assert image in build(root).names and not build(root).left_out
    (root / "train.txt").write_text(f"f1\n{label}\n", encoding="utf-8")
    assert build(root).names == ["f1", image]


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ("f1_mask.png", r"nearest name is .*f1_mask.png. If labels are named so, pass --source.label_ending _mask.png"),
        ("f1.png.png", r"nearest name is .*f1.png.png. If labels are named so, pass --source.label_ending .png.png"),
        ("f1.jpg", r"nearest name is .*f1.jpg. A label is never a JPEG: export it as PNG"),
        ("F1.png", r"nearest name is .*F1.png. Rename it"),
        ("mask_f1.png", r"nearest name is .*mask_f1.png. Rename it"),
        ("f1.tif", r"nearest name is .*f1.tif. Labels are read from PNG files alone: save it as one"),
        ("f1", r"nearest name is .*labels/train/f1. Labels are read from PNG files alone"),
        (
            "../../images/train/f1_gt.txt",
            r"nearest name is .*images/train/f1_gt.txt. Labels lie in a folder of their own",
        ),
    ],
)
def test_a_missing_label_is_told_with_the_nearest_name(root, found, told):
    (root / "labels/train/f1.png").rename(root / "labels/train" / found)
    with pytest.raises(DataError, match=f"f1.png has no label: expected .*f1.png.*{told}"):
        build(root)


def test_another_images_label_is_not_the_nearest_name(root):
    (root / "labels/train/f1.png").rename(root / "labels/train/f10.png")
    with pytest.raises(DataError) as error:
        build(root)
    assert "label_ending" not in str(error.value)


def test_the_label_of_another_image_that_is_there_is_never_proposed(root):
    (root / "labels/train/f1.png").unlink()
    with pytest.raises(DataError, match="f1.png has no label") as error:
        build(root)
    assert "nearest" not in str(error.value) and "Rename" not in str(error.value)


def test_labels_with_a_suffix_are_read_by_the_setting(root, capsys):
    for path in (root / "labels/train").iterdir():
        path.rename(path.with_name(path.stem + "_mask.PNG"))
    assert build(root, label_ending="_mask.png").load(1)[1].max() == 1
    assert check(root, "--source.label_ending", "_mask.png") == 0 and "no problems" in capsys.readouterr().out


def test_a_missing_label_folder_is_told(root):
    (root / "labels/train").rename(root / "labels/Train2")
    with pytest.raises(DataError, match="The folder .*labels/train does not exist; in .*labels there are Train2"):
        build(root)
    (root / "images").rename(root / "Images")
    with pytest.raises(DataError, match="images does not exist; in .* there are Images, labels"):
        build(root)


# ---- links ----


@pytest.fixture
def hub(root, tmp_path):
    """The set as a cache of blobs keeps it: every file is a link to one outside."""
    blobs, top = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    blobs.mkdir()
    for index, path in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
        link = top / path.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(index))
        link.symlink_to(os.path.relpath(blobs / str(index), link.parent))
    return top


@pytest.mark.parametrize("skip", [False, True])
def test_files_that_are_links_are_refused_with_the_flag_that_reads_them(hub, skip, capsys):
    with pytest.raises(DataError, match="leads out of the data set's root.*pass --follow-links") as error:
        build(hub, skip_bad_files=skip)
    assert "Give every image a label" not in str(error.value)
    assert build(hub, follow_links=True).load(3)[1].max() == 1
    assert check(hub) == 3 and "--follow-links" in capsys.readouterr().err
    assert check(hub, "--follow-links") == 0


def test_a_linked_folder_is_a_problem_or_followed_and_a_loop_ends(root, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        (root / kind / "train/f0.png").rename(tmp_path / kind / "f0.png")
        (root / kind / "train/city").symlink_to(tmp_path / kind)
    data = build(root)
    assert data.names == ["f1", "f2", "f3"]
    assert any("city" in problem.name and "--follow-links" in problem.what for problem in data.left_out)
    (tmp_path / "images" / "again").symlink_to(root / "images")
    assert "city/f0" in build(root, follow_links=True, skip_bad_files=True).names


# ---- names and sizes ----


def test_one_name_with_a_control_character_is_left_out_alone_when_skipping(root):
    (root / "images/train/f0.png").rename(root / "images/train/f\x07.png")
    with pytest.raises(DataError, match="control characters"):
        build(root)
    data = build(root, skip_bad_files=True)
    assert data.names == ["f1", "f2", "f3"] and "control characters in the name" in check_data(data).text()


@pytest.mark.parametrize("part", ["images", "labels"])
def test_a_large_picture_is_refused_with_the_setting_that_reads_it(root, part, capsys):
    data = build(root, max_pixels=47)
    with pytest.raises(DataError, match="says it has 8x6 pixels; more than 47 are.*pass --loop.max_pixels 48"):
        (data.image if part == "images" else data.label)(0)
    assert build(root, max_pixels=48).load(0)[1].shape == (6, 8)
    assert check(root, "--loop.max_pixels", "47") == 3 and "--loop.max_pixels 48" in capsys.readouterr().out
    assert check(root, "--loop.max_pixels", "48") == 0


def test_a_limit_above_pillows_own_is_kept(tmp_path, monkeypatch):
    from spcl_fast.data.files import read_image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow refuses twice as many
    Image.new("RGB", (8, 6)).save(tmp_path / "tile.png")
    assert read_image(tmp_path / "tile.png", 48).size == (8, 6)
