"""What the report says of a run in words: collapses, classes that are never predicted, gains that are none."""

import json

import numpy as np
from made_run import CLASSES, TRUE, confusion_matrix, edited, write_confusion

from spcl_fast.runs.signs import signs


def test_a_collapse_is_said_in_words(tmp_path):
    collapsed = np.zeros((8, 8), int)
    collapsed[:, 5] = 1e6 * TRUE
    collapsed[:, 4] = 1  # a net that once in a while says something else

    findings = edited(tmp_path, lambda folder: write_confusion(folder, "distill", collapsed))
    assert findings["Collapsed to one class"].level == "bad"
    assert "the distilled net calls 100% vegetation" in findings["Collapsed to one class"].text
    assert "contrastive" in findings["Collapsed to one class"].text
    assert {
        "The final net is not better than source-only",
        "The final net is not better than the control",
    } <= findings.keys()
    assert "The distilled net lost what the adapted net had won" in findings and "No sign of a collapse" not in findings


def test_a_collapse_during_adaptation_is_seen_in_the_metrics(tmp_path):
    def edit(folder):
        line = {"stage": "adapt", "step": 400, "predicted_share": [0.9, *[0.1 / 7] * 7], "kept_share": [0.9] + [0] * 7}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    findings = edited(tmp_path, edit)
    assert (
        "90% of the target batch was predicted road in adapt" in findings["One class takes over during training"].text
    )


def test_prototypes_that_have_become_alike_are_seen_in_the_metrics(tmp_path):
    def edit(folder, nearest):
        line = {"stage": "adapt", "step": 400, "predicted_share": [1 / 8] * 8, "prototype_nearest": nearest}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    found = edited(tmp_path / "alike", lambda folder: edit(folder, [0.5, 0.995, 0.9, 0.995, *[0.3] * 4]))
    assert f"of {CLASSES[1]}, {CLASSES[3]} point" in found["Prototypes have become alike"].text
    assert "Prototypes have become alike" not in edited(tmp_path / "apart", lambda folder: edit(folder, [0.9] * 8))


def test_pseudo_labels_that_keep_everything_are_said(tmp_path):
    def edit(folder):
        path = folder / "pseudo_labels" / "thresholds.json"
        record = json.loads(path.read_text())
        record["kept_pixels"] = {name: 0.97 * value for name, value in record["predicted_pixels"].items()}
        path.write_text(json.dumps(record))

    findings = edited(tmp_path, edit)
    assert "97% of the pixels passed" in findings["Nearly every pixel got a pseudo-label"].text


def test_a_class_that_is_never_predicted_is_named_unless_the_oracle_misses_it_too(tmp_path):
    def edit(folder):
        matrix = confusion_matrix(0.7)
        matrix[:, 0] += matrix[:, 3]
        matrix[:, 3] = 0
        write_confusion(folder, "distill", matrix)

    findings = edited(tmp_path, edit)
    assert "fence occurs on target" in findings["Classes that are never predicted"].text
    assert (
        "pole" in findings["Classes out of reach"].text
        and "pole" not in findings["Classes that are never predicted"].text
    )


def test_selection_on_target_labels_is_called_what_it_is(tmp_path):
    def edit(folder):
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**summary, "selection": "target_val"}))

    findings = edited(tmp_path, edit)
    assert findings["The checkpoint was chosen on target labels"].level == "bad"


def test_advice_against_a_collapse_names_no_setting_that_is_there_already():
    record = {"stage": "distill", "predicted_share": [0.99, 0.01]}
    off, on = ({"distill.source_weight": value}.get for value in (0.0, 1.0))
    assert "Set distill.source_weight above 0, or train for fewer" in signs(record, ["a", "b"], dict, off)[0].text
    assert "source_weight" not in signs(record, ["a", "b"], dict, on)[0].text
    adapted = record | {"stage": "adapt"}
    assert "adapt.contrast_weight" not in signs(adapted, ["a", "b"], dict, {"adapt.contrast_weight": 0.0}.get)[0].text
    assert "Lower adapt.contrast_weight, or lower adapt.lr" in signs(adapted, ["a", "b"])[0].text
    assert "Lower the learning rate." in signs(record | {"stage": "of another version"}, ["a", "b"])[0].text
