"""model.freeze_body: the head and the classifier learn, the body does not, and nothing of it is kept for the backward."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from spcl_fast import catalog
from spcl_fast.config.load import load_config
from spcl_fast.errors import ConfigError
from spcl_fast.memory_plan.peak import peak_memory
from spcl_fast.method.context import Context
from spcl_fast.method.run import run_stages
from spcl_fast.models import SegmentationModel, build_model
from spcl_fast.train.resume import load_modules

SMALL = {
    "source.size": "[64, 48]", "target.size": "[64, 48]", "source.eval_size": "[64, 48]", "target.eval_size": "[64, 48]",
    "source.train_images": "4", "target.train_images": "4", "evaluate.images": "2", "evaluate.overlays": "1",
    "source.dataset": "generated_source", "target.dataset": "generated_target", "loop.workers": "0", "loop.log_every": "1",
    "model.feature_dim": "8", "model.name": "lite0",
}  # fmt: skip
STAGES = tuple(row.name for row in catalog.STAGES if row.name != "online")
LEARNED = tuple(row.name for row in catalog.trained())


def config_of(tmp_path, **changes):
    short = {f"{stage}.{key}": "2" for stage in LEARNED for key in ("iterations", "batch_size")}
    crops = {f"{stage}.augment.crop": "[64, 48]" for stage in LEARNED}
    crops |= {f"{stage}.target_augment.crop": "[64, 48]" for stage in ("adapt", "online")}
    return load_config(
        "folders", (), (), list({**SMALL, **short, **crops, "runs_dir": str(tmp_path), **changes}.items())
    )


def trained(config, stages=STAGES):
    """Weights before the first stage, and of each net that was trained."""
    run_stages(config, stages)
    context = Context(config)
    nets = [stage for stage in stages if stage in LEARNED]
    return context.nets.new().state_dict(), {stage: context.model_of(stage).state_dict() for stage in nets}


@pytest.mark.parametrize(
    "more", [{}, {"model.freeze_bn": "false"}, {"loop.checkpoint": "block"}, {"loop.accumulate": "2"}]
)
def test_no_stage_moves_the_body_and_every_one_moves_the_head(tmp_path, more):
    start, nets = trained(config_of(tmp_path, **{"model.freeze_body": "true", "target.labelled": "2", **more}))
    assert [*nets] == [stage for stage in LEARNED if stage != "online"]
    for stage, after in nets.items():
        moved = {key for key in start if not torch.equal(start[key], after[key])}
        assert not {key for key in moved if ".encoder." in key}, stage
        assert any(".head." in key for key in moved) and any(key.startswith("classifier.") for key in moved), stage


def test_online_keeps_the_body_of_both_nets(tmp_path):
    config = config_of(tmp_path, **{"model.freeze_body": "true", "online.ema": "0.5"})
    start, nets = trained(config, ("source_only", "online"))
    teacher = Context(config).nets.new()
    load_modules(Context(config).checkpoint("online"), {"teacher": teacher}, "online")
    for net in (nets["online"], teacher.state_dict()):
        moved = {key for key in start if not torch.equal(start[key], net[key])}
        assert moved and not {key for key in moved if ".encoder." in key}


def test_nothing_is_held_near_to_a_body_that_stands_still(tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(build_model("lite0", 9, feature_dim=8).state_dict(), weights)
    given = {"model.weights": str(weights), "online.feature_distance": "0.01"}
    for body, held in (("true", False), ("false", True)):
        config = config_of(tmp_path, **given, **{"model.freeze_body": body, "name": body})
        run_stages(config, ("source_only", "online"))
        lines = Context(config).run.path("metrics.jsonl").read_text().splitlines()
        assert any("feature_distance" in json.loads(line) for line in lines) == held


def test_dropout_of_the_body_is_off_in_training_mode():
    body = nn.ModuleDict({"drop": nn.Dropout(0.5), "top": nn.Conv2d(3, 4, 1)})
    body.forward = lambda x: body["top"](body["drop"](x))
    model = SegmentationModel("own", body, nn.Conv2d(4, 2, 1), stride=1, channels=4, num_classes=2, head="top")
    images = torch.rand(1, 3, 8, 8)
    for freeze in (False, True):
        model = model.freeze_body() if freeze else model
        first, second = (model.train()(images)[1] for _ in range(2))
        assert torch.equal(first, second) == freeze


def test_the_body_learns_otherwise(tmp_path):
    start, nets = trained(config_of(tmp_path), ("source_only",))
    assert any(".encoder." in key and not torch.equal(start[key], nets["source_only"][key]) for key in start)


def test_statistics_of_the_body_stand_still_in_training_mode_and_those_of_the_head_do_not():
    model = build_model("lite0", 3, feature_dim=8, freeze_bn=False).freeze_body()
    head = model.feature_extractor.head
    head.norm = nn.BatchNorm2d(8)
    model.train()
    kept = {key: value.clone() for key, value in model.state_dict().items() if "running" in key and ".encoder." in key}
    model(torch.rand(2, 3, 48, 64))
    assert kept and all(torch.equal(value, model.state_dict()[key]) for key, value in kept.items())
    assert head.training and head.norm.running_mean.abs().sum() > 0
    model.eval()
    assert not head.training


def test_nothing_of_the_body_is_kept_for_the_backward():
    model = build_model("lite0", 3, feature_dim=8).freeze_body().train()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(torch.rand(2, 3, 48, 64))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert kept
    assert all(tensor.shape[-1] <= 8 for tensor in kept if tensor.data_ptr() not in own)  # stride 8 and coarser


@pytest.mark.parametrize("layout", ["false", "true"])
def test_the_plan_knows_that_it_takes_less(tmp_path, layout):
    config = config_of(tmp_path, **{"loop.channels_last": layout})
    frozen = dataclasses.replace(config, model=dataclasses.replace(config.model, freeze_body=True))
    whole, less = (peak_memory(each, "adapt") for each in (config, frozen))
    assert less.peak_bytes < 0.7 * whole.peak_bytes


@pytest.mark.parametrize("name", ["deeplab_v2_resnet18", "lite0"])
def test_a_net_without_anything_that_learns_in_between_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} names no submodule with weights as its `head`"):
        build_model(name, 3, feature_dim=None).freeze_body()
