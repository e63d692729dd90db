"""What a net is worth, and which of its checkpoints is picked."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_run import save_scenes, tiny_config

from spcl_fast.cli import main
from spcl_fast.data import eval_batches
from spcl_fast.data.classes import ClassSet, distinct
from spcl_fast.errors import CheckpointError, NumericError
from spcl_fast.method.context import Context
from spcl_fast.method.run import run_stages
from spcl_fast.method.summary import gap_closed
from spcl_fast.runs.signs import signs
from spcl_fast.runs.tensorfile import replace_tensors
from spcl_fast.train.evaluate import Scores, evaluate_model
from spcl_fast.train.windows import Windows


def test_a_net_picked_by_labels_is_never_called_the_last(tmp_path):
    run_stages(tiny_config(tmp_path, **{"evaluate.selection": "target_val"}), ("source_only",))
    with pytest.raises(CheckpointError, match="evaluate.selection: 'target_val' -> 'last'"):
        run_stages(tiny_config(tmp_path), ("source_only",))


def test_selection_on_source_keeps_the_best_checkpoint(tmp_path):
    config = tiny_config(
        tmp_path, **{"evaluate.selection": "source_val", "loop.checkpoint_every": "1", "source_only.iterations": "4"}
    )
    run_stages(config, ("source_only",))
    context = Context(config)
    picked = json.loads(context.run.path("source_only", "selected.json").read_text())
    scores = evaluate_model(
        context.model_of("source_only"), context.domains.dataset("source", "val"), config.source.eval_size
    )
    assert picked["by"] == "source_val" and scores.miou == pytest.approx(picked["miou"])


def test_scores_are_those_of_a_hand_count():
    classes = dataclasses.make_dataclass("Classes", ["names"])(("a", "b", "c"))
    scores = Scores(classes, np.array([[5, 1, 0], [3, 1, 0], [0, 0, 0]]))
    assert scores.iou == {"a": pytest.approx(500 / 9), "b": pytest.approx(20.0), "c": None}
    assert scores.miou == pytest.approx((500 / 9 + 20) / 2)
    assert scores.as_json()["predicted_share"] == {"a": 0.8, "b": 0.2, "c": 0.0}


def test_two_classes_of_one_name_are_counted_apart():
    scores = Scores(ClassSet(("tree", "road", "tree"), ((0, 0, 0),) * 3), np.array([[9, 0, 0], [0, 8, 2], [0, 5, 5]]))
    assert scores.by_index == [pytest.approx(100), pytest.approx(800 / 15), pytest.approx(500 / 12)]
    assert scores.miou == pytest.approx(np.mean([100, 800 / 15, 500 / 12]))
    assert list(scores.iou) == list(scores.as_json()["true_share"]) == ["tree", "road", "tree (2)"]
    assert distinct(("a", "a (2)", "a", "a")) == ("a", "a (2)", "a (3)", "a (4)")


def test_scores_agree_with_torchmetrics(finished):
    from torchmetrics.functional.classification import multiclass_jaccard_index
    from torchmetrics.functional.segmentation import mean_iou  # noqa: F401  the import itself fails where torchvision is broken

    model, dataset = finished.model_of("source_only"), finished.domains.dataset("target", "val").select(range(3))
    kept = {}
    scores = evaluate_model(
        model, dataset, (48, 32), keep=lambda i, name, predicted: kept.update({i: torch.from_numpy(predicted())})
    )
    truth = torch.cat([torch.from_numpy(np.array(dataset.label(i))).flatten() for i in range(3)]).long()
    predicted = torch.cat([kept[i].flatten() for i in range(3)]).long()
    expected = multiclass_jaccard_index(predicted, truth, len(dataset.classes), average="none", ignore_index=255)
    ours = torch.tensor([0.0 if value is None else value / 100 for value in scores.iou.values()])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_run_and_the_commands_evaluate_in_the_windows_of_their_settings(finished, tmp_path, capsys):
    def evaluated(*words):
        path = tmp_path / "figures.json"
        folder = finished.run.folder
        assert main(["evaluate", str(folder), "--stage", "oracle", "--output", str(path), *words]) == 0
        return json.loads(path.read_text())["confusion"]

    whole = evaluated()
    assert whole == json.loads(finished.run.path("oracle", "evaluation.json").read_text())["confusion"]
    assert whole == evaluated("--evaluate.window", "48x32"), "a window as large as the image is the image"
    parts = evaluated("--evaluate.window", "16x16", "--evaluate.window_stride", "8x8")
    assert parts != whole and np.sum(parts) == np.sum(whole)

    in_windows = {"evaluate.window": "16x16", "evaluate.window_stride": "8x8"}
    config = tiny_config(tmp_path, **in_windows)
    run_stages(config, ("source_only",))
    context = Context(config)
    scores = evaluate_model(
        context.model_of("source_only"),
        context.evaluation_data,
        config.target.eval_size,
        images=4,
        windows=Windows((16, 16), (8, 8)),
    )
    written = json.loads(context.run.path("source_only", "evaluation.json").read_text())
    assert written["confusion"] == scores.confusion.tolist()


def test_predict_sees_an_image_in_the_windows_of_the_settings(finished, tmp_path):
    image = tmp_path / "street.png"
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    Image.fromarray(noise).save(image)

    def predicted(out, *words):
        main(["predict", str(finished.run.folder), str(image), str(tmp_path / out), "--size", "native", *words])
        return np.asarray(Image.open(tmp_path / out / "masks" / "street.png"))

    whole = predicted("a")
    assert np.array_equal(whole, predicted("b", "--evaluate.window", "53x37"))
    parts = predicted("c", "--evaluate.window", "20x20", "--evaluate.window_stride", "8x8")
    assert parts.shape == whole.shape and not np.array_equal(whole, parts)


def logits_in_windows_of_16(model, image):
    """[1, 3, 32, 48] -> the mean of the logits of windows at every 8 pixels, in float64."""
    cell = model.stride
    total = torch.zeros(1, 1, 32 // cell, 48 // cell, dtype=torch.float64)
    count = torch.zeros_like(total)
    for top in range(0, 17, 8):
        for left in range(0, 33, 8):
            there = slice(top // cell, (top + 16) // cell), slice(left // cell, (left + 16) // cell)
            logits = model(image[:, :, top : top + 16, left : left + 16])[1]
            total = total.expand(-1, logits.shape[1], -1, -1).clone()
            total[:, :, there[0], there[1]] += logits
            count[:, :, there[0], there[1]] += 1
    return total / count


def test_evaluate_and_predict_in_windows_are_a_plain_loop_with_interpolate_argmax_and_bincount(finished, tmp_path):
    scored, folder = tmp_path / "figures.json", str(finished.run.folder)
    windows = ["--evaluate.window", "16x16", "--evaluate.window_stride", "8x8"]
    assert main(["evaluate", folder, "--stage", "oracle", "--output", str(scored), *windows]) == 0
    found = np.array(json.loads(scored.read_text())["confusion"])

    model, dataset = finished.model_of("oracle").double().eval(), finished.domains.dataset("target", "val").spread(4)
    classes, expected, unclear, images = len(dataset.classes), np.zeros_like(found), 0, tmp_path / "images"
    images.mkdir()
    with torch.no_grad():
        for index, (image, label, _) in enumerate(eval_batches(dataset, (48, 32))):
            logits = logits_in_windows_of_16(model, image.double())
            large = F.interpolate(logits, np.shape(label), mode="bilinear", align_corners=True)[0]
            best = large.topk(2, 0)
            unclear += int((best.values[0] - best.values[1] < 1e-4).sum())
            pairs = (torch.from_numpy(np.array(label)).long() * classes + best.indices[0]).flatten()
            expected += np.bincount(pairs[pairs < classes**2], minlength=classes**2).reshape(classes, classes)
            dataset.image(index).resize((48, 32)).save(images / f"{index}.png")
    assert expected.sum() == found.sum() and np.abs(found - expected).sum() <= 2 * unclear < expected.sum() / 100

    assert (
        main(["predict", folder, str(images), str(tmp_path / "out"), "--stage", "oracle", "--size", "native", *windows])
        == 0
    )
    with torch.no_grad():
        for path in sorted(images.iterdir()):
            image = torch.from_numpy(np.array(Image.open(path)))[None].movedim(3, 1).double() / 255
            large = F.interpolate(logits_in_windows_of_16(model, image), (32, 48), mode="bilinear", align_corners=True)[
                0
            ]
            best = large.topk(2, 0)
            clear = (best.values[0] - best.values[1] >= 1e-4).numpy()
            mask = np.asarray(Image.open(tmp_path / "out" / "masks" / path.name))
            assert clear.mean() > 0.99 and np.array_equal(mask[clear], best.indices[0].numpy()[clear])


def test_a_net_picked_in_windows_is_never_called_one_picked_without(tmp_path):
    picked = {"evaluate.selection": "source_val", "evaluate.window": "16x16"}
    run_stages(tiny_config(tmp_path, **picked), ("source_only",))
    with pytest.raises(CheckpointError, match="evaluate.window"):
        run_stages(tiny_config(tmp_path, **{"evaluate.selection": "source_val"}), ("source_only",))


def test_where_nothing_is_labelled_there_is_no_figure():
    classes = dataclasses.make_dataclass("Classes", ["names"])(("a", "b"))
    scores = Scores(classes, np.zeros((2, 2), int))
    assert scores.miou is None and scores.as_json()["miou"] is None and set(scores.iou.values()) == {None}
    assert gap_closed({"source_only": {"miou": None}, "adapted": {"miou": 1.0}, "oracle": {"miou": 2.0}}) is None


def test_figures_of_other_settings_or_images_are_not_kept(tmp_path, capsys):
    for side in ("source", "target"):
        save_scenes(tmp_path / side, f"generated_{side}")
    sides = {f"{side}.dataset": "folders" for side in ("source", "target")}
    sides |= {f"{side}.root": str(tmp_path / side) for side in ("source", "target")}
    sides |= {f"{side}.classes": str(tmp_path / "source" / "classes.json") for side in ("source", "target")}
    written = tmp_path / "run" / "source_only" / "evaluation.json"

    def confusion(**changes):
        run_stages(tiny_config(tmp_path, **sides, **changes), ("source_only",))
        return json.loads(written.read_text())["confusion"]

    first = confusion()
    before = written.stat().st_mtime_ns
    assert confusion() == first and written.stat().st_mtime_ns == before, "nothing is done twice"
    capsys.readouterr()
    assert np.sum(confusion(**{"evaluate.images": "1"})) * 4 == np.sum(first)
    assert "source_only: to be evaluated again" in capsys.readouterr().out
    assert confusion() == first
    label = tmp_path / "target" / "labels" / "val" / "0.png"
    Image.fromarray(np.full_like(np.asarray(Image.open(label)), 1)).save(label)
    assert np.sum(confusion(), axis=1).tolist() != np.sum(first, axis=1).tolist()


def test_nets_that_were_evaluated_in_different_ways_are_said_to_be(tmp_path, capsys):
    run_stages(tiny_config(tmp_path), ("source_only",))
    run_stages(tiny_config(tmp_path, **{"evaluate.tta": "flip"}), ("control",))
    assert (
        "warning: source_only and control were evaluated on other images or with other settings"
        in capsys.readouterr().out
    )
    run_stages(tiny_config(tmp_path, **{"evaluate.tta": "flip"}), ("source_only", "control"))
    assert "warning: source_only" not in capsys.readouterr().out


def test_a_net_that_is_not_finite_is_neither_evaluated_nor_does_it_predict(finished, tmp_path, capsys):
    weights = tmp_path / "nan.safetensors"
    state = finished.model_of("source_only").state_dict()
    replace_tensors(
        weights, {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in state.items()}
    )
    settings = ("--config", str(finished.run.path("config.yaml")))
    assert main(["evaluate", str(weights), *settings]) == NumericError.exit_code == 4
    assert "not finite on" in capsys.readouterr().err
    image = tmp_path / "images" / "street.png"
    image.parent.mkdir()
    Image.new("RGB", (48, 32), (90, 120, 200)).save(image)
    assert main(["predict", str(weights), str(image.parent), str(tmp_path / "out"), *settings]) == 4
    assert "not finite on street" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.png"))


def test_most_of_the_pixels_may_be_of_one_class_where_the_labels_say_so():
    names, record = ["background", "car"], {"stage": "distill", "predicted_share": [0.94, 0.06]}
    assert [sign.title for sign in signs(record, names)] == ["One class takes over during training"]
    assert not signs(record, names, lambda: {"background": 0.93, "car": 0.07})
    everything = record | {"predicted_share": [0.995, 0.005]}
    assert signs(everything, names, lambda: {"background": 0.93, "car": 0.07}), "a car is called background everywhere"
