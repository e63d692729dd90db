"""The table of commands: what `-h` says, which settings and arguments each takes, and what it does (actions.py)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from .. import catalog
from . import actions

_RECIPE = ("source", "target", "model", "loop")  # sections of settings that nearly every command shows in its help


@dataclasses.dataclass(frozen=True)
class Command:
    """One row of the table: what `-h` says and what is called."""

    summary: str
    example: str
    act: Callable[[argparse.Namespace], int | None]
    sections: tuple[str, ...] | None = None  # the settings its help lists; None: it takes no settings at all
    arguments: Callable[[argparse.ArgumentParser], None] | None = None


def _weights_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        metavar="RUN_OR_WEIGHTS",
        type=Path,
        help="a run folder, one of its checkpoints, a weights file, or an exported net",
    )
    parser.add_argument("--stage", metavar="NAME", help="which net of the run (default: the last one trained)")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _weights_arguments(parser)
    parser.add_argument("--output", metavar="FILE.json", type=Path, help="write the figures there, too")


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    _weights_arguments(parser)
    parser.add_argument(
        "images", metavar="IMAGES", type=Path, help="a folder of PNG or JPEG images of any size, or one image"
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write masks/ and overlays/ to")
    parser.add_argument(
        "--size", metavar="WxH", help="size at which the net sees an image, or native (default: target.eval_size)"
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _weights_arguments(parser)
    parser.add_argument(
        "output",
        metavar="FILE",
        type=Path,
        help="FILE.onnx (needs the extra: pip install 'spcl_fast[onnx]') or FILE.pt2",
    )
    parser.add_argument(
        "--images",
        metavar="N",
        type=_at_least(1),
        default=4,
        help="compare with the net on N validation images (default: 4)",
    )


def _pick_arguments(parser: argparse.ArgumentParser) -> None:
    _weights_arguments(parser)
    parser.add_argument("--count", metavar="N", type=_at_least(1), required=True, help="how many")
    parser.add_argument(
        "--output", metavar="FILE.txt", type=Path, default=Path("picked.txt"), help="the names (default: picked.txt)"
    )


def _folds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folds",
        metavar="N",
        type=_at_least(2),
        default=4,
        help="parts that are left out in turn, a run each (default: 4)",
    )
    _begin(parser)


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of {least} or more")
        return int(text)

    return read


def _side(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--side", choices=("source", "target"), help="only this domain")
    parser.add_argument(
        "--samples", metavar="N", type=_at_least(1), help="look at N images of each split only, spread evenly"
    )
    parser.add_argument(
        "--page",
        metavar="FILE.html",
        type=Path,
        help="write a page of pictures: labels over images, classes of both domains",
    )
    parser.add_argument(
        "--labels",
        action="store_true",
        help="look at labels of the target's training images too (only an oracle needs them)",
    )


def _begin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--redo",
        metavar="STAGE",
        action="append",
        help="do a finished stage again if its settings changed, and all that started from it; may repeat",
    )
    parser.add_argument(
        "--fork",
        metavar="RUN",
        type=Path,
        help="take over from that run's folder the finished stages that these settings would make alike",
    )


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run folder, such as runs/demo")
    parser.add_argument(
        "--compare",
        metavar="RUN",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        help="runs of the same data: the page gets the curve of mIoU against the number of labelled target images "
        "(target.labelled); RUN itself may be among them, and what cannot be compared is named with the reason",
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", nargs="?", help="a stage, such as adapt (default: all of the run)")
    parser.add_argument("--fit", metavar="SIZE", help="find the fastest settings that fit into this, such as 4GiB")
    parser.add_argument(
        "--gpu",
        metavar="CARD",
        help="fit into this card, such as rtx2080ti: its memory less 1 GiB, bf16 only if it has that",
    )
    parser.add_argument(
        "--no-bf16", action="store_true", help="with --fit: the card has no bfloat16 (older than Ampere)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def _tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=2, help="images (default: 2)")
    parser.add_argument("--dim", type=int, required=True, help="channels of the features")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(256, 512), metavar=("HEIGHT", "WIDTH"), help="of the features"
    )
    parser.add_argument("--classes", type=int, required=True, help="classes or prototypes")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the features"
    )
    parser.add_argument(
        "--layout", choices=("pixels", "channels"), default="pixels", help="NCHW or channels_last (default: pixels)"
    )
    parser.add_argument("--seconds", type=float, default=300, help="at most (default: 300)")


def _keyword(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("keyword", nargs="?", help="only benchmarks whose name holds this")


def _stage_commands() -> dict[str, Command]:
    """A command for each stage of the catalog; the second stage of a command is its second round."""
    commands: dict[str, Command] = {}
    for stage in catalog.STAGES:
        if stage.command not in commands:
            commands[stage.command] = Command(
                stage.summary,
                f"spcl-fast {stage.command} {stage.example}",
                actions.on_stages,
                (*_RECIPE, stage.section, "evaluate"),
                _round if len(catalog.rounds(stage.command)) > 1 else _begin,
            )
    return commands


def _round(parser: argparse.ArgumentParser) -> None:
    _begin(parser)
    rounds = catalog.rounds(parser.prog.split()[-1])
    later = "; ".join(f"{number}: {stage.summary}" for number, stage in enumerate(rounds, 1) if number > 1)
    parser.add_argument("--round", type=int, choices=range(1, len(rounds) + 1), default=1, help=f"{later} (default: 1)")


_ALL = (*_RECIPE, *dict.fromkeys(stage.section for stage in catalog.STAGES), "evaluate")
_FOLDERS = catalog.FOLDERS_EXAMPLE

COMMANDS: dict[str, Command] = {
    "doctor": Command(
        "versions, devices, backends with reasons, and a self-test; exit 1 if something is broken",
        "spcl-fast doctor",
        actions.on_doctor,
    ),
    "demo": Command(
        "the whole of SPCL on the generated pair of domains, with table and report",
        "spcl-fast demo --seed 1 --name demo_1",
        actions.on_stages,
        _ALL,
        _begin,
    ),
    "run": Command(
        "all stages of a run, skipping those that are complete",
        f"spcl-fast run {_FOLDERS} --name first",
        actions.on_stages,
        _ALL,
        _begin,
    ),
    "cross-validate": Command(
        "how good a recipe is on the labelled target images, each seen by nets that did not learn from its label",
        f"spcl-fast cross-validate {_FOLDERS} --target.labelled picked.txt --folds 4 --name first",
        actions.on_cross_validate,
        _ALL,
        _folds,
    ),
    **_stage_commands(),
    catalog.HEAD.command: Command(
        catalog.HEAD.summary,
        f"spcl-fast {catalog.HEAD.command} {catalog.HEAD.example}\n"
        "  (it starts from --set head: the body's own maps as features, model.feature_dim null, and model.classifier linear)",
        actions.on_head,
        ("target", "model", catalog.HEAD.section, "evaluate", "loop", "source"),
    ),
    "evaluate": Command(
        "IoU by class of a trained net",
        "spcl-fast evaluate runs/demo --stage adapt",
        actions.on_evaluate,
        _RECIPE + ("evaluate",),
        _evaluate_arguments,
    ),
    "predict": Command(
        "colour masks and overlays for a folder of images",
        "spcl-fast predict runs/demo path/to/images out",
        actions.on_predict,
        _RECIPE,
        _predict_arguments,
    ),
    "export": Command(
        "the net as one file, ONNX or a torch.export package, compared with the net before it is kept",
        "spcl-fast export runs/demo net.onnx",
        actions.on_export,
        _RECIPE,
        _export_arguments,
    ),
    "pick-images": Command(
        "names the training images of the target that are most worth a label",
        "spcl-fast pick-images runs/mine --count 20 --output picked.txt",
        actions.on_pick_images,
        _RECIPE,
        _pick_arguments,
    ),
    "check-data": Command(
        "missing pairs, broken files, unknown ids, class shares; a page of pictures",
        f"spcl-fast check-data {_FOLDERS} --page data.html",
        actions.on_check_data,
        ("source", "target"),
        _side,
    ),
    "plan": Command(
        "peak memory of a stage, predicted without a GPU; settings that fit",
        "spcl-fast plan adapt --preset gta5_cityscapes --adapt.batch_size 1 --fit 4GiB",
        actions.on_plan,
        _RECIPE,
        _plan_arguments,
    ),
    "report": Command(
        "write report.html of a run again; with others, a curve over the number of labelled target images",
        "spcl-fast report runs/demo\n  spcl-fast report runs/labels_0 --compare runs/labels_5 runs/labels_10",
        actions.on_report,
        None,
        _report_arguments,
    ),
    "bench": Command("the benchmarks of a checkout", "spcl-fast bench contrast", actions.on_bench, None, _keyword),
    "tune": Command(
        "launch settings of the Triton kernels, measured for your sizes",
        "spcl-fast tune --dim 256 --classes 19",
        actions.on_tune,
        None,
        _tune_arguments,
    ),
}
