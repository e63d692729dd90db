"""Every setting of a run, as frozen dataclasses: the one place where names and defaults live.

Sizes are (width, height) in pixels. A stage's defaults are those of the released SPCL code (arXiv 2111.12358); presets change them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """The segmentation net."""

    name: str = "deeplab_v2_resnet101"  # deeplab_v2_resnet101 | _resnet50 | _resnet18 | deeplab_v2_vgg16 | lite0 | tiny
    weights: str | None = (
        None  # file to start from: ImageNet weights, a released SPCL checkpoint, or ours; None: random
    )
    feature_dim: int = 64  # channels of the features (lite0 and tiny; DeepLab-v2 uses those of its backbone)
    freeze_bn: bool = True  # BatchNorm with fixed statistics in every stage but distill
    frozen_bn_eps: float = 1e-5  # the released FrozenBatchNorm has 0


@dataclass(frozen=True)
class DataConfig:
    """One domain: where its images are and at what size the net sees them."""

    dataset: str = "folders"  # folders | gta5 | synthia | synscapes | cityscapes (+generated_driver) | generated_{driver,source,target}
    root: str = ""
    train_split: str = "train"
    val_split: str = "val"
    size: tuple[int, int] = (1280, 720)  # training images are resized to this before any crop
    eval_size: tuple[int, int] = (1024, 512)  # evaluation and pseudo-labels
    classes: str | None = None  # JSON file with the shared classes and the lookup tables from each set's ids (folders)
    classes_key: str | None = None  # which table of that file; None: the name of the root folder, or of a generated set
    num_classes: int = 19  # 19 or, with SYNTHIA, 16
    train_images: int | None = None  # use only the first N images of the training split


@dataclass(frozen=True)
class AugmentConfig:
    """Random transforms of a training image; all off by default, as in the release."""

    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (1.0, 1.0)  # factor on `size`, drawn uniformly in the logarithm
    flip: float = 0.0  # probability
    jitter: float = 0.0  # strength of brightness, contrast, saturation (hue gets a quarter of it)
    blur: float = 0.0  # probability of a Gaussian blur
    rare_crop: float = 0.0  # probability that a crop is centred on a pixel of a rare class


@dataclass(frozen=True)
class TrainConfig:
    """What every trained stage has: schedule, batch, optimiser, augmentation."""

    iterations: int = 40_000
    schedule_iterations: int | None = 62_500  # the poly schedule reaches 0 here; None: at `iterations`
    power: float = 0.9
    warmup_iterations: int = 0  # linear warm-up of the learning rate
    batch_size: int = 4  # images of each domain
    optimizer: str = "sgd"  # sgd | adamw
    lr: float = 2.5e-4
    head_multiplier: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    temperature: float = 1.8  # divides the logits of the segmentation loss on source images
    class_weight_power: float = 0.0  # class weight = (pixel share of the class) ** -power, mean 1; 0: none
    balanced_sampling: bool = False  # draw images by class: p(class) ~ 1 / ln(1.01 + share of images that hold it)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class SourceConfig(TrainConfig):
    """Plain cross-entropy on one labelled domain: source-only, its matched control, and the oracle."""


@dataclass(frozen=True)
class WarmupConfig(TrainConfig):
    """AdaptSegNet, single level."""

    init: str = "weights"  # weights: start from model.weights | source_only: go on from that stage
    adversarial_weight: float = 0.001
    discriminator_lr: float = 1e-4


@dataclass(frozen=True)
class PrototypesConfig:
    """One pass over the labelled source images."""

    images: int | None = None  # None: all
    file: str | None = (
        None  # take them from here instead: semantic_prototype.pth of the release, or our prototypes.safetensors
    )


@dataclass(frozen=True)
class PseudoLabelConfig:
    """Labels for the target's training images."""

    quantile: float = 0.5
    cap: float = 0.9
    estimate_size: tuple[int, int] | None = None  # thresholds from predictions at this size; None: at the size of use
    images: int | None = None  # None: all
    thresholds: str | None = None  # take the first round's thresholds from here: thres_const.npy of the release
    folder: str | None = None  # take the first round's labels from here: palette PNGs of the release, or ours


@dataclass(frozen=True)
class AdaptConfig(TrainConfig):
    """Segmentation loss on source, prototype-contrastive loss on both domains."""

    contrast_weight: float = 1.0
    contrast_temperature: float = 100.0
    normalize: bool = True
    keep: float = 0.1  # share of the old prototype in each update
    absent: str = "keep"  # keep | decay: what happens to the prototype of a class the batch does not hold
    min_pixels: int = 1  # a class with fewer pixels in the batch leaves its prototype alone
    target_augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Self-training of the adapted net on its own pseudo-labels."""

    iterations: int = 20_000
    schedule_iterations: int | None = 31_250
    batch_size: int = 8
    lr: float = 5e-4
    temperature: float = 1.0
    freeze_bn: bool = False
    source_weight: float = (
        0.0  # weight of the segmentation loss on source images of the same step; 0: none, as released
    )
    class_mix: float = (
        0.0  # probability that half of the classes of a source image are pasted onto a target image (ClassMix, DACS)
    )
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(crop=(1024, 512), scale=(0.5, 1.5), flip=0.5, jitter=0.5)
    )


@dataclass(frozen=True)
class LoopConfig:
    """The training loop itself."""

    device: str = "auto"  # auto | cpu | cuda | cuda:N
    precision: str = "fp32"  # fp32 | bf16 (autocast; losses stay fp32)
    channels_last: bool = False
    checkpoint: str = (
        "none"  # none | stage | block | auto (smallest peak): parts of the net whose forward the backward repeats
    )
    offload: bool = False  # keep what the backward needs in the host's memory (GPU only)
    accumulate: int = 1  # micro-batches that a step's batch is split into; the means stay those over the whole batch
    absorb_gradients: bool = (
        False  # add every gradient to the SGD momentum as soon as it is there: none is alive between layers
    )
    compile: bool = False  # torch.compile the net's body
    workers: int = 2  # data loading processes
    log_every: int = 20
    checkpoint_every: int = 500
    checkpoints_kept: int = 2
    resume: str = (
        "auto"  # auto: go on from the newest whole checkpoint | never: refuse a run folder that holds one | a path
    )
    skip_bad_files: bool = False


@dataclass(frozen=True)
class EvaluateConfig:
    """How a net is judged, always on the target's validation split and never to choose a model unless said so."""

    selection: str = "last"  # last | source_val | target_val (uses target labels; the report says so)
    tta: str = "none"  # none | flip
    images: int | None = None
    overlays: int = 6  # images whose predictions are kept for the report


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "run"  # the run lives in runs_dir/name
    runs_dir: str = "runs"
    seed: int = 0
    stages: tuple[str, ...] = ("warmup", "prototypes", "pseudo_labels", "adapt", "pseudo_labels_2", "distill")
    source: DataConfig = field(default_factory=DataConfig)
    target: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    source_only: SourceConfig = field(default_factory=SourceConfig)
    control: SourceConfig = field(default_factory=SourceConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    prototypes: PrototypesConfig = field(default_factory=PrototypesConfig)
    pseudo_label: PseudoLabelConfig = field(default_factory=PseudoLabelConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    oracle: SourceConfig = field(default_factory=SourceConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
