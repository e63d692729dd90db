"""What the commands do, and the table of them. Every import of torch, of a reader or of a stage is inside the function that needs it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import load as settings
from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from ..config import Config, DataConfig

_RECIPE = ("source", "target", "model", "loop")  # sections of settings that nearly every command shows in its help


@dataclasses.dataclass(frozen=True)
class Command:
    """One row of the table: what `-h` says and what is called."""

    summary: str
    example: str
    act: Callable[[argparse.Namespace], int | None]
    sections: tuple[str, ...] | None = None  # the settings its help lists; None: it takes no settings at all
    arguments: Callable[[argparse.ArgumentParser], None] | None = None
    stages: tuple[str, ...] = ()


def _resolve(args: argparse.Namespace, *, preset: str | None = None) -> Config | None:
    """The checked Config of a command, or None after --print-config printed it."""
    config = settings.load_config(args.preset or preset, args.config, args.set, args.given)
    if args.print_config:
        print(settings.dump_config(config), end="")
        return None
    return config


def _run_stages(args: argparse.Namespace) -> int:
    """`run`, `demo`, and every command that is one stage."""
    config = _resolve(args, preset="demo" if args.command == "demo" else None)
    if config is None:
        return 0
    from ..config.rules import check_config

    whole = args.command in ("run", "demo")
    stages = config.stages if whole else COMMANDS[args.command].stages
    if getattr(args, "round", 1) == 2:
        stages = ("pseudo_labels_2",)
    check_config(config, stages)
    from ..method.stages import run_stages

    run_stages(config, stages)
    if whole and os.environ.get("RANK", "0") == "0":
        _show(Path(config.runs_dir) / config.name)
    return 0


def _show(run: Path) -> None:
    """The end of a whole run: table, summary, report."""
    from ..report import write_report
    from ..report.tables import iou_table

    report = write_report(run)
    print(iou_table(json.loads((run / "summary.json").read_text(encoding="utf-8"))))
    print(f"summary: {run / 'summary.json'}\nreport:  {report}")


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    return examine()


def _report(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise ConfigError(f"{args.folder}: there is no such run folder. Expected one such as runs/demo.")
    from ..report import write_report

    print(f"report: {write_report(args.folder)}")


def _plan(args: argparse.Namespace) -> None:
    """Needs no data on the disk but, for `folders`, the list of classes."""
    config = _resolve(args)
    if config is None:
        return
    from ..config.rules import check_config

    check_config(config, ())
    from ..memory_plan import fitting as plan

    stages, fitted = plan.stages_of(config, args.stage), None
    check_config(
        dataclasses.replace(config, source=_rooted(config.source), target=_rooted(config.target)), tuple(stages)
    )
    if args.fit:
        fitted = plan.fit(config, stages, plan.parse_bytes(args.fit))
        config = fitted.config
    found = plan.predictions(config, stages if fitted is None else [], args.against) + (
        fitted.predictions if fitted else []
    )
    if args.json:
        print(json.dumps(plan.as_json(found, config, fitted), indent=1))
        return
    print(plan.as_table(found, config))
    if fitted is not None:
        print(f"\nfits into {args.fit}{': ' + fitted.words() if fitted.flags else ' as it is'}")


def _rooted(domain: DataConfig) -> DataConfig:
    """The domain as if its data were there: planning reads none."""
    return domain if domain.root else dataclasses.replace(domain, root=".")


def _bench(args: argparse.Namespace) -> int:
    """Benchmarks live beside the package, not in it: they compare with code that users need not have."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not folder.is_dir():
        raise ConfigError(
            "the benchmarks are part of a checkout, not of the installed package. Clone the repository, then `make bench`."
        )
    import subprocess

    import pytest  # noqa: F401  if it is missing, say so as for any other library

    words = ["--benchmark-only", *(["-k", args.keyword] if args.keyword else [])]
    return subprocess.run(
        [sys.executable, "-m", "pytest", str(folder), *words], check=False, cwd=folder.parent
    ).returncode


def _tune(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("tune measures on an NVIDIA GPU, and torch sees none here. The shipped settings are used.")
    from ..kernels.tune import main

    words = [f"--{name}={getattr(args, name)}" for name in ("batch", "dim", "classes", "dtype", "layout", "seconds")]
    return main([*words, "--size", *map(str, args.size)])


def _of_trained_net(args: argparse.Namespace) -> Config | None:
    """Settings for `evaluate` and `predict`: those of the run that the weights lie in, unless others are named."""
    from ..method.trained import run_of

    run = run_of(args.weights)
    if run is not None and not args.preset and not args.config:
        args.config.append(run / "config.yaml")
    elif not args.preset and not args.config and not args.print_config:
        if not args.weights.exists():
            raise ConfigError(f"{args.weights}: there is no such run folder, checkpoint folder or weights file.")
        raise ConfigError(
            f"{args.weights} lies in no run folder, so the net is unknown: give --preset NAME or --config FILE.yaml."
        )
    return _resolve(args)


def _evaluate(args: argparse.Namespace) -> None:
    config = _of_trained_net(args)
    if config is None:
        return
    from ..method.trained import evaluate_trained

    result = evaluate_trained(args.weights, config, args.stage)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"figures: {args.output}")


def _predict(args: argparse.Namespace) -> None:
    config = _of_trained_net(args)
    if config is None:
        return
    from ..method.trained import load_trained, parse_size, predict_folder

    size = parse_size(args.size) if args.size else config.target.eval_size
    trained = load_trained(args.weights, config, args.stage)
    count = predict_folder(
        trained, args.images, args.output, size=size, tta=config.evaluate.tta, skip_bad_files=config.loop.skip_bad_files
    )
    print(f"{count} images: masks and overlays are in {args.output} (weights: {trained.weights})")


