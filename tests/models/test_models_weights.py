"""Reading weights: every format people own, every way a file can be wrong, and nothing in a file is ever run."""

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spcl_fast.errors import CheckpointError, ConfigError
from spcl_fast.models import build_model, load_weights

SHARED = Path(__file__).resolve().parents[3] / "shared"
LITE0 = SHARED / "weights" / "efficientnet_lite0_encoder_fp16.npz"
needs_lite0 = pytest.mark.skipif(
    not LITE0.is_file(), reason="the EfficientNet-Lite0 weights are not at ../shared/weights"
)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(1)
    return build_model("deeplab_v2_resnet18", 5)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("freeze_bn", [True, False])
def test_released_checkpoint_round_trip(tmp_path, resnet, prefix, freeze_bn):
    checkpoint = {"iteration": 40_000, "optimizer_fea": {"state": {}, "param_groups": [{"lr": 2.5e-4}]}}
    for part in ("feature_extractor", "classifier"):
        checkpoint[part] = {prefix + key: value for key, value in getattr(resnet, part).state_dict().items()}
    torch.save(checkpoint, tmp_path / "model.pth")
    torch.manual_seed(2)
    other = build_model("deeplab_v2_resnet18", 5, freeze_bn=freeze_bn)
    report = load_weights(other, tmp_path / "model.pth")
    assert "SPCL" in report.format and not report.fresh
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images)[1], resnet(images)[1], rtol=1e-4, atol=1e-4)


def test_released_checkpoint_with_only_a_feature_extractor_leaves_the_classifier(tmp_path, resnet):
    torch.save({"feature_extractor": resnet.feature_extractor.state_dict()}, tmp_path / "half.pth")
    other = build_model("deeplab_v2_resnet18", 3)  # other classes: the classifier is not read
    report = load_weights(other, tmp_path / "half.pth")
    assert set(report.fresh) == {key for key in other.state_dict() if key.startswith("classifier.")}


def test_torchvision_resnet_state_dict_with_counters_and_fc(tmp_path, resnet):
    free = build_model("deeplab_v2_resnet18", 5, freeze_bn=False)
    state = {key.removeprefix("backbone."): value for key, value in free.feature_extractor.state_dict().items()}
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    assert "bn1.num_batches_tracked" in state
    torch.save(state, tmp_path / "resnet18.pth")
    model = build_model("deeplab_v2_resnet18", 5, weights=tmp_path / "resnet18.pth")
    for key, value in model.feature_extractor.state_dict().items():
        assert torch.equal(value, state[key.removeprefix("backbone.")])
    report = load_weights(model, tmp_path / "resnet18.pth")
    assert report.unused == ("fc.bias", "fc.weight") and all(key.startswith("classifier.") for key in report.fresh)


def test_torchvision_vgg16_moves_up_behind_the_removed_pool(tmp_path):
    state, channels = {}, 3
    widths = {
        0: 64,
        2: 64,
        5: 128,
        7: 128,
        10: 256,
        12: 256,
        14: 256,
        17: 512,
        19: 512,
        21: 512,
        24: 512,
        26: 512,
        28: 512,
    }
    for index, width in widths.items():
        state[f"features.{index}.weight"] = torch.full((width, channels, 3, 3), float(index))
        state[f"features.{index}.bias"] = torch.full((width,), float(index))
        channels = width
    state["classifier.0.weight"] = torch.zeros(4, 4)
    torch.save(state, tmp_path / "vgg16.pth")
    model = build_model("deeplab_v2_vgg16", 2)
    report = load_weights(model, tmp_path / "vgg16.pth")
    got = [layer.bias[0].item() for layer in model.feature_extractor.backbone if hasattr(layer, "bias")]
    assert got[:13] == [float(index) for index in widths]
    assert report.unused == ("classifier.0.weight",)
    assert {key.split(".")[2] for key in report.fresh if key.startswith("feature_extractor")} == {"29", "31"}


def test_own_safetensors_alone_in_a_folder_and_inside_a_training_checkpoint(tmp_path):
    torch.manual_seed(3)
    model = build_model("tiny", 4)
    (tmp_path / "step").mkdir()
    save_file(model.state_dict(), tmp_path / "step" / "model.safetensors")
    save_file({"momentum": torch.zeros(3)}, tmp_path / "step" / "optimizer.safetensors")
    wrapped = {f"model.{key}": value for key, value in model.state_dict().items()} | {
        "bank.prototypes": torch.zeros(4, 64)
    }
    save_file(wrapped, tmp_path / "all.safetensors")
    for path in ("step", "step/model.safetensors", "all.safetensors"):
        other = build_model("tiny", 4)
        assert not same(state_of(other), state_of(model))
        load_weights(other, tmp_path / path)
        assert same(state_of(other), state_of(model)), path


