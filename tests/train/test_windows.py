"""A large image in windows: where they lie, what they average, and that nothing changes where one covers the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spcl_fast.config.schema import DataConfig, EvaluateConfig
from spcl_fast.data import dataset_of
from spcl_fast.errors import NumericError
from spcl_fast.models import build_model
from spcl_fast.ops import upsampled_prediction
from spcl_fast.train.evaluate import evaluate_model, label_map, predict_logits
from spcl_fast.train.windows import Windows, windowed_logits, windows_of

CELL = 4


class Local(nn.Module):
    """Means of cells of CELL pixels, where the last cell may be cut: a net that no window can mislead."""

    stride = CELL

    def forward(self, images):
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % CELL, 0, -height % CELL))
        return images, F.avg_pool2d(padded, CELL)


class CountsItsCalls(nn.Module):
    """Logits of the n-th call are n, whatever the image."""

    stride = CELL

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape[2:]))
        grid = [-(-side // CELL) for side in images.shape[2:]]
        return images, torch.full((len(images), 3, *grid), float(len(self.seen)))


@pytest.fixture(scope="module")
def scenes():
    """Labelled images; the net sees them at another size than that of their labels."""
    return dataset_of(DataConfig(dataset="generated_target", size=(61, 47), eval_size=(61, 47)), "val").select(range(3))


@pytest.mark.parametrize("image", [(64, 48), (61, 47), (33, 128), (16, 16), (5, 90)])
@pytest.mark.parametrize(
    "size, stride", [((16, 16), (8, 8)), ((24, 12), (24, 12)), ((19, 17), (13, 11)), ((3, 3), (1, 1))]
)
def test_windows_that_leave_a_pixel_out_or_lie_off_the_grid(image, size, stride):
    width, height = image
    spans = Windows(size, stride).spans((height, width), CELL)
    for found, length, side in zip(spans, (height, width), (size[1], size[0]), strict=True):
        covered = np.zeros(length, bool)
        for span in found:
            covered[span] = True
            assert span.start % CELL == 0 and span.stop - span.start <= max(side, 2 * CELL)
        assert covered.all() and found[-1].stop == length
        assert [span.start for span in found] == sorted({span.start for span in found}), "one twice"


@pytest.mark.parametrize("image", [(64, 48), (61, 47), (33, 66)])
@pytest.mark.parametrize("tta", ["none", "flip"])
def test_a_net_that_sees_no_further_than_a_cell_gives_the_same_logits_in_windows(image, tta):
    images = torch.rand(2, 3, image[1], image[0])
    if tta == "flip":  # the mirror image of a cut cell is another cell
        images = images[:, :, :, : image[0] // CELL * CELL]
    whole = predict_logits(Local(), images, "x", tta=tta)
    parts = predict_logits(Local(), images, "x", tta=tta, windows=Windows((20, 16), (12, 8)))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_logits_of_two_windows_are_averaged_by_how_many_see_them():
    net = CountsItsCalls()
    logits = windowed_logits(lambda x: net(x)[1], torch.zeros(1, 3, 8, 24), Windows((16, 8), (8, 8)), CELL)
    assert net.seen == [(8, 16), (8, 16)]  # the one at the image's end is the first
    expected = torch.tensor([2.0, 2.0, 1.5, 1.5, 1.0, 1.0]).expand(1, 3, 2, 6)
    assert torch.equal(logits, expected)


def test_the_mirror_image_is_that_of_each_window():
    class Ramp(nn.Module):
        stride = CELL

        def forward(self, images):
            height, width = (side // CELL for side in images.shape[2:])
            return images, torch.arange(float(width)).expand(len(images), 2, height, width)

    logits = predict_logits(Ramp(), torch.zeros(1, 3, 8, 32), "x", tta="flip", windows=Windows((16, 8), (16, 8)))
    assert torch.equal(logits, torch.full((1, 2, 2, 8), 1.5))


@pytest.mark.parametrize("tta", ["none", "flip"])
@pytest.mark.parametrize("name", ["tiny", "lite0"])
def test_a_window_that_covers_the_image_changes_a_figure(name, tta, scenes):
    torch.manual_seed(0)
    model = build_model(name, len(scenes.classes))
    whole = evaluate_model(model, scenes, (50, 35), tta=tta)
    covered = evaluate_model(model, scenes, (50, 35), tta=tta, windows=Windows((64, 35), (8, 8)))
    assert np.array_equal(whole.confusion, covered.confusion)


@pytest.mark.parametrize("windows", [None, Windows((24, 24), (16, 16))])
def test_the_confusion_is_that_of_the_label_maps_bit_for_bit(windows, scenes):
    torch.manual_seed(0)
    model = build_model("tiny", len(scenes.classes))
    classes, kept = len(scenes.classes), {}
    scores = evaluate_model(
        model, scenes, (50, 35), windows=windows, keep=lambda i, name, predicted: kept.update({i: predicted()})
    )
    count = np.zeros((classes, classes), np.int64)
    for i, predicted in kept.items():
        truth = np.asarray(scenes.label(i))
        known = truth != scenes.classes.ignore_index
        np.add.at(count, (truth[known], predicted[known]), 1)
    assert np.array_equal(scores.confusion, count) and count.sum() > 0


def test_where_no_picture_is_kept_no_label_map_is_made(scenes, monkeypatch):
    made = []
    monkeypatch.setattr(
        "spcl_fast.train.evaluate.upsampled_prediction", lambda *a, **k: made.append(1) or upsampled_prediction(*a, **k)
    )
    model = build_model("tiny", len(scenes.classes))
    evaluate_model(model, scenes, (48, 32), keep=lambda i, name, predicted: predicted() if i == 1 else None)
    assert len(made) == 1


def test_a_window_whose_logits_are_not_finite_names_the_image():
    class Broken(Local):
        def forward(self, images):
            features, logits = super().forward(images)
            return features, logits / (images.amax() < 0.5)

    images = torch.zeros(1, 3, 32, 32)
    images[0, 0, 30, 30] = 1.0
    with pytest.raises(NumericError, match="not finite on street_7"):
        predict_logits(Broken(), images, "street_7", windows=Windows((16, 16), (8, 8)))


def test_a_class_masked_by_minus_infinity_is_no_fault():
    class Masked(Local):
        def forward(self, images):
            features, logits = super().forward(images)
            return features, logits.index_fill(1, torch.tensor([0]), -torch.inf)

    logits = predict_logits(Masked(), torch.rand(1, 3, 32, 32), "x", windows=Windows((16, 16), (8, 8)))
    assert (label_map(logits, (32, 32)) > 0).all()


def test_two_thirds_of_a_window_is_the_step_where_none_is_given():
    assert windows_of(EvaluateConfig()) is None
    assert windows_of(EvaluateConfig(window=(512, 256))) == Windows((512, 256), (342, 171))
    assert windows_of(EvaluateConfig(window=(512, 256), window_stride=(256, 256))).stride == (256, 256)
