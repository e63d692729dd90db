"""The driver's view: the same bits for the same seed, exact labels of Cityscapes' classes, true perspective, other classes by a table."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from spcl_fast.cli import main
from spcl_fast.config import DataConfig
from spcl_fast.config.load import load_config
from spcl_fast.config.rules import check_config
from spcl_fast.data import CITYSCAPES_19, build_dataset, check_data, dataset_of
from spcl_fast.data.cache import CACHE
from spcl_fast.data.generated import GeneratedDataset
from spcl_fast.data.generated.driver.ground import draw_ground, draw_sky_and_skyline
from spcl_fast.data.generated.driver.kinds import KINDS, LABELS, SEEN_THROUGH
from spcl_fast.data.generated.driver.lots import Lot, Row, draw_front_row
from spcl_fast.data.generated.driver.street import FAR, Street
from spcl_fast.data.generated.driver.vehicles import MODELS, Vehicle
from spcl_fast.data.sampling import generator
from spcl_fast.errors import ConfigError, DataError

CHECKSUMS = """
import zlib
from spcl_fast.data import build_dataset
for split in ("val", "train"):
    for part in build_dataset("generated_driver", "", split).load(3):
        print(zlib.crc32(part.tobytes()))
"""
ROAD, SIDEWALK, SKY, CAR = (CITYSCAPES_19.names.index(name) for name in ("road", "sidewalk", "sky", "car"))


@pytest.fixture(scope="module")
def forty() -> list[np.ndarray]:
    """The labels of the first training scenes."""
    data = build_dataset("generated_driver", "", "train", limit=40)
    return [data.label(index) for index in range(len(data))]


def small(split="train", **changes) -> GeneratedDataset:
    return GeneratedDataset("generated_driver", split, **{"count": 3, "size": (120, 90), **changes})


# ---- scenes ----


def test_scene_is_the_same_bits_in_another_process():
    told = subprocess.run([sys.executable, "-c", CHECKSUMS], capture_output=True, text=True, check=True).stdout.split()
    loaded = [part for split in ("val", "train") for part in build_dataset("generated_driver", "", split).load(3)]
    assert told == [str(zlib.crc32(part.tobytes())) for part in loaded] and len(set(told)) == 4


def test_scene_does_not_depend_on_count_order_or_cache():
    first = np.asarray(small(count=5).image(1)).copy(), small(count=5).label(1).copy()
    CACHE.clear()
    label_first = small(count=2).label(1), np.asarray(small(count=2).image(1))
    assert np.array_equal(first[0], label_first[1]) and np.array_equal(first[1], label_first[0])


def test_scenes_differ_by_index_split_and_seed():
    sets = (small(), small("val"), small(seed=1))
    assert len({data.image(index).tobytes() for data in sets for index in range(3)}) == 9


def test_default_counts_size_and_classes():
    train, val = (build_dataset("generated_driver", "", split) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (400, 60, CITYSCAPES_19)
    assert train.image(0).size == (480, 360) and train.label(0).shape == (360, 480)
    assert build_dataset("generated_driver", "", "train", labels=False, limit=1).label(0) is None
    with pytest.raises(ConfigError, match="no split 'test'"):
        build_dataset("generated_driver", "", "test")


def test_any_size_works():
    for size in ((64, 48), (31, 47), (512, 256)):
        image, label = small(size=size).load(0)
        assert image.size == size and label.shape == size[::-1]


def test_every_class_but_trains_is_in_the_first_forty_scenes_and_no_pixel_is_void(forty):
    counts = np.stack([np.bincount(label.ravel(), minlength=256) for label in forty])
    assert counts[:, 19:].sum() == 0
    absent = [name for name, count in zip(CITYSCAPES_19.names, counts.sum(0), strict=False) if not count]
    assert absent == ["train"]
    shares = dict(zip(CITYSCAPES_19.names, counts.sum(0) / counts.sum(), strict=False))
    often = dict(zip(CITYSCAPES_19.names, (counts > 0).mean(0), strict=False))
    assert (
        0.2 < shares["road"] < 0.45
        and shares["building"] > 0.1
        and shares["sky"] > 0.08
        and shares["vegetation"] > 0.05
    )
    assert min(often[name] for name in ("road", "sidewalk", "building", "pole", "vegetation", "car")) > 0.9
    assert min(often[name] for name in ("person", "traffic sign", "fence", "wall")) > 0.4


def test_a_driver_looks_onto_a_road_under_a_sky(forty):
    middle = slice(160, 320)
    assert np.mean([(label[-60:, middle] == ROAD).mean() for label in forty]) > 0.75
    assert max((label[:120] == ROAD).mean() for label in forty) == 0  # nothing flat above the highest horizon
    assert max((label[-140:] == SKY).mean() for label in forty) == 0


def test_the_camera_is_that_of_a_car():
    streets = [Street((480, 360), generator(seed)) for seed in range(60)]
    eyes, horizons = [street.eye for street in streets], [street.y0 / 360 for street in streets]
    focals = [street.focal / 480 for street in streets]
    for values, low, high in ((eyes, 1.3, 1.7), (horizons, 0.4, 0.55), (focals, 0.8, 1.3)):
        assert low <= min(values) < low + 0.3 * (high - low) and high - 0.3 * (high - low) < max(values) <= high
    assert {street.traffic for street in streets} == {-1, 1} and all(
        -street.edge[-1] < 0 < street.edge[1] for street in streets
    )


def test_how_bright_the_ground_is_does_not_tell_a_sidewalk_from_the_road():
    data, darker = small(count=120), []
    for index in range(120):
        image, label = data.load(index)
        brightness = np.asarray(image).mean(2)
        if (label == SIDEWALK).sum() > 100:
            darker.append(np.median(brightness[label == SIDEWALK]) < np.median(brightness[label == ROAD]))
    assert len(darker) > 60 and 0.3 < np.mean(darker) < 0.7


def test_slabs_are_of_one_paving_and_end_before_their_joints_are_too_fine_to_see():
    slabbed = 0
    for index in range(12):
        scene = small(count=12, size=(480, 360)).scene(index)
        kinds, groups = (np.array([getattr(part, name) for part in scene.parts]) for name in ("kind", "group"))
        joints = kinds[scene.part] == "joint"
        if not joints.any():
            continue
        slabbed += 1
        assert scene.depth[joints].max() < 14 and (scene.labels()[joints] == SIDEWALK).all()
        for group in np.unique(groups[scene.part][joints]):
            mine = groups[scene.part] == group
            assert set(kinds[scene.part][mine]) == {"joint", "sidewalk"}
            assert 0.05 < joints[mine & (scene.depth < 14)].mean() < 0.5
    assert 4 <= slabbed < 12


# ---- labels ----


def test_every_pixel_has_the_class_of_what_it_is_and_shows_it_or_what_is_behind():
    through = set()
    for index in range(12):
        scene = small(count=12, size=(240, 180)).scene(index)
        kinds = np.array([part.kind for part in scene.parts])
        part, seen = kinds[scene.part], kinds[scene.seen]
        assert np.array_equal(scene.labels(), np.vectorize(LABELS.get)(part))
        assert set(part[scene.part != scene.seen]) <= set(SEEN_THROUGH) and not set(np.unique(seen)) & set(SEEN_THROUGH)
        assert np.isfinite(scene.depth).all() and scene.depth.min() > 0
        through |= set(part[scene.part != scene.seen])
    assert through == set(SEEN_THROUGH)


def test_kinds_belong_to_the_classes_that_people_would_give_them():
    meant = {
        "marking": "road", "kerb": "sidewalk", "shop_pane": "building", "coping": "wall", "railing": "fence", "lantern": "pole",
        "green_light": "traffic light", "sign_back": "traffic sign", "trunk": "vegetation", "airy_crown": "vegetation", "verge": "terrain",
        "coat": "person", "rider_coat": "rider", "car_glass": "car", "truck_tyre": "truck", "bus_plate": "bus", "scooter": "motorcycle",
        "spokes": "bicycle",
    }  # fmt: skip
    assert {kind: CITYSCAPES_19.names[LABELS[kind]] for kind in meant} == meant
    assert set(LABELS) == set(KINDS)


# ---- geometry ----


def empty_street(seed: int, bend: float = 0.0) -> Street:
    street = Street((480, 360), generator(seed))
    street.bend = bend
    draw_sky_and_skyline(street)
    draw_ground(street, {side: Row() for side in (-1, 1)})
    return street


@pytest.mark.parametrize("bend", [0.0, 0.004, -0.004])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_ray_meets_a_front_where_the_front_is(side, bend):
    street = empty_street(1, bend)
    z = street.hit(side, 3.0).astype(np.float64)
    near = z < FAR
    assert near.sum() > 50
    across = street.scene.u[near] * z[near] - bend * z[near] ** 2
    np.testing.assert_allclose(across, side * 3.0, rtol=1e-4)
    assert street.px(side * 3.0, 0, z[near][0])[0] == pytest.approx(np.flatnonzero(near)[0] + 0.5, abs=0.02)


@pytest.mark.parametrize("heading", [(0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0)])
def test_a_car_is_as_large_as_its_distance_says(heading):
    street = empty_street(2)
    car = Vehicle(street, MODELS["hatchback"], 0.0, 12.0, heading)
    car.z, car.s = (
        (12.0 + car.length * (heading[1] < 0), 0.0)
        if heading[1]
        else (12.0 + car.width / 2, -heading[0] * car.length / 2)
    )
    street.draw([(12.0, car.draw)])
    rows, columns = np.nonzero(street.scene.labels() == CAR)
    per_m = street.focal / 12.0
    assert np.ptp(columns) + 1 == pytest.approx((car.width if heading[1] else car.length) * per_m, abs=2.5)
    assert rows.max() == pytest.approx(
        street.y0 + street.eye * per_m, abs=2
    )  # its tyres stand on the ground at its distance
    assert np.ptp(rows) + 1 == pytest.approx(
        car.height * per_m, abs=0.2 * per_m
    )  # the roof lies further back and looks lower


def test_near_things_hide_far_ones_whatever_their_order():
    for order in (1, -1):
        street = empty_street(3)
        cars = [Vehicle(street, MODELS["van"], 0.0, z, (0.0, 1.0)) for z in (8.0, 30.0)]
        street.draw([(car.z, car.draw) for car in cars][::order])
        x, y = street.px(0.0, street.eye - 0.1, 8.0)  # where both would be
        assert street.scene.depth[int(y), int(x)] == 8.0


def test_a_wall_ends_where_its_lot_ends():
    street = empty_street(4)
    street.chance = lambda probability: False
    draw_front_row(street, 1, Row(fronts=[Lot("wall", 30.0, 60.0, 6.0, 1.5)]))
    wall = street.scene.labels() == CITYSCAPES_19.names.index("wall")
    columns = np.flatnonzero(wall.any(0))
    assert (columns[0], columns[-1]) == pytest.approx((street.px(6.0, 0, 60.0)[0], street.px(6.0, 0, 30.0)[0]), abs=1.5)
    z = street.scene.depth[wall]
    assert 30.0 <= z.min() < 31.0 and 57.0 < z.max() < 60.0


# ---- looks ----


def test_light_sky_and_sharpness_vary_from_image_to_image():
    data = small(count=40, size=(160, 120))
    roads, blues, grains = [], [], []
    for index in range(len(data)):
        label, pixels = data.label(index), np.asarray(data.image(index), np.float32)
        roads.append(np.median(pixels[label == ROAD].mean(-1)))
        grains.append(np.abs(np.diff(pixels, axis=1)).mean())
        if (top := label[:25] == SKY).sum() > 50:
            blues.append((pixels[:25][top][:, 2] - pixels[:25][top][:, 0]).mean())
    assert max(roads) > 5 * min(roads) and np.percentile(roads, 90) > 2.5 * np.percentile(roads, 10)  # dusk to glare
    assert max(blues) > 35 and (np.abs(blues) < 1).mean() > 0.2  # clear skies, and washed-out ones
    assert max(grains) > 1.8 * min(grains)


# ---- classes ----


def write_classes(folder, **tables) -> str:
    path = folder / "classes.json"
    path.write_text(json.dumps({"names": ["ground", "thing"], "palette": [[1, 2, 3], [4, 5, 6]], "from": tables}))
    return str(path)


def test_the_nineteen_ids_go_through_a_classes_file(tmp_path):
    plain = build_dataset("generated_driver", "", "val", limit=1)
    path = write_classes(tmp_path, cityscapes19={"0": 0, "1": 0, "13": 1})
    expected = np.full(256, 255, np.uint8)
    expected[[0, 1, 13]] = 0, 0, 1
    for key in (None, "cityscapes19"):
        data = build_dataset("generated_driver", "", "val", limit=1, classes=path, classes_key=key)
        assert data.classes.names == ("ground", "thing")
        assert np.array_equal(data.label(0), expected[plain.label(0)])
        assert data.image(0).tobytes() == plain.image(0).tobytes()
    assert plain.label(0).max() > 1  # the mapped labels did not take the place of the plain ones


def test_a_table_of_its_own_comes_first_and_a_missing_one_is_told(tmp_path):
    path = write_classes(tmp_path, cityscapes19={"0": 0}, generated_driver={"0": 1}, generated_source={"0": 0, "7": 1})
    assert build_dataset("generated_driver", "", "val", limit=1, classes=path).label(0)[-1, 240] == 1
    pair = build_dataset("generated_source", "", "val", limit=2, classes=path)
    assert set(np.unique([pair.label(0), pair.label(1)])) == {0, 1, 255}
    with pytest.raises(DataError, match="has no table 'generated_target'"):
        build_dataset("generated_target", "", "val", classes=path)
    with pytest.raises(DataError, match="has no table 'camvid'"):
        build_dataset("generated_driver", "", "val", classes=path, classes_key="camvid")


def test_the_shared_classes_of_camvid_fit(shared_dir):
    path = str(shared_dir / "data" / "shared_classes.json")
    config = load_config(
        "folders",
        (),
        (),
        [("source.dataset", "generated_driver"), ("source.classes", path), ("source.classes_key", "cityscapes19")],
    )
    data = dataset_of(config.source, "val")
    assert data.classes.names == ("road", "sidewalk", "building", "fence", "pole", "vegetation", "sky", "car")
    report = check_data(data, 8)
    assert report.ok and (report.shares > 0).all()


def test_a_classes_file_without_tables_must_have_the_same_classes(tmp_path):
    with pytest.raises(DataError, match="other classes than generated_driver"):
        build_dataset("generated_driver", "", "val", classes=write_classes(tmp_path))
    (tmp_path / "same.json").write_text(json.dumps({"names": CITYSCAPES_19.names, "palette": CITYSCAPES_19.palette}))
    assert build_dataset("generated_driver", "", "val", limit=1, classes=tmp_path / "same.json").label(0).max() < 19


# ---- merged with another source ----


@pytest.fixture
def town(tmp_path):
    """Two labelled photographs of another set, with ids of its own: 0, 1 and 2."""
    for index in range(2):
        for folder, picture in (
            ("images", np.full((9, 16, 3), 90, np.uint8)),
            ("labels", np.full((9, 16), index, np.uint8)),
        ):
            (tmp_path / "town" / folder / "train").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "town" / folder / "train" / f"a{index}.png")
    path = write_classes(tmp_path, town={"0": 1, "1": 0}, cityscapes19={"0": 0, "13": 1})
    return DataConfig(dataset="folders+generated_driver", root=str(tmp_path / "town"), size=(64, 36), classes=path)


def test_joined_sets_keep_their_images_labels_and_tables(town):
    data = dataset_of(town, "train")
    assert (
        len(data) == 402
        and data.names[:3] == ["a0", "a1", "generated_driver/train_00000"]
        and data.classes.names == ("ground", "thing")
    )
    assert (data.label(0) == 1).all() and (data.label(1) == 0).all()
    image, label = data.load(2)
    alone = build_dataset("generated_driver", "", "train", limit=1, classes=town.classes)
    assert (
        image.size == (64, 36) and set(np.unique(label)) <= {0, 1, 255} and label.shape == (36, 64) and len(alone) == 1
    )
    subset = data.select([401, 0])
    assert subset.names == ["generated_driver/train_00399", "a0"] and np.array_equal(subset.label(1), data.label(0))
    assert (
        np.array_equal(subset.label(0), data.label(401))
        and subset.image_path(1).name == "a0.png"
        and subset.image_path(0) is None
    )
    assert dataset_of(town, "train", labels=False).label(2) is None
    assert check_data(data, 4).ok


def test_train_images_bounds_the_folder_and_not_the_scenes(town):
    assert len(dataset_of(dataclasses.replace(town, train_images=1), "train")) == 401


def test_joined_sets_of_different_classes_are_refused(town, tmp_path):
    (tmp_path / "town" / "classes.json").write_text(json.dumps({"names": ["a", "b", "c"]}))
    with pytest.raises(DataError, match="folders and generated_driver have different classes: a, b, c and road"):
        dataset_of(dataclasses.replace(town, classes=None), "train")


def test_generated_scenes_join_the_source_alone():
    config = load_config(
        "folders", (), (), [("target.dataset", "folders+generated_driver"), ("source.dataset", "generated_driver")]
    )
    with pytest.raises(ConfigError, match="generated scenes can join the source alone"):
        check_config(config)


# ---- in a run ----


def test_a_run_trains_on_it_and_scores_its_nineteen_classes(tmp_path):
    settings = {
        "stages": "[source_only]", "source.dataset": "generated_driver", "target.dataset": "generated_driver", "model.name": "tiny",
        "source.size": "[64, 48]", "source.eval_size": "[64, 48]", "target.size": "[64, 48]", "target.eval_size": "[64, 48]",
        "source.train_images": "2", "target.train_images": "2", "source_only.iterations": "2", "source_only.batch_size": "2",
        "source_only.augment.crop": "[64, 48]", "evaluate.images": "1", "loop.workers": "0",
        "loop.device": "cpu", "runs_dir": str(tmp_path),
    }  # fmt: skip
    command = ["run", "--preset", "folders"]
    for key, value in settings.items():
        command += [f"--{key}", value]
    assert main(command) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["classes"] == list(CITYSCAPES_19.names) and 0 <= summary["source_only"]["miou"] <= 100


def test_no_root_is_asked_for():
    config = load_config("folders", (), (), [("source.dataset", "generated_driver"), ("target.root", "somewhere")])
    check_config(config, ("source_only",))
