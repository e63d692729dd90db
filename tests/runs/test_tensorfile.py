"""Tensors and optimizer states in files: exact, and readable by others."""

from __future__ import annotations

import json

import pytest
import torch
from faults import same_bits
from safetensors.torch import load_file

from spcl_fast.errors import CheckpointError
from spcl_fast.runs.checkpoint import CheckpointStore
from spcl_fast.runs.statetree import flatten, unflatten
from spcl_fast.runs.tensorfile import read_tensors, write_tensors

TENSORS = {"model/weight": torch.randn(5, 3), "model/bias": torch.full((), 1.0), "optimizer/step": torch.tensor(1)}


def test_every_dtype_shape_and_layout_comes_back_as_it_was(tmp_path):
    given = {
        "scalar": torch.tensor(3.25),
        "scalar64": torch.tensor(-(2**40)),
        "bool": torch.tensor([True, False, True]),
        "u8": torch.arange(7, dtype=torch.uint8),
        "bf16": torch.randn(3, 5).bfloat16(),
        "f16": torch.randn(3).half(),
        "f64": torch.randn(2, 2, dtype=torch.float64),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "empty": torch.empty(0, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 6).t(),
        "sliced": torch.randn(6, 6)[::2, 1:4],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "learns": torch.nn.Parameter(torch.randn(2)),
    }
    given["tied"] = given["f64"]  # the same memory under two names
    write_tensors(tmp_path / "x.safetensors", given)
    back = read_tensors(tmp_path / "x.safetensors")
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (back[name], tensor)]
        assert torch.equal(*bits), name
    assert (
        back["channels_last"].is_contiguous(memory_format=torch.channels_last)
        and not back["channels_last"].is_contiguous()
    )
    assert back["transposed"].stride() == given["transposed"].stride()


def test_the_file_is_plain_safetensors_for_others(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(1, TENSORS, {})
    given = TENSORS
    assert same_bits(
        load_file(path / "model.safetensors"), {"weight": given["model/weight"], "bias": given["model/bias"]}
    )


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, betas=(0.8, 0.95)),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_state_goes_through_json_and_back_exactly(tmp_path, make):
    parameter = torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = make([parameter])
    for _ in range(3):
        parameter.square().sum().backward()
        optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(flatten(optimizer.state_dict(), tensors, "optimizer/x"), allow_nan=False))
    CheckpointStore(tmp_path).save(1, tensors, {"tree": tree})
    checkpoint = CheckpointStore(tmp_path).latest()
    back = unflatten(checkpoint.meta["tree"], checkpoint.tensors)
    assert back["param_groups"] == optimizer.state_dict()["param_groups"]
    for key, value in optimizer.state_dict()["state"][0].items():
        if isinstance(value, torch.Tensor):
            restored = back["state"][0][key]
            assert (
                torch.equal(restored, value) and restored.dtype == value.dtype and restored.stride() == value.stride()
            )
        else:
            assert back["state"][0][key] == value


def test_trees_keep_integer_keys_tuples_and_non_finite_numbers():
    tree = {"a": (1, [2.5, None, True, "x"]), 3: {"$": "not a tag", "inf": float("inf")}, "t": torch.tensor(1.5)}
    tensors: dict[str, torch.Tensor] = {}
    back = unflatten(json.loads(json.dumps(flatten(tree, tensors, "p"), allow_nan=False)), tensors)
    assert back == tree and isinstance(back["a"], tuple) and 3 in back


def test_state_that_would_need_code_is_refused_by_name():
    with pytest.raises(CheckpointError, match="'p.hook' of type function cannot be stored"):
        flatten({"hook": lambda: None}, {}, "p")
