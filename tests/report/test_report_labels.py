"""`report --compare`: the curve over the number of labelled images, what is left out of it and why, and what else differs."""

import contextlib
import functools
import json
import re
import shutil
from io import StringIO

import numpy as np
import pytest
from made_labels import (
    IMAGES,
    STAGES,
    cut,
    edit_json,
    gone,
    labelled_run,
    learned_from_others,
    never_did,
    other_pixels,
    started_again,
    with_classes,
    without_a_count,
)
from made_run import make_run
from test_report import Page, assert_asks_for_nothing

from spcl_fast.cli import main
from spcl_fast.report import label_curve, write_report
from spcl_fast.report.comparison import compare
from spcl_fast.runs.reading import read_run


@pytest.fixture(scope="module")
def new_run(tmp_path_factory):
    base = make_run(tmp_path_factory.mktemp("base") / "run", STAGES)
    return functools.partial(labelled_run, base)


@pytest.fixture(scope="module")
def made(new_run, tmp_path_factory):
    """Runs that compare: none, 5 and 50 labels; 5 by two seeds, one of them from a list file."""
    runs = tmp_path_factory.mktemp("runs")
    return [
        new_run(runs / "none", 0, 41.1, 43.4),
        new_run(runs / "five", 5, 44.2, 47.3),
        new_run(runs / "five_1", 5, 45.8, 46.9, seed=1, labelled="lists/picked.txt"),
        new_run(runs / "fifty", 50, 52.5, 51.25),
    ]


@pytest.fixture(scope="module")
def page_of(made):
    """The page of the first of these runs next to the others."""
    return write_report(made[0], made[1:])


@pytest.fixture
def own(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "none")


def curve_part(path):
    text = path.read_text(encoding="utf-8")
    start = text.index("<h2>mIoU against the number of labelled target images</h2>")
    return text[start : text.index("<h2>Pictures</h2>")]


def cells(part):
    """The rows of the section's tables, a list of texts each."""
    rows = re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL)
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row)] for row in rows]


def test_the_table_of_the_curve_has_the_figures_of_every_summary(made, page_of):
    rows = {row[0]: row for row in cells(curve_part(page_of)) if row and row[0] in ("none", "five", "five_1", "fifty")}
    assert list(rows) == ["none", "five", "five_1", "fifty"], "by the number of labels"
    for folder, count, seed in zip(made, ("0", "5", "5", "50"), ("0", "0", "1", "0"), strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        miou = [f"{summary[net]['miou']:.1f}" for net in ("source_only", "control", "adapted", "distilled")]
        gain = f"{summary['distilled']['miou'] - summary['control']['miou']:+.1f}".replace("-", "−")
        assert rows[folder.name] == [folder.name, count, seed, "distilled", *miou, gain]
    assert rows["fifty"][-1] == "−1.2" and 'class="down"' in curve_part(page_of)


def test_runs_of_one_number_of_labels_have_a_mean_and_a_spread(made, page_of):
    part = curve_part(page_of)
    assert ["5", "2 runs", "distilled", "45.0 ± 1.1", "47.1 ± 0.3", "+2.1 ± 1.4"] in cells(part)
    assert ["50", "1 run", "distilled", "52.5", "51.2", "−1.2"] in cells(part)
    assert "lines go through the means" in part
    assert not label_curve.section(compare(read_run(made[0]), [made[1], made[3]]))["repeated"]


def test_the_plot_has_the_means_of_control_and_final_net_in_words(page_of):
    alt = "control: source and labels: 41.1 at 0, 45.0 at 5, 52.5 at 50. final net: distilled: 43.4 at 0, 47.1 at 5, 51.2 at 50."
    assert alt in curve_part(page_of)
    page = Page(page_of.read_text(encoding="utf-8"))
    assert_asks_for_nothing(page_of, page)
    assert page.tags.count("img") == 6 + 3 * 4 + 1


def test_the_curve_is_drawn_through_the_means_and_the_points_of_every_run(made, monkeypatch):
    figures = []
    monkeypatch.setattr(label_curve, "as_png", lambda figure: figures.append(figure) or b"")
    label_curve.section(compare(read_run(made[0]), made[1:]))
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "5", "50"]
    control, final = axes.lines
    assert np.allclose(control.get_ydata(), [41.1, 45.0, 52.5]) and np.allclose(final.get_ydata(), [43.4, 47.1, 51.25])
    assert np.abs(np.diff(control.get_xdata()) - 1).max() < 1e-9, "0 and 5 are as far apart as 5 and 50"
    points = sorted(float(y) for one in axes.collections for _, y in one.get_offsets())
    assert points == [41.1, 43.4, 44.2, 45.8, 46.9, 47.3, 51.25, 52.5]


