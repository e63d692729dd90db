"""A few labelled images of the target: who learns from them, that no other label is read, and which ones are worth it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import pytest
import torch
from tiny_run import save_scenes, tiny_config

from spcl_fast import catalog
from spcl_fast.cli import main
from spcl_fast.config.load import load_config
from spcl_fast.config.rules import check_config
from spcl_fast.data import read_label_png
from spcl_fast.data.dataset import FileDataset
from spcl_fast.errors import CheckpointError, ConfigError, DataError
from spcl_fast.memory_plan.peak import peak_memory
from spcl_fast.method import few_labels
from spcl_fast.method.context import Context
from spcl_fast.method.few_labels import declared
from spcl_fast.method.pick import greedy
from spcl_fast.method.run import run_stages
from spcl_fast.method.stage import LABELLED, Trainee
from spcl_fast.report import write_report


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return save_scenes(root / "source", "generated_source"), save_scenes(root / "target", "generated_target")


def config_of(scenes, tmp_path, labelled=None, name="run", **changes):
    source, target = scenes
    roots = {"source.root": str(source), "target.root": str(target)}
    roots |= {"source.dataset": "folders", "target.dataset": "folders"}
    few = {} if labelled is None else {"target.labelled": labelled}
    return tiny_config(tmp_path, name=name, **roots, **few, **changes)


@pytest.fixture(scope="module")
def learned(scenes, tmp_path_factory):
    """A run of all but the oracle with two labelled images, and the target's training labels that were read."""
    read: set[str] = set()
    label = FileDataset.label

    def noting(self, index):
        read.add(str(self.label_path(index)))
        return label(self, index)

    config = config_of(scenes, tmp_path_factory.mktemp("runs"), "1,3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileDataset, "label", noting)
        run_stages(config, [row.name for row in catalog.STAGES if row.role != "bound"])
    train = str(scenes[1] / "labels" / "train")
    return Context(config), {path for path in read if path.startswith(train)}


def test_no_label_of_a_training_image_is_read_that_was_not_named(scenes, learned):
    folder = scenes[1] / "labels" / "train"
    assert learned[1] == {str(folder / "1.png"), str(folder / "3.png")}


def test_a_run_needs_no_other_label_file(scenes, tmp_path):
    target = save_scenes(tmp_path / "bare", "generated_target")
    for name in ("0", "2"):
        (target / "labels" / "train" / f"{name}.png").unlink()
    run_stages(config_of((scenes[0], target), tmp_path, "2", name="bare"), ["source_only", "control"])
    assert sorted((tmp_path / "bare" / "labelled.txt").read_text().split()) == ["1", "3"]


def test_every_stage_but_the_baseline_logs_their_loss(learned):
    run = learned[0].run
    for row in catalog.trained():
        records = list(run.metrics(row.name))
        assert all(("labelled" in record) == row.few_labels for record in records)
        assert records or row.name == "oracle"
    assert json.loads(run.path("summary.json").read_text())["labelled_target_images"] == 2
    assert run.path("labelled.txt").read_text() == "1\n3\n"


def test_adaptation_starts_from_the_net_that_learned_from_them(learned):
    context = learned[0]
    for name in ("prototypes", "pseudo_labels", "adapt", "online"):
        assert context.inputs(catalog.find(catalog.STAGES, name))[0] == "few_labels"
    assert context.inputs(catalog.find(catalog.STAGES, "few_labels")) == ("warmup",)


def test_without_labels_that_stage_has_nothing_to_do(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(ConfigError, match="target.labelled is not set, and few_labels has nothing to do without it"):
        check_config(config, ("source_only", "few_labels"))
    check_config(config, ("source_only",))


def test_the_set_trains_the_control_for_as_much_longer(tmp_path):
    plain, few = (load_config("folders", sets=sets) for sets in ((), ("few_labels",)))
    assert few.control.iterations - plain.control.iterations == few.few_labels.iterations
    assert [stage for stage in few.stages if stage != "few_labels"] == [*plain.stages]


def test_their_pseudo_labels_are_their_labels(scenes, learned):
    for stage in ("pseudo_labels", "pseudo_labels_2"):
        for name in ("1", "3"):
            written = read_label_png(learned[0].run.path(stage, f"{name}.png"))
            truth = read_label_png(scenes[1] / "labels" / "train" / f"{name}.png")
            assert (written == truth).all()
        assert (read_label_png(learned[0].run.path(stage, "0.png")) == 255).any()


def test_an_image_of_the_validation_split_is_refused(scenes, tmp_path):
    with pytest.raises(
        DataError, match="'2', which is an image of the validation split .* evaluated on what it learned"
    ):
        run_stages(config_of(scenes, tmp_path, "2,", **{"target.val_split": "train"}), ["source_only", "control"])


def test_other_images_are_another_run_but_for_the_baseline(scenes, tmp_path):
    run_stages(config_of(scenes, tmp_path, "1"), ["source_only", "control"])
    run_stages(config_of(scenes, tmp_path, "3"), ["source_only"])
    with pytest.raises(CheckpointError, match="target.labelled: '1' -> '3'|what target.labelled holds"):
        run_stages(config_of(scenes, tmp_path, "3"), ["control"])
    (tmp_path / "same.txt").write_text("1\n")
    run_stages(config_of(scenes, tmp_path, str(tmp_path / "same.txt")), ["control"])


def test_a_weight_that_no_step_reads_is_refused(tmp_path):
    for section in ("source_only", "oracle"):
        with pytest.raises(ConfigError, match=rf"{section}.labelled_weight: got 0.5, and nothing reads it"):
            check_config(tiny_config(tmp_path, **{f"{section}.labelled_weight": "0.5"}))
        check_config(tiny_config(tmp_path, **{f"{section}.labelled_weight": "1"}))  # as files of before have it


def test_weight_zero_trains_as_without_them(scenes, tmp_path):
    nets = []
    for name, given in {"without": {}, "zero": {"labelled": "1", "control.labelled_weight": "0"}}.items():
        labelled = given.pop("labelled", None)
        config = config_of(scenes, tmp_path, labelled, name=name, **given)
        run_stages(config, ["source_only", "control"])
        nets.append(Context(config).model_of("control").state_dict())
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])


