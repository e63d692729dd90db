"""Labels and images that are not what they seem: turned photos, other bit depths, JPEGs by content, colours, equal channels."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made_pictures import STORED, png, save_turned
from PIL import Image, ImageOps

from spcl_fast.data import build_dataset, check_data
from spcl_fast.data.colours import LabelColours
from spcl_fast.data.files import read_ids, read_ids_first_channel_16bit, read_image
from spcl_fast.data.palette import write_label_png
from spcl_fast.errors import DataError

UPRIGHT = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_an_image_of_every_orientation_is_read_upright(tmp_path, orientation, ending):
    path = tmp_path / f"i.{ending}"
    save_turned(path, UPRIGHT, orientation, **({"quality": 100, "subsampling": 0} if ending == "jpg" else {}))
    image = read_image(path)
    with Image.open(path) as stored:
        assert stored.size == STORED[orientation](UPRIGHT).shape[1::-1]
        assert np.array_equal(np.asarray(image), np.asarray(ImageOps.exif_transpose(stored)))
    assert np.abs(np.asarray(image).astype(int) - UPRIGHT).max() <= (0 if ending == "png" else 6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_label_that_has_an_orientation_is_turned_as_its_image_is(tmp_path, orientation, dtype):
    ids = np.arange(35, dtype=dtype).reshape(5, 7)
    save_turned(tmp_path / "l.png", ids, orientation)
    assert read_ids(tmp_path / "l.png").tolist() == ids.tolist()


def test_an_orientation_in_xmp_alone_is_applied_and_a_damaged_block_is_no_orientation(tmp_path):
    Image.fromarray(UPRIGHT[::-1, ::-1]).save(
        tmp_path / "x.jpg", quality=100, subsampling=0, xmp=b'<x:xmpmeta><rdf tiff:Orientation="3"/></x:xmpmeta>'
    )
    assert np.abs(np.asarray(read_image(tmp_path / "x.jpg")).astype(int) - UPRIGHT).max() <= 6
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\xff\xff"):
        Image.fromarray(UPRIGHT).save(tmp_path / "d.png", exif=exif)
        assert np.array_equal(np.asarray(read_image(tmp_path / "d.png")), UPRIGHT)


@pytest.mark.parametrize("name", ["orientation_3", "orientation_6"])
def test_the_labels_of_a_turned_photo_lie_on_its_plants(shared_dir, name):
    data = build_dataset("folders", shared_dir / "data" / "exif_fixture", "val")
    image, label = data.load(data.names.index(name))
    red, green, blue = np.asarray(image).astype(int).transpose(2, 0, 1)
    green_ones, plants = 2 * green - red - blue > 20, (label > 0) & (label < 255)
    assert (green_ones & plants).sum() / (green_ones | plants).sum() > 0.4  # 0.15 where the orientation is not applied


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colour_type", [0, 3])
def test_the_samples_of_a_label_are_its_ids_whatever_their_bit_depth(tmp_path, bits, colour_type):
    if (bits, colour_type) == (16, 3):
        pytest.skip("a palette has at most 256 entries")
    ids = np.random.default_rng(bits).integers(0, min(2**bits, 60000), (5, 13))
    ids[0, :2] = 0, 2**bits - 1
    path = tmp_path / "l.png"
    path.write_bytes(png(ids, bits, colour_type, bytes(3 * 2 ** min(bits, 8)) if colour_type == 3 else b""))
    assert read_ids(path).tolist() == ids.tolist()


@pytest.mark.parametrize("colour_type", [2, 6, 0, 4])
def test_a_16_bit_image_is_refused_instead_of_read_black(tmp_path, colour_type):
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    (tmp_path / "i.png").write_bytes(png(np.full((4, 4, channels), 4095), 16, colour_type))
    with pytest.raises(DataError, match="has mode .*16.*; expected 8-bit RGB.*Save it as 8-bit RGB"):
        read_image(tmp_path / "i.png")


@pytest.mark.parametrize("colour_type", [2, 6])
def test_a_16_bit_colour_label_is_refused_but_by_synthia(tmp_path, colour_type):
    samples = np.arange(4 * 4 * 4).reshape(4, 4, 4)[..., : {2: 3, 6: 4}[colour_type]] + 300
    (tmp_path / "l.png").write_bytes(png(samples, 16, colour_type))
    with pytest.raises(DataError, match="has mode RGBA?;16B; expected one class id per pixel"):
        read_ids(tmp_path / "l.png")
    assert read_ids_first_channel_16bit(tmp_path / "l.png").tolist() == samples[..., 0].tolist()


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_label_that_is_a_jpeg_by_content_is_refused(tmp_path, ending, mode):
    path = tmp_path / f"l.{ending}"
    Image.fromarray(np.full((8, 8), 3, np.uint8)).convert(mode).save(path, "JPEG")
    for colours in (None, LabelColours((((3, 3, 3), 1),))):
        with pytest.raises(DataError, match=f"l.{ending} is a JPEG, whatever its name ends in.*as PNG"):
            read_ids(path, colours)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP"])
def test_a_label_of_another_format_is_told_that_it_is_no_png(tmp_path, kind):
    Image.fromarray(np.full((8, 8), 3, np.uint8)).save(tmp_path / "l.png", kind)
    with pytest.raises(DataError, match="l.png is no PNG"):
        read_ids(tmp_path / "l.png")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_three_equal_channels_are_the_ids(tmp_path, mode):
    ids = np.array([[0, 1, 2], [18, 254, 255]], np.uint8)
    Image.fromarray(ids).convert(mode).save(tmp_path / "l.png")
    assert read_ids(tmp_path / "l.png").tolist() == ids.tolist()


def test_a_partly_transparent_label_is_refused(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "l.png")
    with pytest.raises(DataError, match="partly transparent"):
        read_ids(tmp_path / "l.png")


# ---- colours ----

PALETTE = [[70, 130, 180], [128, 64, 128], [0, 0, 142]]
IDS = np.array([[0, 1, 2, 1], [2, 2, 0, 0]], np.uint8)


def coloured_set(root, pixels, **classes):
    for folder in ("images/train", "labels/train"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", pixels.shape[1::-1]).save(root / "images/train/a.png")
    Image.fromarray(pixels).save(root / "labels/train/a.png")
    (root / "classes.json").write_text(json.dumps({"names": ["sky", "road", "car"], **classes}))
    return build_dataset("folders", root, "train")


@pytest.mark.parametrize("opaque", [False, True])
def test_a_label_in_the_palettes_colours_is_read_by_them(tmp_path, opaque):
    pixels = np.array(PALETTE, np.uint8)[IDS]
    if opaque:
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], 2)
    data = coloured_set(tmp_path, pixels, palette=PALETTE)
    assert data.load(0)[1].tolist() == IDS.tolist() and check_data(data).unknown == {}


def test_a_colour_that_is_nearly_a_classes_is_refused_and_named(tmp_path):
    pixels = np.array(PALETTE, np.uint8)[IDS]
    pixels[0, 0] += 1
    data = coloured_set(tmp_path, pixels, palette=PALETTE)
    with pytest.raises(DataError, match=r"colours that the palette lacks: \(71, 131, 181\) \(1 pixel\).*\"void\""):
        data.load(0)
    assert not check_data(data).ok


def test_a_colour_listed_as_void_is_ignored(tmp_path):
    pixels = np.array(PALETTE, np.uint8)[IDS]
    pixels[1] = 0
    data = coloured_set(tmp_path, pixels, palette=PALETTE, void=[[0, 0, 0]])
    assert data.load(0)[1].tolist() == [IDS[0].tolist(), [255] * 4] and not check_data(data).unknown


def test_colours_without_a_palette_are_refused_with_the_way_on(tmp_path):
    data = coloured_set(tmp_path, np.array(PALETTE, np.uint8)[IDS])
    with pytest.raises(DataError, match='coloured rendering of a label.*"palette" in classes.json'):
        data.load(0)


def test_black_and_white_are_colours_where_the_palette_says_so(tmp_path):
    pixels = np.array([[0, 255], [255, 0]], np.uint8)[..., None].repeat(3, 2)
    data = coloured_set(tmp_path, pixels, names=["background", "object"], palette=[[0, 0, 0], [255, 255, 255]])
    assert data.load(0)[1].tolist() == [[0, 1], [1, 0]]


def test_a_label_that_ids_and_colours_read_differently_is_refused(tmp_path):
    data = coloured_set(tmp_path, np.zeros((2, 2, 3), np.uint8), palette=[[9, 9, 9], [0, 0, 0], [8, 8, 8]])
    with pytest.raises(DataError, match="both as ids and as colours"):
        data.load(0)


def test_two_classes_of_one_colour_cannot_be_told_apart_by_it(tmp_path):
    colours = [[1, 2, 3], [1, 2, 3], [4, 5, 6]]
    with pytest.raises(DataError, match=r"\(1, 2, 3\) is the colour of both"):
        coloured_set(tmp_path, np.array(colours, np.uint8)[IDS], palette=colours).load(0)


def test_a_palette_png_whose_own_colours_contradict_its_indices_is_refused(tmp_path):
    image = Image.fromarray(IDS).convert("L")
    data = coloured_set(tmp_path, IDS, palette=PALETTE)
    for colours, fits in ((PALETTE, True), ([[9, 9, 9]] * 3, True), (PALETTE[::-1], False)):
        image.putpalette(np.array(colours, np.uint8).tobytes())
        image.save(tmp_path / "labels/train/a.png")
        if fits:
            assert build_dataset("folders", tmp_path, "train").load(0)[1].tolist() == IDS.tolist()
        else:
            with pytest.raises(DataError, match="contradicts classes.json: its palette shows index 0"):
                build_dataset("folders", tmp_path, "train").load(0)
    assert data.classes.names == ("sky", "road", "car")


def with_greys(path, indices, greys):
    path.write_bytes(png(np.array([indices]), 8, 3, bytes(np.repeat(np.array(greys, np.uint8), 3))))


@pytest.mark.parametrize(
    ("indices", "greys"),
    [([0, 4, 2], [18, 255, 13, 7, 0]), ([0, 1, 2], [0, 1, 7, 255]), ([0, 1], [0, 7]), ([0, 0], [255])],
)
def test_ids_that_an_optimiser_put_into_a_grey_palette_are_not_read_as_its_indices(tmp_path, indices, greys):
    with_greys(tmp_path / "l.png", indices, greys)
    with pytest.raises(DataError, match=r"a PNG optimiser makes such a file .* convert them to mode L"):
        read_ids(tmp_path / "l.png")
    with Image.open(tmp_path / "l.png") as image:
        image.convert("L").save(tmp_path / "l.png")  # the remedy
    assert read_ids(tmp_path / "l.png").tolist() == [[greys[k] for k in indices]]


@pytest.mark.parametrize(
    "greys",
    [[0, 255], [255, 0], [0, 128, 255], [0, 1, 2, 3], list(range(19)), [0, 1, 77], [9, 9, 9], list(range(255, -1, -1))],
)
def test_indices_of_a_grey_palette_that_somebody_made_to_look_at_are_ids(tmp_path, greys):
    with_greys(tmp_path / "l.png", [0, 1, 1, 0], greys)
    assert read_ids(tmp_path / "l.png").tolist() == [[0, 1, 1, 0]]


def test_greys_that_the_palette_of_the_classes_names_are_colours(tmp_path):
    with_greys(tmp_path / "l.png", [0, 1], [30, 90])
    named = LabelColours((((30, 30, 30), 0), ((90, 90, 90), 1)), names_indices=True)
    assert read_ids(tmp_path / "l.png", named).tolist() == [[0, 1]]


def test_void_in_a_palette_png_may_have_the_colour_of_a_class(tmp_path):
    palette = [[0, 0, 0], [128, 64, 128], [0, 0, 142]]  # black is the background's, as VOC has it
    data = coloured_set(tmp_path, IDS, palette=palette)
    ids = np.where(IDS == 1, 255, IDS).astype(np.uint8)
    write_label_png(tmp_path / "labels/train/a.png", ids, palette)  # pseudo-labels, too: black where nothing is kept
    assert data.load(0)[1].tolist() == ids.tolist()


def test_colours_of_a_shared_classes_file_are_its_classes(tmp_path):
    data = coloured_set(tmp_path / "town", np.array(PALETTE, np.uint8)[IDS])
    (tmp_path / "town" / "classes.json").unlink()
    shared = {"names": ["sky", "road", "car"], "palette": PALETTE}
    for tables in ({}, {"from": {"town": {"5": 0, "6": 1, "9": 2}}}):
        (tmp_path / "shared.json").write_text(json.dumps(shared | tables))
        data = build_dataset("folders", tmp_path / "town", "train", classes=tmp_path / "shared.json")
        assert data.load(0)[1].tolist() == IDS.tolist() and not check_data(data).unknown
