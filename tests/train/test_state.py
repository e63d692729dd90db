"""PrototypeBank, PseudoLabelThresholds and the drop-ins of the released SPCL code."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from on_backends import check_ops

import spcl_fast as sf
from spcl_fast import ops
from spcl_fast.compat.spcl import PixelCLLoss, PseudoLabel


def batch(num_classes=4):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, 5, 6, generator=generator)
    labels = torch.randint(0, num_classes, (2, 10, 12), generator=generator)
    return features, labels.masked_fill_(labels == 3, 255)  # class 3 is absent


def class_means(features, labels):
    sums, counts, _ = oracle.moments(features, labels, 4)
    return (sums / counts.clamp_min(1)[:, None]).float(), counts > 0


def test_the_move_is_an_op_that_compiles_and_says_what_it_changes():
    features, labels = torch.randn(2, 8, 5, 7), torch.randint(0, 4, (2, 5, 7))
    check_ops(lambda: ops.move_prototypes_(torch.ones(4, 8), features, labels, keep=0.1))
    eager, compiled = (sf.PrototypeBank(4, 8).load_(torch.ones(4, 8)) for _ in range(2))
    eager.update_(features, labels)
    torch.compile(lambda f, y: compiled.update_(f, y).prototypes, fullgraph=True, backend="aot_eager")(features, labels)
    assert torch.equal(eager.prototypes, compiled.prototypes)


def test_update_moves_present_classes_and_keeps_absent_ones():
    features, labels = batch()
    bank = sf.PrototypeBank(4, 8, keep=0.1).load_(torch.full((4, 8), 2.0))
    means, present = class_means(features, labels)
    bank.update_(features, labels)
    torch.testing.assert_close(bank.prototypes[present], 0.1 * 2.0 + 0.9 * means[present])
    assert not present[3] and torch.all(bank.prototypes[3] == 2.0)


def test_decay_is_the_release_and_min_pixels_counts_as_absent():
    features, labels = batch()
    decayed = sf.PrototypeBank(4, 8, keep=0.25, absent="decay").load_(torch.ones(4, 8)).update_(features, labels)
    torch.testing.assert_close(decayed.prototypes[3], torch.full((8,), 0.25))
    still = sf.PrototypeBank(4, 8, min_pixels=1000).load_(torch.ones(4, 8)).update_(features, labels)
    assert torch.all(still.prototypes == 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_bank_inside_a_model_of_another_dtype_moves_in_float32(dtype):
    features, labels = batch()
    plain = sf.PrototypeBank(4, 8).load_(torch.ones(4, 8)).update_(features, labels)
    other = sf.PrototypeBank(4, 8).to(dtype).load_(torch.ones(4, 8)).update_(features, labels)
    assert other.prototypes.dtype == torch.float32 and torch.equal(other.prototypes, plain.prototypes)


def test_a_bad_label_is_told_with_predictions_too():
    features, labels = batch()
    labels[1, 2, 4] = 9
    with pytest.raises(ValueError, match=r"label 9 at pixel \(image 1, row 2, column 4\) is outside \[0, 4\)"):
        sf.PrototypeBank(4, 8).update_(features, labels, torch.zeros(2, 5, 6, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"features": [1.0]}, TypeError, "features must be a tensor"),
        ({"features": torch.zeros(2, 7, 5, 6)}, ValueError, r"must be \[B, 8, h, w\] or \[N, 8\]"),
        ({"predictions": [[0]]}, TypeError, "predictions must be an integer tensor"),
        (
            {"predictions": torch.zeros(2, 5, 6, dtype=torch.int64, device="meta")},
            ValueError,
            "predictions is on meta and labels on cpu",
        ),
    ],
)
def test_what_a_bank_cannot_take_is_refused_in_words(change, error, text):
    features, labels = batch()
    given = {"features": features, "labels": labels, "predictions": torch.zeros(2, 5, 6, dtype=torch.uint16)}
    sf.PrototypeBank(4, 8).update_(**given)
    with pytest.raises(error, match=text):
        sf.PrototypeBank(4, 8).update_(**(given | change))


def test_thresholds_take_tensors():
    with pytest.raises(TypeError, match="must be tensors, got ndarray and ndarray"):
        sf.PseudoLabelThresholds(3).update((np.zeros(3, np.uint8), np.zeros(3, np.float32)))


def test_predictions_leave_out_pixels_that_disagree():
    features, labels = batch()
    predictions = torch.randint(0, 4, (2, 5, 6))
    agreed = sf.agreement_labels(labels, predictions)
    means, present = class_means(features, agreed)
    bank = sf.PrototypeBank(4, 8, keep=0.0).update_(features, labels, predictions)
    torch.testing.assert_close(bank.prototypes[present], means[present])


def test_bank_refuses_in_words():
    bank = sf.PrototypeBank(4, 8)
    with pytest.raises(ValueError, match=r"features must be \[B, 8, h, w\] or \[N, 8\], got shape \[2, 7, 5, 6\]"):
        bank.update_(torch.zeros(2, 7, 5, 6), torch.zeros(2, 5, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="features' grid"):
        bank.update_(*batch(), torch.zeros(2, 3, 3, dtype=torch.long))
    for settings, text in (
        ({"keep": 1.5}, "keep must be in"),
        ({"absent": "drop"}, "'keep' or 'decay'"),
        ({"min_pixels": 0}, "min_pixels"),
    ):
        with pytest.raises(ValueError, match=text):
            sf.PrototypeBank(4, 8, **settings)


def released_threshold(x, cap):
    return min(np.sort(x)[int(np.round(len(x) * 0.5))], cap)


def test_streamed_thresholds_equal_the_sorted_median_bit_for_bit():
    rng = np.random.default_rng(0)
    thresholds = sf.PseudoLabelThresholds(5, cap=0.9)
    seen = []
    for _ in range(12):
        confidence = rng.beta(4, 2, size=(1, 100, 200)).astype(np.float32)
        labels = rng.integers(0, 4, size=confidence.shape).astype(np.uint8)
        seen.append((labels.ravel(), confidence.ravel()))
        thresholds.update(sf.Prediction(torch.tensor(labels), torch.tensor(confidence)))
    labels, confidence = (np.concatenate(part) for part in zip(*seen, strict=True))
    expected = [released_threshold(confidence[labels == k], 0.9) for k in range(4)]
    assert thresholds.thresholds()[:4].tolist() == [float(np.float32(e)) for e in expected]
    assert thresholds.exact().all() and thresholds.thresholds()[4] == pytest.approx(0.9)
    assert thresholds.counts().tolist() == [int((labels == k).sum()) for k in range(5)]


def test_thresholds_stay_small_and_close_on_a_stream_that_drifts():
    rng = np.random.default_rng(1)
    thresholds = sf.PseudoLabelThresholds(1, quantile=0.3, cap=1.0)
    values = [np.clip(rng.normal(0.3 + 0.04 * i, 0.1, 50_000), 0, 1).astype(np.float32) for i in range(10)]
    for value in values:
        thresholds.update((torch.zeros(50_000, dtype=torch.uint8), torch.tensor(value)))
    everything = np.sort(np.concatenate(values))
    assert abs(thresholds.thresholds().item() - everything[int(np.round(len(everything) * 0.3))]) < 2e-3
    assert len(thresholds._classes[0].lower) <= 16384 and thresholds._classes[0].counts.sum() == 500_000


def test_a_quantile_that_moves_far_is_nearly_right_and_exact_after_a_second_pass():
    """Images of one kind after images of another: the median ends where the first pass had merged values."""
    rng = np.random.default_rng(2)
    spreads = [(0.45, 0.05)] * 6 + [(0.8, 0.1)] * 10 + [(0.62, 0.02)] * 2
    values = [np.clip(rng.normal(mean, width, 60_000), 0.1, 0.999).astype(np.float32) for mean, width in spreads]
    everything = np.sort(np.concatenate(values))
    exact = everything[int(np.round(len(everything) * 0.5))]
    thresholds = sf.PseudoLabelThresholds(2, cap=1.0)

    def one_pass():
        for value in values:
            thresholds.update((torch.zeros(len(value), dtype=torch.uint8), torch.tensor(value)))

    one_pass()
    assert not thresholds.exact()[0] and abs(thresholds.thresholds()[0].item() - exact) <= exact / 2048
    assert len(thresholds._classes[0].lower) <= 16384
    thresholds.second_pass()
    one_pass()
    assert thresholds.exact().all() and thresholds.thresholds().tolist() == [exact, 1.0]
    assert thresholds.counts().tolist() == [len(everything), 0]


def test_thresholds_refuse_in_words():
    with pytest.raises(ValueError, match="one shape"):
        sf.PseudoLabelThresholds(3).update((torch.zeros(2, dtype=torch.uint8), torch.zeros(3)))
    with pytest.raises(ValueError, match="NaN"):
        sf.PseudoLabelThresholds(3).update((torch.zeros(1, dtype=torch.uint8), torch.tensor([torch.nan])))
    with pytest.raises(ValueError, match="cap must be"):
        sf.PseudoLabelThresholds(3, cap=0.0)


def released_loss(prototype, src_feat, src_mask, tgt_feat, tgt_mask, temperature):
    """The formula of the release, in the dtype of its inputs."""
    total = 0
    for feat, mask in ((src_feat, src_mask), (tgt_feat, tgt_mask)):
        rows = F.normalize(feat, dim=1).permute(0, 2, 3, 1).reshape(-1, feat.shape[1])
        total = total + F.cross_entropy(rows @ prototype / temperature, mask.reshape(-1), ignore_index=255)
    return total


@pytest.mark.parametrize("temperature", [100.0, 1.0, 0.05])
def test_pixel_cl_loss_is_as_accurate_as_the_release(temperature):
    generator = torch.Generator().manual_seed(2)
    prototype = F.normalize(torch.randn(256, 19, generator=generator), dim=0)
    source, target = torch.randn(1, 256, 23, 41, generator=generator), torch.randn(1, 256, 16, 32, generator=generator)
    masks = [torch.randint(0, 19, (1, *f.shape[2:]), generator=generator) for f in (source, target)]
    masks[0][0, :5] = 255
    results = []
    for dtype, loss in (
        (torch.float32, PixelCLLoss(None, temperature)),
        (torch.float32, lambda *a: released_loss(*a, temperature)),
        (torch.float64, lambda *a: released_loss(*a, temperature)),
    ):
        s, t = (f.to(dtype).requires_grad_() for f in (source, target))
        value = loss(prototype.to(dtype), s, masks[0], t, masks[1])
        results.append((value.detach(), *torch.autograd.grad(value, (s, t))))
    for got, eager, truth in zip(*results, strict=True):
        oracle.assert_as_accurate(got, eager, truth)


def test_pixel_cl_loss_with_nothing_labelled_is_zero():
    features = torch.randn(1, 8, 4, 4, requires_grad=True)
    mask = torch.full((1, 4, 4), 255)
    assert PixelCLLoss(None)(torch.randn(8, 3), features, mask, features, mask) == 0


def test_pseudo_label_drop_in(tmp_path):
    cfg = SimpleNamespace(MODEL=SimpleNamespace(NUM_CLASSES=4), OUTPUT_DIR=str(tmp_path))
    ours, confidences, labels = PseudoLabel(cfg), [], []
    for seed in range(3):
        logits = torch.randn(1, 4, 30, 40, generator=torch.Generator().manual_seed(seed))
        logits[:, 3] = -20  # never predicted
        ours.update_pseudo_label(logits)
        top = logits.softmax(1).max(1)
        confidences.append(top.values.flatten())
        labels.append(top.indices.flatten())
    confidence, label = torch.cat(confidences).numpy(), torch.cat(labels).numpy()
    expected = [released_threshold(confidence[label == k], 0.6) for k in range(3)] + [0.0]
    np.testing.assert_allclose(ours.get_threshold_const(0.6), expected, atol=1e-6)
    ours.save_results()
    np.testing.assert_array_equal(np.load(tmp_path / "thres_const.npy"), ours.thres)


def test_module_forms_have_the_functions_defaults():
    features, labels = batch()
    prototypes = torch.randn(4, 8)
    loss = sf.PrototypeContrastiveLoss(0.3, class_weight=torch.ones(4) * 2)
    assert loss(features, labels, prototypes) == sf.prototype_contrastive_loss(
        features, labels, prototypes, temperature=0.3, class_weight=torch.ones(4) * 2
    )
    assert sf.UpsampledCrossEntropyLoss(1.8)(features[:, :4], labels) == sf.upsampled_cross_entropy(
        features[:, :4], labels, temperature=1.8
    )
