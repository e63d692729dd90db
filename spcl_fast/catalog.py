"""The five tables: backends, losses, nets, data sets, stages. A new one is a file of its own and one line here.

Names and where they are defined ("module:object"), and nothing is imported: help texts, choices, the order of stages, summary keys, plots,
the memory plan, `doctor`, tests and benchmarks go over these tables.
"""

from __future__ import annotations

from typing import NamedTuple


class Backend(NamedTuple):
    name: str
    home: str  # a module with the members of backends/contract.py
    devices: tuple[str, ...]  # device types on which it is taken where nobody asked for a backend by name


class Loss(NamedTuple):
    name: str  # adapt.loss
    home: str  # a function (num_classes, dim, settings) -> Objective
    summary: str


class Net(NamedTuple):
    name: str  # model.name
    home: str  # a function (num_classes, settings) -> SegmentationModel
    summary: str


class DataSet(NamedTuple):
    name: str  # source.dataset, target.dataset
    home: str  # a reader: (root, split, num_classes) -> Layout; or a Domain of generated scenes
    summary: str
    needs_root: bool = True
    driving: bool = False  # its classes are the 19 of Cityscapes, or 16 of them


class Stage(NamedTuple):
    name: str  # in settings, run folders and logs
    home: str  # a TrainedStage or an UntrainedStage of method/stage.py
    section: str  # its settings
    command: str  # spcl-fast COMMAND
    summary: str
    example: str  # behind `spcl-fast COMMAND`
    net: str | None = None  # key in summary.json of the net that it trains; None: it trains none
    title: str = ""  # of that net in tables and plots
    reads: tuple[str, ...] = ("source", "target")  # domains whose data it needs


BACKENDS = (  # the first usable one is taken, unless another was measured to be faster
    Backend("cpu", "spcl_fast.backends.cpu", ("cpu",)),
    Backend("triton", "spcl_fast.backends.triton", ("cuda",)),
    Backend("cuda", "spcl_fast.backends.cuda", ("cuda",)),
    Backend("reference", "spcl_fast.backends.reference", ("cpu", "cuda")),
)

LOSSES = (
    Loss(
        "spcl", "spcl_fast.losses.spcl:objective", "prototype-contrastive loss and moving prototypes, arXiv 2111.12358"
    ),
)

NETS = (
    Net(
        "deeplab_v2_resnet101",
        "spcl_fast.models.deeplab:resnet101",
        "DeepLab-v2 on ResNet-101, stride 8, 2048 channels",
    ),
    Net("deeplab_v2_resnet50", "spcl_fast.models.deeplab:resnet50", "DeepLab-v2 on ResNet-50, stride 8, 2048 channels"),
    Net("deeplab_v2_resnet18", "spcl_fast.models.deeplab:resnet18", "DeepLab-v2 on ResNet-18, stride 8, 512 channels"),
    Net("deeplab_v2_vgg16", "spcl_fast.models.deeplab:vgg16", "DeepLab-v2 on VGG-16, stride 8, 1024 channels"),
    Net("lite0", "spcl_fast.models.lite0:lite0", "EfficientNet-Lite0 with a stride-8 skip"),
    Net("tiny", "spcl_fast.models.tiny:tiny", "a small net for the demo and for tests"),
)

_FOLDERS = "--preset folders --source.root path/to/rendered --target.root path/to/real"

DATA_SETS = (
    DataSet(
        "generated_source", "spcl_fast.data.generated:SOURCE", "generated scenes, labelled domain", needs_root=False
    ),
    DataSet("generated_target", "spcl_fast.data.generated:TARGET", "generated scenes, other domain", needs_root=False),
    DataSet("generated_driver", "spcl_fast.data.generated:DRIVER", "generated driver's view", needs_root=False),
    DataSet("gta5", "spcl_fast.data.layouts:gta5", "GTA5", driving=True),
    DataSet("synthia", "spcl_fast.data.layouts:synthia", "SYNTHIA-RAND-CITYSCAPES", driving=True),
    DataSet("synscapes", "spcl_fast.data.layouts:synscapes", "Synscapes", driving=True),
    DataSet("cityscapes", "spcl_fast.data.layouts:cityscapes", "Cityscapes", driving=True),
    DataSet("folders", "spcl_fast.data.layouts:folders", "two folders of images and label PNGs with a classes.json"),
)

STAGES = (  # in the order in which they run
    Stage(
        "source_only", "spcl_fast.method.supervised:SOURCE_ONLY", "source_only", "source-only",
        "baseline: train on source labels alone", f"{_FOLDERS}", net="source_only", title="source-only",
    ),
    Stage(
        "control", "spcl_fast.method.supervised:CONTROL", "control", "control",
        "matched control: source-only, trained on for as long as adaptation takes", f"{_FOLDERS}", net="control", title="control",
    ),
    Stage(
        "warmup", "spcl_fast.method.warmup:STAGE", "warmup", "warmup",
        "adversarial warm-up on both domains", "--preset demo --name mine", net="warmup", title="warm-up",
    ),
    Stage(
        "prototypes", "spcl_fast.method.prototypes:STAGE", "prototypes", "prototypes",
        "one prototype per class from the labelled source images", "--run-folder runs/mine", reads=("source",),
    ),
    Stage(
        "pseudo_labels", "spcl_fast.method.pseudo_labels:FIRST", "pseudo_label", "pseudo-label",
        "labels for the target's training images", "--run-folder runs/mine",
    ),
    Stage(
        "adapt", "spcl_fast.method.adapt:STAGE", "adapt", "adapt",
        "segmentation and prototype-contrastive loss on both domains", "--run-folder runs/mine --adapt.contrast_temperature 0.1",
        net="adapted", title="adapted",
    ),
    Stage(
        "pseudo_labels_2", "spcl_fast.method.pseudo_labels:SECOND", "pseudo_label", "pseudo-label --round 2",
        "labels for distill, from the adapted net", "--run-folder runs/mine",
    ),
    Stage(
        "distill", "spcl_fast.method.distill:STAGE", "distill", "distill",
        "self-training of the adapted net on its own pseudo-labels", "--run-folder runs/mine", net="distilled", title="distilled",
    ),
    Stage(
        "oracle", "spcl_fast.method.supervised:ORACLE", "oracle", "oracle",
        "upper bound: train on the target's labels", f"{_FOLDERS}", net="oracle", title="oracle",
    ),
)  # fmt: skip


def names(table: tuple) -> tuple[str, ...]:
    return tuple(row.name for row in table)


def find(table: tuple, name: str):
    """The row called `name`; KeyError where there is none."""
    for row in table:
        if row.name == name:
            return row
    raise KeyError(name)


def load(home: str):
    """The object at "module:object", or the module where no object is named."""
    import importlib

    module, _, name = home.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found
