"""Tables of docs/expect.md: the drives left out, a few labels, and the family side by side."""

from __future__ import annotations

from benchmarks import ROOT
from benchmarks.adaptation import drives
from benchmarks.adaptation.__main__ import RESULTS
from benchmarks.adaptation.frozen import measure
from benchmarks.adaptation.lines import by_setting, miou, paired, spread, text_of
from benchmarks.adaptation.plan import read_plan
from benchmarks.tables import markdown
from spcl_fast import catalog

PAGE = ROOT / "docs" / "expect.md"
PLAN = read_plan(ROOT / "benchmarks" / "adaptation" / "plans" / "family.yaml")
TITLES = {  # file of result lines -> name for the reader
    "airsim_camvid_without_0016E5": "AirSim → CamVid, the drive 0016E5 never seen",
    "airsim_generated_camvid_without_0016E5": "AirSim + generated → the same",
    "camvid_day_dusk": "CamVid day → dusk",
}


def family_table() -> str:
    """mIoU, and in the second row of a pair the difference to the control of the same seed: means ± standard errors."""
    header: list[str] = ["mIoU in percent"]
    rows = []
    for pair in PLAN.pairs:
        every = by_setting(RESULTS / f"{pair}.jsonl")
        lines = {name: {seed: every[name][seed] for seed in PLAN.seeds} for name in PLAN.settings}
        base = next(iter(lines.values()))  # the setting that has the control
        bases = catalog.with_role("baseline", "matched")
        nets = [("", base, row) for row in bases] + [
            (f"`{name}`, ", of_setting, row)
            for name, of_setting in lines.items()
            for row in catalog.with_role("result")
            if all(row.net in line["nets"] for line in of_setting.values())
        ]
        header[1:] = [f"{name}{row.title}" for name, _, row in nets]
        scores = [spread(miou(line, row.net) for line in of_setting.values()) for _, of_setting, row in nets]
        gains = [paired(of_setting, row.net, base, bases[-1].net) for _, of_setting, row in nets]
        rows.append([TITLES[pair], *(text_of(score) for score in scores)])
        rows.append(["less the control", *(text_of(gain, "+.1f") for gain in gains)])
    return markdown(header, rows)


def frozen_table() -> str:
    return measure.table(TITLES)


def frozen_labels_table() -> str:
    drive = dict.fromkeys(drives.PLAN.pairs, "CamVid's drives")
    return measure.labels_table({**drive, "cwfid_carrot_weed": "crop and weed"})


TABLES = {
    "labels": drives.few_labels_table,
    "drives": drives.drives_table,
    "family": family_table,
    "frozen": frozen_table,
    "frozen-labels": frozen_labels_table,
}
