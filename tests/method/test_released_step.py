"""One adapt step against a plain transcription of the released loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny_run import tiny_config

from spcl_fast.method.adapt import STAGE as ADAPT
from spcl_fast.method.context import Context
from spcl_fast.method.prototypes import read_prototypes
from spcl_fast.method.run import run_stages
from spcl_fast.method.training import batches_of
from spcl_fast.models import build_model


def released_adapt_step(model, prototypes, source, target, pseudo, lr):
    """One iteration as `train_ours.py` does it, both graphs alive and the source graph gone through twice. prototypes [D, K]."""
    optimizer = torch.optim.SGD(
        [{"params": model.feature_extractor.parameters()}, {"params": model.classifier.parameters(), "lr": 10 * lr}],
        lr=lr,
        momentum=0.9,
        weight_decay=5e-4,
    )
    src_feat = model.features(source.images)
    src_seg = model.classify(src_feat)
    pred = F.interpolate(src_seg, source.images.shape[2:], mode="bilinear", align_corners=True)
    loss_seg = F.cross_entropy(pred / 1.8, source.labels.long(), ignore_index=255)
    loss_seg.backward(retain_graph=True)
    tgt_feat = model.features(target.images)
    tgt_mask = F.interpolate(pseudo[None].float(), tgt_feat.shape[2:], mode="nearest")[0].long()
    src_mask = F.interpolate(source.labels[None].float(), src_feat.shape[2:], mode="nearest")[0].long()
    src_mask[src_mask != src_seg.detach().argmax(1)] = 255
    unit = F.normalize(src_feat.detach(), dim=1).permute(0, 2, 3, 1)
    current = torch.zeros_like(prototypes)
    for k in src_mask.unique().tolist():
        if k != 255:
            current[:, k] = unit[src_mask == k].mean(0)
    prototypes = 0.1 * prototypes + 0.9 * current
    loss_cl = 0
    for feat, mask in ((src_feat, src_mask), (tgt_feat, tgt_mask)):
        rows = F.normalize(feat, dim=1).permute(0, 2, 3, 1).reshape(-1, feat.shape[1])
        loss_cl = loss_cl + F.cross_entropy(rows @ prototypes / 100, mask.flatten(), ignore_index=255)
    loss_cl.backward()
    optimizer.step()
    return prototypes


def test_one_adapt_step_under_released_settings_is_the_released_step(tmp_path):
    config = tiny_config(
        tmp_path,
        preset="gta5_cityscapes",
        sets=("released",),
        **{
            "source.dataset": "generated_source",
            "target.dataset": "generated_target",
            "model.name": "deeplab_v2_resnet18",
            "model.weights": "null",
            "warmup.iterations": "3",
            "adapt.iterations": "1",
            "pseudo_label.estimate_size": "[48, 32]",
        },
    )
    assert (config.adapt.contrast_temperature, config.adapt.absent, config.adapt.keep, config.model.frozen_bn_eps) == (
        100,
        "decay",
        0.1,
        0,
    )
    run_stages(config, ("warmup", "prototypes", "pseudo_labels", "adapt"))
    context = Context(config)
    source, target = next(batches_of(context, "adapt", config.adapt, ADAPT.feeds(config))(0))
    assert (target.labels != 255).any() and (source.labels != 255).any()

    model = context.model_of("warmup")
    start = {key: value.clone() for key, value in model.state_dict().items()}
    prototypes = released_adapt_step(
        model, read_prototypes(context.run).T.clone(), source, target, target.labels, config.adapt.lr
    )
    ours = context.checkpoint("adapt")
    moved = 0
    for key, value in model.state_dict().items():
        step = (value - start[key]).abs().max()
        moved += bool(step > 0)
        torch.testing.assert_close(ours.group("model")[key], value, rtol=1e-5, atol=max(1e-8, 1e-3 * step.item()))
    assert moved > 20
    torch.testing.assert_close(ours.group("bank")["prototypes"], prototypes.T, rtol=1e-5, atol=1e-6)


def test_released_batch_norm_has_no_eps():
    model = build_model("deeplab_v2_resnet18", 4, frozen_bn_eps=0.0)
    assert all(module.eps == 0 for module in model.modules() if type(module).__name__ == "FrozenBatchNorm2d")
