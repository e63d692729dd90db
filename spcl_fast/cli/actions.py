"""What the commands do. Every import of torch, of a reader or of a stage is inside the function that needs it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalog
from ..config import load as settings
from ..config.rules import check_config, check_domains
from ..errors import ConfigError, DataError
from ..runs import layout
from ..runs.output import make_folder_of
from . import places

if TYPE_CHECKING:
    from ..config import Config, DataConfig


def _resolve(args: argparse.Namespace, *, preset: str | None = None) -> Config | None:
    """The Config of a command, or None after --print-config printed it; what is printed obeys the rules that a run has."""
    _check_environment()
    config = settings.load_config(args.preset or preset, args.config, args.set, args.given)
    if args.print_config:
        check_config(config, _stages(args, config), reading=False)
        print(settings.dump_config(config), end="")
        return None
    return config


def _check_environment() -> None:
    asked, known = os.environ.get("SPCL_FAST_BACKEND"), catalog.names(catalog.BACKENDS)
    if asked and asked not in known:
        hint = settings.suggestion(asked, known)
        raise ConfigError(
            f"SPCL_FAST_BACKEND={asked}: there is no such backend{hint or '; there are ' + ', '.join(known)}"
        )


def _stages(args: argparse.Namespace, config: Config) -> tuple[str, ...]:
    """The stages that a command is about to do."""
    rounds = catalog.rounds(args.command)
    if rounds:
        return (rounds[getattr(args, "round", 1) - 1].name,)
    if args.command == catalog.HEAD.command:
        return (catalog.HEAD.name,)
    return config.stages if args.command in ("run", "demo", "cross-validate") else ()


def on_stages(args: argparse.Namespace) -> int:
    """`run`, `demo`, and every command that is one stage."""
    config = _resolve(args, preset="demo" if args.command == "demo" else None)
    if config is None:
        return 0
    stages, rounds = _stages(args, config), catalog.rounds(args.command)
    check_config(config, stages)
    run = Path(config.runs_dir) / config.name
    if os.environ.get("RANK", "0") == "0":
        places.check_folder(run, "the run's folder")
    from ..memory_plan.peak import forecast
    from ..method.run import run_stages

    run_stages(config, stages, forecast=forecast, **_begins_with(args))
    if os.environ.get("RANK", "0") == "0":
        if not rounds:
            show_end(run)
        elif (run / layout.REPORT).is_file():  # of the run without this stage
            on_report(argparse.Namespace(folder=run, compare=()))
    return 0


def on_cross_validate(args: argparse.Namespace) -> int:
    """One run per fold, then the figures over all labelled images."""
    config = _resolve(args)
    if config is None:
        return 0
    check_config(config, config.stages)
    from ..memory_plan.peak import forecast
    from ..method.cross_validation import cross_validate, folds_of, write_cross_validation
    from ..report import write_report
    from ..report.folds import folds_page, folds_table

    configs = folds_of(config, args.folds)
    main = os.environ.get("RANK", "0") == "0"
    for one in configs:
        check_config(one, one.stages)
        if main:
            places.check_folder(layout.folder_of(one), "the run's folder")

    def after(run: Path) -> None:
        print(f"report: {write_report(run)}")

    record = cross_validate(config, args.folds, forecast=forecast, after=after, **_begins_with(args))
    if main:
        files = write_cross_validation(config, record, folds_page(config.name, record))
        print("\n" + folds_table(record))
        print("\n".join(f"figures: {file}" for file in files))
    return 0


def _begins_with(args: argparse.Namespace) -> dict[str, Any]:
    """`--redo STAGE` and `--fork RUN` for run_stages; stages by their own names or those of their commands."""
    given: dict[str, Any] = {}
    redo = [word.replace("-", "_") for word in getattr(args, "redo", None) or ()]
    if redo:
        known = catalog.names(catalog.STAGES)
        unknown = next((name for name in redo if name not in known), None)
        if unknown is not None:
            hint = settings.suggestion(unknown, known)
            raise ConfigError(f"--redo {unknown}: there is no such stage{hint or '; there are ' + ', '.join(known)}")
        given["redo"] = redo
    if getattr(args, "fork", None) is not None:
        given["fork_of"] = args.fork
    return given


def show_end(run: Path) -> None:
    """The end of a whole run: table, summary, report."""
    from ..report import write_report
    from ..report.tables import iou_table
    from ..runs.signs import gain_note

    report, summary = write_report(run), json.loads((run / layout.SUMMARY).read_text(encoding="utf-8"))
    print(iou_table(summary))
    print(f"{gain_note(summary)}summary: {run / layout.SUMMARY}\nreport:  {report}")


def on_doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    return examine()


def on_report(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise ConfigError(f"{args.folder}: there is no such run folder. Expected one such as runs/demo.")
    for other in args.compare:  # what is there and is no run is left out of the curve, as runs/* may have such
        if not other.exists():
            raise ConfigError(f"--compare {other}: there is no such run folder.")
    if not any((args.folder / name).is_file() for name in (layout.CONFIG, layout.SUMMARY, layout.METRICS)):
        raise ConfigError(f"{args.folder} is no run folder: it has neither {layout.CONFIG} nor {layout.METRICS}.")
    begun = (layout.SUMMARY, layout.METRICS, *catalog.names(catalog.STAGES), catalog.HEAD.name)
    if not any((args.folder / name).exists() for name in begun):
        raise ConfigError(
            f"{args.folder} has settings, but no stage of it has begun: there is nothing to report. "
            f"`spcl-fast run --run-folder {args.folder}` does its stages."
        )
    from ..report import write_report

    lines: list[str] = []
    print(f"report: {write_report(args.folder, args.compare, lines.append)}", *lines, sep="\n")


def on_plan(args: argparse.Namespace) -> None:
    """Needs no data on the disk but, for `folders`, the list of classes."""
    config = _resolve(args)
    if config is None:
        return
    check_config(config, ())
    source = catalog.find(catalog.DATA_SETS, config.source.dataset.partition("+")[0])
    if source.needs_root and not source.num_classes and not config.source.root and not config.source.classes:
        raise ConfigError(
            f"source.root is not set, and plan needs the classes of {config.source.dataset}: give --source.root path/to/folder, "
            "or --source.classes FILE.json"
        )
    from ..memory_plan import cards, fitting, table

    stages, fitted = fitting.stages_of(config, args.stage), None
    check_config(
        dataclasses.replace(config, source=_rooted(config.source), target=_rooted(config.target)), tuple(stages)
    )
    card = cards.card(args.gpu) if args.gpu else None
    if args.fit or card:
        limit = fitting.parse_bytes(args.fit) if args.fit or card is None else card.usable_bytes
        bf16 = not args.no_bf16 and (card is None or card.bf16)
        fitted = fitting.settings_within(config, stages, limit, bf16=bf16, say=_progress)
        config = fitted.config
    found = fitting.peaks(config, stages, _progress) if fitted is None else fitted.peaks
    if args.json:
        print(json.dumps(table.as_json(found, config, fitted), indent=1))
        return
    print(table.as_table(found, config))
    if fitted is not None:
        into = args.fit or f"{card.name if card else ''} ({limit / 2**30:g} GiB and 1 GiB to spare)"
        print(f"\nfits into {into}{': ' + fitted.words() if fitted.flags else ' as it is'}")
        if fitted.flags.get("loop.precision") == "bf16" and card is None:
            print("bf16 needs a card of compute capability 8.0 (Ampere) or newer; for an older one add --no-bf16")


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _rooted(domain: DataConfig) -> DataConfig:
    """The domain as if its data were there: planning reads none."""
    return domain if domain.root else dataclasses.replace(domain, root=".")


def on_bench(args: argparse.Namespace) -> int:
    """Benchmarks are next to the package, not in it: they compare with code that users need not have."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not folder.is_dir():
        raise ConfigError(
            "the benchmarks are part of a checkout, not of the installed package. Clone the repository, then `make bench`."
        )
    import subprocess

    words = ["-k", args.keyword] if args.keyword else []
    return subprocess.run([sys.executable, "-m", "benchmarks.cpu", *words], check=False, cwd=folder.parent).returncode


