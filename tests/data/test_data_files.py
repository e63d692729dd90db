"""Files that are broken or hostile: an error that names the file and the remedy, or skipped and counted."""

from __future__ import annotations

import json
import os
import struct
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spcl_fast.config import AugmentConfig
from spcl_fast.data import (
    build_dataset,
    check_data,
    colourise,
    eval_batches,
    overlay,
    read_label_png,
    train_batches,
    write_label_png,
)
from spcl_fast.data.files import find_images, read_ids, read_image
from spcl_fast.errors import DataError

W, H = 8, 6
CLASSES = {"names": ["a", "b"], "palette": [[255, 0, 0], [0, 255, 0]], "ignore_index": 255}


@pytest.fixture
def root(tmp_path):
    """Four whole pairs."""
    top = tmp_path / "set"
    for folder in ("images/train", "labels/train"):
        (top / folder).mkdir(parents=True)
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (H, W, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(top / "images" / "train" / f"{index}.png")
        Image.fromarray(np.full((H, W), index % 2, np.uint8)).save(top / "labels" / "train" / f"{index}.png")
    (top / "classes.json").write_text(json.dumps(CLASSES))
    return top


def png_header(width: int, height: int) -> bytes:
    """A few bytes that claim to be a large picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def break_image(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>404</html>")
    elif how == "bomb":
        path.write_bytes(png_header(60000, 60000))
    elif how == "large":
        path.write_bytes(png_header(9000, 9000))
    elif how == "16-bit":
        Image.fromarray(np.zeros((H, W), np.uint16)).save(path)
    elif how == "float":
        Image.fromarray(np.zeros((H, W), np.float32)).save(path, format="TIFF")
    elif how == "cmyk":
        Image.new("CMYK", (W, H)).save(path, format="JPEG")
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("truncated", "cannot be decoded"),
        ("empty", r"is empty \(0 bytes\)"),
        ("text", "is neither a PNG nor a JPEG"),
        ("bomb", "60000x60000|larger than"),
        ("large", "9000x9000 pixels; more than"),
        ("16-bit", "has mode I;16"),
        ("float", "is neither a PNG nor a JPEG"),
        ("cmyk", "has mode CMYK"),
        ("pipe", "is no ordinary file"),
    ],
)
def test_bad_image_is_named_with_a_remedy_and_skipped_on_demand(root, how, told):
    path = root / "images" / "train" / "1.png"
    break_image(path, how)
    data = build_dataset("folders", root, "train")
    with pytest.raises(DataError, match=told) as error:
        data.load(1)
    assert str(path) in str(error.value) and "--skip-bad-files" in str(error.value)
    report = check_data(data)
    assert not report.ok and [p.name for p in report.problems] == ["1"] and "1: image" in report.text()

    data = build_dataset("folders", root, "train", skip_bad_files=True)
    names = {
        n
        for batch in islice(train_batches(data, AugmentConfig(), size=(W, H), batch_size=4, seed=0), 3)
        for n in batch.names
    }
    assert names == {"0", "2", "3"} and [p.name for p in data.problems] == ["1"]
    assert [name for _, _, name in eval_batches(data, (W, H))] == ["0", "2", "3"]
    assert len(data.problems) == 1  # counted once, however often it was met


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_stops_training_with_its_own_words(root, workers):
    break_image(root / "images" / "train" / "2.png", "empty")
    data = build_dataset("folders", root, "train")
    with pytest.raises(DataError) as error:
        list(islice(train_batches(data, AugmentConfig(), size=(W, H), batch_size=4, seed=0, workers=workers), 1))
    assert (
        str(error.value).startswith("image ")
        and "2.png is empty" in str(error.value)
        and "Traceback" not in str(error.value)
    )
    with pytest.raises(DataError, match="2.png is empty"):
        list(eval_batches(data, (W, H), workers=workers))


def test_skipped_files_are_counted_across_worker_processes(root):
    break_image(root / "images" / "train" / "2.png", "truncated")
    data = build_dataset("folders", root, "train", skip_bad_files=True)
    list(islice(train_batches(data, AugmentConfig(), size=(W, H), batch_size=4, seed=0, workers=1), 1))
    assert [p.name for p in data.problems] == ["2"]


def test_nothing_readable_is_an_error_even_when_skipping(root):
    for index in range(4):
        break_image(root / "images" / "train" / f"{index}.png", "empty")
    data = build_dataset("folders", root, "train", skip_bad_files=True)
    with pytest.raises(DataError, match="none of the 4 images can be read"):
        next(train_batches(data, AugmentConfig(), size=(W, H), batch_size=1, seed=0))


def test_label_of_another_size_is_named_with_both_sizes(root):
    Image.fromarray(np.zeros((H, W + 1), np.uint8)).save(root / "labels" / "train" / "3.png")
    with pytest.raises(DataError, match=r"3.png is 9x6, but its image .*3.png is 8x6"):
        build_dataset("folders", root, "train").load(3)


@pytest.mark.parametrize(
    ("pixels", "told"),
    [
        (np.arange(H * W * 3, dtype=np.uint8).reshape(H, W, 3), r"colours that the palette lacks: \(0, 1, 2\)"),
        (np.zeros((H, W, 2), np.uint8), "has mode LA;"),
    ],
)
def test_label_that_holds_no_ids_is_refused(root, pixels, told):
    Image.fromarray(pixels).save(root / "labels" / "train" / "0.png")
    with pytest.raises(DataError, match=told):
        build_dataset("folders", root, "train").load(0)


def test_16_bit_grey_label_keeps_its_ids(tmp_path):
    ids = np.array([[3, 256 + 3, 65535]], np.uint16)
    Image.fromarray(ids).save(tmp_path / "l.png")
    assert read_ids(tmp_path / "l.png").tolist() == ids.tolist()
    with pytest.raises(DataError, match="has 16 bits per pixel"):
        read_label_png(tmp_path / "l.png")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "RGB"])
def test_ordinary_modes_become_rgb(tmp_path, mode):
    Image.new("RGB", (W, H), (204, 204, 204)).convert(mode).save(tmp_path / "i.png")
    image = read_image(tmp_path / "i.png")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (204, 204, 204)


def test_missing_label_is_told_or_left_out_and_reported(root):
    (root / "labels" / "train" / "2.png").unlink()
    with pytest.raises(DataError, match="2.png has no label: expected .*labels/train/2.png"):
        build_dataset("folders", root, "train")
    data = build_dataset("folders", root, "train", skip_bad_files=True)
    assert data.names == ["0", "1", "3"] and not check_data(data).ok and "2: image" in check_data(data).text()


@pytest.mark.parametrize("line", ["../secret", "a/../../secret", "/etc/passwd", "C:/x", "a\\b", "a\tb", "a\x1b[2Jb"])
def test_list_file_cannot_name_a_path_outside(root, line):
    (root / "train.txt").write_text(f"0\n{line}\n")
    with pytest.raises(DataError, match=r"train.txt, line 2, names .*expected a relative path without '\.\.'"):
        build_dataset("folders", root, "train")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("\n# x\n", "names no file"),
        ("0\n0\n", "names '0' twice"),
        ("nope\n", "names 'nope', but there is no such image"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_list_file_that_says_nothing_useful_is_told(root, content, told):
    (root / "train.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=told):
        build_dataset("folders", root, "train")


@pytest.mark.parametrize("part", ["images", "labels"])
def test_link_out_of_the_root_is_refused_and_a_linked_root_is_fine(root, tmp_path, part):
    alias = tmp_path / "alias"
    alias.symlink_to(root)
    assert len(build_dataset("folders", alias, "train")) == 4
    secret = tmp_path / "secret.png"
    (root / part / "train" / "0.png").rename(secret)
    (root / part / "train" / "0.png").symlink_to(secret)
    with pytest.raises(DataError, match="leads out of the data set's root .*secret.png"):
        build_dataset("folders", root, "train")
    assert build_dataset("folders", root, "train", skip_bad_files=True).names == ["1", "2", "3"]


def test_two_files_of_one_name_are_told(root):
    Image.new("RGB", (W, H)).save(root / "images" / "train" / "0.jpg")
    with pytest.raises(DataError, match="0.jpg and .*0.png have the same name '0'"):
        build_dataset("folders", root, "train")


def test_odd_file_name_is_told_and_html_is_only_a_name(root):
    for folder in ("images", "labels"):
        (root / folder / "train" / "0.png").rename(root / folder / "train" / "<b>&0.png")
    assert "<b>&0" in build_dataset("folders", root, "train").names
    (root / "images" / "train" / "<b>&0.png").rename(root / "images" / "train" / "a\nb.png")
    with pytest.raises(DataError, match=r"names 'a\\nb'"):
        build_dataset("folders", root, "train")


@pytest.mark.parametrize("name", ["Screenshot 9.41.00\u202fAM", "a\u00a0b", "é\u3000ü", "\U0001f469\u200d\U0001f33e"])
def test_a_name_with_any_space_or_letter_is_fine(root, name):
    for folder in ("images", "labels"):
        (root / folder / "train" / "0.png").rename(root / folder / "train" / f"{name}.png")
    data = build_dataset("folders", root, "train")
    assert sorted(data.names) == sorted(["1", "2", "3", name]) and check_data(data).ok
    (root / "train.txt").write_text(f"1\n{name}\n", encoding="utf-8")
    assert build_dataset("folders", root, "train").names == ["1", name]


@pytest.mark.parametrize("name", ["a\x7fb", "a\u2028b", "a\udcffb", "a\x9bb"])
def test_a_name_with_a_control_character_is_refused(root, name):
    (root / "images" / "train" / "0.png").rename(root / "images" / "train" / f"{name}.png")
    with pytest.raises(DataError, match="control characters"):
        build_dataset("folders", root, "train")


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "__MACOSX", ".git/objects", "@eaDir", "$RECYCLE.BIN"])
@pytest.mark.parametrize("labels", [True, False])
def test_hidden_folders_beside_the_images_are_passed_over(root, folder, labels):
    extra = root / "images" / "train" / folder
    extra.mkdir(parents=True)
    Image.new("RGB", (W, H)).save(extra / "0-checkpoint.png")
    assert build_dataset("folders", root, "train", labels=labels).names == ["0", "1", "2", "3"]
    assert list(find_images(extra)) == ["0-checkpoint"]  # asked for by name it is read


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_file_is_read_as_editors_save_it(root, encoding):
    (root / "train.txt").write_bytes("2\r\n0\r\n".encode(encoding))
    assert build_dataset("folders", root, "train").names == ["2", "0"]


# ---- label pictures ----


def test_label_png_keeps_every_value_and_shows_colours(tmp_path):
    palette = CLASSES["palette"]
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = tmp_path / "deep" / "er" / "l.png"
    write_label_png(path, labels, palette)
    assert (read_label_png(path) == labels).all()
    image = Image.open(path)
    assert (
        image.mode == "P"
        and image.convert("RGB").getpixel((1, 0)) == (0, 255, 0)
        and os.listdir(path.parent) == ["l.png"]
    )
    with pytest.raises(ValueError, match="expected uint8"):
        write_label_png(path, labels.astype(np.int64), palette)


def test_label_png_with_one_class_is_still_read_as_ids(tmp_path):
    for value in (0, 1, 255):
        write_label_png(tmp_path / "l.png", np.full((3, 5), value, np.uint8), CLASSES["palette"])
        assert (read_label_png(tmp_path / "l.png") == value).all()


def test_colours_and_overlay_leave_ignored_pixels_alone():
    labels = np.array([[0, 1, 255]], np.uint8)
    image = np.full((1, 3, 3), 100, np.uint8)
    assert colourise(labels, CLASSES["palette"]).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 0]]]
    mixed = overlay(image, labels, CLASSES["palette"])
    assert mixed[0, 2].tolist() == [100, 100, 100] and mixed[0, 0].tolist() == [178, 50, 50]
