"""Tables and pictures of README and of pages in docs/, from the result files and the backends alone: `make figures`.

python -m benchmarks.figures                         tables between the pages' markers, and docs/pictures/ but for overlays.png
python -m benchmarks.figures --overlays runs/demo    docs/pictures/overlays.png, too: a run's images before and after adaptation
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import ROOT, speed_page
from benchmarks.adaptation import curves, drives
from benchmarks.adaptation import page as adaptation_page
from benchmarks.adaptation.lines import Spread, by_setting, miou, paired, spread, text_of
from benchmarks.family import page as family_page
from benchmarks.tables import markdown, read
from benchmarks.traffic.rungs import gpu_table
from spcl_fast import backends, catalog
from spcl_fast.backends import contract
from spcl_fast.runs import layout

README, LOSSES, PICTURES = ROOT / "README.md", ROOT / "docs" / "losses.md", ROOT / "docs" / "pictures"
LINES = ROOT / "benchmarks" / "adaptation" / "results"
USERS = "users' formula"  # a peer of cpu_options.json
OURS, GREY, DARK = "#0072B2", "#B0B0B0", "#5A5A5A"
LOOPS = {  # a row of plan.json -> its name for the reader
    "released loop, fp32": "released loop, float32",
    "fp32": "ours, float32",
    "bf16": "ours, bfloat16",
    "bf16, checkpoint auto, absorb_gradients": "ours, bfloat16, recomputed, gradients absorbed",
}
PAIRS = {  # name for the reader -> (files of result lines, setting); the runs of several files are one row
    "AirSim → CamVid": (("airsim_camvid",), "folders"),
    "AirSim → CamVid, a drive never seen": (("airsim_camvid_without_0016E5",), "folders"),
    "AirSim + generated scenes → CamVid": (("airsim_generated_camvid",), "near"),
    "AirSim + generated → CamVid, drives never seen": (tuple(drives.PLAN.pairs), "near"),
    "generated scenes → CamVid": (("generated_camvid",), "near"),
    "CamVid day → dusk": (("camvid_day_dusk",), "folders"),
}
NETS = {row.net: row for row in catalog.STAGES if row.net and row.role != "start"}  # key of summary.json -> its stage
BASELINE = next(net for net, row in NETS.items() if row.role == "baseline")
UNBOUND = tuple(net for net, row in NETS.items() if row.role != "bound")


# ---- tables ---------------------------------------------------------------------------------------------------------


def speed_table() -> str:
    result = read("cpu_ops.json")
    rows = []
    for op, (users, best) in speed_page.USERS.items():
        for shape, one in result["ops"][op].items():
            faster = one["times_faster_than"]
            rows.append(
                [
                    f"`{op}` {shape}",
                    *(f"{v:.1f}" for v in (one["times"]["spcl_fast"]["median_ms"], faster[users], faster[best])),
                ]
            )
    machine = result["machine"]
    note = (
        f"CPU, float32, forward and backward; medians on {machine['threads']} cores of an {machine['cpu']} "
        f"({machine['instructions']}), torch {machine['torch'].partition('+')[0]}, {speed_page.dates_of(result)}."
    )
    return markdown(["op and shape", "ms", "× the users' formula", "× the best compiled one"], rows) + f"\n\n{note}"


def memory_table() -> str:
    plan = read("plan.json")
    peaks = {title: {entry["name"]: entry["peak_gib"] for entry in entries} for title, entries in plan.items()}
    rows = [[words, *(f"{peaks[title][name]:.2f}" for title in peaks)] for name, words in LOOPS.items()]
    return markdown(["one adaptation step, ResNet-101, 1 + 1 images", *(f"GiB at {title}" for title in peaks)], rows)


def adaptation_table() -> str:
    """Of one pair the spread is over its seeds, of several over the pairs, each the mean of its seeds."""
    found, rows = {}, []
    for title, (files, setting) in PAIRS.items():
        found[title] = []
        for file in files:
            settings = by_setting(LINES / f"{file}.jsonl")
            found[title].append(settings.get(setting) or next(iter(settings.values()), {}))
    every = [line for pairs in found.values() for lines in pairs for line in lines.values()]
    nets = [net for net in NETS if any(net in line["nets"] for line in every)]
    for title, pairs in found.items():
        scores = [over([spread(miou(line, net) for line in lines.values()) for lines in pairs]) for net in nets]
        gain = over([paired(lines, "distilled", lines, "control") for lines in pairs])
        rows.append([title, str(sum(map(len, pairs))), *map(text_of, scores), text_of(gain, "+.1f")])
    header = ["mIoU in percent", "runs", *(NETS[net].title for net in nets), "distilled − control"]
    return markdown(header, rows)


def over(pairs: Sequence[Spread | None]) -> Spread | None:
    return pairs[0] if len(pairs) == 1 else spread(None if found is None else found.mean for found in pairs)


def demo_table() -> str:
    rows = []
    nets = [net for net in UNBOUND if read("demo_seed_0.json").get(net)]
    for title, seeds in (
        ("seeds 0, 1, 2: the recipe was chosen on them", (0, 1, 2)),
        ("seeds 3, 4, 5: never looked at", (3, 4, 5)),
    ):
        runs = [read(f"demo_seed_{seed}.json") for seed in seeds]
        scores = [Spread(tuple(run[net]["miou"] for run in runs)).text() for net in nets]
        gain = Spread(tuple(run["distilled"]["miou"] - run["control"]["miou"] for run in runs)).text("+.1f")
        rows.append([title, *scores, gain])
    return markdown(
        ["generated pair, mIoU in percent", *(NETS[net].title for net in nets), "distilled − control"], rows
    )


def options_table() -> str:
    """Each option next to what users write: times as fast, forward and backward, and where it was measured the peak."""
    result = read("cpu_options.json")
    machine = result["machine"]
    note = (
        f"CPU, float32; medians on {machine['threads']} cores of an {machine['cpu']} ({machine['instructions']}), "
        f"torch {machine['torch'].partition('+')[0]}, {machine['date']}."
    )
    header = [
        "option and shape",
        "ms",
        "× users' formula",
        "× the best compiled one",
        "peak, MB",
        "peak of the users' formula, MB",
    ]
    tables = [markdown(header, [[*_option_numbers(row), *_peaks(row)] for row in result["rows"]]) + f"\n\n{note}"]
    for level, part in sorted(result.get("instructions", {}).items()):
        rows = [_option_numbers(row) for row in part["rows"]]
        tables.append(f"The same with no more than {level}:\n\n" + markdown(header[:4], rows))
    return "\n\n".join(tables)


def _option_numbers(row: dict) -> list[str]:
    faster = row["times_faster_than"]
    compiled = f"{faster['compiled']:.1f}" if "compiled" in faster else ""
    return [
        f"{row['option']}, {row['shape']}",
        f"{row['times']['ours']['median_ms']:.1f}",
        f"{faster[USERS]:.1f}",
        compiled,
    ]


def _peaks(row: dict) -> list[str]:
    peaks = row.get("peak_bytes")
    return ["", ""] if peaks is None else [f"{peaks[which] / 1e6:.1f}" for which in ("ours", "eager")]


def teacher_table() -> str:
    """What the Triton backend allocates for targets that are computed, counted."""
    rows = [
        [
            f"K {row['classes']}, N {row['rows']}, D {row['dim']}, {row['dtype']}",
            *(f"{row[key] / 1e6:.1f}" for key in ("bytes", "stored_bytes")),
        ]
        for row in read("triton_teacher.json")["rows"]
    ]
    return markdown(["forward and backward on a GPU, counted", "MB", "MB of one stored [N, K] tensor"], rows)


def backends_table() -> str:
    """Which option of which op each compiled backend has; what it lacks, `reference` does."""
    homes = {row.name: catalog.load(row.home) for row in catalog.BACKENDS if row.name != "reference"}
    has = {name: dict(home.OPTIONS) for name, home in homes.items()}
    rows = []
    for op in backends.OPS:
        rows.append([f"**`{op}`**", *("yes" if op in options else "no" for options in has.values())])
        reached = contract.NEEDS if op not in _NOT_REACHED else [n for n in contract.NEEDS if n not in _NOT_REACHED[op]]
        used = [need for need in reached if any(need in options.get(op, ()) for options in has.values())]
        rows += [
            [
                OPTION_WORDS.get(need, f"`{need}`"),
                *("yes" if need in options.get(op, ()) else "no" for options in has.values()),
            ]
            for need in used
        ]
    return markdown(["op and option", *(f"`{name}`" for name in has)], rows)


# what a backend's loss shares with another one, and no argument of the op asks for
_NOT_REACHED = {"upsampled_binary_cross_entropy": ("probabilities", "label_smoothing")}
OPTION_WORDS = {
    "per_image_prototypes": "prototypes `[B, K, D]`",
    "tensor_temperature": "temperature as a tensor",
    "probabilities": "probabilities as labels",
    "teacher": "`TeacherTargets` as labels",
    "no_positive_variance": "`positive_variance=False`",
    "sigmoid": '`loss="sigmoid"`',
    "dbias": "gradient of the bias",
    "dtemperature": "gradient of the temperature",
    "focal": "`gamma` above 0",
    "int32_labels": "more than 255 classes",
}
TABLES = {
    README: {
        "gpu": gpu_table,
        "speed": speed_table,
        "memory": memory_table,
        "adaptation": adaptation_table,
        "demo": demo_table,
    },
    LOSSES: {"backends": backends_table, "options": options_table, "teacher": teacher_table},
    speed_page.PAGE: speed_page.TABLES,
    family_page.PAGE: family_page.TABLES,
    adaptation_page.PAGE: adaptation_page.TABLES,
}


def filled(page: Path) -> str:
    """A page with every table between `<!-- NAME -->` and `<!-- /NAME -->` made anew; KeyError where a marker is missing."""
    return refilled(page.read_text(encoding="utf-8"), TABLES[page])


def refilled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise KeyError(f"there are no markers <!-- {name} --> and <!-- /{name} -->")
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table()}\n{match[2]}", text)
    return text


# ---- pictures -------------------------------------------------------------------------------------------------------


def _axes(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(figsize=(width, height), layout="constrained")


def draw_speed(path: Path) -> None:
    """Milliseconds of each op and shape on a logarithmic axis: the users' formula, the best compiled one, ours."""
    result = read("cpu_ops.json")
    figure, axes = _axes(7.5, 5.8)
    names, position = [], 0.0
    for op, (users, best) in speed_page.USERS.items():
        for shape, one in result["ops"][op].items():
            times = [one["times"][peer]["median_ms"] for peer in (users, best, "spcl_fast")]
            for offset, (ms, colour) in enumerate(zip(times, (GREY, DARK, OURS), strict=True)):
                axes.barh(position + 0.26 * offset, ms, height=0.25, color=colour)
            axes.text(
                times[2] * 1.06,
                position + 0.52,
                f"{times[0] / times[2]:.0f}×",
                va="center_baseline",
                fontsize=8,
                color=OURS,
            )
            names.append((position + 0.26, f"{op.replace('_', ' ')}  {shape}"))
            position += 1.0
        position += 0.4
    axes.set_yticks([at for at, _ in names], [name for _, name in names])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds per call (log scale), CPU, float32")
    axes.legend(
        [axes.patches[0], axes.patches[1], axes.patches[2]],
        ["the formula users have", "the best formula, torch.compile", "spcl_fast"],
        loc="lower center",
        bbox_to_anchor=(0.4, 1.0),
        ncols=3,
        frameon=False,
    )
    figure.savefig(path, dpi=150)


