"""SPCL, stage by stage (arXiv 2111.12358). A stage reads what earlier ones wrote into the run folder and writes what later ones read.

A trained stage is one of `steps.py` on its nets and its batches; everything else is `Context.train`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import distributed
from ..compat.spcl import load_semantic_prototype, load_thres_const
from ..config import Config, PseudoLabelConfig, SourceConfig
from ..data import Batch, Dataset, eval_batches, with_class_mix, write_label_png
from ..errors import CheckpointError, NumericError
from ..estimators.bank import PrototypeBank
from ..estimators.thresholds import PseudoLabelThresholds
from ..models import Discriminator, SegmentationModel
from ..ops import agreement_labels, class_moments, upsampled_prediction
from ..runs.identity import step_seed
from ..runs.signs import nearly_all_kept
from ..runs.tensorfile import read_tensors, replace_tensors
from ..train import memory
from ..train.signals import stop_requests
from .context import Context
from .steps import adapt_step, distill_step, supervised_step, warmup_step
from .summary import keep_samples, write_summary

_TRAIN_AGAIN = "Its last step must have been too large: train it again with a lower learning rate, under another name."
_CACHED_LOGITS_BYTES = 512 << 20  # low-resolution logits kept between the two passes of a pseudo-label stage


# ---- source only, its matched control, the oracle ----------------------------------------------------------------------


def source_only(context: Context) -> None:
    """The plain baseline: cross-entropy on source images."""
    _supervised(context, "source_only", context.config.source_only, "source", context.new_model())


def control(context: Context) -> None:
    """Source-only trained on for as many iterations as adaptation takes: what more training alone gives."""
    _supervised(
        context, "control", context.config.control, "source", context.model_of("source_only"), after=("source_only",)
    )


def oracle(context: Context) -> None:
    """The upper bound: the same on the target's training labels, which no other stage reads."""
    _supervised(context, "oracle", context.config.oracle, "target", context.new_model())


def _supervised(
    context: Context, stage: str, train: SourceConfig, side: str, model: SegmentationModel, after: tuple[str, ...] = ()
) -> None:
    dataset = context.dataset(side, "train")
    class_weight = context.class_weight(dataset, train.class_weight_power)

    net = context.lean(model, [context.image_shape(train, side, train.augment)])
    step = supervised_step(net, train, class_weight, context.config.loop.accumulate)
    context.train(stage, model, step, context.batches(stage, side, dataset, train, train.augment), train, after=after)


# ---- warm-up -----------------------------------------------------------------------------------------------------------


def warmup(context: Context) -> None:
    """AdaptSegNet, single level: a discriminator on the softmax maps tells the domains apart, the net learns to fool it on target."""
    train = context.config.warmup
    after = ("source_only",) if train.init == "source_only" else ()
    model = context.model_of("source_only") if after else context.new_model()
    torch.manual_seed(context.config.seed)
    discriminator = Discriminator(len(context.classes)).to(context.device)
    dataset = context.dataset("source", "train")
    class_weight = context.class_weight(dataset, train.class_weight_power)

    net = context.lean(model, [context.image_shape(train, side, train.augment) for side in ("source", "target")])
    step = warmup_step(net, discriminator, train, class_weight, context.config.loop.accumulate, context.shown(train))
    target = context.dataset("target", "train", labels=False)
    context.train(
        "warmup",
        model,
        step,
        _pairs(
            context.batches("warmup", "source", dataset, train, train.augment),
            context.batches("warmup", "target", target, train, train.augment),
        ),
        train,
        after=after,
        modules={"discriminator": discriminator},
        optimizers={
            "discriminator": torch.optim.Adam(discriminator.parameters(), lr=train.discriminator_lr, betas=(0.9, 0.99))
        },
    )


def _pairs(
    source: Callable[[int], Iterator[Batch]], target: Callable[[int], Iterator[Batch]]
) -> Callable[[int], Iterator[tuple[Batch, Batch]]]:
    return lambda start: zip(source(start), target(start), strict=False)


# ---- prototypes --------------------------------------------------------------------------------------------------------


