"""timm/NAME, transformers/NAME and MODULE:NAME: maps, norms, rates and errors. With stand-ins for both libraries, which CI does not have;
the real ones are in tests/clients."""

from __future__ import annotations

import json
import sys

import pytest
import stand_ins
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spcl_fast.errors import ConfigError
from spcl_fast.models import SegmentationModel, build_model
from spcl_fast.models.layers import registration_order

MEAN, STD = [0.25, 0.5, 0.75], [0.5, 0.25, 0.125]


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    stand_ins.take(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    """kind -> transformers/FOLDER of a net of that kind."""

    def make(kind: str, **preprocessor) -> str:
        where = tmp_path / kind
        where.mkdir()
        (where / "config.json").write_text(json.dumps({"model_type": kind}))
        about = {"image_mean": MEAN, "image_std": STD} | preprocessor
        (where / "preprocessor_config.json").write_text(json.dumps(about))
        return f"transformers/{where}"

    return make


def test_a_pyramid_of_timm_gives_the_maps_from_the_chosen_stride_on():
    for stride, widths in ((None, [8, 12]), (4, [6, 8, 12]), (16, [12])):
        net = build_model("timm/small_cnn", 5, stride=stride, feature_dim=None)
        assert (net.stride, net.channels) == (stride or 8, sum(widths))
        features, logits = net(torch.rand(2, 3, 40, 56))
        grid = [-(-side // net.stride) for side in (40, 56)]
        assert list(features.shape) == [2, sum(widths), *grid] and logits.shape[1] == 5
        with_head = build_model("timm/small_cnn", 5, stride=stride, feature_dim=24)
        assert with_head.channels == 24 and with_head(torch.rand(1, 3, 40, 56))[0].shape[1] == 24
    with pytest.raises(ConfigError, match="model.stride: got 32, and timm/small_cnn has maps of stride 2, 4, 8, 16"):
        build_model("timm/small_cnn", 5, stride=32)


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_images_are_normalised_by_the_nets_own_mean_and_std(folder, freeze_bn):
    net = build_model("timm/small_cnn", 3, freeze_bn=freeze_bn).eval()
    assert net.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert net.std.flatten().tolist() == pytest.approx([0.5, 0.6, 0.7])
    images = torch.rand(1, 3, 32, 32)
    normal = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(net(images)[0], net.feature_extractor(normal))
    hidden = build_model(folder("hidden"), 3)
    assert (hidden.mean.flatten().tolist(), hidden.std.flatten().tolist()) == (MEAN, STD)
    as_they_are = build_model(folder("pyramid", do_normalize=False), 3)
    assert as_they_are.mean.abs().sum() == 0 and as_they_are.std.eq(1).all()


@pytest.mark.parametrize("size", [(35, 49), (33, 52), (3, 10)])
def test_a_vit_sees_whole_patches_of_any_image(size):
    net = build_model("timm/small_vit", 4, feature_dim=None).eval()
    features, logits = net(torch.rand(2, 3, *size))
    grid = [max(1, (side + 3) // 7) for side in size]
    assert (net.stride, net.channels) == (7, 8) and list(features.shape) == [2, 8, *grid]
    # after the last norm: zero mean and unit variance over the channels
    assert features.mean(1).abs().max() < 1e-5 and (features.var(1, correction=0) - 1).abs().max() < 1e-2


def test_a_frozen_norm_of_any_class_neither_learns_nor_moves():
    net = build_model("timm/small_cnn", 3).train()
    norms = {key: value.clone() for key, value in net.state_dict().items() if ".1." in key and "body" in key}
    assert any("running_mean" in key for key in norms)
    optimizer = torch.optim.SGD(net.parameter_groups(0.1, 10.0), lr=0.1)
    net(torch.rand(2, 3, 32, 32))[1].square().mean().backward()
    optimizer.step()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in norms.items())
    body = net.feature_extractor.body
    assert (body(torch.rand(1, 3, 16, 16))[0] >= 0).all(), "the activation in timm's BatchNorm is gone"
    free = build_model("timm/small_cnn", 3, freeze_bn=False).train()
    free.load_state_dict(net.state_dict())
    free(torch.rand(2, 3, 32, 32))
    assert any(not torch.equal(value, free.state_dict()[key]) for key, value in norms.items() if "running" in key)
    assert len(list(free.parameters())) == len(list(net.parameters()))
    assert sum(p.requires_grad for p in free.parameters()) > sum(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", ["timm/small_cnn", "timm/small_vit", "pyramid", "hidden"])
def test_every_map_is_a_net_that_learns_and_is_there_without_memory(name, folder):
    name = name if "/" in name else folder(name)
    torch.manual_seed(0)
    net = build_model(name, 4, feature_dim=16)
    features, logits = net(torch.rand(2, 3, 56, 42))
    logits.square().mean().backward()
    for key, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    with FakeTensorMode():
        fake = build_model(name, 4, feature_dim=16)
        assert fake(torch.empty(2, 3, 56, 42))[0].shape == features.shape
    assert {k: v.shape for k, v in fake.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    torch.manual_seed(0)
    again = build_model(name, 4, feature_dim=16)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in net.state_dict().items())


def test_weights_of_the_library_are_taken_only_where_asked_for(folder, tmp_path):
    assert not build_model("timm/small_cnn", 3).feature_extractor.body.stage0[0].weight.eq(0.125).all()
    assert build_model("timm/small_cnn", 3, pretrained=True).feature_extractor.body.stage0[0].weight.eq(0.125).all()
    with pytest.raises(
        ConfigError, match="weights of timm's small_vit cannot be had: no network here. They are looked"
    ):
        build_model("timm/small_vit", 3, pretrained=True)
    name = folder("pyramid")
    with pytest.raises(
        ConfigError, match="its weights of transformers' .* cannot be had: no file named model.safetensors"
    ):
        build_model(name, 3, pretrained=True)
    (tmp_path / "pyramid" / "model.safetensors").touch()
    net = build_model(name, 3, pretrained=True)
    assert net.feature_extractor.body.net.stages[0].weight.eq(0.0625).all()
    with pytest.raises(ConfigError, match="model.pretrained: tiny has no weights of a library"):
        build_model("tiny", 3, pretrained=True)


def test_backbones_and_hidden_states_of_transformers_are_maps_by_stride(folder):
    for kind in ("pyramid", "hidden"):
        name = folder(kind)
        net = build_model(name, 3, feature_dim=None)
        assert (net.stride, net.channels) == (8, 8 + 10)
        assert (
            build_model(name, 3, stride=4, feature_dim=None).channels == 6 + 8 + 10
        )  # of two maps of a stride the later
        assert net(torch.rand(1, 3, 48, 32))[0].shape == (1, 18, 6, 4)


def test_a_library_that_is_not_there_is_named_with_how_to_get_it(monkeypatch):
    stand_ins.forget(monkeypatch)
    for name in ("timm", "transformers"):
        with pytest.raises(
            ConfigError, match=rf"needs '{name}', which is not installed: pip install \"spcl_fast\[{name}\]\""
        ):
            build_model(f"{name}/anything", 3)


def test_a_library_that_is_broken_is_named_with_its_reason(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ConfigError, match="does not import: operator torchvision::nms does not exist. `spcl-fast doctor`"
    ):
        build_model("timm/small_cnn", 3)


def test_names_that_do_not_fit_are_refused_in_words(folder, tmp_path):
    with pytest.raises(ConfigError, match="timm has no net 'small_cn', did you mean 'small_cnn'"):
        build_model("timm/small_cn", 3)
    with pytest.raises(ConfigError, match="no_maps gives no maps .features_only not implemented"):
        build_model("timm/no_maps", 3)
    with pytest.raises(
        ConfigError, match="its config of transformers' 'nobody/nothing' cannot be had: nobody/nothing is not"
    ):
        build_model("transformers/nobody/nothing", 3)
    with pytest.raises(ConfigError, match="does not take an image: ValueError"):
        build_model(folder("text"), 3)
    name = folder("hidden")
    (tmp_path / "hidden" / "preprocessor_config.json").unlink()
    with pytest.raises(
        ConfigError, match="has no preprocessor_config.json that can be read .* image_mean and image_std"
    ):
        build_model(name, 3)
    with pytest.raises(
        ConfigError, match="no net 'lite'.*There are .*lite2, timm/NAME, transformers/NAME, MODULE:NAME"
    ):
        build_model("lite", 3)
    with pytest.raises(ConfigError, match="model.stride: got 4, and lite0 has stride 8 alone"):
        build_model("lite0", 3, stride=4)


# ---- rates by layer --------------------------------------------------------------------------------------------------


def test_layers_are_counted_as_the_net_has_them():
    names = [
        "cls_token",
        "patch_embed.weight",
        "blocks.0.mlp.weight",
        "blocks.0.norm1.weight",
        "blocks.1.mlp.0.bias",
        "norm.bias",
    ]
    assert list(registration_order(names).values()) == [0, 0, 1, 1, 2, 2]
    names = [
        "conv1.weight",
        "layer1.0.conv1.weight",
        "layer1.0.downsample.0.weight",
        "layer1.1.bn2.bias",
        "layer2.0.conv1.weight",
    ]
    assert list(registration_order(names).values()) == [0, 1, 1, 2, 3]
    names = ["stages.0.patch.weight", "stages.0.blocks.0.w", "stages.0.blocks.1.w", "stages.1.blocks.0.w"]
    assert list(registration_order(names).values()) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["timm/small_vit", "deeplab_v2_resnet18", "lite0", "tiny"])
def test_with_layer_decay_each_layer_learns_slower_than_the_next(name):
    net = build_model(name, 3)
    plain, decayed = net.parameter_groups(0.1, 10.0), net.parameter_groups(0.1, 10.0, 0.5)
    assert [group["name"] for group in plain] == ["body", "head"]
    assert decayed[-1]["name"] == "head" and decayed[-1]["lr_scale"] == 10.0
    scales = [group["lr_scale"] for group in decayed[:-1]]
    assert (
        scales[-1] == 1.0 and all(2 * a == b for a, b in zip(scales[:-1], scales[1:], strict=True)) and len(scales) > 2
    )
    assert all(group["lr"] == pytest.approx(0.1 * group["lr_scale"]) for group in decayed)
    ids = [[id(p) for group in groups for p in group["params"]] for groups in (plain, decayed)]
    assert sorted(ids[0]) == sorted(ids[1]) and len(set(ids[1])) == len(ids[1])


def test_without_a_head_the_maps_are_the_features():
    for name, channels in (("tiny", 80), ("lite0", 152), ("lite1", 152), ("lite2", 168)):
        net = build_model(name, 3, feature_dim=None)
        assert net.channels == channels and net(torch.rand(1, 3, 64, 48))[0].shape[:2] == (1, channels)
        assert [group["name"] for group in net.parameter_groups(1.0, 2.0)] == ["body", "head"]


# ---- nets by path ----------------------------------------------------------------------------------------------------

OWN = '''
from torch import nn
from spcl_fast.models import SegmentationModel

class Net(nn.Module):
    """features by its forward, a head of its own."""
    stride, channels, mean, std, head = 2, 6, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "top"
    def __init__(self):
        super().__init__()
        self.body, self.bn, self.top = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)
    def forward(self, images):
        return self.top(self.bn(self.body(images)))

class ByMethod(Net):
    channels = 4
    head = None
    def features(self, images):
        return self.body(images)

class TwoOutputs(Net):
    def forward(self, images):
        return super().forward(images), images

class OtherChannels(Net):
    channels = 7

class NoStride(Net):
    @property
    def stride(self):
        raise AttributeError("stride")

class WordStride(Net):
    stride = "eight"

class OtherStride(Net):
    stride = 8

class TwoArguments(Net):
    def forward(self, images, labels):
        return super().forward(images)

class NeedsMore(Net):
    def __init__(self, depth):
        super().__init__()

def whole(num_classes):
    return SegmentationModel("own", nn.Conv2d(3, 5, 4, 4), nn.Conv2d(5, num_classes, 1), stride=4, channels=5, num_classes=num_classes)

def other_classes():
    return whole(17)

def no_module():
    return 3

VALUE = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    monkeypatch.chdir(tmp_path)


def test_any_module_is_a_net_by_its_path(own):
    net = build_model("own_nets:Net", 5).train()
    images = torch.rand(2, 3, 8, 12)
    features, logits = net(images)
    assert (
        features.shape == (2, 6, 4, 6)
        and logits.shape == (2, 5, 4, 6)
        and (net.name, net.stride) == ("own_nets:Net", 2)
    )
    module = net.feature_extractor.body
    assert not module.bn.training and not any(p.requires_grad for p in module.bn.parameters())
    torch.testing.assert_close(features, module(images))
    body, head = net.parameter_groups(1.0, 10.0)
    assert {id(p) for p in head["params"]} == {id(p) for p in (*module.top.parameters(), *net.classifier.parameters())}
    assert build_model("own_nets:Net", 5, freeze_bn=False).train().feature_extractor.body.bn.training
    assert build_model("own_nets:ByMethod", 5)(images)[0].shape == (2, 4, 4, 6)
    whole = build_model("own_nets:whole", 9)
    assert isinstance(whole, SegmentationModel) and whole(images)[1].shape == (2, 9, 2, 3)
    assert whole.state_dict().keys() == {
        f"{part}.{key}" for part in ("feature_extractor", "classifier") for key in ("weight", "bias")
    }
    with FakeTensorMode():
        assert build_model("own_nets:Net", 5)(torch.empty(2, 3, 8, 12))[0].shape == features.shape


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_nets:Nat", "own_nets has no 'Nat' .docs/settings.md"),
        ("own_nets:VALUE", "and it is no class or function"),
        ("no_such_net:Net", "the module 'no_such_net' does not import: ModuleNotFoundError.*working directory"),
        ("own_nets:no_module", "gives a int, expected an nn.Module"),
        ("own_nets:NeedsMore", "calling it without arguments raised TypeError: .*'depth'"),
        ("own_nets:NoStride", "NoStride lacks stride; it needs"),
        (
            "own_nets:TwoArguments",
            "its forward must take the images and nothing else: missing a required argument: 'labels'",
        ),
        ("own_nets:WordStride", "stride and channels must be whole numbers of 1 or more, got 'eight' and 6"),
        ("own_nets:other_classes", "predicts 17 classes, and the data has 5: take num_classes"),
    ],
)
def test_a_module_that_does_not_keep_to_the_protocol_is_refused_with_what_is_wrong(own, name, words):
    with pytest.raises(ConfigError, match=words):
        build_model(name, 5)


def test_a_stride_that_is_not_the_maps_is_refused_at_the_first_map(own):
    net = build_model("own_nets:OtherStride", 5)
    with pytest.raises(
        ConfigError, match=r"its attribute stride is 8, but images of \[64, 96\] .* features of \[32, 48\]"
    ):
        net(torch.rand(1, 3, 64, 96))
    assert build_model("own_nets:Net", 5)(torch.rand(1, 3, 63, 95))[0].shape[2:] == (32, 48)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("TwoOutputs", r"features of \[2, 3, 8, 12\] images must be one tensor \[2, 6 .*, h, w\], got a tuple"),
        ("OtherChannels", r"one tensor \[2, 7 .its attribute channels., h, w\], got \[2, 6, 4, 6\]"),
    ],
)
def test_features_of_another_form_are_refused_at_the_first_forward(own, name, words):
    net = build_model(f"own_nets:{name}", 5)
    with pytest.raises(ConfigError, match=words):
        net(torch.rand(2, 3, 8, 12))


def test_a_module_without_a_forward_is_not_wrapped():
    from spcl_fast.models import wrap_model

    class Nothing(nn.Module):
        stride, channels = 4, 3

    with pytest.raises(ConfigError, match="Nothing lacks features; it needs features.images. .or a forward"):
        wrap_model(Nothing(), 3)
