"""Every setting of a run, as frozen dataclasses: name, type, default, range and help on one line.

Sizes are (width, height) in pixels. A stage's defaults are those of the released SPCL code (arXiv 2111.12358); presets change them.
A class that gives a setting another default inherits its help and range.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from .. import catalog

Value = TypeVar("Value")


class About(NamedTuple):
    """What a setting has besides name, type and default. Bounds and choices hold for every item of a list."""

    help: str = ""
    above: float | None = None
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()  # where they come from the catalog; others are a Literal in the type
    path: bool = False  # names a file or folder: a leading ~ is the home folder
    classes: bool = False  # names of classes, with commas: looked up in the data's before the first step


def setting(
    default: Value,
    help: str = "",
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    path: bool = False,
    classes: bool = False,
) -> Value:
    """One setting of a dataclass. Its type says what it holds, this what it is for and which values make sense."""
    about = About(help, above, least, most, choices, path, classes)
    return field(default=default, metadata={"about": about})  # type: ignore[return-value]  # as dataclasses.field does


@dataclass(frozen=True)
class ModelConfig:
    """The segmentation net."""

    name: str = setting("deeplab_v2_resnet101", "which net", choices=catalog.names(catalog.NETS))
    weights: str | None = setting(None, "start from this file (ImageNet, released SPCL, ours); null: random", path=True)
    body_only: bool = setting(False, "of model.weights all but the classifier: those of a net with other classes")
    feature_dim: int | None = setting(64, "channels of the features; null: the body's own maps, no head", least=1)
    stride: int | None = setting(None, "pixels per feature, one of those that the net has; null: its own", least=1)
    pretrained: bool = setting(False, "the weights that timm or transformers has: from its cache, else its hub")
    classifier: Literal["own", "linear", "cosine"] = setting(
        "own", "the net's own, a 1x1 convolution, or cosines times a scale"
    )
    layer_decay: float = setting(1.0, "rate of a layer over that of the layer after it; 1: one rate", above=0, most=1)
    freeze_body: bool = setting(
        False, "train only the classifier and the net's own head: faster, and in much less memory"
    )
    freeze_bn: bool = setting(True, "BatchNorm with fixed statistics in every stage but distill")
    frozen_bn_eps: float = setting(1e-5, "the released FrozenBatchNorm has 0", least=0)


@dataclass(frozen=True)
class DataConfig:
    """One domain: where its images are and at what size the net sees them."""

    dataset: str = setting("folders", "layout, or generated scenes", choices=catalog.data_set_choices())
    root: str = setting("", "folder that holds the data set", path=True)
    train_split: str = setting("train", "name of the training split")
    val_split: str = setting("val", "name of the validation split")
    size: tuple[int, int] = setting((1280, 720), "training images are resized to this before any crop", least=1)
    eval_size: tuple[int, int] = setting((1024, 512), "for evaluation and pseudo-labels", least=1)
    classes: str | None = setting(None, "JSON file: the shared classes, and a table from each set's ids", path=True)
    classes_key: str | None = setting(None, "which table of that file; null: that of the root folder's name")
    label_ending: str | None = setting(None, "of a label's name after its image's, such as _mask.png; null: .png")
    num_classes: int = setting(19, "19 or, with SYNTHIA, 16", least=1)
    train_images: int | None = setting(None, "only the first N images of the training split; null: all", least=1)


@dataclass(frozen=True)
class TargetConfig(DataConfig):
    """The domain that a net is adapted to."""

    labelled: str | None = setting(
        None,
        "training images whose labels are used: how many, drawn by the seed; names with commas; a list file; null: none",
    )
    fold: str | None = setting(
        None,
        "1/4: the first of 4 parts of target.labelled is left out of training and evaluated instead of val_split; null: none is",
    )


@dataclass(frozen=True)
class AugmentConfig:
    """Random transforms of a training image; all off by default, as in the release."""

    crop: tuple[int, int] | None = setting(None, "size of a random crop; null: none", least=1)
    scale: tuple[float, float] = setting((1.0, 1.0), "factor on `size`, drawn uniformly in the logarithm", above=0)
    flip: float = setting(0.0, "probability of the mirror image", least=0, most=1)
    jitter: float = setting(0.0, "strength of brightness, contrast and saturation; hue gets a quarter", least=0)
    blur: float = setting(0.0, "probability of a Gaussian blur", least=0, most=1)
    rare_crop: float = setting(0.0, "probability that a rare class is at a crop's centre", least=0, most=1)


@dataclass(frozen=True)
class TrainConfig:
    """What every trained stage has: schedule, batch, optimiser, augmentation."""

    iterations: int = setting(40_000, "optimiser steps", least=1)
    schedule_iterations: int | None = setting(62_500, "the rate reaches 0 here; null: at `iterations`", least=1)
    power: float = setting(0.9, "of the poly schedule", least=0)
    warmup_iterations: int = setting(0, "linear warm-up of the learning rate", least=0)
    batch_size: int = setting(4, "images of each domain", least=1)
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "optimiser of the net")
    lr: float = setting(2.5e-4, "learning rate of the body", above=0)
    head_multiplier: float = setting(10.0, "learning rate of the head over that of the body", above=0)
    momentum: float = setting(0.9, "of SGD", least=0, most=1)
    weight_decay: float = setting(5e-4, "of the optimiser", least=0)
    temperature: float = setting(1.8, "divides the logits of the loss on source labels", above=0)
    class_weight_power: float = setting(0.0, "class weight = (share of the pixels) ** -power; 0: none", least=0)
    labelled_weight: float = setting(1.0, "of the loss on the images of target.labelled in the same step", least=0)
    balanced_sampling: bool = setting(False, "draw images by class, ~ 1 / ln(1.01 + share of images)")
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class SourceConfig(TrainConfig):
    """Plain cross-entropy on one labelled domain: source-only, its matched control, the start with a few labels, and the oracle."""


@dataclass(frozen=True)
class WarmupConfig(TrainConfig):
    """AdaptSegNet, single level."""

    init: Literal["weights", "source_only"] = setting("weights", "start from model.weights, or from that stage")
    adversarial_weight: float = setting(0.001, "of the loss that fools the discriminator", least=0)
    discriminator_lr: float = setting(1e-4, "learning rate of the discriminator", above=0)


@dataclass(frozen=True)
class PrototypesConfig:
    """One pass over the labelled source images."""

    images: int | None = setting(None, "how many, spread evenly; null: all", least=1)
    file: str | None = setting(None, "take these: semantic_prototype.pth, or our prototypes.safetensors", path=True)


@dataclass(frozen=True)
class PseudoLabelConfig:
    """Labels for the target's training images."""

    quantile: float = setting(0.5, "of the confidences of a class: its threshold", least=0, most=1)
    cap: float = setting(0.9, "no threshold is higher", above=0, most=1)
    estimate_size: tuple[int, int] | None = setting(None, "size for the thresholds; null: the size of use", least=1)
    images: int | None = setting(None, "only the first N; null: all", least=1)
    thresholds: str | None = setting(None, "of the first round, from here: thres_const.npy", path=True)
    folder: str | None = setting(None, "of the first round: take the label PNGs in here", path=True)


