"""`spcl-fast export`: one file that predicts what the net does, kept only if it does; `predict` takes it like a run."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from spcl_fast.cli import main
from spcl_fast.config.load import dump_config, load_config
from spcl_fast.errors import NumericError
from spcl_fast.method import export, exported
from spcl_fast.models import MODEL_NAMES, build_model

NAMES = ["road", "sky", "car"]
PALETTE = [[128, 64, 128], [70, 130, 180], [0, 0, 142]]
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
KINDS = [pytest.param(".pt2"), pytest.param(".onnx", marks=needs_onnx)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with its config, its classes, the weights of a tiny net, and images of its target."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    images = folder.parent / "target" / "images" / "val"
    images.mkdir(parents=True)
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (37, 53, 3), np.uint8)
        Image.fromarray(noise).save(images / f"{number}.png")
    (folder / "weights").mkdir(parents=True)
    settings = {
        "source.root": "a", "target.root": str(images.parents[1]), "model.name": "tiny", "model.feature_dim": "8",
        "target.eval_size": "48x32",
    }  # fmt: skip
    (folder / "config.yaml").write_text(dump_config(load_config("folders", overrides=list(settings.items()))))
    for classes in (folder / "classes.json", images.parents[1] / "classes.json"):
        classes.write_text(json.dumps({"names": NAMES, "palette": PALETTE, "ignore_index": 255}))
    torch.manual_seed(0)
    net = build_model("tiny", 3, feature_dim=8)
    torch.nn.init.normal_(net.classifier.weight)  # else all classes are as good
    save_file(net.state_dict(), str(folder / "weights" / "model.safetensors"))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_net_predicts_the_same_masks_in_the_same_colours(run, tmp_path, capfd, kind):
    file, images = tmp_path / "new" / f"net{kind}", run.parent / "target" / "images" / "val"
    assert main(["export", str(run / "weights"), str(file)]) == 0
    said, grumbled = capfd.readouterr()
    assert "100.000% of the labels agree" in said and not grumbled and f"new folder: {file.parent}\n" in said
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert main(["predict", str(run / "weights"), str(images), str(tmp_path / "net")]) == 0
    assert (
        main(["predict", str(file), str(images), str(tmp_path / "file")]) == 0
    )  # no run, no preset, the run's own size
    for path in sorted((tmp_path / "net").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "file" / path.relative_to(tmp_path / "net")).read_bytes()
    assert json.loads((tmp_path / "file" / "classes.json").read_text())["names"] == NAMES


@pytest.mark.parametrize("name", [name for name in MODEL_NAMES if "resnet" not in name and "vgg" not in name])
def test_every_small_net_is_exported_for_any_batch_and_size(tmp_path, name):
    torch.manual_seed(0)
    net = build_model(name, 5, feature_dim=16).eval()
    facts = exported.Facts(net.name, net.stride, (64, 48), tuple("abcde"), ((0, 0, 0),) * 5, 255)
    export._write_torch(export._Logits(net).eval(), torch.rand(1, 3, 48, 64), tmp_path / "net.pt2", facts)
    model, read = exported.load_exported(tmp_path / "net.pt2")
    assert read == facts
    for shape in ((1, 3, 48, 64), (3, 3, 65, 97), (1, 3, 33, 128)):
        images = torch.rand(shape)
        with torch.inference_mode():
            torch.testing.assert_close(model(images)[1], net(images)[1])


def test_a_file_that_predicts_otherwise_is_not_kept(run, tmp_path, monkeypatch):
    other, write = build_model("tiny", 3, feature_dim=8).eval(), export._write_torch
    monkeypatch.setattr(export, "_write_torch", lambda net, *rest: write(export._Logits(other), *rest))
    (tmp_path / "net.pt2").write_text("of yesterday")
    config = load_config(files=[run / "config.yaml"])
    with pytest.raises(NumericError, match="is not written: on 4 images its logits differ .* Try .*net.onnx"):
        export.export_trained(run / "weights", config, None, tmp_path / "net.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]
    assert (tmp_path / "net.pt2").read_text() == "of yesterday"


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [("net.pth", 2, "a name that ends with .onnx or .pt2"), ("config.yaml/net.pt2", 2, "config.yaml")],
)
def test_a_name_that_cannot_be_written_is_refused_before_any_work(run, name, code, text, capsys):
    assert main(["export", str(run / "weights"), str(run / name)]) == code
    assert text in capsys.readouterr().err


def test_a_file_that_export_did_not_make_is_refused_in_one_line(run, tmp_path, capfd):
    images = str(run.parent / "target" / "images" / "val")
    (tmp_path / "text.pt2").write_text("no archive")
    with torch.no_grad():
        torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.rand(2),)), tmp_path / "foreign.pt2")
    for name, text in (
        ("text.pt2", "is no torch.export package"),
        ("foreign.pt2", "Expected a file made by `spcl-fast export`"),
    ):
        assert main(["predict", str(tmp_path / name), images, str(tmp_path / "out")]) == 5
        said = capfd.readouterr()
        assert text in said.err and said.err.count("\n") == 1 and not said.out
