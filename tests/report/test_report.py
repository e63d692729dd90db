"""The report: whole and partial runs, damaged files, names that would be code, one file that asks for nothing."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from spcl_fast.data.palette import write_label_png
from spcl_fast.errors import CheckpointError
from spcl_fast.report import write_report
from spcl_fast.report.findings import find
from spcl_fast.report.pictures import label_overlay
from spcl_fast.report.tables import iou_table
from spcl_fast.runs.reading import read_run

CLASSES = ["road", "sidewalk", "building", "fence", "pole", "vegetation", "sky", "car"]
PALETTE = [
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (190, 153, 153),
    (153, 153, 153),
    (107, 142, 35),
    (70, 130, 180),
    (0, 0, 142),
]
TRUE = np.array([0.3, 0.08, 0.22, 0.02, 0.01, 0.15, 0.17, 0.05])
NETS = {"source_only": 0.55, "control": 0.57, "warmup": 0.58, "adapt": 0.66, "distill": 0.68, "oracle": 0.8}
NAMES = {"adapt": "adapted", "distill": "distilled"}


def confusion_matrix(skill):
    """Pixels [K, K]: `skill` of each class is right, the rest spreads like the true shares; poles are never found."""
    spread = np.tile(TRUE, (len(TRUE), 1)) * (1 - skill) + np.eye(len(TRUE)) * skill
    spread[4] = np.roll(TRUE, 1)
    spread[:, 4] = 0
    spread[4, 4] = 0
    return np.round(1e6 * TRUE[:, None] * spread / spread.sum(1, keepdims=True)).astype(int)


def evaluation(matrix):
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    iou = 100 * matrix.diagonal() / union
    return {
        "miou": iou.mean(),
        "iou": dict(zip(CLASSES, iou, strict=True)),
        "confusion": matrix.tolist(),
        "predicted_share": dict(zip(CLASSES, matrix.sum(0) / matrix.sum(), strict=True)),
        "true_share": dict(zip(CLASSES, matrix.sum(1) / matrix.sum(), strict=True)),
    }


def scene(rng, height=90, width=120):
    """An image and its labels: sky over buildings and trees over road, a car."""
    rows, columns = np.mgrid[:height, :width]
    label = np.where(rows < 34 + 6 * np.sin(columns / 11 + rng.uniform(0, 6)), 6, 2)
    label[(columns % 50 > 30) & (rows > 20) & (rows < 50)] = 5
    label[rows > 55] = 1
    label[rows > 55 + np.abs(columns - 60) // 4 - 5] = 0
    left = int(rng.integers(15, 80))
    label[50:66, left : left + 26] = 7
    label[25:60, 100:102] = 4
    label[86:, :] = 255
    colours = np.array([*PALETTE, (40, 40, 40)])[np.minimum(label, len(PALETTE))]
    noise = rng.normal(0, 9, (height, width, 1))
    return np.clip(0.6 * colours + 70 + noise, 0, 255).astype(np.uint8), label.astype(np.uint8)


def records(stage, steps, rng):
    for step in range(20, steps + 1, 20):
        fall = np.exp(-step / 90)
        line = {"stage": stage, "step": step, "seconds": 0.4 * step, "lr": 5e-4 * (1 - step / (steps + 1)) ** 0.9}
        line |= {
            "segmentation": 0.4 + 1.6 * fall + rng.normal(0, 0.03),
            "images_per_s": 9.5,
            "data_wait": 0.04,
            "peak_memory_bytes": 900 << 20,
            "predicted_peak_bytes": 612 << 20,
            "phase_peak_bytes": {"forward": 700 << 20, "loss": 710 << 20, "backward": 890 << 20, "step": 400 << 20},
        }
        if stage == "warmup":
            line |= {"adversarial": 0.69 + rng.normal(0, 0.02), "discriminator": 0.69 - 0.1 * (1 - fall)}
        if stage == "adapt":
            line |= {
                "source_excess": -1.1 * (1 - fall) + rng.normal(0, 0.02),
                "target_excess": -0.7 * (1 - fall) + rng.normal(0, 0.03),
            }
            predicted = TRUE * rng.uniform(0.8, 1.2, len(TRUE))
            line["predicted_share"] = (predicted / predicted.sum()).tolist()
            line["kept_share"] = (0.5 * TRUE * rng.uniform(0.9, 1.1, len(TRUE))).tolist()
            line["prototype_norm"] = (np.linspace(0.35, 0.95, len(TRUE)) + 0.04 * (1 - fall)).tolist()
        yield line


def make_run(folder, stages=tuple(NETS), seed=0):
    """A run folder as the stages leave it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        "name: streets\nseed: 0\nmodel: {name: lite0}\n"
        "source: {dataset: folders, root: data/airsim_nh}\ntarget: {dataset: folders, root: data/camvid}\n"
    )
    (folder / "classes.json").write_text(json.dumps({"names": CLASSES, "palette": PALETTE, "ignore_index": 255}))
    scenes = {f"drive/{index:04d}": scene(rng) for index in range(3)}
    for name, (image, label) in scenes.items():
        path = folder / "report_samples" / f"{name}_image.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        write_label_png(folder / "report_samples" / f"{name}_truth.png", label, PALETTE)
    summary = {"classes": CLASSES, "gap_closed": 0.52, "selection": "last", "seed": 0}
    summary |= {
        "machine": {"device": "a test", "threads": 2, "torch": "2.13.0"},
        "seconds": {},
        "peak_memory_bytes": {},
    }
    lines = []
    for stage in stages:
        scores = evaluation(confusion_matrix(NETS[stage]))
        (folder / stage / "predictions").mkdir(parents=True)
        (folder / stage / "evaluation.json").write_text(json.dumps(scores))
        (folder / stage / "done.json").write_text(
            json.dumps({"stage": stage, "step": 300, "seconds": 140.2, "peak_memory_bytes": 950 << 20})
        )
        summary[NAMES.get(stage, stage)] = {key: scores[key] for key in ("miou", "iou", "predicted_share")}
        for name, (_, label) in scenes.items():
            wrong = rng.random((12, 15)) > NETS[stage]
            blocks = np.kron(wrong, np.ones((8, 8), bool))[: label.shape[0], : label.shape[1]]
            guess = np.where(blocks | (label == 255), rng.integers(0, 8), label).astype(np.uint8)
            write_label_png(folder / stage / "predictions" / f"{name}.png", guess, PALETTE)
        lines += [json.dumps(record) for record in records(stage, 300, rng)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for stage in ("pseudo_labels", "pseudo_labels_2"):
        (folder / stage).mkdir()
        shares = {"thresholds": np.linspace(0.5, 0.9, 8), "predicted_pixels": 1e6 * TRUE, "kept_pixels": 0.52e6 * TRUE}
        record = {key: dict(zip(CLASSES, values.tolist(), strict=True)) for key, values in shares.items()}
        (folder / stage / "thresholds.json").write_text(json.dumps(record))
    prototypes = rng.normal(size=(8, 16))
    labels = rng.choice(8, 1200, p=TRUE / TRUE.sum())
    domain = np.repeat([0, 1], 600)
    features = prototypes[labels] + rng.normal(0, 0.5, (1200, 16)) + 0.5 * domain[:, None]
    unit = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    np.savez_compressed(
        folder / "features.npz",
        features=features.astype(np.float16),
        labels=labels,
        domain=domain,
        prototypes=0.9 * unit,
    )
    (folder / "summary.json").write_text(json.dumps({"distilled": None, "oracle": None, "control": None, **summary}))
    return folder


class Page(HTMLParser):
    """What a browser would fetch or run, and what it would show."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.handlers, self.words = [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [
            (value or "")
            for name, value in attributes
            if name in ("src", "href", "srcset", "data", "action", "background")
        ]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "whole")
    path = write_report(folder)
    return folder, path, Page(path.read_text(encoding="utf-8"))


def assert_asks_for_nothing(path, page):
    text = path.read_text(encoding="utf-8")
    assert all(value.startswith("data:image/") for value in page.fetched)
    assert not page.handlers and not {"script", "link", "iframe", "object", "embed", "form"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in text


def test_report_is_one_file_that_asks_for_nothing(whole):
    folder, path, page = whole
    assert path == folder / "report.html" and not list(folder.glob(".report*"))
    assert_asks_for_nothing(path, page)
    assert page.tags.count("img") == 6 + 3 * 4  # plots, and image | source-only | final | truth
    assert len(page.fetched) == len(set(page.fetched)), "a picture is shown twice"


def test_report_shows_every_figure_of_the_summary(whole):
    folder, _, page = whole
    summary = json.loads((folder / "summary.json").read_text())
    for net in ("source_only", "control", "warmup", "adapted", "distilled", "oracle"):
        for value in (summary[net]["miou"], *summary[net]["iou"].values()):
            assert f" {value:.1f} " in page.text, (net, value)
    final, source, control = (summary[net]["miou"] for net in ("distilled", "source_only", "control"))
    assert (
        f"+{final - source:.1f} points over source-only" in page.text
        and f"+{final - control:.1f} points; the control" in page.text
    )
    assert "gap closed 52%" in page.text and "airsim_nh → camvid · lite0 · 8 classes · seed 0" in page.text
    for words in (
        "No label was used to choose it",
        "2 min 20 s",
        "950 MiB",
        "device a test",
        "torch 2.13.0",
        "root: data/camvid",
        "52.0%",
    ):
        assert words in page.text, words


def test_a_healthy_run_is_not_called_bad(whole):
    findings = find(read_run(whole[0]))
    assert [finding.title for finding in findings] == ["Classes out of reach", "No sign of a collapse"]


def test_a_run_that_stopped_half_way_has_a_report_that_says_so(tmp_path):
    folder = make_run(tmp_path / "half", stages=("source_only", "warmup"))
    for name in ("summary.json", "features.npz", "pseudo_labels_2/thresholds.json"):
        (folder / name).unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"stage": "adapt", "step": 40, "segmentation": 0.5, "lr": 1e-4}) + "\n")
        file.write('{"stage": "adapt", "step": 60, "segme')
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    for words in (
        "summary.json: the run has not come to its end",
        "adapted: the stage stopped after step 40; the same command goes on from its last checkpoint",
        "oracle: not trained, so the share of the gap that is closed is not known",
        "control: not trained",
        "metrics.jsonl: 1 line cut short",
        "features.npz: no sample of features",
    ):
        assert words in page.text, words
    assert "gap closed" not in page.text and page.tags.count("img") == 3 + 3 * 3  # no final net to show


def test_an_empty_folder_has_a_report_and_a_missing_one_an_error(tmp_path):
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "No net of this run has been evaluated yet." in page.text and "img" not in page.tags
    with pytest.raises(CheckpointError, match="no such folder"):
        write_report(tmp_path / "nowhere")


def test_damaged_files_are_named_and_cost_only_themselves(tmp_path):
    folder = make_run(tmp_path / "run", stages=("source_only", "adapt", "distill"))
    (folder / "distill" / "evaluation.json").write_text('{"miou": 40.0, "iou": ')
    (folder / "adapt" / "evaluation.json").write_text(
        json.dumps({"miou": 45.0, "iou": {"road": None}, "confusion": [[1, "x"], []]})
    )
    (folder / "source_only" / "evaluation.json").write_text("[1, 2]")
    (folder / "summary.json").write_text(
        json.dumps({"classes": CLASSES, "source_only": {"miou": "high"}, "machine": 3})
    )
    (folder / "features.npz").write_bytes((folder / "features.npz").read_bytes()[:500])
    (folder / "report_samples" / "drive" / "0001_image.png").write_bytes(b"\x89PNG\r\n")
    (folder / "adapt" / "predictions" / "drive" / "0002.png").write_bytes(b"")
    (folder / "config.yaml").write_text("{broken: [")
    (folder / "classes.json").write_text(json.dumps({"names": CLASSES, "palette": [["a"]]}))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps(
                {"stage": "adapt", "step": 320, "segmentation": None, "predicted_share": ["x"] * 8, "lr": "fast"}
            )
            + "\n"
        )
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    for words in (
        "distill/evaluation.json is damaged",
        "source_only/evaluation.json is damaged",
        "features.npz is damaged",
        "report_samples/drive/0001_image.png cannot be read",
        "adapt/predictions/drive/0002.png cannot be read",
        "{broken: [",
        "45.0",
    ):
        assert words in page.text, words
    assert "could not be drawn" not in page.text


def test_names_are_text_and_never_markup(tmp_path):
    evil = "<script>alert(1)</script>"
    folder = make_run(tmp_path / "run", stages=("source_only", "adapt"))
    for path in [
        folder / "classes.json",
        *folder.glob("*/evaluation.json"),
        folder / "summary.json",
        *folder.glob("*/thresholds.json"),
    ]:
        path.write_text(
            path.read_text()
            .replace('"road"', json.dumps(evil))
            .replace('"car"', '"$c_{a$ & \\"x\\""')
            .replace("a test", evil)
        )
    (folder / "config.yaml").write_text(
        f"name: '\"><img src=x onerror=alert(1)>'\nmodel: {{name: '{evil}'}}\n# {evil}\n"
    )
    for path in folder.rglob("0001*.png"):
        path.rename(path.with_name(path.name.replace("0001", "<b>'\"&")))
    path = write_report(folder)
    page = Page(path.read_text(encoding="utf-8"))
    assert_asks_for_nothing(path, page)
    assert page.tags.count("b") == len(find(read_run(folder))) + 1  # the findings' titles and "Not in this report"
    assert evil in page.text and "<b>'\"&" in page.text and "could not be drawn" not in page.text


def edited(tmp_path, edit):
    """The findings, by title, of a healthy run after `edit(folder)`."""
    folder = make_run(tmp_path / "run")
    edit(folder)
    return {finding.title: finding for finding in find(read_run(folder))}


def write_confusion(folder, stage, matrix):
    (folder / stage / "evaluation.json").write_text(json.dumps(evaluation(matrix)))


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


def test_overlay_shows_the_image_where_nothing_is_labelled_and_edges_in_full():
    image = np.full((4, 6, 3), 100, np.uint8)
    label = np.full((4, 6), 255, np.uint8)
    label[:, 3:] = 1
    mixed = label_overlay(image, label, [(0, 0, 0), (200, 100, 0)], opacity=0.5)
    assert (
        (mixed[:, :3] == 100).all() and (mixed[:, 3] == (200, 100, 0)).all() and (mixed[:, 4:] == (150, 100, 50)).all()
    )
    assert np.array_equal(
        label_overlay(image, label[::2, ::2], [(0, 0, 0), (200, 100, 0)], opacity=0.5)[:, :2], image[:, :2]
    )


SUMMARY = {
    "classes": ["road", "[sky]"],
    "source_only": {"miou": 40.0, "iou": {"road": 60.0, "[sky]": 20.0}},
    "control": None,
    "adapted": {"miou": 45.25, "iou": {"road": 58.0, "[sky]": None}},
    "mine": {"miou": 1.0, "iou": {"road": 1.0, "[sky]": 1.0}},
    "gap_closed": 0.5,
}


def test_iou_table_has_a_row_a_class_and_a_column_a_net():
    lines = [line.split() for line in iou_table(SUMMARY).splitlines()]
    assert lines[0] == ["class", "source-only", "adapted", "mine", "gain"]
    assert ["road", "60.0", "58.0", "1.0", "-2.0"] in lines and ["[sky]", "20.0", "-", "1.0", "-"] in lines
    assert ["mIoU", "40.0", "45.2", "1.0", "+5.2"] in lines and lines[-1][-2:] == ["closed:", "50%"]
    assert len({len(line) for line in iou_table(SUMMARY).splitlines()[:-1]}) == 1, "columns do not line up"
    assert "No net" in iou_table({"classes": ["road"], "oracle": None})


def test_iou_table_on_a_terminal_has_the_same_figures_in_colour(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = iou_table(SUMMARY)
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert all(word in plain for word in ("source-only", "[sky]", "58.0", "-2.0", "+5.2"))
    net = {"miou": 10.5, "iou": {"vegetation": 10.5}}
    full = {
        "classes": ["vegetation"],
        **dict.fromkeys(("source_only", "control", "warmup", "adapted", "distilled", "oracle"), net),
    }
    full["distilled"] = {"miou": 30.75, "iou": {"vegetation": 30.75}}
    plain = re.sub(r"\x1b\[[0-9;]*m", "", iou_table(full))
    assert "+20.2" in plain and "…" not in plain and max(len(line.rstrip()) for line in plain.splitlines()) <= 80


def test_the_table_needs_neither_torch_nor_matplotlib():
    import subprocess

    code = (
        "import sys, spcl_fast.report, spcl_fast.report.tables; "
        "print([m for m in ('torch', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_ledger_has_every_phase_beside_the_plan(tmp_path):
    page = write_report(make_run(tmp_path / "run")).read_text()
    ledger = page[page.index("Memory by phase of a step") :]
    for text in ("<th>forward</th>", "<th>backward</th>", "890 MiB", "612 MiB", "No setting that saves memory was on"):
        assert text in ledger
    (tmp_path / "run" / "config.yaml").write_text(
        "name: streets\nloop: {precision: bf16, checkpoint: auto, accumulate: 1}\n"
    )
    assert "saved by each setting" not in page
    stage = next(path.parent for path in (tmp_path / "run").glob("adapt/*.json"))
    (stage / "plan.json").write_text(json.dumps({"saved_bytes": {"precision": 300 << 20, "checkpoint": -(2 << 20)}}))
    page = write_report(tmp_path / "run").read_text()
    assert "Settings that save memory: precision bf16, checkpoint auto." in page
    assert "precision bf16: 300 MiB, checkpoint auto: costs 2 MiB" in page


def test_a_log_of_before_plans_existed_has_no_ledger(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in ("predicted_peak_bytes", "phase_peak_bytes")} for line in lines]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
    assert "Memory by phase of a step" not in write_report(run).read_text()