@dataclass(frozen=True)
class AdaptConfig(TrainConfig):
    """Segmentation loss on source, and the objective of an adaptation method on both domains."""

    loss: str = setting("spcl", "objective of the adaptation", choices=catalog.names(catalog.LOSSES))
    contrast_weight: float = setting(1.0, "weight of the contrastive loss", least=0)
    contrast_temperature: float = setting(100.0, "divides the similarities of the contrastive loss", above=0)
    normalize: bool = setting(True, "features of unit length in the contrastive loss")
    keep: float = setting(0.1, "share of the old prototype in each update", least=0, most=1)
    absent: Literal["keep", "decay"] = setting("keep", "the prototype of a class that the batch lacks")
    min_pixels: int = setting(1, "fewer pixels of a class in the batch leave its prototype as it is", least=1)
    variance_ratio: float = setting(1.0, "of the class variances in sepico_dist", least=0)
    bank_length: int = setting(100, "batch means that sepico_bank keeps per class", least=1)
    contrast_regularizer: float = setting(0.0, "weight of SePiCo's regulariser of the mean feature", least=0)
    target_augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Self-training of the adapted net on its own pseudo-labels."""

    iterations: int = 20_000
    schedule_iterations: int | None = 31_250
    batch_size: int = 8
    lr: float = 5e-4
    temperature: float = 1.0
    freeze_bn: bool = setting(False, "BatchNorm with fixed statistics in this stage")
    source_weight: float = setting(0.0, "of the loss on source images in the same step; 0: none, as released", least=0)
    class_mix: float = setting(0.0, "probability to paste source classes onto a target image (DACS)", least=0, most=1)
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(crop=(1024, 512), scale=(0.5, 1.5), flip=0.5, jitter=0.5)
    )


@dataclass(frozen=True)
class OnlineConfig(TrainConfig):
    """Self-training with a teacher that follows the net: DAFormer's and MIC's losses."""

    ema: float = setting(0.999, "share of the teacher that a step keeps, fewer in the first ones", least=0, most=1)
    confidence: float = setting(0.968, "the teacher is sure of a pixel from this probability on", least=0, most=1)
    mix_weight: float = setting(1.0, "of the loss on target images with source classes pasted in; 0: none", least=0)
    mix_jitter: float = setting(0.2, "brightness, contrast and saturation of these images", least=0)
    masked_weight: float = setting(1.0, "of the loss on target images without most patches; 0: none", least=0)
    mask_ratio: float = setting(0.7, "share of the patches that are taken away", least=0, most=1)
    mask_block: int = setting(64, "width and height of a patch in pixels", least=1)
    feature_distance: float = setting(
        0.005, "of the distance to the features of the encoder of model.weights, on source; 0: none", least=0
    )
    feature_distance_classes: str | None = setting(
        None, "on pixels of these, names with commas; null: Cityscapes' things, all where there are none", classes=True
    )
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop=(512, 512), flip=0.5))
    target_augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop=(512, 512), flip=0.5))


@dataclass(frozen=True)
class HeadConfig(TrainConfig):
    """A head on the features of a frozen net: `spcl-fast head`. Images are not augmented: their features are computed once."""

    iterations: int = 1000
    schedule_iterations: int | None = None
    batch_size: int = 16
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.01
    temperature: float = 1.0
    side: Literal["source", "target"] = setting("target", "whose training images and labels it learns from")
    batch_norm: bool = setting(True, "BatchNorm on the features of a linear head, in its weights at the end")
    cache_dtype: Literal["float16", "float32"] = setting("float16", "of the features on the disk")
    cache_dir: str | None = setting(None, "folder of the features; null: RUNS_DIR/features", path=True)


@dataclass(frozen=True)
class LoopConfig:
    """The training loop itself."""

    device: str = setting("auto", "auto | cpu | cuda | cuda:N")
    precision: Literal["fp32", "bf16"] = setting("fp32", "bf16: autocast; losses stay fp32")
    channels_last: bool = setting(False, "memory layout of the net's convolutions")
    checkpoint: Literal["none", "stage", "block", "auto"] = setting("none", "segments that the backward recomputes")
    offload: bool = setting(False, "keep what the backward needs in the host's memory (GPU only)")
    accumulate: int = setting(1, "micro-batches of a step; its means stay those over the whole batch", least=1)
    absorb_gradients: bool = setting(False, "add each gradient to the SGD momentum as soon as it is there")
    compile: bool = setting(False, "torch.compile the net's body")
    workers: int = setting(2, "data loading processes", least=0)
    log_every: int = setting(20, "steps between two log lines", least=1)
    checkpoint_every: int = setting(500, "steps between two checkpoints", least=1)
    checkpoints_kept: int = setting(2, "older ones are removed", least=1)
    resume: str = setting("auto", "auto: from the newest whole checkpoint | never: refuse one | a path", path=True)
    skip_bad_files: bool = setting(False, "leave out files that cannot be read, and list them")
    follow_links: bool = setting(False, "read links that lead out of a data set's root, and links to folders")
    max_pixels: int = setting(1 << 26, "larger pictures are not decoded: a small file can ask for all memory", least=1)


SAVES_MEMORY = ("precision", "checkpoint", "offload", "accumulate", "absorb_gradients")  # of LoopConfig; off by default


@dataclass(frozen=True)
class EvaluateConfig:
    """How a net is evaluated, always on the target's validation split (or what target.fold leaves out) and never to choose a model
    unless that is asked for (target_val, which the report says).
    """

    selection: Literal["last", "source_val", "target_val"] = setting("last", "which net of a stage is its result")
    tta: Literal["none", "flip"] = setting("none", "test-time augmentation")
    window: tuple[int, int] | None = setting(None, "size of the windows that a net sees; null: whole images", least=1)
    window_stride: tuple[int, int] | None = setting(None, "from window to window; null: two thirds of one", least=1)
    images: int | None = setting(None, "how many of val_split, spread evenly; null: all", least=1)
    overlays: int = setting(6, "images whose predictions are kept for the report", least=0)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = setting("run", "the run lives in runs_dir/name")
    runs_dir: str = setting("runs", "folder of all runs", path=True)
    seed: int = setting(0, "of everything random", least=0)
    stages: tuple[str, ...] = setting(
        ("warmup", "prototypes", "pseudo_labels", "adapt", "pseudo_labels_2", "distill"),
        "what `run` does, in the order of the method",
        choices=catalog.names(catalog.STAGES),
    )
    source: DataConfig = field(default_factory=DataConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    source_only: SourceConfig = field(default_factory=SourceConfig)
    control: SourceConfig = field(default_factory=SourceConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    few_labels: SourceConfig = field(default_factory=SourceConfig)
    prototypes: PrototypesConfig = field(default_factory=PrototypesConfig)
    pseudo_label: PseudoLabelConfig = field(default_factory=PseudoLabelConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    oracle: SourceConfig = field(default_factory=SourceConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


def _with_sections_of_stages(config: type) -> Any:
    """`config` with a section more for every stage of the catalog whose settings are declared in the stage's own file."""
    known = {item.name for item in dataclasses.fields(config)}
    more = {stage.section: catalog.load(stage.settings) for stage in catalog.STAGES if stage.section not in known}
    if not more:
        return config
    sections = [(name, section, field(default_factory=section)) for name, section in more.items()]
    return dataclasses.make_dataclass(
        "Config", sections, bases=(config,), frozen=True, namespace={"__module__": __name__}
    )


if not TYPE_CHECKING:  # such a file imports this module: `from ..config.schema import TrainConfig, setting`
    Config = _with_sections_of_stages(Config)
