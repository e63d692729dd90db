"""python -m benchmarks.adaptation run PLAN.yaml [--jobs 2 --threads 1] · table · plot · day-to-dusk CAMVID FOLDER
· left-out-drives CAMVID FOLDER · nuclei CLONE FOLDER · labels-alone ROOT ... · frozen PLAN.yaml · frozen-labels PLAN.yaml

run: every setting x seed x pair of a plan that has no result line yet. Seeds go side by side, the settings of a seed one after another,
so that they share stages. Stopped at any time, the same command goes on. table, plot: from results/*.jsonl alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.adaptation.plan import RUNS, read_plan
from spcl_fast.errors import Interrupted, SpclFastError

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    args = _parser().parse_args()
    try:
        return args.act(args) or 0
    except SpclFastError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)

    def command(name: str, act: object, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(act=act)
        return sub

    for name, act in (("run", _run), ("seed", _seed)):
        sub = command(name, act, "all of a plan" if name == "run" else "one seed of one pair, in this process")
        sub.add_argument("plan", type=Path)
        sub.add_argument("--results", type=Path, default=RESULTS)
        sub.add_argument("--runs", type=Path, default=RUNS)
        if name == "run":
            sub.add_argument("--jobs", type=int, default=1, help="seeds side by side")
            sub.add_argument("--threads", type=int, default=1, help="CPU threads of each")
        else:
            sub.add_argument("--pair", required=True)
            sub.add_argument("--seed", type=int, required=True)
    for name, act, summary in (
        ("table", _table, "all result lines as Markdown"),
        ("plot", _plot, "plots with error bars, one PNG a pair"),
    ):
        sub = command(name, act, summary)
        sub.add_argument("--results", type=Path, default=RESULTS)
        sub.add_argument(
            "--output", type=Path, help="a file for the table (default: the terminal), a folder for the plots"
        )
    sub = command("day-to-dusk", _day_to_dusk, "two roots, day and dusk, from one copy of CamVid")
    sub.add_argument("camvid", type=Path)
    sub.add_argument("folder", type=Path)
    sub = command("left-out-drives", _left_out_drives, "a root for each drive of CamVid that is left out of training")
    sub.add_argument("camvid", type=Path)
    sub.add_argument("folder", type=Path)
    sub = command("nuclei", _nuclei, "nuclei by three ways of making them visible, a root each")
    sub.add_argument("clone", type=Path, help="of the repository that nuclei.py names")
    sub.add_argument("folder", type=Path)
    sub = command("labels-alone", _labels_alone, "heads on frozen features of N labelled images, for each root")
    sub.add_argument("roots", type=Path, nargs="*", help="none: the table of what is there")
    sub.add_argument("--classes", type=Path, default=Path("../shared/data/shared_classes.json"))
    sub.add_argument("--classes-key", default="camvid", help="the table of that file")
    sub.add_argument("--weights", type=Path, default=Path("../shared/weights/efficientnet_lite0_encoder_fp16.npz"))
    sub.add_argument("--seeds", type=int, default=3)
    sub.add_argument("--picked", type=Path, help="names of `spcl-fast pick-images`: their first N, not N at random")
    sub.add_argument("--runs", type=Path, default=RUNS / "labels_alone")
    for name, act, summary in (
        ("frozen", _frozen, "variants of the contrastive term on the maps of a frozen encoder"),
        ("frozen-labels", _frozen_labels, "the recipe with a few labelled images of the target, on such maps"),
    ):
        sub = command(name, act, summary)
        sub.add_argument("plan", type=Path)
        sub.add_argument("--runs", type=Path, default=RUNS / "frozen")
    return parser


def _run(args: argparse.Namespace) -> int:
    plan = read_plan(args.plan)
    waiting = list(itertools.product(plan.seeds, plan.pairs))
    running: dict[subprocess.Popen, str] = {}
    worst = 0
    previous = {number: signal.signal(number, _stopped) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                seed, pair = waiting.pop(0)
                running[_start(args, pair, seed)] = f"{pair}, seed {seed}"
            for process in [p for p in running if p.poll() is not None]:
                what = running.pop(process)
                print(
                    f"{what}: {'done' if process.returncode == 0 else f'ended with {process.returncode}, see its log'}",
                    flush=True,
                )
                worst = max(worst, abs(process.returncode))
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()  # each saves its state
        for process in running:
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return worst


def _stopped(number: int, frame: object) -> None:
    raise Interrupted(
        f"Stopped by {signal.Signals(number).name}; the running seeds save their state. Start the same command to go on."
    )


def _start(args: argparse.Namespace, pair: str, seed: int) -> subprocess.Popen:
    folder = args.runs / pair
    folder.mkdir(parents=True, exist_ok=True)
    words = [args.plan, "--pair", pair, "--seed", seed, "--results", args.results, "--runs", args.runs]
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with open(folder / f"seed_{seed}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.adaptation", "seed", *map(str, words)],
            stdout=log,
            stderr=log,
            env={**os.environ, **threads},
            start_new_session=True,  # Ctrl-C reaches us alone, and we ask each to stop once
        )


def _seed(args: argparse.Namespace) -> None:
    from benchmarks.adaptation.seed import run_seed

    run_seed(read_plan(args.plan), args.pair, args.seed, args.results, args.runs)


def _table(args: argparse.Namespace) -> None:
    from benchmarks.adaptation.table import table

    text = "\n".join(table(path) for path in sorted(args.results.glob("*.jsonl")))
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def _plot(args: argparse.Namespace) -> None:
    from benchmarks.adaptation.plots import plot

    folder = args.output or args.results
    for path in sorted(args.results.glob("*.jsonl")):
        print(plot(path, folder / f"{path.stem}.png"))


def _day_to_dusk(args: argparse.Namespace) -> None:
    from benchmarks.adaptation.day_to_dusk import make_pair

    for root, images in make_pair(args.camvid, args.folder).items():
        print(f"{root}: {images} images")


def _left_out_drives(args: argparse.Namespace) -> None:
    from benchmarks.adaptation.left_out_drives import make_folds

    for root, images in make_folds(args.camvid, args.folder).items():
        print(f"{root}: {images} images")


def _nuclei(args: argparse.Namespace) -> None:
    from benchmarks.adaptation.nuclei import make_roots

    for root, images in make_roots(args.clone, args.folder).items():
        print(f"{root}: {images} images")


def _labels_alone(args: argparse.Namespace) -> None:
    from benchmarks.adaptation.labels_alone import measure, read, table

    for root in args.roots:
        classes = {"target.classes": str(args.classes), "target.classes_key": args.classes_key}
        for said in measure(root, args.weights, range(args.seeds), args.runs, picked=args.picked, **classes):
            print(said, flush=True)
    print(table(read(picked=args.picked is not None)))


def _frozen(args: argparse.Namespace) -> None:
    from benchmarks.adaptation.frozen.measure import measure, table

    for said in measure(read_plan(args.plan), args.runs):
        print(said, flush=True)
    print(table())


def _frozen_labels(args: argparse.Namespace) -> None:
    from benchmarks.adaptation.frozen.measure import measure_labels

    for said in measure_labels(read_plan(args.plan), args.runs):
        print(said, flush=True)


if __name__ == "__main__":
    sys.exit(main())