@needs_lite0
def test_each_of_the_245_published_arrays_is_read_or_known():
    model = build_model("lite0", 8, weights=None)
    fresh_head = state_of(model.feature_extractor.head)
    report = load_weights(model, LITE0)
    with np.load(LITE0) as arrays:
        names = set(arrays.files)
        read = {key.removeprefix("feature_extractor.encoder.") for key in report.loaded}
        assert len(names) == 245 and names == read | set(report.unused) and not read & set(report.unused)
        assert {name.split(".")[1] for name in report.unused if name.startswith("_blocks.")} == {
            "11",
            "12",
            "13",
            "14",
            "15",
        }
        assert {name.split(".")[0] for name in report.unused} == {"_blocks", "_conv_head", "_bn1"}
        own = model.feature_extractor.encoder.state_dict()
        assert own.keys() == read
        for name in read:
            assert np.array_equal(own[name].numpy(), arrays[name].astype(np.float32)), name
    assert same(state_of(model.feature_extractor.head), fresh_head)


@needs_lite0
def test_weights_of_another_net_are_a_config_error():
    with pytest.raises(ConfigError, match="EfficientNet-Lite0 encoder, and the net is tiny: not one key fits"):
        build_model("tiny", 4, weights=LITE0)


def test_no_file_is_a_config_error_that_says_what_we_read(tmp_path):
    with pytest.raises(ConfigError, match="there is no file .*nowhere.pth.*torchvision"):
        build_model("tiny", 4, weights=tmp_path / "nowhere.pth")
    with pytest.raises(ConfigError, match="0 safetensors files"):
        build_model("tiny", 4, weights=tmp_path)


def broken(state, how):
    key = "classifier.conv2d_list.0.weight"
    if how == "missing":
        del state[key]
    elif how == "unexpected":
        state["feature_extractor.backbone.layer9.weight"] = torch.zeros(1)
    else:
        state[key] = torch.zeros(19, *state[key].shape[1:])
    return state


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("missing", r"1 missing: classifier\.conv2d_list\.0\.weight"),
        ("unexpected", r"1 unexpected: feature_extractor\.backbone\.layer9\.weight"),
        ("shape", r"of another shape: .*file \[19, 512, 3, 3\], net \[5, 512, 3, 3\].*number of classes"),
    ],
)
def test_wrong_keys_are_named_and_the_net_stays_as_it_was(tmp_path, resnet, how, text):
    save_file(broken(state_of(resnet), how), tmp_path / "wrong.safetensors")
    torch.manual_seed(4)
    other = build_model("deeplab_v2_resnet18", 5)
    before = state_of(other)
    with pytest.raises(CheckpointError, match=text):
        load_weights(other, tmp_path / "wrong.safetensors")
    assert same(state_of(other), before)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle", "npz"])
def test_code_in_a_file_is_never_run(tmp_path, how):
    trap, path = tmp_path / "was_run", tmp_path / ("evil.npz" if how == "npz" else "evil.pth")
    if how == "torch":
        torch.save({"state_dict": Evil(trap)}, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Evil(trap)}))
    else:
        np.savez(path, **{"_conv_stem.weight": np.array([Evil(trap)], dtype=object)})
    with pytest.raises(CheckpointError, match="evil"):
        build_model("lite0", 4, weights=path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "name", ["cut.safetensors", "cut.pth", "cut.npz", "empty.pth", "empty.npz", "empty.safetensors"]
)
def test_a_cut_file_is_a_checkpoint_error_that_names_it(tmp_path, name):
    model = build_model("tiny", 4)
    path = tmp_path / name
    state = state_of(model)
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    else:
        torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if name.startswith("cut") else b"")
    with pytest.raises(CheckpointError, match=name):
        load_weights(model, path)


