"""EfficientNet-Lite: padding, input scaling and block order are only right if the published statistics come out."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from spcl_fast.errors import CheckpointError
from spcl_fast.models import build_model, lite, load_weights
from spcl_fast.models.norm import FrozenBatchNorm2d

SHARED = Path(__file__).resolve().parents[3] / "shared"
WEIGHTS = {name: SHARED / "weights" / f"efficientnet_{name}_encoder_fp16.npz" for name in ("lite0", "lite1", "lite2")}
CAMVID = SHARED / "data" / "camvid"
FINGERPRINTS = {
    "lite0": [1.13641, 11.36043, -8.09265, -0.1258, 5.77622, -9.46544],
    "lite1": [1.85184, 15.6998, -3.12807, -0.61064, 5.80473, -3.5274],
    "lite2": [1.79417, 12.55352, 18.86361, -0.1585, 4.9649, -5.40027],
}
needs_weights = pytest.mark.skipif(
    not all(path.is_file() for path in WEIGHTS.values()), reason="the Lite weights are not at ../shared/weights"
)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(8, 3, 2), (9, 3, 2), (8, 5, 2), (9, 5, 2), (7, 3, 1), (8, 5, 1), (1, 5, 2)]
)
def test_same_padding_is_tensorflows(size, kernel, stride):
    """Each output counts the pixels its window holds; TensorFlow's rule says where windows start."""
    conv = lite.SameConv2d(1, 1, kernel, stride, bias=False)
    torch.nn.init.ones_(conv.weight)
    got = conv(torch.ones(1, 1, size, size))[0, 0]
    outputs = -(-size // stride)
    before = max((outputs - 1) * stride + kernel - size, 0) // 2
    inside = [sum(0 <= i * stride - before + k < size for k in range(kernel)) for i in range(outputs)]
    assert got.shape == (outputs, outputs)
    assert torch.equal(got, torch.tensor(inside).outer(torch.tensor(inside)).float())


def test_the_stages_are_the_published_ones():
    encoder = build_model("lite0", 2).feature_extractor.encoder
    convs = [block._depthwise_conv for block in encoder._blocks]
    assert [conv.kernel_size[0] for conv in convs] == [3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5]
    assert [conv.stride[0] for conv in convs] == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1]
    assert [block._project_conv.out_channels for block in encoder._blocks] == [
        16,
        24,
        24,
        40,
        40,
        80,
        80,
        80,
        112,
        112,
        112,
    ]
    assert [block.residual for block in encoder._blocks] == [
        False,
        False,
        True,
        False,
        True,
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    skip, deep = encoder(torch.rand(1, 3, 100, 65))
    assert skip.shape == (1, 40, 13, 9) and deep.shape == (1, 112, 7, 5)


@needs_weights
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_encoder_reproduces_its_fingerprint(name):
    """Fixed input, fixed weights: sums recorded once; a change of padding, scaling or block order moves them by far more than rounding."""
    model = build_model(name, 8, weights=WEIGHTS[name])
    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    image = torch.stack([rows / 96, columns / 128, ((rows // 8 + columns // 8) % 2)])[None]
    with torch.no_grad():
        skip, deep = model.feature_extractor.encoder((image - model.mean) / model.std)
    got = [skip.mean(), skip.std(), skip[0, 3, 5, 7], deep.mean(), deep.std(), deep[0, 50, 3, 4]]
    np.testing.assert_allclose([value.item() for value in got], FINGERPRINTS[name], rtol=2e-3, atol=2e-3)


@needs_weights
@pytest.mark.skipif(not CAMVID.is_dir(), reason="the CamVid images are not at ../shared/data/camvid")
@pytest.mark.parametrize(("name", "convolutions"), [("lite0", 23), ("lite1", 31), ("lite2", 31)])
def test_real_images_give_the_statistics_of_training(monkeypatch, name, convolutions):
    """Means per channel before each BatchNorm follow its running means. Wrong colours, padding or a swapped block breaks this."""
    model = build_model(name, 8, weights=WEIGHTS[name])
    stems = (CAMVID / "mini_train.txt").read_text().split()[::4]
    files = [next((CAMVID / "images").rglob(f"{Path(stem).name}*")) for stem in stems]
    images = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(file).convert("RGB").resize((320, 240)))).permute(2, 0, 1) / 255
            for file in files
        ]
    )
    agreement = []

    def spy(conv, norm, x):
        out = conv(x)
        assert isinstance(norm, FrozenBatchNorm2d)
        if (
            conv.kernel_size[0] > 1 or conv.out_channels < conv.in_channels
        ):  # expansions of few channels have nearly equal means
            agreement.append(torch.corrcoef(torch.stack([out.mean((0, 2, 3)), norm.running_mean]))[0, 1].item())
        return norm(out)

    monkeypatch.setattr(lite, "conv_norm", spy)
    with torch.no_grad():
        features = model.features(images)
    assert len(agreement) == convolutions and min(agreement) > 0.8 and np.median(agreement) > 0.96, agreement
    assert features.isfinite().all() and 0.2 < features.std() < 5


@pytest.mark.parametrize(
    ("name", "outputs", "kernels"),
    [
        ("lite1", [16] + [24] * 3 + [40] * 3 + [80] * 4 + [112] * 4, [3] * 4 + [5] * 3 + [3] * 4 + [5] * 4),
        ("lite2", [16] + [24] * 3 + [48] * 3 + [88] * 4 + [120] * 4, [3] * 4 + [5] * 3 + [3] * 4 + [5] * 4),
    ],
)
def test_the_stages_of_the_larger_ones_are_the_published_ones(name, outputs, kernels):
    model = build_model(name, 2)
    encoder = model.feature_extractor.encoder
    assert [block._project_conv.out_channels for block in encoder._blocks] == outputs
    assert [block._depthwise_conv.kernel_size[0] for block in encoder._blocks] == kernels
    assert [i for i, block in enumerate(encoder._blocks) if block._depthwise_conv.stride[0] == 2] == [1, 4, 7]
    assert all(
        block.residual == (a == b) for block, a, b in zip(encoder._blocks, [32, *outputs], outputs, strict=False)
    )
    skip, deep = encoder(torch.rand(1, 3, 100, 65))
    assert skip.shape == (1, outputs[4], 13, 9) and deep.shape == (1, outputs[-1], 7, 5)
    assert model.feature_extractor.stages() == (1, 2, 5, 8, 12)


@needs_weights
def test_weights_of_another_lite_are_refused_by_their_name():
    for name, other in (("lite0", "lite1"), ("lite1", "lite2"), ("lite2", "lite0")):
        with pytest.raises(
            CheckpointError, match=f"looks like the EfficientNet-{other.capitalize()} encoder but does not fit {name}"
        ):
            build_model(name, 8, weights=WEIGHTS[other])
    assert load_weights(build_model("lite2", 8), WEIGHTS["lite2"]).format == "the EfficientNet-Lite2 encoder"


def test_relu6_is_torchs_and_keeps_its_output_only():
    x = torch.tensor([-1.0, 0.0, 0.5, 6.0, 7.0, float("nan")], requires_grad=True)
    expected = F.relu6(x)
    expected.backward(torch.arange(1.0, 7.0))
    y, kept = torch.nn.Parameter(x.detach().clone()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = lite.relu6_(1 * y)
    out.backward(torch.arange(1.0, 7.0))
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(y.grad, x.grad, equal_nan=True)
    assert out.data_ptr() in kept and len(set(kept)) == 1
