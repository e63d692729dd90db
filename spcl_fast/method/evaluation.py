"""How good the net of a stage is: on the target's validation images, and at its checkpoints where one of them is to be picked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import distributed
from ..config.values import plain
from ..data import Dataset, eval_batches, write_label_png
from ..data.content import content_of
from ..errors import DataError
from ..models import SegmentationModel
from ..runs import layout
from ..runs.tensorfile import replace_tensors
from ..train.evaluate import evaluate_model, label_map, mean_text, predict_logits
from ..train.windows import windows_of
from .context import Context


def needs_evaluation(context: Context, stage: str) -> bool:
    """Whether a finished stage has no figures, or has those of other images or of other settings. The same on every process."""
    needed, record = False, None
    if distributed.is_main():
        record = context.run.read_json(layout.of_stage(stage, layout.EVALUATION))
        now = _evaluated(context)
        # runs of before this was kept have figures that nothing says more of
        known = record.get(layout.EVALUATED, now) if isinstance(record, dict) else None
        needed = known is None or (now is not None and known != now)
    needed = distributed.broadcast_object(needed)
    if needed and record is not None:
        context.run.say(
            f"{stage}: to be evaluated again, as its figures are of other images or other settings of evaluate"
        )
    return needed


def _evaluated(context: Context) -> dict[str, Any] | None:
    dataset, evaluate = context.evaluation_data, context.config.evaluate
    if dataset is None:
        return None
    seen = {name: getattr(evaluate, name) for name in ("tta", "window", "window_stride")}
    seen["images"] = context.domains.evaluated_count
    if context.domains.held_out is not None:  # by name, too: generated scenes have no content to tell folds apart
        seen[layout.HELD_OUT_NAMES] = sorted(context.domains.held_out.names)
    return plain({**seen, "data": content_of(dataset)})


def evaluate_stage(context: Context, stage: str, model: SegmentationModel) -> None:
    """Write the stage's evaluation.json and a few predictions for the report. The main process works; the others wait.

    Without labels of the target there are predictions alone.
    """
    dataset, run = context.evaluation_data, context.run
    if distributed.is_main() and dataset is None and context.pictured is not None:
        _predict_pictured(context, stage, model, context.pictured)
    if distributed.is_main() and dataset is not None:
        evaluate = context.config.evaluate
        assert context.pictured is not None  # some of what is evaluated
        shown = {*context.pictured.names}

        def keep(index: int, name: str, predicted: Callable[[], np.ndarray]) -> None:
            context.stop.raise_if_requested(f"evaluating {stage}")
            if name in shown:
                write_label_png(
                    run.path(stage, layout.PREDICTIONS, f"{name}.png"), predicted(), context.classes.palette
                )

        size = context.config.target.eval_size
        scores = evaluate_model(
            model,
            dataset,
            size,
            device=context.device,
            tta=evaluate.tta,
            windows=windows_of(evaluate),
            images=context.domains.evaluated_count,
            keep=keep,
        )
        run.write_json(
            layout.of_stage(stage, layout.EVALUATION), {**scores.as_json(), layout.EVALUATED: _evaluated(context)}
        )
        count = len(dataset.spread(context.domains.evaluated_count))
        run.say(f"{stage}: {mean_text(scores.miou)} on {context.domains.evaluated_words(count)}")
    distributed.barrier()


def _predict_pictured(context: Context, stage: str, model: SegmentationModel, dataset: Dataset) -> None:
    evaluate, mode = context.config.evaluate, model.training
    model.eval()
    try:
        for image, _, name in eval_batches(dataset, context.config.target.eval_size, labels=False):
            context.stop.raise_if_requested(f"predicting with {stage}")
            logits = predict_logits(
                model, image.to(context.device), name, tta=evaluate.tta, windows=windows_of(evaluate)
            )
            predicted = label_map(logits, (image.shape[2], image.shape[3]))
            write_label_png(
                context.run.path(stage, layout.PREDICTIONS, f"{name}.png"), predicted, context.classes.palette
            )
    finally:
        model.train(mode)


def keep_best(context: Context, stage: str, model: SegmentationModel, done: int) -> None:
    """Keep the weights that do best on the validation images that evaluate.selection names; "last" keeps none."""
    selection = context.config.evaluate.selection
    if selection == "last":
        return
    if distributed.is_main():
        side, record = selection.removesuffix("_val"), layout.of_stage(stage, layout.SELECTED)
        best = context.run.read_json(record)
        if best is None or best["step"] != done:
            size = getattr(context.config, side).eval_size
            dataset, windows = context.domains.dataset(side, "val"), windows_of(context.config.evaluate)
            scores = evaluate_model(model, dataset, size, device=context.device, windows=windows)
            if scores.miou is None:
                raise DataError(
                    f"evaluate.selection is {selection}, and no pixel of {side}.val_split "
                    f"({getattr(context.config, side).val_split!r}) is labelled. Give labels, or choose last."
                )
            if best is None or best["step"] > done or scores.miou > best["miou"]:
                replace_tensors(context.run.path(stage, layout.SELECTED_WEIGHTS), model.state_dict())
                context.run.write_json(record, {"step": done, "miou": scores.miou, "by": selection})
    distributed.barrier()