def test_what_changes_a_stages_batches_does_not_see_the_labelled_ones():
    """As class mix does: batches of a stage of two feeds, changed; the third goes past, in step, from any iteration on."""

    def around(batches):
        def stream(start: int) -> Iterator[tuple[str, str]]:
            ahead = list(zip(range(3), batches(start), strict=False))  # reads ahead, as a loader may
            yield from ((f"mixed {a}", b) for _, (a, b) in ahead)

        return stream

    def batches(start):
        return ((f"s{i}", f"t{i}", f"l{i}") for i in range(start, start + 3))

    trainee = Trainee(lambda batch, it: {}, None, {}, {}, around)  # type: ignore[arg-type]
    found = list(few_labels._past(trainee, batches)(5))
    assert found == [("mixed s5", "t5", "l5"), ("mixed s6", "t6", "l6"), ("mixed s7", "t7", "l7")]


@pytest.mark.parametrize("name", [row.name for row in catalog.trained()])
def test_the_memory_plan_sees_the_batch_more(tmp_path, name):
    config = tiny_config(tmp_path, **{"target.labelled": "2"})
    row = catalog.find(catalog.STAGES, name)
    without = dataclasses.replace(config, target=dataclasses.replace(config.target, labelled=None))
    feeds, own = declared(row, config).feeds(config), declared(row, without).feeds(config)
    assert [feed.labels for feed in feeds[len(own) :]] == [LABELLED] * row.few_labels
    assert (peak_memory(config, name).flops > peak_memory(without, name).flops) == row.few_labels


# ---- which ones --------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_uncertain_then_the_far():
    places = torch.tensor([[0.0], [0.1], [5.0], [9.0], [9.2]])
    uncertainty = torch.tensor([0.9, 0.8, 0.2, 0.5, 0.4])
    # 0; then 3 (0.5 x 9.0 over 0.4 x 9.2 and 0.2 x 5); then 2 (0.2 x 4.0 over 0.8 x 0.1 and 0.4 x 0.2)
    assert greedy(uncertainty, places, 3) == [0, 3, 2]
    assert greedy(uncertainty, places, 2, before=[0]) == [3, 2]
    assert sorted(greedy(torch.zeros(5), places, 5)) == [0, 1, 2, 3, 4]


def test_picked_images_are_neither_labelled_nor_evaluated_and_come_again_alike(learned, tmp_path, capsys):
    run = str(learned[0].run.folder)
    output, again = tmp_path / "new" / "picked.txt", tmp_path / "again.txt"
    assert main(["pick-images", run, "--count", "2", "--output", str(output)]) == 0
    names = output.read_text().split()
    assert names[:2] == ["1", "3"] and sorted(names[2:]) == ["0", "2"]  # 1 and 3 are labelled
    assert f"--target.labelled {output} (with the 2 images labelled before)" in capsys.readouterr().out
    assert main(["pick-images", run, "--count", "2", "--output", str(again)]) == 0
    assert again.read_text() == output.read_text()
    assert main(["pick-images", run, "--count", "1", "--output", str(again)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["pick-images", run, "--count", "3", "--output", str(tmp_path / "more.txt")]) == 3
    assert "only 2 training images of the target are not labelled yet" in capsys.readouterr().err


def test_the_report_says_that_the_control_had_the_labels(learned):
    page = write_report(learned[0].run.folder).read_text()
    assert "learned from the same labels, without adaptation" in page and "trained on without the target" not in page
    assert "learned from 2 labelled target images, too" in page and "on source alone does as well" not in page
