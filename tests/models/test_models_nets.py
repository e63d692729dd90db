"""The nets: sizes, names, the published arithmetic, what learns and what does not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spcl_fast.errors import ConfigError
from spcl_fast.models import MODEL_NAMES, Discriminator, build_model, wrap_model
from spcl_fast.models.norm import FrozenBatchNorm2d, conv_norm

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def norm_keys(name, counter):
    return {
        f"{name}.{part}"
        for part in ("weight", "bias", "running_mean", "running_var", *(["num_batches_tracked"] if counter else []))
    }


def resnet_keys(name, counter=False):
    """torchvision's names without fc, by rule."""
    convs = 2 if name == "resnet18" else 3
    keys = {"conv1.weight"} | norm_keys("bn1", counter)
    for layer, depth in enumerate(DEPTHS[name], start=1):
        for block in range(depth):
            base = f"layer{layer}.{block}"
            for conv in range(1, convs + 1):
                keys |= {f"{base}.conv{conv}.weight"} | norm_keys(f"{base}.bn{conv}", counter)
            if block == 0 and (layer > 1 or convs == 3):
                keys |= {f"{base}.downsample.0.weight"} | norm_keys(f"{base}.downsample.1", counter)
    return keys


@pytest.mark.parametrize("name", sorted(DEPTHS))
@pytest.mark.parametrize("freeze_bn", [True, False])
def test_resnet_state_dict_has_the_names_of_the_release(name, freeze_bn):
    with torch.device("meta"):
        model = build_model(f"deeplab_v2_{name}", 19, freeze_bn=freeze_bn)
    keys = resnet_keys(name, counter=not freeze_bn)
    assert set(model.feature_extractor.state_dict()) == {f"backbone.{key}" for key in keys}
    assert set(model.classifier.state_dict()) == {
        f"conv2d_list.{i}.{part}" for i in range(4) for part in ("weight", "bias")
    }
    if name == "resnet101" and not freeze_bn:
        assert len(keys) == 624  # torchvision's 626 without fc


def test_vgg16_state_dict_has_the_names_of_the_release():
    with torch.device("meta"):
        model = build_model("deeplab_v2_vgg16", 19)
    convs = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31]
    assert set(model.feature_extractor.state_dict()) == {
        f"backbone.{i}.{part}" for i in convs for part in ("weight", "bias")
    }
    assert model.channels == 1024
    dilations = [layer.dilation[0] for layer in model.feature_extractor.backbone if isinstance(layer, nn.Conv2d)]
    assert dilations == [1] * 10 + [2] * 3 + [4] * 2


def plain_resnet(state, name, x, eps):
    """ResNet at output stride 8, written from torchvision's rules as plain functions on a state dict."""

    def norm(x, key):
        return F.batch_norm(
            x,
            state[f"{key}.running_mean"],
            state[f"{key}.running_var"],
            state[f"{key}.weight"],
            state[f"{key}.bias"],
            eps=eps,
        )

    def conv(x, key, stride=1, dilation=1):
        weight = state[f"{key}.weight"]
        return F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation)

    x = F.max_pool2d(norm(conv(x, "conv1", 2), "bn1").relu(), 3, 2, 1)
    strides, dilations = (1, 2, 1, 1), ((1, 1), (1, 1), (1, 2), (2, 4))  # dilation of the first block and of the others
    for layer in range(4):
        for block in range(DEPTHS[name][layer]):
            base = f"layer{layer + 1}.{block}"
            stride = strides[layer] if block == 0 else 1
            dilation = dilations[layer][block > 0]
            identity = x
            if name == "resnet18":
                inner = norm(conv(x, f"{base}.conv1", stride, dilation), f"{base}.bn1").relu()
                out = norm(conv(inner, f"{base}.conv2", 1, dilations[layer][1]), f"{base}.bn2")
            else:
                inner = norm(conv(x, f"{base}.conv1"), f"{base}.bn1").relu()
                inner = norm(conv(inner, f"{base}.conv2", stride, dilation), f"{base}.bn2").relu()
                out = norm(conv(inner, f"{base}.conv3"), f"{base}.bn3")
            if f"{base}.downsample.0.weight" in state:
                identity = norm(conv(x, f"{base}.downsample.0", stride), f"{base}.downsample.1")
            x = (out + identity).relu()
    return x