def test_runs_of_other_settings_are_in_no_mean_next_to_runs_of_one_recipe(new_run, made, tmp_path):
    longer = [new_run(tmp_path / f"more_{n}", n, 60.0, 70.0, settings={"adapt.lr": 0.125}) for n in (5, 20)]
    found = label_curve.section(compare(read_run(made[0]), [*made[1:3], *longer]))
    assert "control: source and labels: 41.1 at 0, 45.0 at 5, 60.0 at 20." in found["alt"]
    assert "final net: distilled: 43.4 at 0, 47.1 at 5, 70.0 at 20." in found["alt"]
    rows = [(row["count"], row["runs"], row["miou"]) for row in found["repeated"]]
    assert rows == [
        ("0", "1 run", "43.4"),
        ("5", "2 runs", "47.1 ± 0.3"),
        ("5*", "1 run", "70.0"),
        ("20*", "1 run", "70.0"),
    ]


def test_without_other_runs_the_page_has_no_byte_of_a_curve(page_of, own):
    alone = write_report(own).read_bytes()
    assert page_of.read_text(encoding="utf-8").replace(curve_part(page_of), "").encode() == alone


def test_only_the_given_folders_are_read_and_nothing_of_the_others_is_written(made):
    before = {path: path.stat().st_mtime_ns for folder in made for path in folder.rglob("*")}
    found = compare(read_run(made[0]), [made[1]])
    assert [row.name for row in found.rows] == ["none", "five"]
    assert before == {path: path.stat().st_mtime_ns for folder in made for path in folder.rglob("*")}


REASONS = {
    "classes": (with_classes, "other classes (with lorry and without car)"),
    "target": (
        {"settings": {"target.root": "data/other"}},
        "another target (target.root: 'data/camvid' -> 'data/other')",
    ),
    "split": (
        {"settings": {"target.val_split": "test"}},
        "evaluated on other images (target.val_split: 'val' -> 'test')",
    ),
    "images": (
        {"evaluated": {**IMAGES, "data": "9 images of 8 classes, def"}},
        "evaluated on other images or in another way (data: '12 images of 8 classes, abc' -> '9 images of 8 classes, def')",
    ),
    "way": (
        {"evaluated": {**IMAGES, "tta": "flip"}},
        "evaluated on other images or in another way (tta: 'none' -> 'flip')",
    ),
    "fold": ({"settings": {"target.fold": "1/4"}}, "evaluated on other images (target.fold: None -> '1/4')"),
    "pixels": (other_pixels, "evaluated on other images (the labelled pixels of each class are not as many)"),
    "summary": (cut("summary.json"), "summary.json is damaged ("),
    "evaluation": (cut("control/evaluation.json"), "control/evaluation.json is damaged ("),
    "settings": (
        lambda folder: (folder / "config.yaml").write_text("{broken: ["),
        "config.yaml is not there or damaged",
    ),
    "unfinished": (gone("summary.json"), "unfinished: it has no summary.json"),
    "again": (started_again, "unfinished: distill stopped after step 280"),
    "nets": (
        never_did("control", "adapt", "distill"),
        "no mIoU of any of control, online self-training, adapted, distilled",
    ),
    "since": (learned_from_others, "its distilled net learned with target.labelled 7, and its settings say 20 since"),
    "count": (without_a_count, "target.labelled is 20, and neither summary.json nor labelled.txt says how many images"),
}


