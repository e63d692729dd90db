"""The tables and the picture of docs/speed.md, from benchmarks/results; `make figures` puts them there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.cpu.variants import ONE_THREAD, PLAIN
from benchmarks.tables import markdown, read

PAGE = ROOT / "docs" / "speed.md"
PICTURE = ROOT / "docs" / "pictures" / "growth.png"
USERS = {  # op -> the formula that its users have, and the fastest other one
    "prototype_contrastive_loss": ("released", "channel_first compiled"),
    "class_moments": ("released update", "one-hot product"),
    "upsampled_cross_entropy": ("interpolate", "interpolate compiled"),
    "upsampled_prediction": ("interpolate", "interpolate compiled"),
}
CONTRAST = "prototype_contrastive_loss"


def dates_of(part: dict[str, Any]) -> str:
    """When the ops were measured: not all of them need be measured at once."""
    return " and ".join(sorted({entry["date"] for shapes in part["ops"].values() for entry in shapes.values()}))


def _note(machine: dict[str, Any], dates: str = "") -> str:
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return (
        f"{threads} of an {machine['cpu']} with {machine['cores']} cores ({machine['instructions']}), "
        f"torch {machine['torch'].partition('+')[0]}, {dates or machine['date']}."
    )


def ops_table() -> str:
    """Every op and shape, at each instruction set that was measured: milliseconds, next to the formulas and to the floor."""
    result = read("cpu_ops.json")
    tables = []
    for part in (result, *result.get("instructions", {}).values()):
        rows = []
        for op, (users, best) in USERS.items():
            for shape, one in part.get("ops", {}).get(op, {}).items():
                faster = one["times_faster_than"]
                cells = [f"{one['times']['spcl_fast']['median_ms']:.1f}", f"{faster[users]:.1f}", f"{faster[best]:.1f}"]
                rows.append([f"`{op}` {shape}", *cells, f"{one['share_of_floor']:.2f}"])
        header = ["op and shape", "ms", "× the users' formula", "× the best compiled one", "share of the floor"]
        if rows:
            tables.append(markdown(header, rows) + f"\n\n{_note(part['machine'], dates_of(part))}")
    return "\n\n".join(tables)


def baseline_table() -> str:
    """Today's build next to an older revision, at each instruction set that was measured."""
    result = read("cpu_ops.json")
    tables = []
    for part in (result, *result.get("instructions", {}).values()):
        baseline = part.get("baseline")
        if not baseline:
            continue
        rows = [
            [f"`{op}` {shape}", f"{one['before_ms']:.1f}", f"{one['now_ms']:.1f}", f"{one['times_as_fast']:.2f}"]
            for op, shapes in baseline["ops"].items()
            for shape, one in shapes.items()
        ]
        header = ["op and shape", f"ms at `{baseline['revision']}`", "ms today", "× as fast"]
        tables.append(markdown(header, rows) + f"\n\n{_note(baseline['machine'])}")
    return "\n\n".join(tables)


def peers_table() -> str:
    """The contrastive loss next to every peer, at the machine's own instruction set."""
    by_shape = read("cpu_ops.json")["ops"][CONTRAST]
    names = list(dict.fromkeys(peer for one in by_shape.values() for peer in one["times"]))
    rows = [
        [
            f"`{name}`",
            *(f"{one['times'][name]['median_ms']:.1f}" if name in one["times"] else "" for one in by_shape.values()),
        ]
        for name in names
    ]
    skipped = {peer: reason for one in by_shape.values() for peer, reason in one["skipped"].items()}
    reasons = "\n".join(f"* `{peer}` was skipped: {reason}" for peer, reason in skipped.items())
    table = markdown(["forward and backward, ms", *by_shape], rows)
    return f"{table}\n\n{reasons}" if reasons else table


def growth_table() -> str:
    result = read("cpu_growth.json")
    rows = []
    for axis in ("pixels", "channels", "classes"):
        one = result[axis]
        ends = f"{one['values'][0]} to {one['values'][-1]}"
        exponents = (one["exponents"][name][part] for name in one["exponents"] for part in ("all", "upper decade"))
        rows.append([f"{axis}, {ends}", *(f"{number:.2f}" for number in exponents)])
    header = ["exponent of the time", "ours", "its upper decade", "the users' formula", "its upper decade"]
    return markdown(header, rows) + f"\n\n{_note(result['machine'])}"


def step_table() -> str:
    result = read("cpu_step.json")
    rows = []
    for one in result["rows"].values():
        for loop, times in one["loops"].items():
            phases = [f"{times[phase]:.1f}" for phase in ("total", "data", "forward", "loss", "backward", "step")]
            share = [f"{100 * one[key]:.1f}" if loop == "ours" else "" for key in ("losses_share", "data_share")]
            rows.append([f"{one['net']}, {loop}", *phases, *share])
    header = [
        "one adaptation step, ms",
        "total",
        "data",
        "forward",
        "loss",
        "backward",
        "optimiser",
        "losses, %",
        "data wait, %",
    ]
    return markdown(header, rows) + f"\n\n{_note(result['machine'])}"


def variants_table() -> str:
    """Ours with other dtypes, layouts and one thread: milliseconds, and next to float32 NCHW."""
    result = read("cpu_variants.json")
    rows = []
    for op, by_shape in result["ops"].items():
        for shape, variants in by_shape.items():
            ms = {name: stats["median_ms"] for name, stats in variants.items()}
            others = [name for name in ms if name not in (PLAIN, ONE_THREAD)]
            ratios = [f"{ms[name] / ms[PLAIN]:.2f}" for name in others]
            rows.append([f"`{op}` {shape}", f"{ms[PLAIN]:.1f}", *ratios, f"{ms[ONE_THREAD] / ms[PLAIN]:.2f}"])
    first = next(iter(next(iter(result["ops"].values())).values()))
    header = ["op and shape", "float32, ms"]
    header += [f"{name}, × its time" for name in first if name not in (PLAIN, ONE_THREAD)]
    header.append(f"× as fast with {result['machine']['threads']} threads as with 1")
    return markdown(header, rows) + f"\n\n{_note(result['machine'])}"


TABLES = {
    "ops": ops_table,
    "baseline": baseline_table,
    "peers": peers_table,
    "variants": variants_table,
    "growth": growth_table,
    "step": step_table,
}


def draw_growth(path: Path = PICTURE) -> None:
    """Time along pixels, channels and classes, and the peak along the resolution; both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    result = read("cpu_growth.json")
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), layout="constrained")
    colours = {"ours": "#0072B2", "users' formula": "#8A8A8A"}
    for cell, axis in zip(axes, ("pixels", "channels", "classes"), strict=False):
        for name, times in result[axis]["ms"].items():
            slope = result[axis]["exponents"][name]["upper decade"]
            cell.loglog(
                result[axis]["values"], times, "o-", markersize=3, color=colours[name], label=f"{name}: {slope:.2f}"
            )
        cell.set_xlabel(axis)
        cell.legend(frameon=False, fontsize=7)
    axes[0].set_ylabel("ms, forward and backward")
    memory = result["memory"]
    pixels = [height * width for height, width in memory["height_width"]]
    for name, found in memory["peak_bytes"].items():
        axes[3].loglog(pixels, [each / 1e6 for each in found], "o-", markersize=3, color=colours[name], label=name)
    axes[3].loglog(
        pixels, [each / 1e6 for each in memory["gradient_bytes"]], "--", color="#D55E00", label="the gradient alone"
    )
    axes[3].set_xlabel("pixels")
    axes[3].set_ylabel("peak, MB")
    axes[3].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)
