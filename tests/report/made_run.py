"""Run folders as the stages leave them, made up for the report's tests."""

import json

import numpy as np
from PIL import Image

from spcl_fast.data.palette import write_label_png
from spcl_fast.report.findings import findings_of
from spcl_fast.runs.reading import read_run

CLASSES = ["road", "sidewalk", "building", "fence", "pole", "vegetation", "sky", "car"]
PALETTE = [
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (190, 153, 153),
    (153, 153, 153),
    (107, 142, 35),
    (70, 130, 180),
    (0, 0, 142),
]
TRUE = np.array([0.3, 0.08, 0.22, 0.02, 0.01, 0.15, 0.17, 0.05])
NETS = {"source_only": 0.55, "control": 0.57, "warmup": 0.58, "adapt": 0.66, "distill": 0.68, "oracle": 0.8}
NAMES = {"adapt": "adapted", "distill": "distilled"}


def confusion_matrix(skill):
    """Pixels [K, K]: `skill` of each class is right, the rest spreads like the true shares; poles are never found."""
    spread = np.tile(TRUE, (len(TRUE), 1)) * (1 - skill) + np.eye(len(TRUE)) * skill
    spread[4] = np.roll(TRUE, 1)
    spread[:, 4] = 0
    spread[4, 4] = 0
    return np.round(1e6 * TRUE[:, None] * spread / spread.sum(1, keepdims=True)).astype(int)


def evaluation(matrix):
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    iou = 100 * matrix.diagonal() / union
    return {
        "miou": iou.mean(),
        "iou": dict(zip(CLASSES, iou, strict=True)),
        "confusion": matrix.tolist(),
        "predicted_share": dict(zip(CLASSES, matrix.sum(0) / matrix.sum(), strict=True)),
        "true_share": dict(zip(CLASSES, matrix.sum(1) / matrix.sum(), strict=True)),
    }