def prototypes(context: Context) -> None:
    """Prototype k = mean over source images of the mean unit feature of class k's correctly classified pixels in that image."""
    settings, start = context.config.prototypes, context.source_stage()
    identity = context.identity("prototypes", settings, (start,))
    if context.finished_before("prototypes", identity):
        return
    model = context.model_of(start).eval()
    if settings.file is not None:
        _take_prototypes(context, Path(settings.file), model.channels, identity)
    elif distributed.is_main():
        dataset = context.dataset("source", "train").spread(settings.images)
        means, images = _mean_of_image_means(context, model, dataset)
        if not means.isfinite().all():
            raise NumericError(f"prototypes: the features of the net of {start} are not finite. {_TRAIN_AGAIN}")
        missing = [name for name, count in zip(context.classes.names, images.tolist(), strict=True) if not count]
        if missing:
            context.run.say(
                f"prototypes: no correctly classified source pixel of {', '.join(missing)}: their prototypes are 0"
            )
        replace_tensors(context.run.path("prototypes.safetensors"), {"prototypes": means, "images": images})
        context.run.mark_done("prototypes", identity, missing=missing)
    distributed.barrier()


def _take_prototypes(context: Context, path: Path, dim: int, identity: dict) -> None:
    """Prototypes that somebody made before."""
    num_classes = len(context.classes)
    found = _prototypes_in(path) if path.suffix == ".safetensors" else load_semantic_prototype(path, num_classes)
    if found.shape != (num_classes, dim):
        raise CheckpointError(
            f"{path} holds prototypes {list(found.shape)}; this run's net and classes need {[num_classes, dim]}"
        )
    if distributed.is_main():
        replace_tensors(context.run.path("prototypes.safetensors"), {"prototypes": found})
        context.run.mark_done("prototypes", identity)


def _prototypes_in(path: Path) -> Tensor:
    tensors = read_tensors(path)
    if "prototypes" not in tensors:
        raise CheckpointError(f"{path} holds {', '.join(tensors) or 'no tensor'}; expected 'prototypes' [K, D]")
    return tensors["prototypes"]