@pytest.fixture(scope="module")
def odd(made, new_run, tmp_path_factory):
    """Page and standard output of a run next to one that compares and one of each kind that does not."""
    runs, said = tmp_path_factory.mktemp("odd"), StringIO()
    own = shutil.copytree(made[0], runs / "none")
    for case, (how, _) in REASONS.items():
        folder = new_run(runs / f"odd_{case}", 20, 48.6, 49.7, **(how if isinstance(how, dict) else {}))
        if callable(how):
            how(folder)
    with contextlib.redirect_stdout(said):
        assert main(["report", str(own), "--compare", str(made[1]), *map(str, runs.glob("odd_*"))]) == 0
    return own / "report.html", said.getvalue()


@pytest.mark.parametrize("case", REASONS)
def test_a_run_that_does_not_compare_is_left_out_with_the_reason_in_page_and_on_stdout(case, odd):
    page, said = odd
    assert f"left out of the curve: odd_{case}: {REASONS[case][1]}" in said
    assert f" odd_{case}: {REASONS[case][1]}" in Page(curve_part(page)).text.split("Left out of this curve")[1]


def test_what_is_left_out_is_in_no_table_and_no_point(odd):
    page, said = odd
    assert "curve: 2 runs with 0, 5 labelled target images" in said
    assert [row[0] for row in cells(curve_part(page)) if row] == ["none", "five"]
    assert "49.7" not in curve_part(page) and "48.6" not in curve_part(page)


def test_the_page_of_a_run_that_is_unfinished_itself_says_so_and_compares_nothing(made, own):
    (own / "summary.json").unlink()
    lines = []
    write_report(own, made[1:], lines.append)
    assert lines == ["left out of the curve: none: unfinished: it has no summary.json. Nothing was compared with it"]
    assert "Nothing was compared with it" in curve_part(own / "report.html") and "<img" not in curve_part(
        own / "report.html"
    )


def test_folds_of_one_recipe_are_evaluated_on_different_images(new_run, tmp_path):
    def fold(name, part, held_out, count=6):
        folder = new_run(
            tmp_path / name,
            count,
            40.0,
            41.0,
            settings={"target.fold": part},
            evaluated={**IMAGES, "held_out": held_out},
        )
        edit_json(folder / "summary.json", left_out={"fold": part, "images": 2, "labelled_images": 8})
        return folder

    first, same = fold("first", "1/4", ["a", "b"]), fold("same", "1/4", ["b", "a"], count=5)
    second, others = fold("second", "2/4", ["c", "d"]), fold("others", "1/4", ["b", "e"])
    more = fold("more", "1/4", ["a", "b"])
    edit_json(more / "summary.json", left_out={"fold": "1/4", "images": 2, "labelled_images": 9})
    found = compare(read_run(first), [same, second, others, more])
    assert [row.name for row in found.rows] == ["same", "first"]
    why = dict(found.left_out)
    assert why["second"] == "evaluated on other images (target.fold: '1/4' -> '2/4')"
    assert why["others"] == "evaluated on other images (2 images left out of training, 1 of them among the 2 of first)"
    assert why["more"].startswith("evaluated on other images (2 of the 8 labelled target images, left out of training")


def test_a_run_that_is_given_twice_counts_once(made, own, tmp_path):
    again, copy = made[1].parent / "none" / ".." / "five", shutil.copytree(made[1], tmp_path / "copy")
    found = compare(read_run(own), [own, made[1], again, copy])
    assert [row.name for row in found.rows] == ["none", "five"]
    assert found.left_out == [
        ("five", "given twice; it counts once"),
        ("copy", "the same stages with the same settings and seed as five; they count once"),
    ]


def test_the_number_of_labels_of_a_list_file_is_that_of_the_images_that_were_found(new_run, tmp_path, made):
    run = new_run(tmp_path / "listed", 3, 42.0, 44.0, labelled="lists/picked.txt")
    assert [row.count for row in compare(read_run(made[0]), [run]).rows] == [0, 3]
    without_a_count(run)  # as the summary of a head
    (run / "labelled.txt").write_text("a\nb\nc\nd\n")
    assert [row.count for row in compare(read_run(made[0]), [run]).rows] == [0, 4]


