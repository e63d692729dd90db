"""Batches: a pure function of (seed, step, rank); what augmentation does to image and label alike; which image comes when."""

from __future__ import annotations

import signal
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from spcl_fast.config import AugmentConfig
from spcl_fast.data import Dataset, build_dataset, class_counts, class_frequency, eval_batches, train_batches
from spcl_fast.data.augment import make_sample
from spcl_fast.data.cache import ContentCache
from spcl_fast.data.classes import CITYSCAPES_16, ClassSet
from spcl_fast.data.sampling import BLOCK, BalancedOrder, ShuffledOrder
from spcl_fast.data.statistics import rarity
from spcl_fast.errors import ConfigError, DataError

EVERYTHING = AugmentConfig(crop=(48, 32), scale=(0.4, 2.0), flip=0.5, jitter=0.5, blur=0.5, rare_crop=0.5)
SIZE = (64, 40)


class InMemory(Dataset):
    """Labels given as arrays; every image shows its label (red = 10 x class) and its index (green)."""

    def __init__(self, labels: list[np.ndarray], classes: int = 3, has_labels: bool = True):
        palette = tuple((k, k, k) for k in range(classes))
        names = [str(i) for i in range(len(labels))]
        super().__init__(
            "memory", "train", ClassSet(tuple("abcdefghi"[:classes]), palette), names, has_labels=has_labels
        )
        self.arrays = labels

    def image(self, index):
        label = self.arrays[index]
        return Image.fromarray(np.stack([label * 10, np.full_like(label, index), np.zeros_like(label)], -1))

    def label(self, index):
        return self.arrays[index] if self.has_labels else None


def batches(dataset, count, *, start=0, augment=EVERYTHING, **changes):
    settings = {"size": SIZE, "batch_size": 3, "seed": 7, "start_step": start, **changes}
    return list(islice(train_batches(dataset, augment, **settings), count))


def same(one, two) -> bool:
    return one.names == two.names and torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)


@pytest.fixture(scope="module")
def scenes():
    return build_dataset("generated_source", "", "train", limit=10)


def test_shapes_types_and_range(scenes):
    batch = batches(scenes, 1)[0]
    assert batch.images.shape == (3, 3, 32, 48) and batch.images.dtype == torch.float32
    assert batch.labels.shape == (3, 32, 48) and batch.labels.dtype == torch.uint8 and len(batch.names) == 3
    assert batch.images.min() >= 0 and batch.images.max() <= 1 and batch.images.std() > 0.05
    assert batches(scenes, 1, augment=AugmentConfig())[0].images.shape == (3, 3, 40, 64)


def test_an_image_is_augmented_anew_at_every_step_and_slot(scenes):
    drawn = batches(scenes.select([4]), 3)
    samples = {image.numpy().tobytes() for batch in drawn for image in batch.images}
    assert {name for batch in drawn for name in batch.names} == {scenes.names[4]} and len(samples) == 9


@pytest.mark.parametrize("balanced", [False, True])
def test_resumed_batches_are_bitwise_those_of_an_uninterrupted_run(scenes, balanced):
    whole = batches(scenes, 9, balanced=balanced)
    again = batches(scenes, 4, start=5, balanced=balanced)
    assert all(same(a, b) for a, b in zip(whole[5:], again, strict=True))
    assert not same(whole[0], whole[1]) and not same(whole[0], batches(scenes, 1, seed=8)[0])


def test_worker_processes_change_nothing_and_leave_the_random_state_alone(scenes):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert all(
        same(a, b) for a, b in zip(batches(scenes, 4, start=2), batches(scenes, 4, start=2, workers=2), strict=True)
    )
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_share_each_epoch_without_overlap(scenes):
    parts = [batches(scenes, 5, rank=rank, world_size=2, batch_size=1) for rank in range(2)]
    names = [batch.names[0] for part in parts for batch in part]
    assert sorted(names) == sorted(scenes.names)
    one = batches(scenes, 5, batch_size=2)
    assert [[a.names[0], b.names[0]] for a, b in zip(*parts, strict=True)] == [batch.names for batch in one]
    assert torch.equal(one[3].images[1:], parts[1][3].images)  # more machines, the same samples


def test_every_image_once_an_epoch_and_each_epoch_in_another_order():
    order = ShuffledOrder(11, seed=0)
    epochs = [[order(p) for p in range(e * 11, e * 11 + 11)] for e in range(3)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs) and epochs[0] != epochs[1]
    assert [order(p) for p in range(5)] == epochs[0][:5]  # looking back is possible
    with pytest.raises(DataError, match="holds no images"):
        ShuffledOrder(0, seed=0)