def scene(rng, height=90, width=120):
    """An image and its labels: sky over buildings and trees over road, a car."""
    rows, columns = np.mgrid[:height, :width]
    label = np.where(rows < 34 + 6 * np.sin(columns / 11 + rng.uniform(0, 6)), 6, 2)
    label[(columns % 50 > 30) & (rows > 20) & (rows < 50)] = 5
    label[rows > 55] = 1
    label[rows > 55 + np.abs(columns - 60) // 4 - 5] = 0
    left = int(rng.integers(15, 80))
    label[50:66, left : left + 26] = 7
    label[25:60, 100:102] = 4
    label[86:, :] = 255
    colours = np.array([*PALETTE, (40, 40, 40)])[np.minimum(label, len(PALETTE))]
    noise = rng.normal(0, 9, (height, width, 1))
    return np.clip(0.6 * colours + 70 + noise, 0, 255).astype(np.uint8), label.astype(np.uint8)


def records(stage, steps, rng):
    for step in range(20, steps + 1, 20):
        fall = np.exp(-step / 90)
        line = {"stage": stage, "step": step, "seconds": 0.4 * step, "lr": 5e-4 * (1 - step / (steps + 1)) ** 0.9}
        line |= {
            "segmentation": 0.4 + 1.6 * fall + rng.normal(0, 0.03),
            "images_per_s": 9.5,
            "data_wait": 0.04,
            "peak_memory_bytes": 900 << 20,
            "predicted_peak_bytes": 612 << 20,
            "phase_peak_bytes": {"forward": 700 << 20, "loss": 710 << 20, "backward": 890 << 20, "step": 400 << 20},
        }
        if stage == "warmup":
            line |= {"adversarial": 0.69 + rng.normal(0, 0.02), "discriminator": 0.69 - 0.1 * (1 - fall)}
        if stage == "adapt":
            line |= {
                "source_excess": -1.1 * (1 - fall) + rng.normal(0, 0.02),
                "target_excess": -0.7 * (1 - fall) + rng.normal(0, 0.03),
            }
            predicted = TRUE * rng.uniform(0.8, 1.2, len(TRUE))
            line["predicted_share"] = (predicted / predicted.sum()).tolist()
            line["kept_share"] = (0.5 * TRUE * rng.uniform(0.9, 1.1, len(TRUE))).tolist()
            line["prototype_norm"] = (np.linspace(0.35, 0.95, len(TRUE)) + 0.04 * (1 - fall)).tolist()
        yield line


def make_run(folder, stages=tuple(NETS), seed=0):
    """A run folder as the stages leave it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        "name: streets\nseed: 0\nmodel: {name: lite0}\n"
        "source: {dataset: folders, root: data/airsim_nh}\ntarget: {dataset: folders, root: data/camvid}\n"
    )
    (folder / "classes.json").write_text(json.dumps({"names": CLASSES, "palette": PALETTE, "ignore_index": 255}))
    scenes = {f"drive/{index:04d}": scene(rng) for index in range(3)}
    for name, (image, label) in scenes.items():
        path = folder / "report_samples" / f"{name}_image.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        write_label_png(folder / "report_samples" / f"{name}_truth.png", label, PALETTE)
    summary = {"classes": CLASSES, "gap_closed": 0.52, "selection": "last", "seed": 0}
    summary |= {
        "machine": {"device": "a test", "threads": 2, "torch": "2.13.0"},
        "seconds": {},
        "peak_memory_bytes": {},
    }
    lines = []
    for stage in stages:
        scores = evaluation(confusion_matrix(NETS[stage]))
        (folder / stage / "predictions").mkdir(parents=True)
        (folder / stage / "evaluation.json").write_text(json.dumps(scores))
        (folder / stage / "done.json").write_text(
            json.dumps({"stage": stage, "step": 300, "seconds": 140.2, "peak_memory_bytes": 950 << 20})
        )
        summary[NAMES.get(stage, stage)] = {key: scores[key] for key in ("miou", "iou", "predicted_share")}
        for name, (_, label) in scenes.items():
            wrong = rng.random((12, 15)) > NETS[stage]
            blocks = np.kron(wrong, np.ones((8, 8), bool))[: label.shape[0], : label.shape[1]]
            guess = np.where(blocks | (label == 255), rng.integers(0, 8), label).astype(np.uint8)
            write_label_png(folder / stage / "predictions" / f"{name}.png", guess, PALETTE)
        lines += [json.dumps(record) for record in records(stage, 300, rng)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for stage in ("pseudo_labels", "pseudo_labels_2"):
        (folder / stage).mkdir()
        shares = {"thresholds": np.linspace(0.5, 0.9, 8), "predicted_pixels": 1e6 * TRUE, "kept_pixels": 0.52e6 * TRUE}
        record = {key: dict(zip(CLASSES, values.tolist(), strict=True)) for key, values in shares.items()}
        (folder / stage / "thresholds.json").write_text(json.dumps(record))
    prototypes = rng.normal(size=(8, 16))
    labels = rng.choice(8, 1200, p=TRUE / TRUE.sum())
    domain = np.repeat([0, 1], 600)
    features = prototypes[labels] + rng.normal(0, 0.5, (1200, 16)) + 0.5 * domain[:, None]
    unit = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    np.savez_compressed(
        folder / "features.npz",
        features=features.astype(np.float16),
        labels=labels,
        domain=domain,
        prototypes=0.9 * unit,
    )
    (folder / "summary.json").write_text(json.dumps({"distilled": None, "oracle": None, "control": None, **summary}))
    return folder


def edited(tmp_path, edit):
    """The findings, by title, of a healthy run after `edit(folder)`."""
    folder = make_run(tmp_path / "run")
    edit(folder)
    return {finding.title: finding for finding in findings_of(read_run(folder))}


def write_confusion(folder, stage, matrix):
    (folder / stage / "evaluation.json").write_text(json.dumps(evaluation(matrix)))