@torch.no_grad()
def _mean_of_image_means(context: Context, model: SegmentationModel, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """-> prototypes [K, D], number of images that count for each class [K]."""
    num_classes = len(context.classes)
    total = torch.zeros(num_classes, model.channels, device=context.device)
    images = torch.zeros(num_classes, dtype=torch.int64, device=context.device)
    for image, label, _ in eval_batches(dataset, context.config.source.size, workers=context.config.loop.workers):
        context.stop.raise_if_requested("averaging prototypes")
        features, logits = model(image.to(context.device))
        label = torch.from_numpy(label).to(context.device)[None]
        moments = class_moments(features, agreement_labels(label, logits.argmax(1)), num_classes)
        total += moments.sums / moments.counts.clamp_min(1)[:, None]
        images += moments.counts > 0
    return total / images.clamp_min(1)[:, None], images


# ---- pseudo-labels -----------------------------------------------------------------------------------------------------


def pseudo_labels(context: Context) -> None:
    """Labels for the target's training images from the net that adaptation starts from."""
    _pseudo_label(context, "pseudo_labels", context.source_stage())


def pseudo_labels_2(context: Context) -> None:
    """The same from the adapted net, for distillation."""
    _pseudo_label(context, "pseudo_labels_2", "adapt")


def _pseudo_label(context: Context, stage: str, start: str) -> None:
    """Thresholds from one pass over the images, or two where the first leaves them inexact; label PNGs from one more."""
    settings: PseudoLabelConfig = context.config.pseudo_label
    identity = context.identity(stage, settings, (start,))
    if context.finished_before(stage, identity):
        return
    first_round = stage == "pseudo_labels"
    if first_round and settings.folder is not None:
        images = len(context.pseudo_labelled(stage))  # raises DataError for an image without a label
        context.run.say(f"{stage}: {images} labels from {settings.folder}")
        context.run.mark_done(stage, identity)
        return
    model = context.model_of(start).eval()
    if distributed.is_main():
        dataset = context.unlabelled_target()
        use_size = context.config.target.eval_size
        estimate_size = settings.estimate_size or use_size
        estimate = _logits_of(context, model, dataset, estimate_size)
        thresholds = PseudoLabelThresholds(len(context.classes), quantile=settings.quantile, cap=settings.cap)

        def observe() -> None:
            for name, logits in estimate():
                prediction = upsampled_prediction(logits, estimate_size[::-1])
                if prediction.confidence.isnan().any():
                    raise NumericError(
                        f"{stage}: the logits of the net of {start} are not finite on {name}. {_TRAIN_AGAIN}"
                    )
                thresholds.update(prediction)

        observe()
        if not thresholds.exact().all():
            thresholds.second_pass()
            observe()
        applied = thresholds.thresholds()
        if first_round and settings.thresholds is not None:
            applied = load_thres_const(settings.thresholds, len(applied))
        apply = estimate if estimate_size == use_size else _logits_of(context, model, dataset, use_size)
        kept = torch.zeros(len(context.classes), dtype=torch.int64)
        for name, logits in apply():
            labels = upsampled_prediction(logits, use_size[::-1], thresholds=applied.to(logits.device)).labels[0].cpu()
            kept += torch.bincount(labels.flatten(), minlength=256)[: len(kept)]
            write_label_png(context.run.path(stage, f"{name}.png"), labels.numpy(), context.classes.palette)
        record = _threshold_record(context, stage, thresholds, applied, kept)
        context.run.write_json(f"{stage}/thresholds.json", record)
        context.run.mark_done(stage, identity)
    distributed.barrier()


def _threshold_record(
    context: Context, stage: str, thresholds: PseudoLabelThresholds, applied: Tensor, kept: Tensor
) -> dict:
    names, predicted = context.classes.names, thresholds.counts()
    sign = nearly_all_kept(stage, int(predicted.sum()), int(kept.sum()))
    if sign is not None:
        context.run.say(f"warning: {sign.title}. {sign.text}")
    never = [name for name, count in zip(names, predicted.tolist(), strict=True) if not count]
    if never:
        context.run.say(f"pseudo-labels: never predicted on target: {', '.join(never)}")
    return {
        "thresholds": dict(zip(names, applied.tolist(), strict=True)),
        "predicted_pixels": dict(zip(names, predicted.tolist(), strict=True)),
        "kept_pixels": dict(zip(names, kept.tolist(), strict=True)),
        "exact": bool(thresholds.exact().all()),
    }


def _logits_of(
    context: Context, model: SegmentationModel, dataset: Dataset, size: tuple[int, int]
) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """A function that yields (name, low-resolution logits) of every image; the second call computes only what did not fit into memory."""
    cached: dict[str, Tensor] = {}

    @torch.no_grad()
    def logits_by_name() -> Iterator[tuple[str, Tensor]]:
        missing = [i for i, name in enumerate(dataset.names) if name not in cached]
        yield from list(cached.items())
        room = _CACHED_LOGITS_BYTES - sum(logits.nbytes for logits in cached.values())
        for image, _, name in eval_batches(
            dataset.select(missing), size, workers=context.config.loop.workers, labels=False
        ):
            context.stop.raise_if_requested("predicting pseudo-labels")
            with context.precision.autocast():
                _, logits = model(image.to(context.device))
            logits = logits.float()
            if logits.nbytes <= room:
                cached[name] = logits
                room -= logits.nbytes
            yield name, logits

    return logits_by_name


# ---- adapt -------------------------------------------------------------------------------------------------------------


def adapt(context: Context) -> None:
    """Segmentation loss on source; contrastive loss of both domains against the prototypes, which follow the source."""
    train, start = context.config.adapt, context.source_stage()
    model = context.model_of(start)
    num_classes = len(context.classes)
    bank = PrototypeBank(
        num_classes,
        model.channels,
        keep=train.keep,
        absent=train.absent,
        min_pixels=train.min_pixels,
        normalize=train.normalize,
    ).to(context.device)
    bank.load_(load_prototypes(context).to(context.device))
    source_data, target_data = context.dataset("source", "train"), context.pseudo_labelled("pseudo_labels")
    class_weight = context.class_weight(source_data, train.class_weight_power)

    shapes = [
        context.image_shape(train, "source", train.augment),
        context.image_shape(train, "target", train.target_augment),
    ]
    step = adapt_step(
        context.lean(model, shapes), bank, train, class_weight, context.config.loop.accumulate, context.shown(train)
    )
    context.train(
        "adapt",
        model,
        step,
        _pairs(
            context.batches("adapt", "source", source_data, train, train.augment),
            context.batches("adapt", "target", target_data, train, train.target_augment),
        ),
        train,
        after=(start, "prototypes", "pseudo_labels"),
        modules={"bank": bank},
    )
    keep_samples(context, model, bank.prototypes)


def load_prototypes(context: Context) -> Tensor:
    """[K, D] float32 that the prototypes stage wrote."""
    if not context.run.path("prototypes.safetensors").is_file():
        raise CheckpointError(
            f"The stage 'prototypes' is not finished in {context.run.folder}; do it first: spcl-fast prototypes."
        )
    return read_tensors(context.run.path("prototypes.safetensors"))["prototypes"]


# ---- distill -----------------------------------------------------------------------------------------------------------


def distill(context: Context) -> None:
    """Self-training of the adapted net on its own pseudo-labels; with source_weight > 0 source batches keep it honest, and with class_mix
    parts of them stand on target images, too.
    """
    train = context.config.distill
    model = context.model_of("adapt", freeze_bn=train.freeze_bn)
    source_data, target_data = context.dataset("source", "train"), context.pseudo_labelled("pseudo_labels_2")
    class_weight = context.class_weight(source_data, train.class_weight_power)

    shapes = [context.image_shape(train, "target", train.augment)]
    if train.source_weight:
        shapes.append(context.image_shape(train, "source", context.config.adapt.augment))
    step = distill_step(
        context.lean(model, shapes), train, class_weight, context.config.loop.accumulate, context.shown(train)
    )

    batches = context.batches("distill", "target", target_data, train, train.augment)
    if train.source_weight:
        batches = _pairs(
            context.batches("distill", "source", source_data, train, context.config.adapt.augment), batches
        )
    if train.class_mix:
        batches = with_class_mix(
            batches, train.class_mix, seed=step_seed(context.config.seed, "distill/mix", 0), rank=distributed.rank()
        )
    context.train("distill", model, step, batches, train, after=("adapt", "pseudo_labels_2"))


# ---- the run -----------------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Context], None]] = {
    "source_only": source_only,
    "control": control,
    "warmup": warmup,
    "prototypes": prototypes,
    "pseudo_labels": pseudo_labels,
    "adapt": adapt,
    "pseudo_labels_2": pseudo_labels_2,
    "distill": distill,
    "oracle": oracle,
}


def _introduce(context: Context) -> None:
    """What the folder says of itself while the run goes on: its classes, and its settings unless a stage has accepted others already."""
    classes, run = context.classes, context.run
    palette = [list(colour) for colour in classes.palette]
    run.write_json(
        "classes.json", {"names": list(classes.names), "palette": palette, "ignore_index": classes.ignore_index}
    )
    if not (run.path("config.yaml").is_file() and any(run.path(name).exists() for name in STAGES)):
        _keep_settings(context)


def _keep_settings(context: Context) -> None:
    from ..config.load import dump_config

    context.run.write_text("config.yaml", dump_config(context.config))


def run_stages(config: Config, names: tuple[str, ...] | list[str] | None = None) -> None:
    """Do the named stages (default: those of the config) in the order of STAGES; what is complete is skipped. Then write summary.json."""
    wanted = config.stages if names is None else names
    with distributed.session(config.loop.device):
        context = Context(config)
        with context.run.exclusive(), stop_requests() as stop:
            context.stop = stop
            _introduce(context)
            for name, stage in STAGES.items():
                if name in wanted:
                    memory.reset_peak(context.device)
                    stage(context)
                    _keep_settings(context)  # the stage has accepted them
            write_summary(context)
        context.run.close()