def test_without_augmentation_image_and_label_are_the_resized_files():
    label = np.random.default_rng(0).integers(0, 3, (37, 53), dtype=np.uint8)
    data = InMemory([label])
    batch = batches(data, 1, augment=AugmentConfig(), batch_size=1)[0]
    image = np.asarray(data.image(0).resize(SIZE, Image.Resampling.BICUBIC), np.float32) / 255
    assert np.array_equal(batch.images[0].numpy(), image.transpose(2, 0, 1))
    assert np.array_equal(
        batch.labels[0].numpy(), np.asarray(Image.fromarray(label).resize(SIZE, Image.Resampling.NEAREST))
    )


def test_label_stays_on_its_pixels_under_scale_crop_and_flip():
    # large squares, so that interpolation touches few pixels; the image carries its label in the red channel
    label = np.kron(np.random.default_rng(1).integers(0, 3, (5, 8), dtype=np.uint8), np.ones((20, 20), np.uint8))
    augment = AugmentConfig(crop=(48, 32), scale=(0.6, 3.0), flip=0.5, rare_crop=0.5)
    agree = []
    for batch in batches(InMemory([label, label[::-1].copy()]), 20, augment=augment):
        shown = (batch.images[:, 0] * 25.5).round().to(torch.uint8)
        inside = batch.labels != 255
        agree.append((shown == batch.labels)[inside].float().mean())
    assert min(agree) > 0.85


def test_flip_mirrors_both():
    label = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    label[:, :8] = 2
    seen = set()
    for batch in batches(InMemory([label]), 8, augment=AugmentConfig(flip=0.5)):
        for image, labels in zip(batch.images, batch.labels, strict=True):
            left, right = int(labels[0, 0]), int(labels[0, -1])
            assert {left, right} == {0, 2} and torch.equal(image[0] > 0.04, labels == 2)
            seen.add(left)
    assert seen == {0, 2}


def test_image_smaller_than_the_crop_is_padded_and_the_padding_ignored():
    label = np.ones((40, 64), np.uint8)
    batch = batches(InMemory([label]), 1, augment=AugmentConfig(crop=(64, 40), scale=(0.5, 0.5)))[0]
    for image, labels in zip(batch.images, batch.labels, strict=True):
        assert (labels == 1).sum() == 32 * 20 and (labels == 255).sum() == 64 * 40 - 32 * 20
        pad = image[:, labels == 255]
        assert torch.allclose(pad, torch.tensor([124.0, 116.0, 104.0])[:, None] / 255)


def test_rare_crop_finds_the_rare_class_and_zooms_in():
    rng = np.random.default_rng(0)
    labels = []
    for _ in range(6):
        label = np.zeros((144, 256), np.uint8)
        y, x = rng.integers(10, 130), rng.integers(10, 240)
        label[y : y + 3, x : x + 3] = 2
        labels.append(label)
    zoom = AugmentConfig(crop=(80, 60), scale=(5.0, 5.0))  # 28 of 144 rows
    data, size = InMemory(labels, classes=4), (107, 60)
    plain = [int((b.labels == 2).any((1, 2)).sum()) for b in batches(data, 10, augment=zoom, size=size)]
    rare = [
        int((b.labels == 2).any((1, 2)).sum())
        for b in batches(data, 10, augment=replace(zoom, rare_crop=1.0), size=size)
    ]
    assert sum(rare) >= 25 and sum(plain) <= 10
    share = float(
        np.mean(
            [(b.labels == 2).float().mean() for b in batches(data, 10, augment=replace(zoom, rare_crop=1.0), size=size)]
        )
    )
    assert share > 10 * class_frequency(data)[2]
    assert rarity(data)[3] == rarity(data).max() and np.isfinite(rarity(data)).all()  # a class that never occurs


def test_rare_crop_on_an_image_without_any_label_still_crops():
    batch = batches(InMemory([np.full((40, 64), 255, np.uint8)]), 1, augment=replace(EVERYTHING, rare_crop=1.0))[0]
    assert (batch.labels == 255).all()


def test_data_without_labels_gives_ignored_labels():
    batch = batches(InMemory([np.zeros((40, 64), np.uint8)], has_labels=False), 1)[0]
    assert (batch.labels == 255).all()


def test_jitter_leaves_the_label_and_keeps_grey_grey():
    grey = Image.new("RGB", (16, 8), (90, 90, 90))
    out, labels = np.empty((3, 8, 16), np.float32), np.empty((8, 16), np.uint8)
    seen = []
    for seed in range(8):
        make_sample(
            grey,
            np.full((8, 16), 1, np.uint8),
            AugmentConfig(jitter=0.5),
            (16, 8),
            np.random.default_rng(seed),
            None,
            out,
            labels,
        )
        assert np.ptp(out) < 1e-5 and (labels == 1).all()
        assert (
            0.49 < out[0, 0, 0] / (90 / 255) < 1.51
        )  # contrast turns about the mean: only brightness moves a plain picture
        seen.append(float(out[0, 0, 0]))
    assert np.ptp(seen) > 0.1


