"""The released adaptation step in plain PyTorch, as it is: what our step is compared with, counted or measured.

Both domains' graphs alive, logits up-sampled, features copied into rows of pixels, the source graph kept for a second backward, the
target's classifier forward that only its shape is taken from, BatchNorm that is not folded. Source: `core/train_ours.py` of
BinhuiXie/SPCL, commit 9e5bab7, written anew.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcl_fast.config import AdaptConfig, Config
from spcl_fast.data import Batch
from spcl_fast.data.classes import IGNORE
from spcl_fast.memory_plan.peak import CountedStep, PeakMemory, batch_of, peak_of, plan_nets
from spcl_fast.method.adapt import STAGE as ADAPT
from spcl_fast.method.parts import Step, backward
from spcl_fast.models import SegmentationModel
from spcl_fast.models.norm import FrozenBatchNorm2d
from spcl_fast.train import memory


class _ReleasedBatchNorm(nn.Module):
    """Scale and shift as two passes after the convolution."""

    def __init__(self, norm: FrozenBatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.norm.scale_shift()
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def unfold_batch_norm(module: nn.Module) -> None:
    """Replace every frozen BatchNorm by one that no convolution takes in."""
    for name, child in module.named_children():
        if isinstance(child, FrozenBatchNorm2d):
            setattr(module, name, _ReleasedBatchNorm(child))
        else:
            unfold_batch_norm(child)


def released_step(model: SegmentationModel, prototypes: Tensor, train: AdaptConfig) -> Step:
    """prototypes [D, K] as the release keeps them; they are moved in place."""

    def rows_of(features: Tensor) -> Tensor:
        return F.normalize(features, dim=1).permute(0, 2, 3, 1).reshape(-1, features.shape[1])

    def move(features: Tensor, mask: Tensor) -> None:
        unit = F.normalize(features.detach(), dim=1).permute(0, 2, 3, 1)
        current = torch.zeros_like(prototypes)
        for k in range(prototypes.shape[1]):
            chosen = (mask == k)[..., None]
            current[:, k] = (unit * chosen).sum((0, 1, 2)) / chosen.sum().clamp_min(1)
        prototypes.copy_(train.keep * prototypes + (1 - train.keep) * current)

    def step(batch: tuple[Batch, Batch], it: int) -> dict[str, Tensor]:
        source, target = batch
        with memory.phase("forward"):
            source_features = model.features(source.images)
            source_logits = model.classify(source_features)
        with memory.phase("loss"):
            predicted = F.interpolate(source_logits, source.images.shape[2:], mode="bilinear", align_corners=True)
            segmentation = F.cross_entropy(predicted / train.temperature, source.labels.long(), ignore_index=IGNORE)
        with memory.phase("backward"):
            segmentation.backward(retain_graph=True)

        with memory.phase("forward"):
            target_features = model.features(target.images)
            target_logits = model.classify(target_features)  # noqa: F841  its graph lives through the backward, as in the release
        with memory.phase("loss"):
            target_mask = F.interpolate(target.labels[None].float(), target_features.shape[2:], mode="nearest")[
                0
            ].long()
            source_mask = F.interpolate(source.labels[None].float(), source_features.shape[2:], mode="nearest")[
                0
            ].long()
            source_mask = source_mask.where(source_mask == source_logits.detach().argmax(1), IGNORE)
            move(source_features, source_mask)
            losses = [
                F.cross_entropy(
                    rows_of(features) @ prototypes / train.contrast_temperature, mask.flatten(), ignore_index=IGNORE
                )
                for features, mask in ((source_features, source_mask), (target_features, target_mask))
            ]
            contrast = train.contrast_weight * (losses[0] + losses[1])
        backward(contrast)
        return {"segmentation": segmentation.detach(), "contrast": contrast.detach()}

    return step


def counted_step(config: Config, num_classes: int) -> CountedStep:
    """The released step at the sizes of these settings: float32, no setting of our loop."""
    train, model = config.adapt, plan_nets(config, num_classes).new().train()
    unfold_batch_norm(model)
    if model.chain is not None:
        model.chain.cuts = ()
    batch = tuple(batch_of(feed.size(config), train.batch_size) for feed in ADAPT.feeds(config))
    prototypes = torch.zeros(model.channels, num_classes)
    groups = model.parameter_groups(train.lr, train.head_multiplier)
    optimizer = torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    step = released_step(model, prototypes, train)
    return CountedStep(model, step, batch, [model], [optimizer], [prototypes])


def released_peak(config: Config, num_classes: int) -> PeakMemory:
    """What `spcl-fast plan adapt` counts of our step, of the released one. On fake tensors: nothing is allocated."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        work = counted_step(config, num_classes)
        return peak_of("released loop", work, on_cpu=config.loop.device == "cpu")
