"""The generated pair: the same bits for the same seed, exact labels, all classes, two looks; and check-data."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from spcl_fast.data import build_dataset, check_data, class_counts
from spcl_fast.data.cache import CACHE
from spcl_fast.data.generated import GeneratedDataset
from spcl_fast.data.generated.pair.scenes import KINDS
from spcl_fast.data.generated.pair.styles import SOURCE, TARGET
from spcl_fast.errors import ConfigError, DataError

KINDS_OF_DATA = ("generated_source", "generated_target")
CHECKSUMS = """
import zlib
from spcl_fast.data import build_dataset
for kind in ("generated_source", "generated_target"):
    for part in build_dataset(kind, "", "val").load(3):
        print(zlib.crc32(part.tobytes()))
"""


def test_scene_is_the_same_bits_in_another_process():
    told = subprocess.run([sys.executable, "-c", CHECKSUMS], capture_output=True, text=True, check=True).stdout.split()
    assert told == [
        str(zlib.crc32(part.tobytes())) for kind in KINDS_OF_DATA for part in build_dataset(kind, "", "val").load(3)
    ]


@pytest.mark.parametrize("kind", KINDS_OF_DATA)
def test_scene_does_not_depend_on_count_order_or_cache(kind):
    one, two = build_dataset(kind, "", "train", limit=5), build_dataset(kind, "", "train", limit=2)
    first = np.asarray(one.image(1)).copy(), one.label(1).copy()
    CACHE.clear()
    label_first = two.label(1), np.asarray(two.image(1))
    assert np.array_equal(first[0], label_first[1]) and np.array_equal(first[1], label_first[0])


def test_scenes_differ_by_index_split_domain_and_seed():
    sets = [build_dataset(kind, "", split) for kind in KINDS_OF_DATA for split in ("train", "val")]
    pictures = [data.image(index).tobytes() for data in sets for index in (0, 1)]
    pictures.append(GeneratedDataset("generated_source", "train", seed=1).image(0).tobytes())
    assert len(set(pictures)) == len(pictures)


def test_default_counts_names_and_splits():
    data = build_dataset("generated_target", "", "train")
    assert (
        len(data) == 400 and len(build_dataset("generated_target", "", "val")) == 60 and data.names[7] == "train_00007"
    )
    assert build_dataset("generated_source", "", "train", labels=False).load(0)[1] is None
    with pytest.raises(ConfigError, match="no split 'test'"):
        build_dataset("generated_source", "", "test")


@pytest.mark.parametrize("kind", KINDS_OF_DATA)
def test_every_class_is_common_enough_to_learn(kind):
    data = build_dataset(kind, "", "train", limit=60)
    counts = class_counts(data)
    shares = counts.sum(0) / counts.sum()
    assert counts.sum() == 60 * 256 * 128 and len(data.classes) == 9  # every pixel has a label
    assert shares.min() > 0.005 and shares.max() < 0.45
    assert ((counts > 0).mean(0) > 0.5).all()


def test_labels_are_those_of_the_parts_that_are_painted():
    data = build_dataset("generated_source", "", "train", limit=3)
    scene = data.scene(2)
    kinds = np.array([KINDS[k] for k in scene.kinds])
    shown = set(kinds[np.unique(scene.part)])
    assert scene.part.max() < len(scene.kinds) and {"road", "sky"} <= shown
    assert set(np.unique(data.label(2)[np.isin(kinds, ["car", "glass", "tyre"])[scene.part]])) <= {
        data.classes.names.index("car")
    }
    assert np.isfinite(scene.depth).all() and scene.depth.min() > 0


def test_domains_look_different_and_hold_the_same_classes():
    source, target = (build_dataset(kind, "", "train", limit=20) for kind in KINDS_OF_DATA)
    assert source.classes == target.classes and set(SOURCE.colours) == set(TARGET.colours) == set(KINDS)

    def statistics(data):
        pixels = np.stack([np.asarray(data.image(i), np.float32) for i in range(len(data))])
        saturation = (pixels.max(-1) - pixels.min(-1)).mean()
        grain = np.abs(np.diff(pixels, axis=2)).mean()
        return saturation, grain

    (s_saturation, s_grain), (t_saturation, t_grain) = statistics(source), statistics(target)
    assert s_saturation > 1.3 * t_saturation and t_grain > s_grain


def test_light_and_sensor_vary_from_image_to_image_on_target_only():
    def spreads(kind):
        data = build_dataset(kind, "", "train", limit=20)
        pixels = np.stack([np.asarray(data.image(i), np.float32) for i in range(len(data))])
        brightness = pixels.mean((1, 2, 3))
        grain = np.median(np.abs(np.diff(pixels, axis=2)), axis=(1, 2, 3))
        return brightness.std() / brightness.mean(), np.percentile(grain, 90) - np.percentile(grain, 10)

    (source_light, source_grain), (target_light, target_grain) = (
        spreads("generated_source"),
        spreads("generated_target"),
    )
    assert target_light > 2 * source_light and target_grain > 3 * source_grain + 2


def test_scenes_are_made_quickly():
    data = build_dataset("generated_target", "", "train", limit=12)
    CACHE.clear()
    start = time.process_time()
    for index in range(12):
        data.load(index)
    assert (time.process_time() - start) / 12 < 0.05  # about 0.006 on an idle core


def test_any_size_works():
    for size in ((64, 32), (31, 47), (400, 300)):
        image, label = GeneratedDataset("generated_target", "train", count=1, size=size).load(0)
        assert image.size == size and label.shape == size[::-1]


# ---- check-data ----


def test_report_tells_shares_and_nothing_wrong():
    report = check_data(build_dataset("generated_source", "", "val"), 5)
    text = report.text()
    assert report.ok and report.checked == 5 and report.images == 60 and abs(report.shares.sum() - 1) < 1e-9
    assert "5 checked" in text and "no problems" in text and "person" in text and "256x128 (5)" in text


def test_report_without_labels_and_with_a_class_that_never_occurs():
    data = build_dataset("generated_source", "", "val", labels=False, limit=2)
    assert "labels: none used" in check_data(data).text()

    class OnlyRoad(GeneratedDataset):
        def label(self, index):
            return np.zeros((128, 256), np.uint8)

    text = check_data(OnlyRoad("generated_source", "val", count=2)).text()
    assert re.search(r"car +0.00% +0 +never occurs", text) and not re.search(r"road .*never occurs", text)


def test_report_spells_out_a_few_problems_and_counts_the_rest():
    class Broken(GeneratedDataset):
        def image(self, index):
            if index:
                raise DataError(f"image {index} is broken")
            return Image.new("RGB", (256, 128))

    report = check_data(Broken("generated_source", "val", count=30))
    text = report.text(most=3)
    assert not report.ok and len(report.problems) == 29 and "29 problems" in text
    assert "image 3 is broken" in text and "... and 26 more" in text
