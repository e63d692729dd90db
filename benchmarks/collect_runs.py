"""Several seeds of one recipe as one table: python benchmarks/collect_runs.py runs/a_0 runs/a_1 runs/a_2 --output results.json

Reads the runs' summary.json and config.yaml; refuses runs whose settings differ in more than name and seed. Figures are means over the
runs with the standard error of the mean; a difference (final - control, final - source_only) is taken run by run first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import yaml
from adaptation.lines import Spread
from adaptation.table import NET_NAMES

PRIVATE = ("root", "weights", "classes", "runs_dir", "name", "seed")  # say where, not what


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in args.runs]
    configs = [_recipe(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))) for run in args.runs]
    if any(config != configs[0] for config in configs):
        print(
            "collect_runs: the runs have different settings; expected the same recipe with other seeds", file=sys.stderr
        )
        return 2
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": summaries[0]["machine"],
        "seeds": [summary["seed"] for summary in summaries],
        "selection": summaries[0]["selection"],
        "classes": summaries[0]["classes"],
        "miou": {
            net: _spread([s[net]["miou"] for s in summaries]) for net in NET_NAMES if all(s[net] for s in summaries)
        },
        "gain": _gains(summaries),
        "iou": {net: _by_class(summaries, net, "iou") for net in NET_NAMES if all(s[net] for s in summaries)},
        "predicted_share": {
            net: _by_class(summaries, net, "predicted_share") for net in NET_NAMES if all(s[net] for s in summaries)
        },
        "seconds": {stage: _spread([s["seconds"][stage] for s in summaries]) for stage in summaries[0]["seconds"]},
        "trained_seconds": [
            round(sum(summary["seconds"].values()), 1) for summary in summaries
        ],  # of the trained stages together
        "settings": configs[0],
        "runs": summaries,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for net, value in result["miou"].items():
        print(f"{net:12s} {Spread(tuple(value['values'])).text('5.1f')}  {value['values']}")
    for name, value in result["gain"].items():
        print(f"{name:28s} {Spread(tuple(value['values'])).text('+5.1f')}  {value['values']}")
    return 0


def _recipe(config: dict) -> dict:
    """The settings without the names of this machine's folders."""
    return {
        key: _recipe(value) if isinstance(value, dict) else value for key, value in config.items() if key not in PRIVATE
    }


def _spread(values: list[float]) -> dict:
    found = Spread(tuple(values))
    error = round(found.error, 2) if len(values) > 1 else None  # of a single run it is not known
    return {"mean": round(found.mean, 2), "standard_error": error, "values": [round(v, 2) for v in values]}


def _gains(summaries: list[dict]) -> dict:
    gains = {}
    for net in ("adapted", "distilled"):
        for base in ("source_only", "control", "warmup"):
            if all(s[net] and s[base] for s in summaries):
                gains[f"{net} - {base}"] = _spread([s[net]["miou"] - s[base]["miou"] for s in summaries])
    return gains


def _by_class(summaries: list[dict], net: str, what: str) -> dict:
    return {name: _spread([s[net][what][name] or 0.0 for s in summaries]) for name in summaries[0]["classes"]}


if __name__ == "__main__":
    sys.exit(main())
