"""Readers: every data set's real layout, as a tiny generated tree; ids, pairs, splits, classes."""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spcl_fast.config import DataConfig
from spcl_fast.data import (
    CITYSCAPES_16,
    CITYSCAPES_19,
    build_dataset,
    check_data,
    dataset_of,
    with_pseudo_labels,
    write_label_png,
)
from spcl_fast.data.classes import CITYSCAPES_IDS_16, CITYSCAPES_IDS_19, SYNTHIA_IDS_16
from spcl_fast.errors import ConfigError, DataError

W, H = 6, 4


def save_image(path: Path, colour=(10, 20, 30), size=(W, H)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def save_ids(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(path)


def save_rgb16(path: Path, channels: np.ndarray) -> None:
    """A 16-bit RGB PNG, which Pillow cannot write: uint16 [H, W, 3], every row with the Up filter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = channels.shape
    rows = np.frombuffer(channels.astype(">u2").tobytes(), np.uint8).reshape(height, -1)
    filtered = np.diff(rows, axis=0, prepend=np.zeros((1, rows.shape[1]), np.uint8)).astype(np.uint8)
    body = zlib.compress(b"".join(b"\2" + row.tobytes() for row in filtered))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", body), (b"IEND", b""))
    encoded = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(encoded))


def row_of(ids: list[int]) -> np.ndarray:
    return np.tile(np.array(ids, np.uint8), (3, 1))


def image_for(ids: np.ndarray, path: Path) -> None:
    save_image(path, size=ids.shape[::-1])


# ---- gta5 ----


@pytest.fixture
def gta5(tmp_path):
    ids = row_of([*CITYSCAPES_IDS_19, 0, 34])
    for name in ("00001", "00002"):
        image_for(ids, tmp_path / "images" / f"{name}.png")
        save_ids(tmp_path / "labels" / f"{name}.png", ids)
    return tmp_path


def test_gta5_maps_every_id_and_ignores_the_rest(gta5):
    data = build_dataset("gta5", gta5, "train")
    image, label = data.load(1)
    assert data.names == ["00001", "00002"] and data.classes == CITYSCAPES_19
    assert image.mode == "RGB" and image.size == (21, 3) and label.dtype == np.uint8
    assert label[0].tolist() == [*range(19), 255, 255]


def test_gta5_with_16_classes_uses_the_other_table(gta5):
    data = build_dataset("gta5", gta5, "train", num_classes=16)
    wanted = [CITYSCAPES_IDS_16.get(k, 255) for k in [*CITYSCAPES_IDS_19, 0, 34]]
    assert data.classes == CITYSCAPES_16 and data.label(0)[0].tolist() == wanted


def test_gta5_real_files_have_plausible_streets(shared_dir):
    data = build_dataset("gta5", shared_dir / "data" / "gta5_samples", "train")
    report = check_data(data)
    assert report.ok and report.checked == 4 and list(report.sizes) == [(478, 263)]
    assert dict(zip(data.classes.names, report.shares, strict=True))["road"] > 0.1
    assert report.ignored > 0


def test_gta5_with_shared_classes_goes_through_the_nineteen(gta5, tmp_path):
    classes = tmp_path / "shared.json"
    tables = {"cityscapes19": {"0": 0, "13": 1}}
    classes.write_text(json.dumps({"names": ["road", "car"], "palette": [[1, 2, 3], [4, 5, 6]], "from": tables}))
    data = build_dataset("gta5", gta5, "train", classes=classes)
    label = data.label(0)[0]
    assert data.classes.names == ("road", "car")
    assert label[0] == 0 and label[13] == 1 and (np.delete(label, [0, 13]) == 255).all()
    assert not data.unknown_ids(0)


# ---- synthia ----


@pytest.fixture
def synthia(tmp_path):
    ids = np.tile(np.array([*SYNTHIA_IDS_16, 0, 13], np.uint16), (3, 1))
    channels = np.stack([ids, ids * 300 + 7, np.full_like(ids, 65535)], -1)
    image_for(ids, tmp_path / "RAND_CITYSCAPES" / "RGB" / "0000001.png")
    save_rgb16(tmp_path / "RAND_CITYSCAPES" / "GT" / "LABELS" / "0000001.png", channels)
    return tmp_path


def test_synthia_16_bit_labels_do_not_become_class_0_everywhere(synthia):
    for root in (synthia, synthia / "RAND_CITYSCAPES"):
        data = build_dataset("synthia", root, "train")
        assert data.classes == CITYSCAPES_16 and data.label(0)[1].tolist() == [*range(16), 255, 255]


def test_synthia_ids_above_255_are_not_folded_into_small_ones(synthia):
    path = synthia / "RAND_CITYSCAPES" / "GT" / "LABELS" / "0000001.png"
    ids = np.full((3, 18), 256 + 3, np.uint16)
    save_rgb16(path, np.stack([ids] * 3, -1))
    data = build_dataset("synthia", synthia, "train")
    assert (data.label(0) == 255).all() and data.unknown_ids(0) == {259: 54}


def test_synthia_8_bit_label_is_refused_in_words(synthia):
    path = synthia / "RAND_CITYSCAPES" / "GT" / "LABELS" / "0000001.png"
    save_image(path, size=(18, 3))
    with pytest.raises(DataError, match=r"0000001.png is no 16-bit RGB PNG \(mode RGB\)"):
        build_dataset("synthia", synthia, "train").load(0)


# ---- synscapes, cityscapes ----


def test_synscapes_layout(tmp_path):
    ids = row_of([7, 26, 0])
    image_for(ids, tmp_path / "img" / "rgb-2k" / "17.png")
    save_ids(tmp_path / "img" / "class" / "17.png", ids)
    data = build_dataset("synscapes", tmp_path, "train")
    assert data.names == ["17"] and data.label(0)[0].tolist() == [0, 13, 255]


@pytest.fixture
def cityscapes(tmp_path):
    for split, city in (("train", "aachen"), ("train", "bremen"), ("val", "lindau")):
        for number in range(2):
            ids = row_of([7, 22, 27, 33, 1])
            name = f"{city}_{number:06d}_000019"
            image_for(ids, tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
            save_ids(tmp_path / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", ids)
            save_ids(tmp_path / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", ids)
    return tmp_path


def test_cityscapes_splits_cities_and_both_class_sets(cityscapes):
    train, val = (build_dataset("cityscapes", cityscapes, split) for split in ("train", "val"))
    assert train.names[0] == "aachen/aachen_000000_000019" and len(train) == 4 and len(val) == 2
    assert train.label(0)[0].tolist() == [0, 9, 14, 18, 255]
    sixteen = build_dataset("cityscapes", cityscapes, "val", num_classes=16)
    assert sixteen.label(0)[0].tolist() == [0, 255, 255, 15, 255]  # terrain and truck are not among the 16


def test_cityscapes_takes_the_released_list_files(cityscapes):
    (cityscapes / "train.txt").write_text(
        "bremen/bremen_000001_000019_leftImg8bit.png\n\n# a comment\naachen/aachen_000000_000019\n"
    )
    data = build_dataset("cityscapes", cityscapes, "train")
    assert data.names == ["bremen/bremen_000001_000019", "aachen/aachen_000000_000019"]


def test_cityscapes_with_a_class_number_nobody_has_is_a_config_error(cityscapes):
    with pytest.raises(ConfigError, match="num_classes is 18; expected 19, or 16"):
        build_dataset("cityscapes", cityscapes, "train", num_classes=18)


# ---- folders ----

CLASSES = {"names": ["a", "b", "c"], "palette": [[255, 0, 0], [0, 255, 0], [0, 0, 255]], "ignore_index": 255}


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "town"
    for split, names in (("train", ("t1", "t2", "t3")), ("val", ("v1",))):
        for name in names:
            save_image(root / "images" / split / f"{name}.jpg")
            save_ids(root / "labels" / split / f"{name}.png", np.tile(np.array([0, 1, 2, 255, 9, 1], np.uint8), (H, 1)))
    (root / "classes.json").write_text(json.dumps(CLASSES))
    return root


def test_folders_with_splits_read_ids_as_classes(folders):
    data = build_dataset("folders", folders, "train")
    assert data.names == ["t1", "t2", "t3"] and data.classes.names == ("a", "b", "c")
    assert data.label(0)[0].tolist() == [0, 1, 2, 255, 255, 1] and data.unknown_ids(0) == {9: H}
    assert data.image_path(0) == folders / "images" / "train" / "t1.jpg"


def test_folders_list_picks_and_orders_a_split(folders):
    (folders / "train.txt").write_text("t3\nt1.jpg\n")
    assert build_dataset("folders", folders, "train").names == ["t3", "t1"]
    (folders / "mini.txt").write_text("v1\nt2\n")  # a split without a folder of its own
    data = build_dataset("folders", folders, "mini")
    assert data.names == ["v1", "t2"] and data.label(1) is not None


def test_folders_without_split_folders_use_all_or_the_list(tmp_path):
    for name in ("x", "y"):
        save_image(tmp_path / "images" / f"{name}.png")
        save_ids(tmp_path / "labels" / f"{name}.png", np.ones((H, W), np.uint8))
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    assert build_dataset("folders", tmp_path, "val").names == ["x", "y"]
    (tmp_path / "val.txt").write_text("y\n")
    assert build_dataset("folders", tmp_path, "val").names == ["y"]
    assert build_dataset("folders", tmp_path, "train").names == ["x", "y"]


def test_folders_unknown_split_tells_the_ones_there(folders):
    with pytest.raises(DataError, match="no split 'test'.*Splits there: train, val"):
        build_dataset("folders", folders, "test")


def test_folders_without_any_split_say_so(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    with pytest.raises(DataError, match="no split 'train'.*Splits there: none"):
        build_dataset("folders", tmp_path, "train")


def test_folders_list_with_a_name_in_two_folders_asks_for_the_full_name(folders):
    save_image(folders / "images" / "val" / "t1.jpg")
    (folders / "mix.txt").write_text("t1\n")
    with pytest.raises(DataError, match="names 't1', but it may be any of train/t1, val/t1"):
        build_dataset("folders", folders, "mix")


def test_folders_classes_file_maps_by_the_root_s_name_or_by_key(folders, tmp_path):
    shared = tmp_path / "shared.json"
    tables = {"town": {"0": 1, "2": 0}, "other": {"1": 1}}
    shared.write_text(json.dumps({"names": ["c", "a"], "palette": [[1, 1, 1], [2, 2, 2]], "from": tables}))
    data = build_dataset("folders", folders, "train", classes=shared)
    assert data.label(0)[0].tolist() == [1, 255, 0, 255, 255, 255] and set(data.unknown_ids(0)) == {9}
    other = build_dataset("folders", folders, "train", classes=shared, classes_key="other")
    assert other.label(0)[0].tolist() == [255, 1, 255, 255, 255, 1]
    with pytest.raises(DataError, match="no table 'third'; it has 'town', 'other'"):
        build_dataset("folders", folders, "train", classes=shared, classes_key="third")


def test_folders_without_classes_say_what_to_add(folders):
    (folders / "classes.json").unlink()
    with pytest.raises(DataError, match="there is no .*classes.json and no `classes` file was given"):
        build_dataset("folders", folders, "train")


def test_folders_bad_classes_file_is_named(folders):
    (folders / "classes.json").write_text('{"names": ["a", "a"]}')
    with pytest.raises(DataError, match="classes.json cannot be used: two classes are called 'a'"):
        build_dataset("folders", folders, "train")


def test_target_training_images_need_no_labels(folders):
    for path in (folders / "labels" / "train").iterdir():
        path.unlink()
    data = build_dataset("folders", folders, "train", labels=False)
    assert len(data) == 3 and data.load(0)[1] is None
    with pytest.raises(DataError, match=r"t1.jpg has no label: expected .*labels/train/t1.png.*\(3 files of 3"):
        build_dataset("folders", folders, "train")


def test_limit_bounds_the_training_split_alone(folders):
    config = DataConfig(dataset="folders", root=str(folders), train_images=2)
    assert dataset_of(config, "train").names == ["t1", "t2"] and dataset_of(config, "val").names == ["v1"]


def test_the_shared_real_sets_open_with_the_eight_shared_classes(shared_dir):
    shared = shared_dir / "data" / "shared_classes.json"
    for name, count in (("airsim_nh", 16), ("camvid", 16)):
        data = build_dataset("folders", shared_dir / "data" / name, "mini_train", classes=shared)
        report = check_data(data, 4)
        assert len(data) == count and len(data.classes) == 8 and report.ok and report.shares[6] > 0.05


# ---- any reader ----


def test_unknown_kind_and_missing_root_are_told(tmp_path):
    with pytest.raises(ConfigError, match="dataset 'kitti' is unknown; expected one of generated_source, "):
        build_dataset("kitti", tmp_path, "train")
    with pytest.raises(DataError, match="the root folder .*nowhere does not exist"):
        build_dataset("gta5", tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="images does not exist"):
        build_dataset("gta5", tmp_path, "train")


def test_select_keeps_images_and_labels_together(gta5):
    save_ids(gta5 / "labels" / "00002.png", np.full((3, 21), 26, np.uint8))
    data = build_dataset("gta5", gta5, "train").select([1])
    assert data.names == ["00002"] and (data.label(0) == 13).all() and data.image_path(0).name == "00002.png"


# ---- pseudo-labels ----


def test_pseudo_labels_replace_labels_and_may_have_another_size(cityscapes, tmp_path):
    target = build_dataset("cityscapes", cityscapes, "train", labels=False)
    for name in target.names:
        write_label_png(tmp_path / "pseudo" / f"{name}.png", np.full((2, 2), 4, np.uint8), target.classes.palette)
    data = with_pseudo_labels(target, tmp_path / "pseudo")
    image, label = data.load(3)
    assert (
        data.has_labels and data.names == target.names and label.tolist() == [[4, 4], [4, 4]] and image.size == (5, 3)
    )


def test_pseudo_labels_of_the_released_code_lie_flat(cityscapes, tmp_path):
    target = build_dataset("cityscapes", cityscapes, "val", labels=False)
    for name in target.names:
        write_label_png(
            tmp_path / "p" / f"{name.split('/')[1]}_leftImg8bit.png", np.zeros((3, 5), np.uint8), target.classes.palette
        )
    assert (with_pseudo_labels(target, tmp_path / "p").label(1) == 0).all()


def test_pseudo_labels_missing_or_of_other_classes_are_told(folders, tmp_path):
    target = build_dataset("folders", folders, "train", labels=False)
    write_label_png(tmp_path / "t1.png", np.zeros((H, W), np.uint8), target.classes.palette)
    write_label_png(tmp_path / "t2.png", np.full((H, W), 3, np.uint8), target.classes.palette)
    with pytest.raises(DataError, match="1 of 3 images have no pseudo-label; the first is 't3'"):
        with_pseudo_labels(target, tmp_path)
    target.skip_bad_files = True
    data = with_pseudo_labels(target, tmp_path)
    assert data.names == ["t1", "t2"] and [p.name for p in data.problems] == ["t3"]
    with pytest.raises(DataError, match="t2.png holds 3; expected a class of 0-2 or 255"):
        data.load(1)


def test_pseudo_labels_written_again_are_read_again(folders, tmp_path):
    target = build_dataset("folders", folders, "val", labels=False)
    for value in (1, 2):
        write_label_png(tmp_path / "v1.png", np.full((H, W), value, np.uint8), target.classes.palette)
        assert (with_pseudo_labels(target, tmp_path).label(0) == value).all()


# ---- label info of the released scripts ----


def test_label_info_spares_reading_labels_and_runs_no_code(gta5, tmp_path):
    from spcl_fast.data.statistics import class_presence

    info = {"00001.png": [0, 13], "00002.png": [18]}
    (gta5 / "gtav_label_info.p").write_bytes(pickle.dumps(([], info), protocol=3))
    presence = class_presence(build_dataset("gta5", gta5, "train"))
    assert np.argwhere(presence).tolist() == [[0, 0], [0, 13], [1, 18]]

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (gta5 / "gtav_label_info.p").write_bytes(pickle.dumps(([], {"00001.png": [Evil()]})))
    with pytest.raises(DataError, match="gtav_label_info.p cannot be used: it asks for .*touch"):
        class_presence(build_dataset("gta5", gta5, "train"))
    assert not (tmp_path / "ran").exists()


def test_label_info_of_other_images_is_not_believed(gta5):
    from spcl_fast.data.statistics import class_presence

    (gta5 / "gtav_label_info.p").write_bytes(pickle.dumps(([], {"00009.png": [0]})))
    assert class_presence(build_dataset("gta5", gta5, "train")).all()
