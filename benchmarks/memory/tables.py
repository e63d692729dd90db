"""The tables of docs/memory.md: `plan` for one adaptation step at the released sizes and at full resolution, with each setting.

python -m benchmarks.memory.tables      writes results/plan.json and prints the tables; takes a few minutes, allocates nothing
"""

from __future__ import annotations

import json
import sys

from benchmarks import RESULTS
from benchmarks.peers import released
from spcl_fast.config.load import load_config
from spcl_fast.memory_plan.peak import num_classes_of, peak_memory
from spcl_fast.method.adapt import STAGE as ADAPT

SAVED = RESULTS / "plan.json"
SIZES = {"released sizes": ("1280x720", "1024x512"), "full resolution": ("1914x1052", "2048x1024")}
BF16 = {"loop.precision": "bf16"}
LEAN = BF16 | {"loop.absorb_gradients": "true", "loop.checkpoint": "auto"}
SETTINGS = {
    "fp32": {},
    "fp32, absorb_gradients": {"loop.absorb_gradients": "true"},
    "fp32, checkpoint auto, absorb_gradients": LEAN | {"loop.precision": "fp32"},
    "bf16": BF16,
    "bf16, absorb_gradients": BF16 | {"loop.absorb_gradients": "true"},
    "bf16, checkpoint stage, absorb_gradients": LEAN | {"loop.checkpoint": "stage"},
    "bf16, checkpoint block, absorb_gradients": LEAN | {"loop.checkpoint": "block"},
    "bf16, checkpoint auto": BF16 | {"loop.checkpoint": "auto"},
    "bf16, checkpoint auto, absorb_gradients": LEAN,
    "bf16, offload, absorb_gradients": BF16 | {"loop.absorb_gradients": "true", "loop.offload": "true"},
    "bf16, checkpoint auto, offload, absorb_gradients": LEAN | {"loop.offload": "true"},
}


def row(name: str, sizes: tuple[str, str], given: dict[str, str] | None) -> dict:
    """given: settings of our loop; None: the released loop."""
    keys = {"source.size": sizes[0], "target.size": sizes[1], "adapt.batch_size": "1", "loop.device": "cuda"}
    config = load_config("gta5_cityscapes", (), (), list((keys | (given or {})).items()))
    num_classes = num_classes_of(config)
    if given is None:
        found = released.released_peak(config, num_classes)
    else:
        found = peak_memory(config, ADAPT.name, num_classes=num_classes)
    return {
        "name": name, "peak_gib": round(found.peak_bytes / 2**30, 3), "floor_gib": round(found.floor_bytes / 2**30, 3),
        "tflop": round(found.flops / 1e12, 2), "host_gib": round(found.host_bytes / 2**30, 3), "cuts": list(found.cuts),
        "categories_mib": {key: round(value / 2**20) for key, value in found.categories.items()},
        "phases_mib": {key: round(value / 2**20) for key, value in found.phases.items()},
    }  # fmt: skip


def main() -> int:
    tables = {}
    for title, sizes in SIZES.items():
        tables[title] = [row("released loop, fp32", sizes, None)]
        tables[title] += [row(name, sizes, given) for name, given in SETTINGS.items()]
        base = next(entry["tflop"] for entry in tables[title] if entry["name"] == "bf16")
        print(f"\n{title}: {' + '.join(sizes)}\n")
        for entry in tables[title]:
            print(
                f"| {entry['name']} | {entry['peak_gib']:.2f} | {entry['tflop'] / base:.2f} | {entry['floor_gib']:.2f} |",
                flush=True,
            )
    SAVED.write_text(json.dumps(tables, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
