"""The tables of docs/switching.md, from benchmarks/results/family.json; `make figures` puts them there."""

from __future__ import annotations

from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.family.authors import REPOSITORIES
from benchmarks.tables import markdown, read

PAGE = ROOT / "docs" / "switching.md"
SAVED = RESULTS / "family.json"
_BUSY = 1.0  # processes that wanted to run, per core


def measured_table() -> str:
    """Each step: milliseconds and MB of both, ratios, and whether the goal is met."""
    result = read(SAVED.name)
    rows = []
    for one in result["cases"].values():
        sides = [one["authors"], one["spcl_fast"]]
        rows.append(
            [
                one["is"],
                *(f"{side['processor_ms']:.0f}" for side in sides),
                f"{one['times_as_fast_by_processor_time']:.1f}",
                f"{one['times_as_fast']:.1f}",
                *(f"{side['peak_mb']:.0f}" for side in sides),
                f"{one['times_less_memory']:.1f}",
                "yes" if one["goal_is_met"] else "no",
            ]
        )
    header = ["step", "authors', ms of processor time", "here", "× as fast", "× by the wall clock"]
    header += ["authors', MB", "here", "× less memory", "goal"]
    skipped = "".join(f"\n* {name} was skipped: {why}" for name, why in result["skipped"].items())
    return markdown(header, rows) + f"\n\n{_note(result)}" + (f"\n{skipped}" if skipped else "")


def _note(result: dict[str, Any]) -> str:
    machines = [one["machine"] for one in result["cases"].values()]
    first = machines[0]
    dates = " and ".join(sorted({machine["date"] for machine in machines}))
    busiest = max(machine["load"] for machine in machines)
    threads = " or ".join(str(count) for count in sorted({machine["threads"] for machine in machines}))
    note = (
        f"Float32, {threads} thread{'' if threads == '1' else 's'} of an {first['cpu']} with {first['cores']} cores "
        f"({first['instructions']}), torch {first['torch'].partition('+')[0]}, {dates}."
    )
    if busiest > _BUSY * first["cores"]:
        note += f"\nOther programs ran at the same time (load {busiest:.0f}): of the times, take the ratios, and those "
        note += "roughly:\nthreads that wait for each other count as processor time, too."
    return note


def repositories_table() -> str:
    """What to clone, under which name, and the commits that were measured."""
    measured = {one["repository"]: one["commit"] for one in read(SAVED.name)["cases"].values()}
    rows = [
        [f"`{name}`", f"[{home}](https://github.com/{home})", f"`{measured.get(name, commit)}`"]
        for name, (home, commit) in REPOSITORIES.items()
    ]
    return markdown(["folder", "repository", "commit"], rows, numbers=False)


TABLES = {"family": measured_table, "authors": repositories_table}
