"""README and docs/: commands are accepted as they stand, Python runs, and a switching guide's new lines name what is there.

docs/losses.md has a test of its own (tests/ops/test_docs_losses.py). Nothing is trained or downloaded here.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spcl_fast.cli import main
from spcl_fast.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, kind: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [body for one, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if one == kind]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `spcl-fast` line of a block: lines with a backslash are one, behind # is a comment, ... stands for more."""
    found = []
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                if not re.match(r"(spcl-fast|torchrun .* spcl_fast) ", line):
                    continue
                words = [word for word in shlex.split(line, comments=True) if word != "..."]
                start = next(i for i, word in enumerate(words) if word in ("spcl-fast", "spcl_fast"))
                found.append((page.name, words[start + 1 :]))
    return found


def named_in_docs(words: list[str]) -> str:
    return " ".join(words)[:70]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with what the pages name: runs that were there before, a file of settings, data of two classes."""
    root = tmp_path_factory.mktemp("docs")
    labels = ("labels_0", "labels_5", "labels_10", "labels_10_seed_1")
    for run in ("first", "demo", "airsim_camvid_0", "NAME", "mine", "first_head", *labels):
        (root / "runs" / run / "adapt" / "checkpoints" / "step_00000130").mkdir(parents=True)
        (root / "runs" / run / "config.yaml").write_text("seed: 0\n")
    (root / "mine.yaml").write_text("seed: 0\n")
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (root / "path/to/set" / part / split).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(np.zeros((36, 64, 3), np.uint8)).save(root / f"path/to/set/images/{split}/{number}.png")
            Image.fromarray(np.zeros((36, 64), np.uint8)).save(root / f"path/to/set/labels/{split}/{number}.png")
    (root / "path/to/set/classes.json").write_text(json.dumps({"names": ["road", "sky"]}))
    return root


def test_the_pages_have_commands():
    assert len(commands()) > 35, "the blocks are no longer found"


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else named_in_docs(value)
)
def test_a_command_of_the_pages_is_accepted(page, words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert words[0] in COMMANDS, f"{page}: there is no such command"
    takes_settings = COMMANDS[words[0]].sections is not None
    if words[0] == "report":
        assert main(words) == 0, f"{page}: {capsys.readouterr().err}"
        return
    if not takes_settings:
        assert words == ["doctor"], f"{page}: what it does is not looked at here"
        return
    assert main([*words, "--print-config"]) == 0, f"{page}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "losses.md"], ids=lambda page: page.name)
def test_python_of_the_pages_runs(page, place, monkeypatch):
    """With the tensors that the text around it names by shape."""
    monkeypatch.chdir(place)
    torch.manual_seed(0)
    names: dict[str, object] = {
        "features": torch.randn(2, 2048, 4, 8, requires_grad=True),
        "labels": torch.randint(0, 19, (2, 32, 64)),
        "predictions": torch.randint(0, 19, (2, 4, 8)),
        "logits": torch.randn(2, 19, 4, 8, requires_grad=True),
    }
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    for key in ("loss", "seg"):
        value = names.get(key)
        assert value is None or (isinstance(value, torch.Tensor) and value.isfinite())
    if "rows_of" in names:  # of a layer that is never called, after an optimiser's step
        layer = torch.nn.utils.weight_norm(torch.nn.Linear(8, 5, bias=False))
        with torch.no_grad():
            layer.weight_v.add_(1.0)
        rows = names["rows_of"](layer)  # pyright: ignore[reportCallIssue]
        layer(torch.zeros(1, 8))
        torch.testing.assert_close(rows, layer.weight)
    batch = names.get("batch")
    if page.name == "data.md":
        assert batch is not None and tuple(batch.images.shape) == (4, 3, 240, 320), "what the comment says"  # pyright: ignore[reportAttributeAccessIssue]
        assert tuple(batch.labels.shape) == (4, 240, 320)  # pyright: ignore[reportAttributeAccessIssue]


def test_json_of_the_pages_is_json():
    found = [block for page in PAGES for block in blocks(page, "json")]
    assert len(found) >= 2 and all(json.loads(block)["names"] for block in found)


def guides() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "switching.md").read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return [
        (part.partition("\n")[0], diff) for part in parts for diff in re.findall(r"```diff\n(.*?)```", part, re.DOTALL)
    ]


@pytest.mark.parametrize(("title", "diff"), guides(), ids=[title for title, _ in guides()])
def test_the_new_lines_of_a_guide_import_all_that_they_use(title, diff):
    new = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    imported: set[str] = set()
    for module, names in re.findall(r"from (spcl_fast[\w.]*) import ([\w, ]+)", "\n".join(new)):
        home = importlib.import_module(module)
        for name in re.split(r",\s*", names.strip()):
            assert hasattr(home, name.split(" as ")[0]), f"{title}: {module} has no {name}"
            imported.add(name.split(" as ")[-1])
    bases = re.findall(r"class \w+\(([\w., ]+)\)", "\n".join(new))
    foreign = {"nn.Module", "GMMSegHead"}
    assert not [base for group in bases for base in group.split(", ") if base not in imported | foreign], title


def test_every_link_of_the_pages_leads_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            there = page if not file else (page.parent / file)
            assert there.exists(), f"{page.name}: {target}"
            if anchor and there.suffix == ".md":
                assert anchor in anchors(there), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """As a Git host makes them of headings, and those given by name."""
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-") for title in titles}
    return made | set(re.findall(r'<a name="([^"]+)"', text))