def on_tune(args: argparse.Namespace) -> None:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("tune measures on an NVIDIA GPU, and torch sees none here. The shipped settings are used.")
    from ..kernels import tune  # pyright: ignore[reportMissingImports]  # kernels/ lies next to the package

    tune.run((args.batch, args.dim, *args.size), args.classes, args.dtype, args.layout, args.seconds)


def _of_trained_net(args: argparse.Namespace) -> Config | None:
    """Settings for `evaluate` and `predict`: those of the run that the weights lie in, unless others are named."""
    run = layout.run_of(args.weights)
    if not args.weights.exists() and not args.print_config:
        raise ConfigError(f"{args.weights}: there is no such run folder, checkpoint folder or weights file.")
    if run is not None and not args.preset and not args.config:
        args.config.append(run / layout.CONFIG)
    elif not args.preset and not args.config and not args.print_config and not layout.is_exported(args.weights):
        raise ConfigError(
            f"{args.weights} lies in no run folder, so the net is unknown: give --preset NAME or --config FILE.yaml."
        )
    return _resolve(args)


def on_head(args: argparse.Namespace) -> int:
    """The features are the body's own maps, unless settings say otherwise: the set `head` stands below them."""
    args.set = [catalog.HEAD.name, *args.set]
    config = _resolve(args)
    if config is None:
        return 0
    check_config(config, (catalog.HEAD.name,))
    run = Path(config.runs_dir) / config.name
    if os.environ.get("RANK", "0") == "0":
        places.check_folder(run, "the run's folder")
    catalog.load(catalog.HEAD.home)(config)
    if os.environ.get("RANK", "0") == "0":
        show_end(run)
    return 0