def _check_data(args: argparse.Namespace) -> int:
    """Both splits of both domains, or of the one named; exit 3 if anything is wrong."""
    config = _resolve(args)
    if config is None:
        return 0
    sides = [args.side] if args.side else ["source", "target"]
    from ..config.rules import check_config

    check_config(config, tuple({"source": "prototypes", "target": "pseudo_labels"}[side] for side in sides))
    from ..data import check_data, dataset_of

    whole = True
    for side in sides:
        domain: DataConfig = getattr(config, side)
        for split, labels in ((domain.train_split, side == "source" or args.labels), (domain.val_split, True)):
            dataset = dataset_of(
                domain, split, labels=labels, skip_bad_files=True
            )  # missing pairs belong into the report
            report = check_data(dataset, args.samples)
            print(f"--- {side}: {report.text()}\n")
            whole &= report.ok
    return 0 if whole else DataError.exit_code


# ---------------------------------------------------------------------------------------------- the table


def _weights_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights", metavar="RUN_OR_WEIGHTS", type=Path, help="a run folder, one of its checkpoints, or a weights file"
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


def _stage(
    summary: str, name: str, example: str, *, section: str | None = None, arguments: Callable | None = None
) -> Command:
    sections = (*_RECIPE, section or name, "evaluate")
    return Command(summary, f"spcl-fast {example}", _run_stages, sections, arguments, stages=(name,))


def _round(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--round",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: from the adapted net, for distill (default: 1, for adapt)",
    )


def _side(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--side", choices=("source", "target"), help="only this domain")
    parser.add_argument("--samples", metavar="N", type=int, help="look at N images of each split only, spread evenly")
    parser.add_argument(
        "--labels",
        action="store_true",
        help="look at labels of the target's training images too (only an oracle needs them)",
    )


def _run_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run folder, such as runs/demo")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", nargs="?", help="a stage, such as adapt (default: all of the run)")
    parser.add_argument("--fit", metavar="SIZE", help="find the fastest settings that fit into this, such as 4GiB")
    parser.add_argument("--against", metavar="NAME", help="also show another loop of adapt: released")
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


_SECTIONS = ("source_only", "control", "warmup", "prototypes", "pseudo_label", "adapt", "distill", "oracle")
_ALL = (*_RECIPE, *_SECTIONS, "evaluate")
_FOLDERS = "--preset folders --source.root path/to/rendered --target.root path/to/real"

COMMANDS: dict[str, Command] = {
    "doctor": Command(
        "versions, devices, backends with reasons, and a self-test; exit 1 if something is broken",
        "spcl-fast doctor",
        _doctor,
    ),
    "demo": Command(
        "the whole of SPCL on the generated pair of domains, with table and report",
        "spcl-fast demo --seed 1 --name demo_1",
        _run_stages,
        _ALL,
    ),
    "run": Command(
        "all stages of a run, skipping those that are complete",
        f"spcl-fast run {_FOLDERS} --name first",
        _run_stages,
        _ALL,
    ),
    "source-only": _stage("baseline: train on source labels alone", "source_only", f"source-only {_FOLDERS}"),
    "control": _stage(
        "matched control: source-only, trained on for as long as adaptation takes", "control", f"control {_FOLDERS}"
    ),
    "warmup": _stage("adversarial warm-up on both domains", "warmup", "warmup --preset demo --name mine"),
    "prototypes": _stage(
        "one prototype a class from the labelled source images", "prototypes", "prototypes --run-folder runs/mine"
    ),
    "pseudo-label": _stage(
        "labels for the target's training images",
        "pseudo_labels",
        "pseudo-label --run-folder runs/mine",
        section="pseudo_label",
        arguments=_round,
    ),
    "adapt": _stage(
        "segmentation and prototype-contrastive loss on both domains",
        "adapt",
        "adapt --run-folder runs/mine --adapt.contrast_temperature 0.1",
    ),
    "distill": _stage(
        "self-training of the adapted net on its own pseudo-labels", "distill", "distill --run-folder runs/mine"
    ),
    "oracle": _stage("upper bound: train on the target's labels", "oracle", f"oracle {_FOLDERS}"),
    "evaluate": Command(
        "IoU by class of a trained net",
        "spcl-fast evaluate runs/demo --stage adapt",
        _evaluate,
        _RECIPE + ("evaluate",),
        _evaluate_arguments,
    ),
    "predict": Command(
        "colour masks and overlays for a folder of images",
        "spcl-fast predict runs/demo path/to/images out",
        _predict,
        _RECIPE,
        _predict_arguments,
    ),
    "check-data": Command(
        "missing pairs, broken files, unknown ids, class shares",
        f"spcl-fast check-data {_FOLDERS}",
        _check_data,
        ("source", "target"),
        _side,
    ),
    "plan": Command(
        "peak memory of a stage, predicted without a GPU; settings that fit",
        "spcl-fast plan adapt --preset gta5_cityscapes --adapt.batch_size 1 --fit 4GiB",
        _plan,
        _RECIPE,
        _plan_arguments,
    ),
    "report": Command("write report.html of a run again", "spcl-fast report runs/demo", _report, None, _run_folder),
    "bench": Command("the benchmarks of a checkout", "spcl-fast bench contrast", _bench, None, _keyword),
    "tune": Command(
        "launch settings of the Triton kernels, measured for your sizes",
        "spcl-fast tune --dim 256 --classes 19",
        _tune,
        None,
        _tune_arguments,
    ),
}
