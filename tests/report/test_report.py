"""The report: whole and partial runs, damaged files, names that would be code, one file that asks for nothing."""

import json
import re
import sys
import types
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from made_run import CLASSES, PALETTE, make_run

from spcl_fast.data import write_label_png
from spcl_fast.data.palette import read_label_png
from spcl_fast.errors import CheckpointError
from spcl_fast.report import lettering, pictures, write_report
from spcl_fast.report.findings import findings_of
from spcl_fast.report.pictures import label_overlay, samples
from spcl_fast.report.tables import iou_table
from spcl_fast.runs.reading import read_run


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


def test_the_pictures_that_changed_most_come_first_and_say_how_much(tmp_path):
    folder = make_run(tmp_path / "run")
    before, after = (folder / stage / "predictions" / "drive" for stage in ("source_only", "distill"))
    for name, rows in (("0000", 10), ("0001", 40), ("0002", 0)):
        label = np.zeros((100, 8), np.uint8)
        write_label_png(before / f"{name}.png", label, PALETTE)
        label[:rows] = 1
        write_label_png(after / f"{name}.png", label, PALETTE)
    found = samples(read_run(folder))
    assert [(sample.name, sample.changed) for sample in found] == [
        ("drive/0001", 0.4), ("drive/0000", 0.1), ("drive/0002", 0.0),
    ]  # fmt: skip
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "drive/0001: 40% of the pixels changed" in text and "What changed most comes first." in text
    (after / "0001.png").unlink()
    assert [sample.name for sample in samples(read_run(folder))] == ["drive/0000", "drive/0002", "drive/0001"]
    assert "drive/0001: " not in Page(write_report(folder).read_text(encoding="utf-8")).text


def test_a_label_file_is_read_once_for_its_overlay_and_for_what_changed(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    read = []
    monkeypatch.setattr(pictures, "read_label_png", lambda path: read.append(path) or read_label_png(path))
    assert all(sample.changed is not None for sample in samples(read_run(folder)))
    assert len(read) == 3 * 3 and len(set(read)) == len(read)  # three images: baseline, final net, truth


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
    findings = findings_of(read_run(whole[0]))
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
    assert (
        page.tags.count("b") == len(findings_of(read_run(folder))) + 1
    )  # the findings' titles and "Not in this report"
    assert evil in page.text and "<b>'\"&" in page.text and "could not be drawn" not in page.text


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


def renamed(folder, names):
    """The classes of a made run under other names, in every file."""
    new = dict(zip(CLASSES, names, strict=True))
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        for key in ("iou", "predicted_share", "true_share", "thresholds", "predicted_pixels", "kept_pixels"):
            if isinstance(content.get(key), dict):
                content[key] = {new[name]: value for name, value in content[key].items()}
        for key in ("names", "classes"):
            if key in content:
                content[key] = names
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("last", ["天空", "سيارة", "डगर", "🚗"])
def test_names_that_no_font_can_draw_are_numbers_in_the_plots_and_said_in_the_page(tmp_path, last):
    names = [*CLASSES[:-1], last]
    folder = renamed(make_run(tmp_path / "run"), names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(write_report(folder).read_text(encoding="utf-8"))
    drawn = lettering.font_of(last) is not None
    assert (f"class 7 is {last}." in page.text) is not drawn
    assert last in page.text and "could not be drawn" not in page.text
    assert lettering.plot_names(names)[:7] == tuple(CLASSES[:7])


def test_a_font_that_has_the_letters_draws_them(monkeypatch):
    entry = types.SimpleNamespace(name="Made Up", fname="made.ttf", style="normal")
    letters = {"made.ttf": frozenset(map(ord, "天空"))}
    real = lettering._letters
    monkeypatch.setattr(lettering, "_letters", lambda path: letters.get(path) or real(path))
    monkeypatch.setattr(lettering.font_manager.fontManager, "ttflist", [entry])
    lettering.font_of.cache_clear()
    try:
        assert lettering.plot_names(["天空", "road", "空 x"]) == ("天空", "road", "class 2")
        assert lettering.families(["天空", "road"]) == ["DejaVu Sans", "Made Up"]
    finally:
        lettering.font_of.cache_clear()