def on_evaluate(args: argparse.Namespace) -> None:
    config = _of_trained_net(args)
    if config is None:
        return
    check_domains(config, {"target": args.command})
    if args.output:
        places.check_file(args.output, "--output")
    from ..method.trained import evaluate_trained

    result = evaluate_trained(args.weights, config, args.stage)
    if args.output:
        make_folder_of(args.output)
        args.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"figures: {args.output}")


def on_predict(args: argparse.Namespace) -> None:
    config = _of_trained_net(args)
    if config is None:
        return
    check_domains(config, {})
    if not args.images.exists():
        raise DataError(f"{args.images}: there is no such folder or image. Expected a folder of PNG or JPEG images.")
    places.check_folder(args.output, "predict: the output folder")
    places.check_apart(args.images, args.output)
    from ..data.left_out import counted
    from ..method.trained import load_trained, parse_size, predict_folder

    trained = load_trained(args.weights, config, args.stage)
    size = parse_size(args.size) if args.size else trained.size or config.target.eval_size
    loop = config.loop
    count = predict_folder(
        trained,
        args.images,
        args.output,
        size=size,
        evaluate=config.evaluate,
        skip_bad_files=loop.skip_bad_files,
        follow_links=loop.follow_links,
        max_pixels=loop.max_pixels,
    )
    print(f"{counted(count, 'image')}: masks and overlays are in {args.output} (weights: {trained.weights})")


def on_export(args: argparse.Namespace) -> None:
    config = _of_trained_net(args)
    if config is None:
        return
    if args.output.suffix not in layout.EXPORTED:
        raise ConfigError(f"{args.output}: expected a name that ends with {' or '.join(layout.EXPORTED)}")
    places.check_file(args.output, "export: the file to write")
    check_domains(config, {"target": args.command})
    from ..method.export import export_trained

    export_trained(args.weights, config, args.stage, args.output, images=args.images)


def on_pick_images(args: argparse.Namespace) -> None:
    config = _of_trained_net(args)
    if config is None:
        return
    check_domains(config, {"target": args.command})
    places.check_file(args.output, "--output")
    if args.output.exists():
        raise ConfigError(f"{args.output} is there already: give another --output, or remove it.")
    from ..data.left_out import counted
    from ..method.pick import pick_images

    picked = pick_images(args.weights, config, args.stage, args.count)
    make_folder_of(args.output)
    names = "".join(f"{name}\n" for name in (*picked.labelled, *picked.names))
    args.output.write_text(names, encoding="utf-8")
    print("\n".join(picked.names))
    known = f" (with the {counted(len(picked.labelled), 'image')} labelled before)" if picked.labelled else ""
    print(f"label these, the first one first, then train with --target.labelled {args.output}{known}")


def on_check_data(args: argparse.Namespace) -> int:
    """Both splits of both domains, or of the one named; exit 3 if anything is wrong."""
    config = _resolve(args)
    if config is None:
        return 0
    sides = [args.side] if args.side else ["source", "target"]
    check_domains(config, {side: args.command for side in sides})
    if args.page:
        places.check_file(args.page, "--page")
    from ..data.check import DataReport, check_domain, check_same_classes

    reports: dict[str, list[DataReport]] = {}
    for side in sides:
        training = side == "source" or args.labels
        reading = dataclasses.replace(config.loop, skip_bad_files=True)  # missing pairs belong into the report
        domain: DataConfig = getattr(config, side)
        reports[side] = []
        for report in check_domain(domain, reading, args.samples, training=training, needs=side == "source"):
            print(f"--- {side}: {report.text()}\n")
            reports[side].append(report)
    whole = all(report.ok for found in reports.values() for report in found)
    if args.page:
        from ..report.data_page import write_data_page

        make_folder_of(args.page)
        write_data_page(args.page, reports, "No problem was found." if whole else "There are problems.")
        print(f"pictures: {args.page}")
    if len(sides) == 2:
        check_same_classes(*(reports[side][0].classes for side in sides))
    return 0 if whole else DataError.exit_code
