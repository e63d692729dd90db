"""Tables of docs/expect.md: the family side by side, and labels alone."""

from __future__ import annotations

from benchmarks import ROOT
from benchmarks.adaptation import labels_alone
from benchmarks.adaptation.__main__ import RESULTS
from benchmarks.adaptation.lines import by_setting, miou, paired, spread
from benchmarks.tables import markdown

PAGE = ROOT / "docs" / "expect.md"
FAMILY = {  # of plans/family.yaml: file of result lines -> name for the reader
    "airsim_camvid_without_0016E5": "AirSim → CamVid, the drive 0016E5 never seen",
    "camvid_day_dusk": "CamVid day → dusk",
}
SEEDS = (0, 1, 2)
NETS = {  # name for the reader -> setting and net
    "SPCL, adapted": ("folders", "adapted"),
    "SPCL, distilled": ("folders", "distilled"),
    "ProtoCL, adapted": ("sepico_proto", "adapted"),
    "DistCL, adapted": ("sepico_dist", "adapted"),
    "`online`": ("online", "online"),
}


def family_table() -> str:
    """mIoU, and in the second row of a pair the difference to the control of the same seed: means ± standard errors."""
    rows = []
    for file, title in FAMILY.items():
        every = by_setting(RESULTS / f"{file}.jsonl")
        settings = {name: {seed: lines[seed] for seed in SEEDS if seed in lines} for name, lines in every.items()}
        control = settings["folders"]
        scores = [(control, "source_only"), (control, "control"), *((settings[s], net) for s, net in NETS.values())]
        rows.append([title, *(_text(spread(miou(line, net) for line in lines.values())) for lines, net in scores)])
        gains = [_text(paired(lines, net, control, "control"), "+.1f") for lines, net in scores]
        gains[1] = ""
        rows.append(["less the control", *gains])
    return markdown(["mIoU in percent", "source-only", "control", *NETS], rows)


def labels_table() -> str:
    return labels_alone.table(labels_alone.read())


def _text(found, form: str = ".1f") -> str:
    return "" if found is None else found.text(form)


TABLES = {"family": family_table, "labels": labels_table}
