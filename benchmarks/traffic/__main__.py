"""Count every case and write benchmarks/results/traffic.json and docs/gpu-evidence.md: `python -m benchmarks.traffic`.

Needs no GPU: Triton's kernels run in its interpreter with the tiles of sm_90, CUDA's in the tests' emulator. Some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from benchmarks import RESULTS  # noqa: E402

from . import page  # noqa: E402
from .cases import CASES  # noqa: E402
from .count import ARCH, counted  # noqa: E402

RESULT = RESULTS / "traffic.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", default="", help="part of a case's name, such as 'class_moments, A'")
    parser.add_argument("--page", action="store_true", help="write the page from the result file, count nothing")
    arguments = parser.parse_args(argv)
    rows = {row["case"] + row["by"]: row for row in (json.loads(RESULT.read_text())["rows"] if RESULT.exists() else [])}
    if not arguments.page:
        for case in CASES:
            if arguments.only not in case.name:
                continue
            for row in counted(case):
                rows[row["case"] + row["by"]] = row
                print(page.line(row), flush=True)
        order = {case.name: index for index, case in enumerate(CASES)}
        kept = sorted((row for row in rows.values() if row["case"] in order), key=lambda row: order[row["case"]])
        lines = ",\n".join(json.dumps(row) for row in kept)  # a row per line: a change shows in the diff
        RESULT.write_text(f'{{"rung": "counted", "tiles": "{ARCH}", "rows": [\n{lines}\n]}}\n')
    page.write(json.loads(RESULT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
