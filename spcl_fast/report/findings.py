"""What a careful reader would say about a run: collapses, classes that are never predicted, gains that are none; with what to do about
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import catalog
from ..config.load import all_settings
from ..runs import layout
from ..runs.reading import Evaluation, RunFolder, number
from ..runs.signs import COLLAPSED, nearly_all_kept, signs

NEVER = 1e-5  # share of pixels below which a class counts as never predicted
OCCURS = 1e-3
WAITING = 0.3  # share of the time spent waiting for data


@dataclass(frozen=True)
class Finding:
    """`level`: "bad" (do not trust the result), "note" (worth knowing) or "good"."""

    level: str
    title: str
    text: str


def labelled_count(run: RunFolder) -> int:
    """How many target images' labels the run learned from (target.labelled)."""
    count = run.summary.get(layout.LABELLED_COUNT)
    return count if isinstance(count, int) else 0


def findings_of(run: RunFolder) -> list[Finding]:
    """The findings of a run, the worst first."""
    found = [*_collapse(run), *_selection(run), *_gains(run), *_classes(run), *_training(run)]
    if run.final and not any(finding.level == "bad" for finding in found):
        text = "No class takes more than 80% of the pixels where it should not"
        text += ", and not every pixel was given a pseudo-label." if run.thresholds else "."
        found.append(Finding("good", "No sign of a collapse", text))
    return sorted(found, key=lambda finding: ("bad", "note", "good").index(finding.level))


def _collapse(run: RunFolder) -> list[Finding]:
    found = []
    collapsed = {
        stage: classes for stage, evaluation in run.evaluations.items() if (classes := _taken_over(evaluation))
    }
    if collapsed:
        nets = [
            f"the {catalog.title(stage)} net calls {run.evaluations[stage].predicted_share[name]:.0%} {name}"
            for stage, name in collapsed.items()
        ]
        if run.is_head:
            section = catalog.HEAD.section
            advice = f"Lower {section}.lr, train longer or raise {section}.class_weight_power, and look at the labels."
        elif collapsed.keys() & {*catalog.names(catalog.with_role("baseline", "bound"))}:
            advice = "It does not start with adaptation: train the source stage longer, and check its learning rate and labels."
        else:
            advice = "Lower the weight of the contrastive loss or the learning rate, and look at the pseudo-labels that it started from."
        found.append(Finding("bad", "Collapsed to one class", f"Of the target's pixels {_list(nets)}. {advice}"))
    true_share = next((one.true_share for one in run.evaluations.values() if one.true_share), {})
    for records in run.metrics.values():
        last = next(
            (record for record in reversed(records) if "predicted_share" in record or "prototype_nearest" in record), {}
        )
        found += [
            Finding("bad", sign.title, sign.text)
            for sign in signs(last, run.classes, lambda: true_share, lambda name: run.setting(*name.split(".")))
        ]
    for stage, record in run.thresholds.items():
        predicted, kept = (
            sum(value for value in map(number, record[key].values()) if value)
            for key in ("predicted_pixels", "kept_pixels")
        )
        sign = nearly_all_kept(stage, predicted, kept)
        found += [Finding("bad", sign.title, sign.text)] if sign else []
    return found


def _taken_over(evaluation: Evaluation) -> str | None:
    """The class that nearly all pixels are given to, though they are not of it."""
    taken = [
        name
        for name, share in evaluation.predicted_share.items()
        if share > max(COLLAPSED, evaluation.true_share.get(name, 0.0) + 0.1)
    ]
    return taken[0] if taken else None


def _selection(run: RunFolder) -> list[Finding]:
    if run.summary.get("selection") != "target_val":
        return []
    text = (
        "evaluate.selection is target_val: target labels were used to choose the net, so its score is not that of "
        "unsupervised adaptation."
    )
    return [Finding("bad", "The checkpoint was chosen on target labels", text)]