def test_other_settings_are_named_and_their_points_are_hollow(new_run, made, own, tmp_path, capsys, monkeypatch):
    changed = {"adapt.lr": 0.125, "model.name": "lite1"}
    runs = [new_run(tmp_path / f"odd_{seed}", 20, 48.0, 49.0, seed=seed, settings=changed) for seed in (0, 1)]
    never_did("adapt")(runs[1])
    assert main(["report", str(own), "--compare", str(made[1]), *map(str, runs)]) == 0
    said, part = capsys.readouterr().out, Page(curve_part(own / "report.html")).text
    assert "Not only the labels differ" in part and "odd_0*" in part and "odd_1*" in part and "five*" not in part
    changes = "model.name: 'lite0' -> 'lite1'; adapt.lr: 0.00025 -> 0.125"
    assert (
        f"warning: not only labels and seed differ from none: odd_0: {changes}\n" in said
        and f" odd_0: {changes} " in part
    )
    assert f": odd_1: stages without adapt; {changes}\n" in said and f" odd_1: stages without adapt; {changes} " in part
    figures = []
    monkeypatch.setattr(label_curve, "as_png", lambda figure: figures.append(figure) or b"")
    label_curve.section(compare(read_run(own), [made[1], *runs]))
    hollow = {
        float(one.get_offsets()[0][1]): bool((one.get_facecolors()[0][:3] == 1).all())
        for one in figures[0].axes[0].collections
    }
    assert hollow == {41.1: False, 43.4: False, 44.2: False, 47.3: False, 48.0: True, 49.0: True}


def test_the_same_data_in_another_folder_are_the_same_target(new_run, made, own, tmp_path):
    for root, content, fits in (("elsewhere/camvid", "12 images, abc", True), ("data/camvid", "13 images, def", False)):
        run = new_run(tmp_path / content[:2], 5, 44.0, 45.0, settings={"target.root": root})
        for folder, what in ((own, "12 images, abc"), (run, content)):
            record = json.loads((folder / "distill" / "done.json").read_text())
            edit_json(folder / "distill" / "done.json", settings={**record["settings"], "content.target.root": what})
        found = compare(read_run(own), [run])
        assert [row.name for row in found.rows] == (["none", run.name] if fits else ["none"])
        assert not found.differences
        if not fits:
            assert found.left_out == [
                (run.name, "another target (what target.root holds: '12 images, abc' -> '13 images, def')")
            ]


def test_final_nets_of_other_stages_are_curves_of_their_own(new_run, made, tmp_path):
    run = new_run(tmp_path / "adapted", 5, 44.0, 30.0)
    never_did("distill")(run)
    found = label_curve.section(compare(read_run(made[0]), [run]))
    assert "final net: adapted: " in found["alt"] and "final net: distilled: 43.4 at 0." in found["alt"]
    assert "control: source and labels: 41.1 at 0, 44.0 at 5." in found["alt"]
    assert found["differences"] == [("adapted", "stages without distill")]


def test_what_is_not_there_is_an_error_and_what_is_no_run_is_left_out(made, own, tmp_path, capsys):
    assert main(["report", str(own), "--compare", str(tmp_path / "nowhere")]) == 2
    assert f"--compare {tmp_path / 'nowhere'}: there is no such run folder" in capsys.readouterr().err
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert main(["report", str(own), "--compare", str(tmp_path / "notes.json"), str(tmp_path / "empty")]) == 0
    said = capsys.readouterr().out
    for name in ("notes.json", "empty"):
        assert f"left out of the curve: {name}: no run folder: it has neither config.yaml nor summary.json" in said
    assert "All runs have the same number of labels: there is no curve yet." in curve_part(own / "report.html")


def test_names_of_runs_and_reasons_are_text_in_the_page(new_run, made, own, tmp_path):
    evil = new_run(tmp_path / "<b>evil", 5, 44.0, 45.0, settings={"model.name": "<script>x</script>"})
    page = Page(write_report(own, [evil]).read_text(encoding="utf-8"))
    assert "<b>evil*" in page.text and "<script>x</script>" in page.text and not {"script"} & set(page.tags)


def test_runs_of_one_name_are_told_apart_by_their_folders(new_run, made, tmp_path):
    a, b = (new_run(tmp_path / place / "run", count, 44.0, 45.0) for place, count in (("a", 5), ("b", 6)))
    assert [row.name for row in compare(read_run(made[0]), [a, b]).rows] == ["none", str(a), str(b)]
