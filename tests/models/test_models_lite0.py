"""EfficientNet-Lite0: padding, input scaling and block order are only right if the published statistics come out."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from spcl_fast.models import build_model, lite0
from spcl_fast.models.norm import FrozenBatchNorm2d

SHARED = Path(__file__).resolve().parents[3] / "shared"
LITE0 = SHARED / "weights" / "efficientnet_lite0_encoder_fp16.npz"
CAMVID = SHARED / "data" / "camvid"
FINGERPRINT = [1.13641, 11.36043, -8.09265, -0.1258, 5.77622, -9.46544]
needs_weights = pytest.mark.skipif(
    not LITE0.is_file(), reason="the EfficientNet-Lite0 weights are not at ../shared/weights"
)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(8, 3, 2), (9, 3, 2), (8, 5, 2), (9, 5, 2), (7, 3, 1), (8, 5, 1), (1, 5, 2)]
)
def test_same_padding_is_tensorflows(size, kernel, stride):
    """Each output counts the pixels its window holds; TensorFlow's rule says where windows start."""
    conv = lite0.SameConv2d(1, 1, kernel, stride, bias=False)
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
def test_the_encoder_reproduces_its_fingerprint():
    """Fixed input, fixed weights: sums recorded once; a change of padding, scaling or block order moves them by far more than rounding."""
    model = build_model("lite0", 8, weights=LITE0)
    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    image = torch.stack([rows / 96, columns / 128, ((rows // 8 + columns // 8) % 2)])[None]
    with torch.no_grad():
        skip, deep = model.feature_extractor.encoder((image - model.mean) / model.std)
    got = [skip.mean(), skip.std(), skip[0, 3, 5, 7], deep.mean(), deep.std(), deep[0, 50, 3, 4]]
    np.testing.assert_allclose([value.item() for value in got], FINGERPRINT, rtol=2e-3, atol=2e-3)


@needs_weights
@pytest.mark.skipif(not CAMVID.is_dir(), reason="the CamVid images are not at ../shared/data/camvid")
def test_real_images_give_the_statistics_of_training(monkeypatch):
    """Means per channel before each BatchNorm follow its running means. Wrong colours, padding or a swapped block breaks this."""
    model = build_model("lite0", 8, weights=LITE0)
    names = (CAMVID / "mini_train.txt").read_text().split()[::4]
    files = [next((CAMVID / "images").rglob(f"{Path(name).name}*")) for name in names]
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

    monkeypatch.setattr(lite0, "conv_norm", spy)
    with torch.no_grad():
        features = model.features(images)
    assert len(agreement) == 23 and min(agreement) > 0.8 and np.median(agreement) > 0.96, agreement
    assert features.isfinite().all() and 0.2 < features.std() < 5


def test_relu6_is_torchs_and_keeps_its_output_only():
    x = torch.tensor([-1.0, 0.0, 0.5, 6.0, 7.0, float("nan")], requires_grad=True)
    expected = F.relu6(x)
    expected.backward(torch.arange(1.0, 7.0))
    y, kept = torch.nn.Parameter(x.detach().clone()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = lite0.relu6_(1 * y)
    out.backward(torch.arange(1.0, 7.0))
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(y.grad, x.grad, equal_nan=True)
    assert out.data_ptr() in kept and len(set(kept)) == 1