def _gains(run: RunFolder) -> list[Finding]:
    if run.final is None:
        return []
    found, final = [], run.evaluations[run.final]
    for row in catalog.with_role(*_NOT_BETTER):
        other = run.evaluations.get(row.name)
        if other is not None and final.miou <= other.miou:
            title = f"The final net is not better than {'the ' if row.role == 'matched' else ''}{row.title}"
            why = _NOT_BETTER[row.role]
            if row.role == "matched" and labelled_count(run):
                why = "the same labelled target images do as well without adaptation. Nothing here shows that adaptation helps."
            text = f"{final.miou:.1f} against {other.miou:.1f} mIoU: {why}"
            found.append(Finding("bad", title, text))
    return found + _lost(run)


_NOT_BETTER = {
    "baseline": "adaptation did harm. Look at the pseudo-labels first: which classes do they lose?",
    "matched": "more training on source alone does as well. Nothing here shows that adaptation helps.",
}


def _lost(run: RunFolder) -> list[Finding]:
    """The last adapted net is worse than the one that it started from."""
    results = [row for row in catalog.with_role("result") if row.name in run.evaluations]
    if len(results) < 2:
        return []
    (before, after), last = (run.evaluations[row.name].miou for row in results[-2:]), results[-1]
    if after >= before - 0.5:
        return []
    text = f"{after:.1f} after, {before:.1f} mIoU before. "
    if f"{last.section}.source_weight" in all_settings() and not run.setting(last.section, "source_weight"):
        text += f"Self-training without source images drifts to rare classes: set {last.section}.source_weight, or leave the stage out."
    return [Finding("note", f"The {last.title} net lost what the {results[-2].title} net had won", text.strip())]


def _classes(run: RunFolder) -> list[Finding]:
    found: list[Finding] = []
    evaluation = run.evaluations.get(run.final) if run.final else None
    if evaluation is None or not evaluation.true_share:
        return found
    never = [
        name
        for name, share in evaluation.predicted_share.items()
        if share < NEVER and evaluation.true_share.get(name, 0) > OCCURS
    ]
    oracle = next((run.evaluations.get(row.name) for row in catalog.with_role("bound")), None)
    beyond = [name for name in never if oracle is not None and (oracle.iou.get(name) or 0.0) < 1.0]
    reachable = [name for name in never if name not in beyond]
    if reachable:
        verb = "occurs" if len(reachable) == 1 else "occur"
        text = f"{_list(reachable)} {verb} on target and the final net never says so. "
        text += (
            f"Weight rare classes ({catalog.HEAD.section}.class_weight_power)."
            if run.is_head
            else "A class that the first net never predicts gets no pseudo-label: weight rare classes in the source stage "
            "(class_weight_power, augment.rare_crop)."
        )
        found.append(Finding("note", "Classes that are never predicted", text))
    if beyond:
        them = "them" if len(beyond) > 1 else "it"
        text = f"{_list(beyond)}: the oracle does not find {them} either, at this image size and length of training."
        found.append(Finding("note", "Classes out of reach", text))
    for name, share in evaluation.predicted_share.items():
        true = evaluation.true_share.get(name, 0.0)
        if COLLAPSED > share > 3 * true and share - true > 0.03:
            found.append(
                Finding(
                    "note",
                    f"Too much {name}",
                    f"{share:.1%} of the target's pixels are predicted {name}, {true:.1%} are.",
                )
            )
    return found


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _training(run: RunFolder) -> list[Finding]:
    found = []
    slow = []
    for stage, records in run.metrics.items():
        waits = [value for value in (number(record.get("data_wait")) for record in records) if value is not None]
        if waits and np.mean(waits) > WAITING:
            slow.append(f"{stage} {np.mean(waits):.0%}")
    if slow:
        text = f"Share of the time without a batch: {', '.join(slow)}. Raise loop.workers, or store smaller images."
        found.append(Finding("note", "Training waited for data", text))
    missing = next((record["missing"] for record in run.done.values() if record.get("missing")), None)
    if isinstance(missing, list):
        names = _list([str(name) for name in missing])
        text = f"No source pixel of {names} was classified correctly: the first prototypes of these classes are 0."
        found.append(Finding("note", "Classes without a first prototype", text))
    return found