def test_impossible_augmentation_is_a_config_error(scenes):
    for augment, told in (
        (AugmentConfig(scale=(0.0, 1.0)), "augment.scale"),
        (AugmentConfig(scale=(2.0, 1.0)), "augment.scale"),
        (AugmentConfig(flip=1.5), "augment.flip is 1.5; expected a probability"),
        (AugmentConfig(jitter=-1), "augment.jitter"),
        (AugmentConfig(crop=(0, 4)), "at least 1x1"),
    ):
        with pytest.raises(ConfigError, match=told):
            batches(scenes, 1, augment=augment)


# ---- class-balanced sampling ----


def test_balanced_sampling_shows_a_rare_class_often():
    presence = np.zeros((200, 3), bool)
    presence[:, 0] = True
    presence[:4, 1] = True  # in 2 % of the images
    order = BalancedOrder(presence, seed=0)
    drawn = [order(p) for p in range(600)]
    share = np.mean([i < 4 for i in drawn])
    assert share > 0.3 and len(set(drawn)) > 100  # the rare files often, the others still


def test_balanced_sampling_survives_one_file_classes_and_missing_classes():
    presence = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0]], bool)  # class 1 in one file, class 2 in none
    order = BalancedOrder(presence, seed=3)
    drawn = [order(p) for p in range(60)]
    assert set(drawn) == {0, 1, 2}
    one_class = BalancedOrder(np.ones((10, 1), bool), seed=0)
    assert sorted(one_class(p) for p in range(10)) == list(
        range(10)
    )  # the next image that holds it: none twice before all were drawn
    with pytest.raises(DataError, match="no training image holds any class"):
        BalancedOrder(np.zeros((3, 2), bool), seed=0)


def test_balanced_sampling_starts_anywhere_at_once():
    presence = np.random.default_rng(0).random((50, 5)) < 0.3
    forward, jump = BalancedOrder(presence, seed=1), BalancedOrder(presence, seed=1)
    near_end = [forward(p) for p in range(BLOCK + 20)][BLOCK + 5 :]
    assert [jump(p) for p in range(BLOCK + 5, BLOCK + 20)] == near_end


# ---- counting, evaluation, cache ----


def test_counts_and_frequency_leave_out_ignored_pixels():
    label = np.array([[0, 0, 1, 255]], np.uint8)
    data = InMemory([label, np.full((1, 4), 255, np.uint8)])
    assert class_counts(data).tolist() == [[2, 1, 0], [0, 0, 0]]
    assert class_frequency(data).tolist() == [2 / 3, 1 / 3, 0] and class_frequency(data, 1).tolist() == [
        2 / 3,
        1 / 3,
        0,
    ]
    with pytest.raises(DataError, match="opened without labels"):
        class_counts(InMemory([label], has_labels=False))


def test_evaluation_keeps_labels_at_their_own_size_and_order(scenes):
    plain = list(eval_batches(scenes, (64, 32)))
    assert [name for _, _, name in plain] == scenes.names
    image, label, _ = plain[0]
    assert (
        image.shape == (1, 3, 32, 64)
        and image.dtype == torch.float32
        and label.shape == (128, 256)
        and label.dtype == np.uint8
    )
    for (a, b, c), (d, e, f) in zip(plain, eval_batches(scenes, (64, 32), workers=2), strict=True):
        assert torch.equal(a, d) and np.array_equal(b, e) and c == f
    assert next(eval_batches(scenes, (64, 32), labels=False))[1] is None


def test_workers_leave_a_signal_to_the_group_to_the_main_process(scenes):
    """A worker that died of it would stop the run before its state is saved. A second SIGTERM is the main process's own."""
    from spcl_fast.data.loading import _WorkerStart

    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    from spcl_fast.data.cache import CACHE

    budget = CACHE.budget_bytes
    try:
        _WorkerStart(budget)(0)
        assert (
            signal.getsignal(signal.SIGINT) is signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        )
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)


def test_cache_stays_within_its_budget_and_forgets_nothing_wrongly():
    cache = ContentCache(1000)
    for key in range(50):
        value = cache.get(key, lambda key=key: np.full(100, key, np.uint8))
        assert (value == key).all() and cache.used_bytes <= 1000
    assert cache.used_bytes == 1000
    assert cache.get("big", lambda: np.zeros(2000, np.uint8)).size == 2000 and cache.used_bytes == 1000
    cache.set_budget(300)
    assert cache.used_bytes == 300
    cache.clear()
    assert cache.used_bytes == 0


def test_16_classes_leave_out_terrain_truck_and_train():
    assert len(CITYSCAPES_16) == 16 and not {"terrain", "truck", "train"} & set(CITYSCAPES_16.names)
