"""Averages of what the steps return: over the steps that have a value at all."""

from __future__ import annotations

import math

import pytest
import torch

from spcl_fast.train.meter import Meter, Weighted


def weighted(value: float, weight: float) -> Weighted:
    return Weighted(torch.tensor(value), torch.tensor(weight))


def test_a_step_without_weight_moves_an_average():
    meter = Meter()
    for step, (value, weight) in enumerate([(3.0, 1.0), (-1.0, 0.0), (5.0, 3.0)]):
        meter.add({"loss": torch.tensor(float(step)), "excess": weighted(value, weight)}, step)
    assert meter.read().values == {"loss": 1.0, "excess": 4.5}


def test_where_no_step_has_a_weight_there_is_no_figure():
    meter = Meter()
    meter.add({"loss": torch.tensor(2.0), "excess": Weighted(torch.tensor(-3.0), torch.tensor(False))}, 0)
    assert meter.read().values == {"loss": 2.0}


def test_weights_survive_a_checkpoint_between_two_log_lines():
    meter, resumed = Meter(), Meter()
    meter.add({"share": weighted(0.5, 10.0)}, 0)
    resumed.restore(meter.state())
    resumed.add({"share": weighted(1.0, 30.0)}, 1)
    assert resumed.read().values == {"share": pytest.approx(0.875)}


def test_a_value_that_is_not_finite_is_bad_whatever_its_weight():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "excess": weighted(math.nan, 0.0)}, 7)
    assert meter.read().bad == {"excess": 7}
