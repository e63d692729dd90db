"""`spcl-fast predict` and `check-data` on real files in a temporary folder."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from spcl_fast.cli import main
from spcl_fast.config.load import dump_config, load_config
from spcl_fast.models import build_model

NAMES, PALETTE = ["road", "sky", "car"], [[128, 64, 128], [70, 130, 180], [0, 0, 142]]


@pytest.fixture
def run(tmp_path):
    """A run folder with its config, its classes and the weights of a tiny net, as if `adapt` had just finished."""
    folder = tmp_path / "runs" / "x"
    weights = folder / "weights"
    weights.mkdir(parents=True)
    settings = [
        ("source.root", "a"),
        ("target.root", "b"),
        ("model.name", "tiny"),
        ("model.feature_dim", "8"),
        ("target.eval_size", "48x32"),
    ]
    (folder / "config.yaml").write_text(dump_config(load_config("folders", overrides=settings)))
    (folder / "classes.json").write_text(json.dumps({"names": NAMES, "palette": PALETTE, "ignore_index": 255}))
    save_file(build_model("tiny", 3, feature_dim=8).state_dict(), str(weights / "model.safetensors"))
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    Image.fromarray(noise[:20, :30, 0]).save(folder / "deeper" / "grey.jpg")
    return folder


def test_predict_writes_masks_and_overlays_at_the_images_own_sizes(run, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["predict", str(run / "weights"), str(images), str(out)]) == 0
    assert "2 images" in capsys.readouterr().out
    for name, size in (("a", (53, 37)), ("deeper/grey", (30, 20))):
        mask, over = Image.open(out / "masks" / f"{name}.png"), Image.open(out / "overlays" / f"{name}.png")
        assert mask.mode == "P" and mask.size == over.size == size and over.mode == "RGB"
        assert np.asarray(mask).max() < 3 and mask.getpalette()[:9] == sum(PALETTE, [])
    assert json.loads((out / "classes.json").read_text())["names"] == NAMES


def test_predict_takes_one_image_a_size_and_a_weights_file(run, images, tmp_path):
    weights = run / "weights" / "model.safetensors"
    for size in ("native", "64x40"):
        assert main(["predict", str(weights), str(images / "a.png"), str(tmp_path / size), "--size", size]) == 0
        assert (tmp_path / size / "masks" / "a.png").is_file()


def test_a_broken_image_stops_with_its_name_or_is_skipped_and_counted(run, images, tmp_path, capsys):
    (images / "b.png").write_bytes((images / "a.png").read_bytes()[:200])
    words = ["predict", str(run / "weights"), str(images), str(tmp_path / "out")]
    assert main(words) == 3
    assert str(images / "b.png") in capsys.readouterr().err
    assert main([*words, "--skip-bad-files"]) == 0
    out = capsys.readouterr().out
    assert "b.png" in out and "1 of 3 images skipped" in out and "2 images: masks" in out
    for image in ("a.png", "deeper/grey.jpg"):
        (images / image).write_bytes(b"")
    assert main([*words, "--skip-bad-files"]) == 3, "nothing was predicted"
    assert "none of 3 images in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["{run}/weights", "{tmp}/none", "{tmp}/out"], 3, "no such folder or image"),
        (["{run}/weights", "{tmp}/runs", "{tmp}/out"], 3, "holds no PNG or JPEG"),
        (["{run}/none", "{tmp}/images", "{tmp}/out"], 2, "no such run folder, checkpoint folder or weights file"),
        (["{tmp}/none", "{tmp}/images", "{tmp}/out"], 2, "no such run folder, checkpoint folder or weights file"),
        (["{run}", "{tmp}/images", "{tmp}/out"], 5, "holds no net of a finished distill, adapt"),
        (["{run}", "{tmp}/images", "{tmp}/out", "--stage", "adapt"], 5, "adapt/checkpoints"),
        (["{run}/weights", "{tmp}/images", "{tmp}/out", "--size", "big"], 2, "WIDTHxHEIGHT"),
        (["{run}/weights", "{tmp}/images", "{tmp}/out", "--model.name", "lite0"], 5, "model.name"),
    ],
)
def test_what_cannot_be_predicted_is_told(words, code, told, run, images, tmp_path, capsys):
    assert main(["predict", *(word.format(run=run, tmp=tmp_path) for word in words)]) == code
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_weights_of_other_classes_get_advice_that_helps_here(run, images, tmp_path, capsys):
    (tmp_path / "five.json").write_text(json.dumps({"names": list("abcde")}))
    weights = shutil.copy(run / "weights" / "model.safetensors", tmp_path)
    words = [str(weights), str(images), str(tmp_path / "out"), "--config", str(run / "config.yaml")]
    assert main(["predict", *words, "--target.classes", str(tmp_path / "five.json")]) == 5
    error = capsys.readouterr().err
    assert "give the classes that it was trained with (--target.classes" in error and "body_only" not in error


def test_weights_that_lack_a_tensor_are_not_taken_for_those_of_other_classes(run, images, tmp_path, capsys):
    weights = load_file(run / "weights" / "model.safetensors")
    part = tmp_path / "part.safetensors"
    save_file({key: value for key, value in weights.items() if key != "classifier.bias"}, part)
    words = [str(part), str(images), str(tmp_path / "out"), "--config", str(run / "config.yaml")]
    assert main(["predict", *words, "--target.classes", str(run / "classes.json")]) == 5
    error = capsys.readouterr().err
    assert "1 missing: classifier.bias" in error and "give a file with the whole net" in error
    assert "classes that it was trained with" not in error


def test_predict_follows_no_link_out_of_the_folder(run, images, tmp_path, capsys):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    (images / "link.png").symlink_to(secret)
    assert main(["predict", str(run / "weights"), str(images), str(tmp_path / "out")]) == 3
    assert "leads out of" in capsys.readouterr().err


def test_predict_follows_links_and_raises_the_size_limit_where_it_is_told_to(run, images, tmp_path, capsys):
    elsewhere = tmp_path / "blobs"
    elsewhere.mkdir()
    (images / "a.png").rename(elsewhere / "0123")
    (images / "a.png").symlink_to(elsewhere / "0123")
    (images / "deeper").rename(tmp_path / "deeper")
    (images / "linked").symlink_to(tmp_path / "deeper")
    out, words = tmp_path / "out", ["predict", str(run / "weights"), str(images), str(tmp_path / "out")]
    assert main([*words, "--skip-bad-files"]) == 3 and not (out / "masks" / "a.png").exists(), (
        "nothing was left to predict"
    )
    said = capsys.readouterr().out
    assert "linked" in said and "--follow-links" in said and said.startswith(str(images))
    assert main([*words, "--follow-links"]) == 0
    assert (out / "masks" / "a.png").is_file() and (out / "masks" / "linked" / "grey.png").is_file()
    assert main([*words, "--follow-links", "--loop.max_pixels", "1000"]) == 3
    err = capsys.readouterr().err
    assert "a.png" in err and "--loop.max_pixels 1961" in err
    assert main([*words, "--follow-links", "--loop.max_pixels", "1961"]) == 0


# ---------------------------------------------------------------------------------------------- check-data


@pytest.fixture
def folders(tmp_path):
    """Two tiny domains in the plain layout."""
    for side in ("source", "target"):
        for split in ("train", "val"):
            for part in ("images", "labels"):
                (tmp_path / side / part / split).mkdir(parents=True)
            Image.new("RGB", (8, 6)).save(tmp_path / side / "images" / split / "a.png")
            ids = np.arange(48).reshape(6, 8) % (3 if split == "train" else 1)  # val has one class of three
            Image.fromarray(ids.astype(np.uint8)).save(tmp_path / side / "labels" / split / "a.png")
        (tmp_path / side / "classes.json").write_text(
            json.dumps({"names": NAMES, "palette": PALETTE, "ignore_index": 255})
        )
    return ["--preset", "folders", "--source.root", str(tmp_path / "source"), "--target.root", str(tmp_path / "target")]


def test_check_data_passes_whole_folders_and_never_opens_target_training_labels(folders, tmp_path, capsys):
    (tmp_path / "target" / "labels" / "train" / "a.png").unlink()
    assert main(["check-data", *folders]) == 0
    out = capsys.readouterr().out
    assert "--- source: folders, split 'train'" in out and "labels: none used" in out and "never occurs" in out


def test_check_data_exits_3_for_a_missing_label_and_an_unknown_id(folders, tmp_path, capsys):
    Image.fromarray(np.full((6, 8), 77, np.uint8)).save(tmp_path / "source" / "labels" / "train" / "a.png")
    assert main(["check-data", *folders, "--side", "source"]) == 3
    out = capsys.readouterr().out
    assert "77 (48 pixels)" in out and "target" not in out
    assert main(["check-data", "--preset", "folders", "--side", "target"]) == 2
    assert "--target.root" in capsys.readouterr().err


def test_check_data_refuses_two_lists_of_classes_as_run_does(folders, tmp_path, capsys):
    (tmp_path / "target" / "classes.json").write_text(json.dumps({"names": ["road", "sky"], "palette": PALETTE[:2]}))
    said = {}
    for words in (
        ["check-data", *folders],
        ["run", *folders, "--loop.device", "cpu", "--runs_dir", str(tmp_path / "runs")],
    ):
        assert main(words) == 3
        said[words[0]] = capsys.readouterr().err.split(": ", 1)[1]
    assert "source and target have different classes: road, sky, car and road, sky" in said["check-data"] == said["run"]


def test_check_data_takes_a_target_without_labels_as_it_is(folders, tmp_path, capsys):
    shutil.rmtree(tmp_path / "target" / "labels")
    assert main(["check-data", *folders]) == 0
    out = capsys.readouterr().out
    assert out.count("labels: none used") == 2 and "Give every image a label" not in out
    shutil.rmtree(tmp_path / "source" / "labels" / "val")
    assert main(["check-data", *folders]) == 3
    assert "none of 1 image has a label" in capsys.readouterr().err


def test_check_data_writes_a_page_of_pictures_that_needs_nothing_else(folders, tmp_path, capsys):
    (tmp_path / "source" / "images" / "train" / "a.png").rename(tmp_path / "source" / "images" / "train" / "<b>&.png")
    (tmp_path / "source" / "labels" / "train" / "a.png").rename(tmp_path / "source" / "labels" / "train" / "<b>&.png")
    page = tmp_path / "deeper" / "data.html"
    assert main(["check-data", *folders, "--page", str(page)]) == 0
    assert f"pictures: {page}" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert text.count('<img src="data:image/jpeg') == 4 + 3, (
        "labels over all images but those of the target's training split"
    )
    assert text.count('src="data:image/png') == 1 and "No problem was found." in text
    assert "&lt;b&gt;&amp;" in text and "<b>&" not in text and "http" not in text.replace("http-equiv", "")
    assert all(f"<h2>{side}, {split}</h2>" in text for side in ("source", "target") for split in ("train", "val"))
    (tmp_path / "source" / "labels" / "val" / "a.png").write_bytes(b"")
    assert main(["check-data", *folders, "--page", str(page)]) == 3
    assert "There are problems." in page.read_text() and "is empty (0 bytes)" in page.read_text()


# ---------------------------------------------------------------------------------------------- evaluate


def test_evaluate_scores_a_weights_file_on_labelled_folders(run, folders, tmp_path, capsys):
    words = [
        "evaluate",
        str(run / "weights"),
        "--target.root",
        str(tmp_path / "target"),
        "--output",
        str(tmp_path / "scores.json"),
    ]
    assert main([*words, "--tta", "flip", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == 1 and sum(map(sum, scores["confusion"])) == 48 and list(scores["iou"]) == NAMES
    assert "mIoU" in out and f"{scores['miou']:.1f}" in out and "model.safetensors" not in scores["weights"]


def test_evaluate_refuses_data_with_other_classes(run, folders, tmp_path, capsys):
    others = {"names": ["road", "sea", "car"], "palette": PALETTE, "ignore_index": 255}
    (tmp_path / "target" / "classes.json").write_text(json.dumps(others))
    assert main(["evaluate", str(run / "weights"), "--target.root", str(tmp_path / "target")]) == 2
    error = capsys.readouterr().err
    assert "road, sky, car" in error and "road, sea, car" in error and "--target.classes" in error