def shuffle_statistics(module, seed=0):
    """BatchNorm as after training: any scale, shift and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if hasattr(layer, "running_mean"):
            shape = layer.weight.shape
            layer.weight.data.copy_(torch.rand(shape, generator=generator) * 0.4 + 0.3)
            layer.bias.data.copy_(torch.randn(shape, generator=generator) * 0.1)
            layer.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
            layer.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_resnet_computes_what_torchvision_would(name, eps):
    torch.manual_seed(0)
    model = build_model(f"deeplab_v2_{name}", 5, frozen_bn_eps=eps).double()
    shuffle_statistics(model)
    images = torch.rand(1, 3, 49, 65, dtype=torch.float64)
    features, logits = model(images)
    normalised = (images - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(1, 3, 1, 1)
    state = {key.removeprefix("backbone."): value for key, value in model.feature_extractor.state_dict().items()}
    expected = plain_resnet(state, name, normalised, eps)
    assert features.shape == (1, 512 if name == "resnet18" else 2048, 7, 9)
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)
    series = model.classifier.state_dict()
    expected_logits = sum(
        F.conv2d(expected, series[f"conv2d_list.{i}.weight"], series[f"conv2d_list.{i}.bias"], padding=d, dilation=d)
        for i, d in enumerate((6, 12, 18, 24))
    )
    torch.testing.assert_close(logits, expected_logits, rtol=1e-6, atol=1e-6)


def test_atrous_classifier_starts_as_released():
    torch.manual_seed(0)
    model = build_model("deeplab_v2_resnet18", 19)
    weights = torch.cat([conv.weight.flatten() for conv in model.classifier.conv2d_list])
    assert abs(weights.mean()) < 1e-4 and abs(weights.std() - 0.01) < 1e-4


SMALL = ("deeplab_v2_resnet18", "deeplab_v2_vgg16", "lite0", "tiny")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(64, 96), (67, 45)])
def test_stride_and_channels_are_what_the_net_says(name, size):
    torch.manual_seed(0)
    model = build_model(name, 7, feature_dim=24).eval()
    with torch.no_grad():
        features, logits = model(torch.rand(2, 3, *size))
    assert features.shape[:2] == (2, model.channels) and logits.shape == (2, 7, *features.shape[-2:])
    for got, pixels in zip(features.shape[-2:], size, strict=True):
        assert abs(got - pixels / model.stride) < 1
    # A net that starts from nothing must neither explode nor vanish, or no learning rate fits it.
    assert 0.02 < features.std() < 20 and features.isfinite().all() and logits.std() < 5


def test_every_name_is_built_and_an_unknown_one_gets_a_suggestion():
    with torch.device("meta"):
        for name in MODEL_NAMES:
            assert build_model(name, 3).name == name
    with pytest.raises(ConfigError, match="did you mean 'deeplab_v2_resnet50'"):
        build_model("deeplab_v2_resnet_50", 3)
    with pytest.raises(ConfigError, match="num_classes"):
        build_model("tiny", 0)


def test_images_of_the_wrong_kind_are_refused_in_words():
    model = build_model("tiny", 3)
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\], got \[3, 8, 8\]"):
        model(torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match="divide 8-bit images by 255"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_folding_the_norm_changes_neither_values_nor_gradients():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 8, 3, 2, 1, groups=2, bias=False).double(), FrozenBatchNorm2d(8).double()
    shuffle_statistics(norm)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64, requires_grad=True)
    plain = F.batch_norm(conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    folded = conv_norm(conv, norm, x)
    torch.testing.assert_close(folded, plain)
    torch.testing.assert_close(norm(conv(x)), plain)
    grad = torch.randn_like(plain)
    for got, expected in zip(
        torch.autograd.grad(folded, (x, conv.weight), grad),
        torch.autograd.grad(plain, (x, conv.weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["deeplab_v2_resnet18", "lite0"])
def test_frozen_norm_does_not_move_in_training(name):
    torch.manual_seed(0)
    model = build_model(name, 4).train()
    norms = {key: value.clone() for key, value in model.state_dict().items() if ".running_" in key or "bn" in key}
    assert norms
    optimizer = torch.optim.SGD(model.parameter_groups(0.1, 10.0), lr=0.1)
    model(torch.rand(2, 3, 32, 32))[1].square().mean().backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        if key in norms:
            assert torch.equal(value, norms[key]), key
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules())


@pytest.mark.parametrize("name", ["deeplab_v2_resnet18", "lite0"])
def test_a_frozen_checkpoint_loads_unfrozen_and_back(name):
    torch.manual_seed(0)
    frozen = build_model(name, 4)
    shuffle_statistics(frozen)
    free = build_model(name, 4, freeze_bn=False)
    free.load_state_dict({key: value.clone() for key, value in frozen.state_dict().items()}, strict=True)
    images = torch.rand(1, 3, 40, 48)
    with torch.no_grad():
        torch.testing.assert_close(free.eval()(images)[0], frozen(images)[0], rtol=1e-4, atol=1e-4)
    again = build_model(name, 4)
    again.load_state_dict(free.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(again(images)[0], frozen(images)[0])
    before = {key: value.clone() for key, value in free.state_dict().items() if "running_mean" in key}
    free.train()(images)
    assert any(not torch.equal(value, free.state_dict()[key]) for key, value in before.items()), (
        "unfrozen statistics must move"
    )
    assert len(list(free.parameters())) > len(list(frozen.parameters()))


@pytest.mark.parametrize("name", SMALL)
def test_every_learning_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = build_model(name, 4)
    _, logits = model(torch.rand(2, 3, 64, 64))
    F.cross_entropy(logits, torch.randint(0, 4, (2, *logits.shape[-2:]))).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", ["tiny", "lite0"])
def test_random_weights_learn_a_simple_scene(name):
    torch.manual_seed(0)
    model = build_model(name, 2, feature_dim=16).train()
    labels = (torch.arange(64)[None, None, :] < torch.tensor([20, 44])[:, None, None]).long().expand(2, 64, 64)
    images = 0.2 + 0.5 * labels[:, None].float().expand(2, 3, 64, 64) + 0.05 * torch.rand(2, 3, 64, 64)
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3, 3.0), lr=1e-3)
    losses = []
    for _ in range(25):
        _, logits = model(images)
        loss = F.cross_entropy(F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=True), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 1.0 and losses[-1] < 0.25 * losses[0], losses


def test_the_head_learns_at_its_own_rate():
    model = build_model("lite0", 4)
    body, head = model.parameter_groups(1e-3, 50.0)
    assert (body["lr"], body["lr_scale"], head["lr"], head["lr_scale"]) == (1e-3, 1.0, pytest.approx(0.05), 50.0)
    heads = {id(p) for p in head["params"]}
    assert heads == {id(p) for p in model.classifier.parameters()} | {
        id(p) for p in model.feature_extractor.head.parameters()
    }
    assert len(heads) + len(body["params"]) == len(list(model.parameters()))
    resnet = build_model("deeplab_v2_resnet18", 4)
    assert {id(p) for p in resnet.parameter_groups(1e-3, 10.0)[1]["params"]} == {
        id(p) for p in resnet.classifier.parameters()
    }


def test_any_module_with_features_stride_and_channels_is_a_net():
    class Own(nn.Module):
        stride, channels, mean, std = 2, 6, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, 2, 1)

        def features(self, images):
            return self.conv(images)

    own = Own()
    model = wrap_model(own, 5)
    images = torch.rand(1, 3, 8, 10)
    features, logits = model(images)
    torch.testing.assert_close(features, own.conv(images))
    assert logits.shape == (1, 5, 4, 5) and (model.stride, model.channels, model.num_classes) == (2, 6, 5)
    with pytest.raises(ConfigError, match="lacks stride, channels"):
        wrap_model(nn.Identity(), 5)


def test_discriminator_is_five_strided_convolutions_with_the_released_names():
    torch.manual_seed(0)
    discriminator = Discriminator(7)
    shapes = {key: list(value.shape) for key, value in discriminator.state_dict().items() if key.endswith("weight")}
    assert shapes == {
        "conv1.weight": [64, 7, 4, 4],
        "conv2.weight": [128, 64, 4, 4],
        "conv3.weight": [256, 128, 4, 4],
        "conv4.weight": [512, 256, 4, 4],
        "classifier.weight": [1, 512, 4, 4],
    }
    probabilities = torch.rand(2, 7, 64, 96, requires_grad=True)
    out = discriminator(probabilities)
    assert out.shape == (2, 1, 2, 3)
    out.sum().backward()
    assert probabilities.grad.abs().sum() > 0
    x = probabilities.detach()
    for conv in (discriminator.conv1, discriminator.conv2, discriminator.conv3, discriminator.conv4):
        x = conv(x)
        x = torch.where(x > 0, x, 0.2 * x)
    torch.testing.assert_close(out, discriminator.classifier(x))
    with pytest.raises(ValueError, match="at least 32 x 32"):
        discriminator(torch.rand(1, 7, 16, 64))
