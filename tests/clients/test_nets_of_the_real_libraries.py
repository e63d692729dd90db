"""timm/NAME and transformers/NAME with the real libraries, random weights: run by `make clients`. CI has neither library, and has
stand-ins for them instead (tests/models/test_models_by_name.py, tests/method/test_nets_by_name.py)."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from spcl_fast.cli import main
from spcl_fast.config.load import load_config
from spcl_fast.data import read_label_png
from spcl_fast.errors import ConfigError
from spcl_fast.memory_plan.peak import count_step, peak_memory, step_of
from spcl_fast.method.run import run_stages
from spcl_fast.method.trained import load_trained
from spcl_fast.models import build_model
from spcl_fast.runs.tensorfile import read_tensors

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("timm", "transformers")),
    reason="needs the real timm and transformers: make clients",
)
SHARED = Path(__file__).resolve().parents[3] / "shared"
OWN_MEAN = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
TIMM = {  # name -> stride, channels of all maps from there on
    "timm/resnet18": (8, 128 + 256 + 512),
    "timm/convnext_atto": (8, 80 + 160 + 320),
    "timm/vit_small_patch14_dinov2": (14, 384),
    "timm/efficientnet_lite0": (8, 40 + 112 + 320),
}
TRANSFORMERS = {
    "segformer": (8, 32 + 48 + 64),
    "dinov2": (14, 48),
    "resnet": (8, 32 + 48 + 64),
    "convnext": (8, 24 + 32 + 48),
}
NAMES = (*TIMM, *TRANSFORMERS)


@pytest.fixture(scope="session")
def model_name(tmp_path_factory):
    """Of a net of transformers a folder with its config, small."""
    root = tmp_path_factory.mktemp("nets")

    def folder(kind: str) -> str:
        import transformers as t

        configs = {
            "segformer": lambda: t.SegformerConfig(
                hidden_sizes=[16, 32, 48, 64], depths=[1] * 4, num_attention_heads=[1, 2, 2, 4]
            ),
            "dinov2": lambda: t.Dinov2Config(
                hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
            ),
            "resnet": lambda: t.ResNetConfig(
                embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1] * 4, layer_type="basic"
            ),
            "convnext": lambda: t.ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1] * 4),
            "bert": lambda: t.BertConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            ),
            "vit": lambda: t.ViTConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            ),
        }
        configs[kind]().save_pretrained(root / kind)
        (root / kind / "preprocessor_config.json").write_text(json.dumps(OWN_MEAN))
        return f"transformers/{root / kind}"

    return lambda name: name if "/" in name else folder(name)


@pytest.mark.parametrize("name", NAMES)
def test_maps_mean_and_gradients_are_those_of_the_net(model_name, name):
    stride, channels = (TIMM | TRANSFORMERS)[name]
    plain = build_model(model_name(name), 5, feature_dim=None)
    assert (plain.stride, plain.channels) == (stride, channels)
    net = build_model(model_name(name), 5).train()
    features, logits = net(torch.rand(2, 3, 75, 101))
    assert all(abs(got - side / stride) < 1 for got, side in zip(features.shape[2:], (75, 101), strict=True))
    logits.square().mean().backward()
    learning = [key for key, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not [key for key in learning if "mask_token" not in key], learning  # only masked pre-training uses it
    expected = OWN_MEAN["image_mean"] if name in TRANSFORMERS else [0.485, 0.456, 0.406]
    assert net.mean.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    scales = [group["lr_scale"] for group in net.parameter_groups(1.0, 10.0, 0.5)]
    assert scales[-1] == 10 and scales[-2] == 1 and len(scales) > 4 and sorted(scales) == scales
    with FakeTensorMode():
        assert build_model(model_name(name), 5)(torch.empty(2, 3, 75, 101))[0].shape == features.shape


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/efficientnet_lite0", "resnet"])
def test_real_norms_are_frozen_with_what_is_inside_of_them(model_name, name):
    torch.manual_seed(0)
    free, frozen = (build_model(model_name(name), 5, freeze_bn=freeze) for freeze in (False, True))
    frozen.load_state_dict(free.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(frozen.train()(images), free.eval()(images))
    before = {key: value.clone() for key, value in frozen.state_dict().items() if "running_" in key}
    frozen(images)
    assert before and all(torch.equal(value, frozen.state_dict()[key]) for key, value in before.items())
    assert len(list(free.parameters())) == len(list(frozen.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_the_counted_peak_of_a_real_step(model_name, name):
    sizes = {"source.size": "96x64", "target.size": "96x64", "loop.device": "cpu", "adapt.batch_size": "2"}
    config = load_config("demo", (), (), list({**sizes, "model.name": model_name(name)}.items()))
    predicted, work = peak_memory(config, "adapt"), step_of(config, "adapt", 5)
    for domain in work.batch:
        domain.images.uniform_()
        domain.labels.random_(0, 5)
    assert predicted.peak_bytes == pytest.approx(count_step(work, on_cpu=True).peak, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_trained_and_loaded(model_name, name, tmp_path):
    size = {f"{side}.{key}": "256x192" for side in ("source", "target") for key in ("size", "eval_size")}
    given = {
        **size, "model.name": model_name(name), "runs_dir": str(tmp_path), "name": "run",
        "source_only.iterations": "2", "source_only.batch_size": "2",
        "source.train_images": "4", "evaluate.images": "2", "loop.workers": "0", "model.layer_decay": "0.8",
    }  # fmt: skip
    config = load_config("demo", (), (), list(given.items()))
    run_stages(config, ("source_only",))
    trained = load_trained(tmp_path / "run", config)
    saved = read_tensors(tmp_path / "run" / "source_only" / "checkpoints" / "step_00000002" / "model.safetensors")
    state = {key: value for key, value in trained.model.state_dict().items() if "num_batches" not in key}
    assert all(torch.equal(value, saved[key]) for key, value in state.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_net_of_a_library_predicts_the_same_masks_from_either_file(model_name, name, tmp_path):
    """By the commands that a user types: export compares logits itself, predict then takes the file without any settings."""
    size = {f"{side}.{key}": "256x192" for side in ("source", "target") for key in ("size", "eval_size")}
    given = {
        **size, "model.name": model_name(name), "runs_dir": str(tmp_path), "name": "run",
        "source_only.iterations": "1", "source_only.batch_size": "2", "source.train_images": "4", "evaluate.images": "2",
        "loop.workers": "0",
    }  # fmt: skip
    run_stages(load_config("demo", (), (), list(given.items())), ("source_only",))
    for number, (width, height) in enumerate(((203, 151), (256, 192))):
        noise = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(noise).resize((width, height)).save(tmp_path / "images" / f"{number}.png")
    nets = [tmp_path / "run", tmp_path / "net.pt2", tmp_path / "net.onnx"]
    for file in nets[1:]:
        assert main(["export", str(nets[0]), str(file), "--images", "2"]) == 0
    masks = []
    for net in nets:
        assert main(["predict", str(net), str(tmp_path / "images"), str(tmp_path / f"out_{net.name}")]) == 0
        masks.append([read_label_png(path) for path in sorted((tmp_path / f"out_{net.name}" / "masks").glob("*.png"))])
    for of_file in masks[1:]:
        for ours, theirs in zip(masks[0], of_file, strict=True):
            assert ours.shape == theirs.shape and (ours == theirs).mean() > 0.999


def test_weights_of_a_folder_are_the_librarys(model_name):
    import transformers

    name = model_name("dinov2")
    folder = name.removeprefix("transformers/")
    source = transformers.AutoBackbone.from_config(transformers.AutoConfig.from_pretrained(folder))
    source.save_pretrained(folder)
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(OWN_MEAN))
    net = build_model(name, 5, pretrained=True, feature_dim=None).eval()
    images = torch.rand(1, 3, 56, 70)
    with torch.no_grad():
        theirs = source.eval()((images - net.mean) / net.std).feature_maps[-1]
        torch.testing.assert_close(net(images)[0], theirs)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/resnet81", "timm has no net 'resnet81', did you mean 'resnet18'"),
        ("vit", "has no AutoBackbone, and none of its hidden states is a map"),
        ("bert", "does not take an image"),
        ("transformers/nobody/nothing-at-all", "its config of transformers' 'nobody/nothing-at-all' cannot be had"),
    ],
)
def test_what_is_no_net_is_refused_in_words(model_name, name, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=re.escape(words)):
        build_model(model_name(name), 5)


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="the Lite weights are not at ../shared/weights")
@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
def test_lite_is_timms_tf_efficientnet_lite_with_the_same_weights(name):
    import timm

    file = SHARED / "weights" / f"efficientnet_{name}_encoder_fp16.npz"
    theirs = timm.create_model(f"tf_efficientnet_{name}", num_classes=0).eval()
    with np.load(file) as arrays:
        state = timm_names(theirs, {key: torch.from_numpy(arrays[key]).float() for key in arrays.files})
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    ours = build_model(name, 8, weights=file).eval()
    image = torch.rand(1, 3, 97, 130)
    with torch.no_grad():
        skip, deep = ours.feature_extractor.encoder((image - ours.mean) / ours.std)
        x, maps = theirs.bn1(theirs.conv_stem((image - ours.mean) / ours.std)), []
        for stage in theirs.blocks:
            x = stage(x)
            maps.append(x)
    for own, other in ((skip, maps[2]), (deep, maps[4])):
        assert own.shape == other.shape and (own - other).abs().max() < 1e-4 * other.abs().max()


def timm_names(net, state):
    """EfficientNet-PyTorch's names of an encoder under timm's."""
    places = [(stage, block) for stage, blocks in enumerate(net.blocks) for block in range(len(blocks))]
    tops = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    first = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}  # without an expansion
    others = {
        "expand_conv": "conv_pw",
        "bn0": "bn1",
        "depthwise_conv": "conv_dw",
        "bn1": "bn2",
        "project_conv": "conv_pwl",
        "bn2": "bn3",
    }
    named = {}
    for key, value in state.items():
        found = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", key)
        if found is None:
            part, _, leaf = key.partition(".")
            named[f"{tops[part]}.{leaf}"] = value
        else:
            index = int(found[1])
            stage, block = places[index]
            named[f"blocks.{stage}.{block}.{(others if index else first)[found[2]]}.{found[3]}"] = value
    return named
