"""benchmarks/adaptation/frozen: the stages on the maps of a frozen encoder are the product's own."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.adaptation.frozen import measure, views
from benchmarks.adaptation.frozen.chain import OnViews, Study
from benchmarks.adaptation.frozen.variants import VARIANTS
from benchmarks.adaptation.plan import Plan
from spcl_fast import catalog
from spcl_fast.data.classes import IGNORE
from spcl_fast.estimators import PrototypeBank
from spcl_fast.losses.proda import distance_weights

PAIR = {
    "source.dataset": "generated_source", "target.dataset": "generated_target",
    "source.size": [64, 48], "target.size": [64, 48], "target.eval_size": [64, 48], "source.eval_size": [64, 48],
    "source.train_images": 8, "target.train_images": 8, "evaluate.images": 4,
}  # fmt: skip
CROP = {f"{stage}.{which}.crop": [64, 48] for stage, which in (
    ("source_only", "augment"), ("control", "augment"), ("few_labels", "augment"), ("adapt", "augment"), ("adapt", "target_augment"),
    ("distill", "augment"),
)}  # fmt: skip
SHORT = {f"{stage}.iterations": 2 for stage in ("source_only", "control", "few_labels", "adapt", "distill")}


@pytest.fixture(scope="module")
def plan():
    setting = {"preset": "folders", "loop.workers": 0, "model.feature_dim": 8, **CROP, **SHORT}
    return Plan((0,), {"generated": PAIR}, {"frozen": setting})


@pytest.fixture(scope="module")
def study(plan, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(views, "SOURCE_VIEWS", 16)
    patch.setattr(views, "TARGET_VIEWS", 8)
    yield Study(plan.config("generated", "frozen", 0), tmp_path_factory.mktemp("views"))
    patch.undo()


def test_a_head_on_the_kept_maps_gives_what_the_whole_net_gives(study):
    model = study.nets.new().eval()
    images = [image for image, _, _ in views.eval_batches(study.context.evaluation_data, study.config.target.eval_size)]
    features, logits = OnViews(model, study.domains.evaluated.maps)(torch.arange(len(images)))
    whole_features, whole_logits = model(torch.cat(images))
    torch.testing.assert_close(features, whole_features, rtol=0, atol=2e-2 * whole_features.abs().max().item())
    torch.testing.assert_close(logits, whole_logits, rtol=0, atol=2e-2 * whole_logits.abs().max().item())


def test_every_variant_gives_a_line_and_none_is_repeated(plan, study, tmp_path, monkeypatch):
    made = []

    def of(config, folder):
        made.append(config.target.labelled)
        return study

    monkeypatch.setattr(measure, "Study", of)
    said = list(measure.measure(plan, tmp_path, tmp_path / "lines.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == list(VARIANTS)
    assert len(said) == len(VARIANTS)
    assert made == [None, "10"]  # one study with labels for all variants that have some
    assert all(0 < score <= 100 for line in lines for score in line["miou"].values())
    assert not list(measure.measure(plan, tmp_path, tmp_path / "lines.jsonl"))


def test_every_number_of_labels_gives_a_line_and_labels_are_learned_from(plan, study, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "COUNTS", (2,))
    monkeypatch.setattr(views, "SOURCE_VIEWS", 16)
    monkeypatch.setattr(views, "TARGET_VIEWS", 8)
    monkeypatch.setattr(views, "LABELLED_VIEWS", 8)
    settings = {"without": plan.settings["frozen"], "labelled": {**plan.settings["frozen"], "target.labelled": "1"}}
    few, file = Plan((0,), plan.pairs, settings), tmp_path / "lines.jsonl"
    list(measure.measure_labels(few, tmp_path, file))
    lines = measure.read(file)
    assert [(line["labels"], line["of"]) for line in lines] == [(0, 8), (2, 8), (8, 8)]
    assert len({line["miou"]["source_only"] for line in lines}) == 1
    assert not list(measure.measure_labels(few, tmp_path, file))
    with_two = Study(measure._with_labels(few.config("generated", "labelled", 0), 2), tmp_path)
    learned = set(with_two.domains.labelled.names)
    assert learned == set(with_two.context.domains.labelled_target.names) and len(learned) == 2
    found = with_two.pseudo_labels(with_two.nets.new().eval()).labels
    own = [name in learned for name in with_two.domains.target.names]
    truth = with_two.domains.target.labels_of(torch.arange(8))
    assert torch.equal(found[own], truth[own]) and not torch.equal(found, truth)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_variant_moves_the_head_alone_and_each_in_its_own_way(study, name):
    start = study.nets.new().eval()
    labels = study.domains.target.labels_of(torch.arange(8))  # any labels
    adapted, objective = study.adapted(start, VARIANTS[name].make, labels, weight=0.1)
    plain, _ = study.adapted(start, VARIANTS["plain"].make, labels, weight=0)
    before, after, without = (model.state_dict() for model in (start, adapted, plain))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert not any(".encoder." in key for key in moved)
    assert any(not torch.equal(after[key], without[key]) for key in after)  # the contrast pulls
    learned = dict(objective.named_parameters())
    assert {"learnt": {"log_temperature"}, "anchors": {"map.weight", "map.bias"}}.get(name, set()) <= set(learned)
    assert all(torch.isfinite(tensor).all() for tensor in learned.values())


def test_the_temperature_is_learnt_and_prototypes_of_both_domains_are_others(study):
    start = study.nets.new().eval()
    labels = study.domains.target.labels_of(torch.arange(8))
    objectives = {
        name: study.adapted(start, VARIANTS[name].make, labels, weight=0.1)[1] for name in ("spcl", "learnt", "both")
    }
    assert objectives["learnt"].log_temperature.exp().item() != pytest.approx(study.config.adapt.contrast_temperature)
    assert not torch.equal(objectives["both"].prototypes, objectives["spcl"].prototypes)


def test_rectified_pseudo_labels_go_to_the_nearer_prototype(study):
    model, views_of_target = study.source_only(), study.domains.target
    plain, rectified = (study.pseudo_labels(model, rectified=yes).labels.long() for yes in (False, True))
    prototypes = study.prototypes(
        model, views_of_target, plain.byte(), PrototypeBank(len(study.classes), model.channels, normalize=False)
    )
    changed = (plain != IGNORE) & (rectified != IGNORE) & (plain != rectified)
    assert changed.any()
    for rows, features, _ in study._forwards(model, views_of_target):
        near = distance_weights(features, prototypes).log()
        near = torch.nn.functional.interpolate(near, plain.shape[1:], mode="bilinear", align_corners=True)
        old, new = (
            near.gather(1, labels[rows][:, None].clamp_max(len(study.classes) - 1))[:, 0]
            for labels in (plain, rectified)
        )
        assert (new > old)[changed[rows]].all()


def test_the_table_of_labels_spreads_over_pairs_or_over_the_seeds_of_one(tmp_path, monkeypatch):
    nets = [row.net for row in (*catalog.with_role("matched"), *catalog.with_role("result")[-1:])]
    scores = {("a", 0): (40, 41), ("a", 1): (44, 43), ("b", 0): (50, 54), ("c", 0): (60, 61), ("c", 1): (62, 66)}
    with open(tmp_path / "lines.jsonl", "w") as file:
        for (pair, seed), found in scores.items():
            miou = dict(zip(nets, found, strict=True))
            for labels in [5] if pair == "b" else [0, 5]:
                file.write(
                    json.dumps(
                        {"pair": pair, "seed": seed, "labels": labels, "of": 9, "miou": miou, "settings_sha256": ""}
                    )
                    + "\n"
                )
    monkeypatch.setattr(measure, "LABELS_FILE", tmp_path / "lines.jsonl")
    none, five = measure.labels_table({"a": "drives", "b": "drives", "c": "weeds"}).splitlines()[2:]
    # 42 and 50, 42 and 54; 60 and 62, 61 and 66. Without a label b has not been measured
    assert five == "| 5 | 46.0 ± 4.0 | 48.0 ± 6.0 | +2.0 ± 2.0 | 61.0 ± 1.0 | 63.5 ± 2.5 | +2.5 ± 1.5 |"
    assert none == "| 0 |  |  |  | 61.0 ± 1.0 | 63.5 ± 2.5 | +2.5 ± 1.5 |"


def test_a_variant_is_compared_with_lines_that_start_from_the_same_net(tmp_path, monkeypatch):
    base, matched, adapted, final = measure._BASE, measure._MATCHED, measure._ADAPTED, measure._FINAL

    def line(variant, seed, start, score):
        miou = {base: start, matched: start + 1, adapted: 0, final: score}
        return json.dumps({"pair": "a", "variant": variant, "seed": seed, "miou": miou}) + "\n"

    found = [line("plain", 0, 30, 40), line("spcl", 0, 30.01, 41), line("spcl", 1, 31, 50), line("plain", 1, 32, 42)]
    found += [line("plain", 2, 33, 45), line("plain", 2, 35, 46), line("spcl", 2, 33, 48)]  # measured again, otherwise
    (tmp_path / "lines.jsonl").write_text("".join(found))
    monkeypatch.setattr(measure, "FILE", tmp_path / "lines.jsonl")
    rows = measure.table({"a": "A"}).splitlines()
    assert rows[2].endswith("| 32.3 ± 1.5 |")  # 30, 32, 35
    of_spcl = next(row for row in rows if "(`spcl`)" in row)
    assert of_spcl.endswith("| +2.0 ± 1.0 |")  # 41 - 40 and 48 - 45; seed 1 has no partner
