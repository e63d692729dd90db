"""The five tables: backends, losses, nets, data sets, stages. A new one is a file of its own and one line here.

Names and where they are defined ("module:object"); nothing of the house is imported. Choices and help texts, the order of the stages,
keys of summary.json, plots, the memory plan, `doctor`, tests and benchmarks iterate over these tables.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar


class Backend(NamedTuple):
    name: str
    home: str  # a module (or "module:object") with the members of backends/contract.py
    devices: tuple[str, ...]  # device types on which it is taken where nobody asked for a backend by name


class Loss(NamedTuple):
    name: str  # adapt.loss
    home: str  # a function (num_classes, dim, settings) -> Objective
    summary: str


class Net(NamedTuple):
    name: str  # model.name; words in capitals stand for what the user names: timm/NAME
    home: str  # a function (num_classes, NetSettings) -> SegmentationModel
    summary: str
    library: str = ""  # who has the net and its weights: an import name, and an extra of the package


class DataSet(NamedTuple):
    name: str  # source.dataset, target.dataset
    home: str  # a reader (root, split, num_classes) -> Layout; or a Domain of generated scenes
    summary: str
    needs_root: bool = True
    num_classes: tuple[int, ...] = ()  # how many classes it can have; (): its files or its generator say so
    joins: bool = False  # "folders+NAME" adds its images to those of a source data set that has files


class Remedy(NamedTuple):
    text: str
    setting: str = ""  # advised only where this setting
    on: bool = True  # is on, or off (0, null, false)


class Stage(NamedTuple):
    name: str  # in settings, run folders and logs
    home: str  # a TrainedStage or an UntrainedStage of method/stage.py
    section: str  # its settings
    command: str  # spcl-fast COMMAND; stages of one command are its rounds: --round 1, 2, ...
    summary: str
    example: str  # behind `spcl-fast COMMAND`
    title: str = ""  # for the reader of tables and plots
    net: str | None = None  # key in summary.json of the net that it trains; None: it trains none
    role: str = ""  # of that net in a report, see ROLES
    after: tuple[str, ...] = ()  # stages whose results it starts from, see `inputs`
    reads: tuple[str, ...] = ("source", "target")  # domains whose data it needs
    few_labels: bool = True  # whether it learns from the images of target.labelled, too
    needs: str = ""  # a setting without which it has nothing to do
    # class of its section ("module:class", importable without torch), unless config/schema.py has it
    settings: str = ""
    absent: str = ""  # what a report lacks where this stage was not run
    remedies: tuple[Remedy, ...] = ()  # what helps where its net predicts one class for nearly every pixel


ROLES = {
    "baseline": "what adaptation is measured against",
    "matched": "a baseline trained on for as long as adaptation takes",
    "start": "where adaptation may start from; a baseline where there is no other",
    "result": "an adapted net; a run's final net is the last of these",
    "bound": "what labels of the target would give",
}

BACKENDS = (  # the first usable one is taken, unless another was measured to be faster
    Backend("cpu", "spcl_fast.backends.cpu", ("cpu",)),
    Backend("triton", "spcl_fast.backends.triton", ("cuda",)),
    Backend("cuda", "spcl_fast.backends.cuda", ("cuda",)),
    Backend("reference", "spcl_fast.backends.reference", ("cpu", "cuda")),
)

LOSSES = (
    Loss("spcl", "spcl_fast.losses.spcl:objective", "prototype-contrastive loss and moving prototypes, arXiv 2111.12358"),
    Loss("protoseg", "spcl_fast.losses.protoseg:objective", "several prototypes per class, assigned by Sinkhorn, arXiv 2203.15102"),
    Loss("gmmseg", "spcl_fast.losses.gmmseg:objective", "a mixture of Gaussians per class, fitted to the source, arXiv 2210.02025"),
    Loss("contrastiveseg", "spcl_fast.losses.contrastiveseg:objective", "InfoNCE against a memory of source pixels, arXiv 2101.11939"),
    Loss("sepico_proto", "spcl_fast.losses.sepico:proto_objective", "SePiCo's ProtoCL: cumulative class means, arXiv 2204.08808"),
    Loss("sepico_dist", "spcl_fast.losses.sepico:dist_objective", "SePiCo's DistCL: class means and variances"),
    Loss("sepico_bank", "spcl_fast.losses.sepico:bank_objective", "SePiCo's BankCL: the last batch means of each class"),
    Loss("sdca", "spcl_fast.losses.sdca:sdca_objective", "statistics of the raw features, made unit length, arXiv 2105.05013"),
    Loss("proca", "spcl_fast.losses.sdca:proca_objective", "cumulative class means of the raw features, arXiv 2207.06654"),
)  # fmt: skip

NETS = (
    Net("deeplab_v2_resnet101", "spcl_fast.models.deeplab:resnet101", "DeepLab-v2 on ResNet-101, stride 8, 2048 channels"),
    Net("deeplab_v2_resnet50", "spcl_fast.models.deeplab:resnet50", "DeepLab-v2 on ResNet-50, stride 8, 2048 channels"),
    Net("deeplab_v2_resnet18", "spcl_fast.models.deeplab:resnet18", "DeepLab-v2 on ResNet-18, stride 8, 512 channels"),
    Net("deeplab_v2_vgg16", "spcl_fast.models.deeplab:vgg16", "DeepLab-v2 on VGG-16, stride 8, 1024 channels"),
    Net("lite0", "spcl_fast.models.lite:lite0", "EfficientNet-Lite0 with a stride-8 skip"),
    Net("lite1", "spcl_fast.models.lite:lite1", "EfficientNet-Lite1 with a stride-8 skip"),
    Net("lite2", "spcl_fast.models.lite:lite2", "EfficientNet-Lite2 with a stride-8 skip"),
    Net("timm/NAME", "spcl_fast.models.timm:timm_net", "any net of timm that gives maps, such as timm/convnext_tiny", "timm"),
    Net("transformers/NAME", "spcl_fast.models.transformers:transformers_net", "a backbone of transformers, or a folder", "transformers"),
    Net("MODULE:NAME", "spcl_fast.models.by_path:net_by_path", "any nn.Module of yours, such as my_package.my_module:MyNet"),
    Net("tiny", "spcl_fast.models.tiny:tiny", "a small net for the demo and for tests"),
)  # fmt: skip

DATA_SETS = (
    DataSet("generated_source", "spcl_fast.data.generated:SOURCE", "generated scenes, labelled domain", needs_root=False),
    DataSet("generated_target", "spcl_fast.data.generated:TARGET", "generated scenes, other domain", needs_root=False),
    DataSet("generated_driver", "spcl_fast.data.generated:DRIVER", "generated driver's view", needs_root=False, joins=True),
    DataSet("gta5", "spcl_fast.data.layouts:gta5", "GTA5", num_classes=(19, 16)),
    DataSet("synthia", "spcl_fast.data.layouts:synthia", "SYNTHIA-RAND-CITYSCAPES", num_classes=(16,)),
    DataSet("synscapes", "spcl_fast.data.layouts:synscapes", "Synscapes", num_classes=(19, 16)),
    DataSet("cityscapes", "spcl_fast.data.layouts:cityscapes", "Cityscapes", num_classes=(19, 16)),
    DataSet("folders", "spcl_fast.data.layouts:folders", "images/ and labels/ in folders of your own, and a classes.json"),
)  # fmt: skip

FOLDERS_EXAMPLE = "--preset folders --source.root path/to/rendered --target.root path/to/real"

STAGES = (  # in the order in which they run
    Stage(
        "source_only", "spcl_fast.method.supervised:SOURCE_ONLY", "source_only", "source-only",
        "baseline: train on source labels alone", FOLDERS_EXAMPLE,
        title="source-only", net="source_only", role="baseline", few_labels=False,
        absent="not trained, so nothing says what adaptation is worth",
    ),
    Stage(
        "control", "spcl_fast.method.supervised:CONTROL", "control", "control",
        "matched control: source-only, trained on for as long as adaptation takes", FOLDERS_EXAMPLE,
        title="control", net="control", role="matched", after=("source_only",),
        absent="not trained, so a gain may come from more training alone",
    ),
    Stage(
        "warmup", "spcl_fast.method.warmup:STAGE", "warmup", "warmup",
        "adversarial warm-up on both domains", "--preset demo --name mine",
        title="warm-up", net="warmup", role="start", after=(".init",),
        remedies=(Remedy("lower warmup.adversarial_weight", "warmup.adversarial_weight"), Remedy("lower warmup.lr")),
    ),
    Stage(
        "few_labels", "spcl_fast.method.supervised:FEW_LABELS", "few_labels", "few-labels",
        "train on source and on the images of target.labelled, for adaptation to start from", f"{FOLDERS_EXAMPLE} --target.labelled 10",
        title="source and labels", net="few_labels", role="start", after=("warmup|source_only",), needs="target.labelled",
        remedies=(Remedy("lower few_labels.lr"),),
    ),
    Stage(
        "online", "spcl_fast.method.online:STAGE", "online", "online",
        "self-training with a teacher that follows the net (DAFormer, MIC)", "--run-folder runs/mine",
        title="online self-training", net="online", role="result", after=("few_labels|warmup|source_only",),
        remedies=(
            Remedy("lower online.lr"), Remedy("raise online.confidence"), Remedy("raise online.ema"),
        ),
    ),
    Stage(
        "prototypes", "spcl_fast.method.prototypes:STAGE", "prototypes", "prototypes",
        "one prototype per class from the labelled source images", "--run-folder runs/mine",
        title="prototypes", after=("few_labels|warmup|source_only",), reads=("source",),
    ),
    Stage(
        "pseudo_labels", "spcl_fast.method.pseudo_labels:FIRST", "pseudo_label", "pseudo-label",
        "labels for the target's training images", "--run-folder runs/mine",
        title="pseudo-labels for adaptation", after=("few_labels|warmup|source_only",),
    ),
    Stage(
        "adapt", "spcl_fast.method.adapt:STAGE", "adapt", "adapt",
        "segmentation and prototype-contrastive loss on both domains", "--run-folder runs/mine --adapt.contrast_temperature 0.1",
        title="adapted", net="adapted", role="result", after=("few_labels|warmup|source_only", "prototypes", "pseudo_labels"),
        absent="there is no adapted net yet",
        remedies=(
            Remedy("lower adapt.contrast_weight", "adapt.contrast_weight"), Remedy("lower adapt.lr"),
            Remedy("look at the pseudo-labels that it started from"),
        ),
    ),
    Stage(
        "pseudo_labels_2", "spcl_fast.method.pseudo_labels:SECOND", "pseudo_label", "pseudo-label",
        "from the adapted net, for distill", "--run-folder runs/mine --round 2",
        title="pseudo-labels for distillation", after=("adapt",),
    ),
    Stage(
        "distill", "spcl_fast.method.distill:STAGE", "distill", "distill",
        "self-training of the adapted net on its own pseudo-labels", "--run-folder runs/mine",
        title="distilled", net="distilled", role="result", after=("adapt", "pseudo_labels_2"),
        remedies=(
            Remedy("set distill.source_weight above 0", "distill.source_weight", on=False),
            Remedy("train for fewer distill.iterations"), Remedy("lower distill.lr"),
        ),
    ),
    Stage(
        "oracle", "spcl_fast.method.supervised:ORACLE", "oracle", "oracle",
        "upper bound: train on the target's labels", FOLDERS_EXAMPLE,
        title="oracle", net="oracle", role="bound", few_labels=False,
        absent="not trained, so the share of the gap that is closed is not known",
    ),
)  # fmt: skip

HEAD = Stage(  # a command of its own, in no run of the stages
    "head", "spcl_fast.method.head:train_head", "head", "head",
    "a linear or cosine head on the features of a frozen net, which are computed once", 
    "--preset folders --target.root path/to/labelled --model.weights path/to/encoder.npz --name first_head",
    title="head on frozen features", net="head", role="result", reads=("target",),
)  # fmt: skip

Row = TypeVar("Row", Backend, Loss, Net, DataSet, Stage)


def names(table: tuple[Row, ...]) -> tuple[str, ...]:
    return tuple(row.name for row in table)


def find(table: tuple[Row, ...], name: str) -> Row:
    """The row called `name`; KeyError where there is none."""
    for row in table:
        if row.name == name:
            return row
    raise KeyError(name)


def load(home: str) -> Any:
    """The object at "module:object", or the module where no object is named."""
    module, _, name = home.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


# ---- nets ------------------------------------------------------------------------------------------------------------


def offers(choices: Iterable[str], name: str) -> bool:
    """Whether `name` is one of the choices; words in capitals in a choice stand for anything (timm/NAME)."""
    return any(name == choice or (is_open(choice) and _pattern(choice).fullmatch(name)) for choice in choices)


def is_open(choice: str) -> bool:
    return re.search(r"[A-Z]", choice) is not None


def _pattern(choice: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"[A-Z]+", r"(.+)", choice))


def net(name: str) -> Net:
    """The row that builds model.name `name`; KeyError where there is none."""
    for row in NETS:
        if not is_open(row.name) and row.name == name:
            return row
    for row in NETS:
        if is_open(row.name) and _pattern(row.name).fullmatch(name):
            return row
    raise KeyError(name)


# ---- data sets -------------------------------------------------------------------------------------------------------


def data_set_choices() -> tuple[str, ...]:
    """What source.dataset may be: every data set, and those with files merged with generated scenes."""
    return names(DATA_SETS) + tuple(
        f"{row.name}+{other.name}" for row in DATA_SETS if row.needs_root for other in DATA_SETS if other.joins
    )


# ---- stages ----------------------------------------------------------------------------------------------------------


def trained() -> tuple[Stage, ...]:
    """The stages that train a net."""
    return tuple(stage for stage in STAGES if stage.net is not None)


def with_nets() -> tuple[Stage, ...]:
    """What leaves a net in a run folder: the stages that train one, and a head, alone in a folder of its own."""
    return (*trained(), HEAD)


def with_role(*roles: str) -> tuple[Stage, ...]:
    return tuple(stage for stage in STAGES if stage.role in roles)


def depends_on_labelled(stage: Stage, fold: str | None) -> bool:
    """Whether what it learns depends on target.labelled: on the few labels, or on all labels but those that target.fold leaves out."""
    return stage.few_labels or (fold is not None and stage.role == "bound")


def title(name: str) -> str:
    """What a reader calls a stage; the name itself where the catalog has none, as in a run of another version."""
    return next((stage.title for stage in (*STAGES, HEAD) if stage.name == name), name)


def remedy(name: str, setting: Callable[[str], Any]) -> str:
    """What to do where the net of a stage predicts one class for nearly every pixel, given the values of the settings (None: unknown)."""
    row = next((stage for stage in STAGES if stage.name == name), None)
    offered = [
        one.text
        for one in (row.remedies if row is not None else ())
        if not one.setting or (value := setting(one.setting)) is None or bool(value) == one.on
    ]
    text = ", or ".join(offered) or "lower the learning rate"
    return text[0].upper() + text[1:]


def rounds(command: str) -> tuple[Stage, ...]:
    """The stages of a command; more than one are its rounds."""
    return tuple(stage for stage in STAGES if stage.command == command)


def inputs(stage: Stage, has: Callable[[str], bool], setting: Callable[[str], Any]) -> tuple[str, ...]:
    """The stages that `stage` starts from, in a run that `has` some stages and whose settings are `setting(dotted name)`.

    Of an entry "a|b" of `after` the first one that the run has, else the last; ".key" is the stage that this setting of its section names,
    if it names one.
    """
    found = []
    for entry in stage.after:
        if entry.startswith("."):
            named = setting(stage.section + entry)
            found += [named] if named in names(STAGES) else []
        else:
            *first, last = entry.split("|")
            found.append(next((name for name in first if has(name)), last))
    return tuple(found)