def test_an_unknown_dictionary_is_refused_with_its_first_keys(tmp_path):
    torch.save({"epoch": 3, "weights": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="epoch, weights.*We read torchvision"):
        build_model("tiny", 4, weights=tmp_path / "other.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        build_model("tiny", 4, weights=tmp_path / "list.pth")


# ---- what programs of this field write ----


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module._orig_mod.", "backbone.", "module.backbone.", "model.encoder.", "student.net."]
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict"])
def test_a_body_is_found_under_whatever_a_program_called_it(tmp_path, resnet, prefix, wrapper):
    body = {key.removeprefix("backbone."): value for key, value in resnet.feature_extractor.state_dict().items()}
    heads = {"decode_head.conv_seg.weight": torch.zeros(19, 4)} if not prefix.endswith("_orig_mod.") else {}
    state = {prefix + key: value for key, value in body.items()} | heads
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "w.pth")
    other = build_model("deeplab_v2_resnet18", 3, weights=tmp_path / "w.pth")
    assert same(state_of(other.feature_extractor), state_of(resnet.feature_extractor))
    assert load_weights(other, tmp_path / "w.pth").unused == tuple(heads)


def test_the_heads_of_deeplabs_descendants_are_left_out(tmp_path, resnet):
    body = {key.removeprefix("backbone."): value for key, value in resnet.feature_extractor.state_dict().items()}
    torch.save(body | {"layer5.conv2d_list.0.weight": torch.zeros(19, 4)}, tmp_path / "w.pth")
    report = load_weights(build_model("deeplab_v2_resnet18", 3), tmp_path / "w.pth")
    assert "BGR" in report.format and report.unused == ("layer5.conv2d_list.0.weight",)


def test_caffes_weights_are_refused_with_the_reason(tmp_path, resnet):
    body = resnet.feature_extractor.state_dict()
    torch.save({"Scale." + key.removeprefix("backbone."): value for key, value in body.items()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="Caffe's DeepLab weights.*BGR.*stride.*torchvision's ResNet"):
        load_weights(resnet, tmp_path / "w.pth")


def test_two_nets_in_one_file_are_not_chosen_from(tmp_path, resnet):
    body = {key.removeprefix("backbone."): value for key, value in resnet.feature_extractor.state_dict().items()}
    torch.save({f"{name}.{key}": v for name in ("student", "teacher") for key, v in body.items()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds 2 nets: student., teacher."):
        load_weights(resnet, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("extra", "protocol", "told"),
    [
        (np.float64(1), 2, r"holds more than tensors \(numpy\.\S+\) and was not run"),
        (argparse.Namespace(lr=1), 2, r"holds more than tensors \(argparse.Namespace\) and was not run"),
        (None, 4, "is saved with pickle protocol 4, and only protocol 2 is read"),
        (None, 5, "is saved with pickle protocol 5, and only protocol 2 is read"),
    ],
)
def test_a_file_that_is_not_run_is_refused_in_our_words(tmp_path, extra, protocol, told):
    content = {"state_dict": {"conv1.weight": torch.zeros(2)}, "extra": extra}
    torch.save(content, tmp_path / "w.pth", pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=told) as error:
        build_model("tiny", 4, weights=tmp_path / "w.pth")
    text = str(error.value)
    assert 'torch.save(state, "weights.pth")' in text and "w.pth" in text
    assert not any(word in text for word in ("\x1b", "weights_only", "safe_globals", "trust"))


def test_weights_of_a_net_with_other_classes_load_without_their_classifier_when_asked(tmp_path, resnet):
    save_file(resnet.state_dict(), tmp_path / "model.safetensors")
    released = {part: getattr(resnet, part).state_dict() for part in ("feature_extractor", "classifier")}
    torch.save(released, tmp_path / "released.pth")
    for path in (tmp_path / "model.safetensors", tmp_path / "released.pth"):
        other = build_model("deeplab_v2_resnet18", 3)
        before = state_of(other)
        with pytest.raises(CheckpointError, match="classifier does not fit 3 classes.*--model.body_only") as caught:
            load_weights(other, path)
        assert same(state_of(other), before) and len(str(caught.value)) < 700
        report = load_weights(other, path, body_only=True)
        assert set(report.fresh) == {key for key in before if key.startswith("classifier.")} == set(report.unused)
        assert same(state_of(other.feature_extractor), state_of(resnet.feature_extractor))
        assert all(torch.equal(other.state_dict()[key], before[key]) for key in report.fresh)
    built = build_model("deeplab_v2_resnet18", 3, weights=tmp_path / "released.pth", body_only=True)
    assert same(state_of(built.feature_extractor), state_of(resnet.feature_extractor))


@pytest.mark.parametrize("ending", ["pth", "npz", "safetensors"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is empty|whole safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!doctype html><title>404</title>", "it is a web page"),
        (b"PK\x03\x04 cut short", "fetch or save it again"),
        (b"\x80\x02.", "fetch or save it again"),
        (b"\x80\x04}.", "fetch or save it again"),
        (b"junk", "fetch or save it again|more than tensors, or is damaged"),
    ],
)
def test_a_file_that_holds_no_weights_is_told_in_our_words(tmp_path, resnet, ending, content, told):
    path = tmp_path / f"w.{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=told) as caught:
        load_weights(resnet, path)
    others = (
        "allow_pickle",
        "weights_only",
        "unsafely",
        "miniz",
        "PytorchStream",
        "trust",
        "\x1b",
        "pop from",
        "magic number",
    )
    assert not [word for word in others if word in str(caught.value)], str(caught.value)


@pytest.mark.parametrize("spoil", [Tensor.int, Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_tensors_without_the_values_of_weights_are_refused_by_name(tmp_path, resnet, spoil):
    state = {key.removeprefix("backbone."): value for key, value in resnet.feature_extractor.state_dict().items()}
    torch.save(state | {"conv1.weight": spoil(state["conv1.weight"])}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="1 of no such values: .*conv1.weight"):
        load_weights(resnet, tmp_path / "w.pth")


@pytest.mark.parametrize("holder", ["state_dict_ema", "model_ema", "ema", "teacher"])
def test_averaged_weights_are_read_where_there_are_no_others(tmp_path, resnet, holder):
    state = {"module." + key: value for key, value in resnet.state_dict().items()}
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({holder: state, "epoch": 3}, tmp_path / "w.pth")
    other = build_model("deeplab_v2_resnet18", 5)
    load_weights(other, tmp_path / "w.pth")
    assert same(state_of(other), state_of(resnet))
    torch.save({holder: zeros, "model": state}, tmp_path / "both.pth")
    load_weights(other, tmp_path / "both.pth")
    assert same(state_of(other), state_of(resnet))
