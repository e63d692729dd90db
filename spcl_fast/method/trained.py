"""A trained net on new images: find its weights, load it, write colour masks and overlays."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .. import catalog
from ..config import Config
from ..config.load import suggestion
from ..config.schema import EvaluateConfig
from ..data.classes import CITYSCAPES_16, CITYSCAPES_19, THIRTEEN_OF_SIXTEEN, ClassSet, read_classes
from ..data.files import MAX_PIXELS, Search, find_images, inside, read_image, searching
from ..data.left_out import counted, left_out_images
from ..data.palette import overlay, write_label_png
from ..errors import CheckpointError, ConfigError, DataError
from ..runs import layout
from .exported import load_exported

if TYPE_CHECKING:
    from ..models import SegmentationModel
    from .exported import Exported


@dataclass(frozen=True)
class Trained:
    """A net in eval mode on its device, what it predicts, and where its weights lay."""

    model: SegmentationModel | Exported
    classes: ClassSet
    weights: Path
    device: torch.device
    size: tuple[int, int] | None = None  # (width, height) at which an exported net wants to see images


def final_first() -> tuple[str, ...]:
    """Which stage's net is a run's result, the last adapted one first; an oracle is taken only by name."""
    return tuple(row.name for row in reversed(catalog.trained()) if row.role != "bound")


def find_weights(path: Path, stage: str | None = None, *, selected: bool = False) -> Path:
    """The weights of a run folder (of `stage`, or of the last one finished); a weights file or a checkpoint as it is.

    The newest whole checkpoint, or, with `selected`, what the run's evaluate.selection picked. A stage asked for by name may still train.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no such run folder, checkpoint folder or weights file.")
    if path.is_file() or (any(path.glob("*.safetensors")) and not (path / layout.CONFIG).is_file()):
        return path
    from ..runs.checkpoint import CheckpointStore

    results = (*final_first(), catalog.HEAD.name)
    stage = stage and stage.replace("-", "_")  # its command's name
    known = (*catalog.names(catalog.trained()), catalog.HEAD.name)
    if stage and stage not in known:
        raise ConfigError(
            f"--stage {stage}: no net is of such a stage{suggestion(stage, known)} (there are {', '.join(known)})"
        )
    for name in (stage,) if stage else results:
        if not stage and not (path / name / layout.DONE).is_file():
            continue
        if selected and (path / name / layout.SELECTED_WEIGHTS).is_file():
            return path / name / layout.SELECTED_WEIGHTS
        checkpoint = CheckpointStore(path / name / layout.CHECKPOINTS).latest()
        if checkpoint is not None:
            return checkpoint.path
    raise CheckpointError(
        f"{path} holds no net of {stage or 'a finished ' + ', '.join(results)}. "
        f"Expected {path / (stage or results[0]) / layout.CHECKPOINTS}/step_*; train that stage first, or name a weights file."
    )


def load_trained(path: Path, config: Config, stage: str | None = None) -> Trained:
    """Build the config's net and fill it with the weights at `path`, or take an exported one as it is.

    Raises ConfigError or CheckpointError where they do not fit.
    """
    if layout.is_exported(path):
        exported, facts = load_exported(path)
        return Trained(exported, facts.class_set, path, torch.device("cpu"), facts.size)
    from ..models import build_model, load_weights
    from ..train.device import choose_device

    weights = find_weights(path, stage, selected=config.evaluate.selection != "last")
    classes = _classes(path, config)
    model = build_model(
        config.model.name,
        len(classes),
        feature_dim=config.model.feature_dim,
        freeze_bn=config.model.freeze_bn,
        frozen_bn_eps=config.model.frozen_bn_eps,
        stride=config.model.stride,
        classifier=config.model.classifier,
    )
    loaded = load_weights(model, weights, trained=True)
    if any(key.startswith("classifier.") for key in loaded.fresh):
        raise CheckpointError(
            f"{weights} holds {loaded.format}, which has no classifier. Expected those of a trained net."
        )
    device = choose_device(config.loop.device)
    return Trained(model.eval().to(device), classes, weights, device)


def _classes(path: Path, config: Config) -> ClassSet:
    """The names and colours that the run kept, so that a net works where its training data is not; else those of the target's data set."""
    run = layout.run_of(path)
    if run is not None and (run / layout.CLASSES).is_file():
        return read_classes(run / layout.CLASSES)[0]
    if config.target.classes is not None:
        return read_classes(Path(config.target.classes))[0]
    known = catalog.find(catalog.DATA_SETS, config.target.dataset).num_classes
    for classes in (CITYSCAPES_19, CITYSCAPES_16):
        if len(classes) == config.target.num_classes and len(classes) in known:
            return classes
    from ..data import dataset_of

    return dataset_of(config.target, config.target.val_split, labels=False).classes


# ---------------------------------------------------------------------------------------------- evaluate