def draw_memory(path: Path) -> None:
    """Peak of one adaptation step at full resolution by category, for each loop."""
    entries = {entry["name"]: entry for entry in read("plan.json")["full resolution"]}
    kinds = {"weights": "#000000", "optimizer": "#56B4E9", "gradients": "#009E73", "data": "#F0E442"}
    kinds |= {"activations": OURS, "loss": "#CC79A7", "backward": "#E69F00"}
    figure, axes = _axes(7.5, 2.9)
    for row, name in enumerate(LOOPS):
        left = 0.0
        for kind, colour in kinds.items():
            width = entries[name]["categories_mib"].get(kind, 0) / 1024
            axes.barh(row, width, left=left, color=colour, label=kind if row == 0 else None)
            left += width
        axes.text(left + 0.1, row, f"{entries[name]['peak_gib']:.1f} GiB", va="center")
    axes.set_yticks(range(len(LOOPS)), list(LOOPS.values()))
    axes.invert_yaxis()
    axes.axvline(11, color="#D55E00", linewidth=1, linestyle="--")
    axes.text(11.15, len(LOOPS) - 1.0, "an 11 GB card", color="#D55E00", fontsize=8)
    axes.set_xlabel("GiB at the peak of one adaptation step, counted")
    axes.set_xlim(0, 17.5)
    axes.legend(ncols=7, fontsize=7, loc="lower right", bbox_to_anchor=(1.0, 1.0), columnspacing=1.0, frameon=False)
    figure.savefig(path, dpi=150)


