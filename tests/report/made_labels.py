"""Runs over a number of labelled images, made up for the tests of their curve, and ways to spoil one."""

import json
import shutil

import numpy as np
import yaml
from made_run import confusion_matrix

from spcl_fast.runs.identity import settings_sha256

STAGES = ("source_only", "control", "adapt", "distill")
NETS = {"source_only": "source_only", "control": "control", "adapt": "adapted", "distill": "distilled"}
IMAGES = {"tta": "none", "window": None, "window_stride": None, "images": None, "data": "12 images of 8 classes, abc"}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def labelled_run(base, folder, count, control, final, seed=0, labelled=None, settings=None, evaluated=None):
    """A run that learned from `count` labelled images and ended with these mIoU; settings: more of config.yaml, by dotted names."""
    shutil.copytree(base, folder)
    labelled = labelled or (str(count) if count else None)
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"name": folder.name, "seed": seed}
    for key, value in {"target.labelled": labelled, **(settings or {})}.items():
        section, _, name = key.rpartition(".")
        config.setdefault(section, {})[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"seed": seed, **({"labelled_target_images": count} if count else {})}
    for stage in STAGES:  # what is true does not depend on the net
        edit_json(folder / stage / "evaluation.json", confusion=confusion_matrix(0.6).tolist())
    for stage, miou in (("control", control), ("distill", final)):
        edit_json(folder / stage / "evaluation.json", miou=miou, evaluated=evaluated or IMAGES)
        summary[NETS[stage]]["miou"] = miou
        identity = {
            "target.root": config["target"]["root"],
            "target.labelled": labelled,
            "run_seed": seed,
            "stage": stage,
        }
        identity |= {key: str(value) for key, value in (settings or {}).items()}
        edit_json(folder / stage / "done.json", settings=identity, settings_sha256=settings_sha256(identity))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


# ---- spoiled runs -------------------------------------------------------------------------------------------------


def cut(file):
    def edit(folder):
        (folder / file).write_bytes((folder / file).read_bytes()[:40])

    return edit


def gone(file):
    return lambda folder: (folder / file).unlink()


def with_classes(folder):
    record = json.loads((folder / "classes.json").read_text())
    edit_json(folder / "classes.json", names=[*record["names"][:-1], "lorry"])


def started_again(folder):
    (folder / "distill" / "done.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(line for line in lines if '"step": 300' not in line) + "\n")


def other_pixels(folder):
    record = json.loads((folder / "distill" / "evaluation.json").read_text())
    matrix = np.array(record["confusion"])
    matrix[0, 0] += 1
    edit_json(folder / "distill" / "evaluation.json", confusion=matrix.tolist())


def never_did(*stages):
    def edit(folder):
        for stage in stages:
            shutil.rmtree(folder / stage)
        edit_json(folder / "summary.json", **{NETS[stage]: None for stage in stages})
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["stage"] not in stages]
        (folder / "metrics.jsonl").write_text("".join(kept))

    return edit


def learned_from_others(folder):
    record = json.loads((folder / "distill" / "done.json").read_text())
    edit_json(folder / "distill" / "done.json", settings={**record["settings"], "target.labelled": "7"})


def without_a_count(folder):
    record = json.loads((folder / "summary.json").read_text())
    del record["labelled_target_images"]
    (folder / "summary.json").write_text(json.dumps(record))