def evaluate_trained(
    path: Path, config: Config, stage: str | None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Score a net on the target's validation split, or on what target.fold leaves out; prints a table, returns what `evaluation.json` of a
    stage holds and `weights`.

    With the 16 classes of SYNTHIA also `miou_13`, the literature's mean without wall, fence and pole.
    """
    from ..train.evaluate import evaluate_model, mean_iou
    from ..train.windows import windows_of
    from .domains import Domains
    from .held_out import check_left_out_by, fold_record

    domains = Domains(config)
    check_left_out_by(path, domains)
    trained = load_trained(path, config, stage)
    dataset = domains.evaluated()
    if dataset.classes.names != trained.classes.names:
        raise ConfigError(
            f"{trained.weights} predicts {len(trained.classes)} classes ({', '.join(trained.classes.names)}), and the data has "
            f"{len(dataset.classes)} ({', '.join(dataset.classes.names)}). Give those it was trained with: --target.classes FILE.json."
        )
    settings = config.evaluate
    scores = evaluate_model(
        trained.model,
        dataset,
        config.target.eval_size,
        device=trained.device,
        tta=settings.tta,
        windows=windows_of(settings),
        images=domains.evaluated_count,
        workers=config.loop.workers,
    )
    count = len(dataset.spread(domains.evaluated_count))
    result = {"weights": str(trained.weights), "images": count, **scores.as_json()}
    left_out = fold_record(domains)
    if left_out is not None:
        result[layout.LEFT_OUT] = left_out
    if dataset.classes == CITYSCAPES_16:
        known = [result["iou"][dataset.classes.names[k]] for k in THIRTEEN_OF_SIXTEEN]
        result["miou_13"] = mean_iou(known)
    say(_score_table(result, counted(count, "image") if left_out is None else domains.evaluated_words(count)))
    return result


def _cell(percent: float | None) -> str:
    return "-".rjust(7) if percent is None else f"{percent:>7.1f}"


def _score_table(result: dict[str, Any], images: str) -> str:
    lines = [
        f"{result['weights']} on {images}",
        f"{'class':<16}{'IoU':>7}{'predicted':>12}{'true':>9}",
    ]
    for name, iou in result["iou"].items():
        predicted, true = result["predicted_share"][name], result["true_share"][name]
        lines.append(f"{name:<16}{_cell(iou)}{predicted:>12.1%}{true:>9.1%}")
    for key, title in (("miou", "mIoU"), ("miou_13", "mIoU, 13 classes")):
        if key in result:
            lines.append(f"{title:<16}{_cell(result[key])}")
    if result["miou"] is None:
        lines.append("no pixel of these images is labelled: check the labels, or --target.val_split")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- predict


def parse_size(text: str) -> tuple[int, int] | None:
    """'640x360' -> (640, 360); 'native' -> None."""
    if text == "native":
        return None
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ConfigError(f"--size: got {text!r}, expected WIDTHxHEIGHT such as 640x360, or native")
    return int(width), int(height)


def predict_folder(
    trained: Trained,
    images: Path,
    output: Path,
    *,
    size: tuple[int, int] | None,  # (width, height) at which the net sees an image; None: its own
    evaluate: EvaluateConfig,
    skip_bad_files: bool = False,
    follow_links: bool = False,
    max_pixels: int = MAX_PIXELS,
    say: Callable[[str], None] = print,
) -> int:
    """Write output/masks/<name>.png (palette PNG: colours to look at, class ids to read) and output/overlays/<name>.png at the images' own
    sizes, and output/classes.json; returns how many. `images` is a folder or one file. Raises DataError that names a broken file."""
    search = Search(follow_links, skip_odd_names=skip_bad_files)
    if images.is_dir():
        with searching(search):
            files, left_out = find_images(images), left_out_images(images)
        root = images
        for problem in left_out:
            say(f"{problem.name}: {problem.what}")
    elif images.is_file():
        files, root = {images.stem: images}, images.parent
    else:
        raise DataError(f"{images}: there is no such folder or image. Expected a folder of PNG or JPEG images.")
    if not files:
        raise DataError(f"{images} holds no PNG or JPEG image. Expected at least one, in it or below it.")
    done = 0
    for name, image in _readable(files, root, skip_bad_files, search, max_pixels, say):
        labels = predict_image(trained, image, size, evaluate, name)
        write_label_png(output / layout.MASKS / f"{name}.png", labels, trained.classes.palette)
        target = output / layout.OVERLAYS / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(overlay(np.asarray(image), labels, trained.classes.palette)).save(target)
        done += 1
        if done % 50 == 0:
            say(f"{done} of {counted(len(files), 'image')}")
    if done:
        (output / layout.CLASSES).write_text(json.dumps(trained.classes.as_json(), indent=1), encoding="utf-8")
    return done


def _readable(
    files: dict[str, Path],
    root: Path,
    skip_bad_files: bool,
    search: Search,
    max_pixels: int,
    say: Callable[[str], None],
) -> Iterator[tuple[str, Image.Image]]:
    skipped = 0
    for name, path in files.items():
        try:
            with searching(search):
                file = inside(root, path)
            yield name, read_image(file, max_pixels)
        except DataError as error:
            if not skip_bad_files:
                raise
            skipped += 1
            say(f"skipped: {error}")
    if skipped == len(files):
        raise DataError(
            f"none of {counted(skipped, 'image')} in {root} can be read: nothing was predicted. Look at the files named above."
        )
    if skipped:
        say(f"{skipped} of {counted(len(files), 'image')} skipped")


@torch.inference_mode()
def predict_image(
    trained: Trained, image: Image.Image, size: tuple[int, int] | None, evaluate: EvaluateConfig, name: str = "it"
) -> np.ndarray:
    """Class of every pixel of an RGB image, [H, W]. Raises NumericError that names it where the net's output is not finite."""
    from ..train.evaluate import label_map, predict_logits
    from ..train.windows import windows_of

    seen = image if size is None or size == image.size else image.resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(seen, dtype=np.uint8)).permute(2, 0, 1)[None].to(trained.device)
    logits = predict_logits(
        trained.model, pixels.float().div(255), name, tta=evaluate.tta, windows=windows_of(evaluate)
    )
    return label_map(logits, (image.height, image.width))