def draw_overlays(run: Path, path: Path, rows: int = 3) -> None:
    """Image, truth, source-only and final prediction of a run's first validation images, classes blended over the image."""
    import numpy as np
    from PIL import Image

    from spcl_fast.data.palette import overlay, read_label_png

    classes = json.loads((run / layout.CLASSES).read_text(encoding="utf-8"))
    palette = [tuple(colour) for colour in classes["palette"]]
    summary = json.loads((run / layout.SUMMARY).read_text(encoding="utf-8"))
    final = [net for net, row in NETS.items() if row.role == "result" and summary.get(net)][-1]
    folder, before = NETS[final].name, NETS[BASELINE].name
    samples = sorted((run / layout.SAMPLES).glob(f"**/*{layout.IMAGE_SUFFIX}"))[:rows]
    figure, axes = _axes(9, 1.2 * len(samples) + 0.35)
    figure.clear()
    grid = figure.subplots(len(samples), 4, squeeze=False)
    titles = ("target image", "true classes", f"{NETS[BASELINE].title}: {summary[BASELINE]['miou']:.0f} mIoU")
    for column, title in enumerate((*titles, f"{final}: {summary[final]['miou']:.0f} mIoU")):
        grid[0][column].set_title(title, fontsize=9)
    for cells, sample in zip(grid, samples, strict=True):
        name = sample.relative_to(run / layout.SAMPLES).as_posix().removesuffix(layout.IMAGE_SUFFIX)
        image = np.asarray(Image.open(sample).convert("RGB"))
        files = [
            sample.with_name(sample.name.replace(layout.IMAGE_SUFFIX, layout.TRUTH_SUFFIX)),
            *(run / stage / layout.PREDICTIONS / f"{name}.png" for stage in (before, folder)),
        ]
        shown = [image, *(overlay(image, read_label_png(file), palette) for file in files)]
        for cell, picture in zip(cells, shown, strict=True):
            cell.imshow(picture, interpolation="nearest")
            cell.axis("off")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlays", metavar="RUN", type=Path, help="a finished run, such as runs/demo")
    options = parser.parse_args(argv)
    for page in TABLES:
        page.write_text(filled(page), encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    draw_speed(PICTURES / "speed.png")
    draw_memory(PICTURES / "memory.png")
    speed_page.draw_growth()
    curves.draw_labels(PICTURES / "labels.png")
    if options.overlays:
        draw_overlays(options.overlays, PICTURES / "overlays.png")
    print(
        f"tables: {', '.join(page.name for page in TABLES)}\npictures: {', '.join(sorted(path.name for path in PICTURES.glob('*.png')))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
