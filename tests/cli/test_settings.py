"""What every setting says of itself: choices, help, default and range."""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
from pathlib import Path

import spcl_fast
from spcl_fast import catalog
from spcl_fast.config import load as settings
from spcl_fast.models import MODEL_NAMES


def test_choices_come_from_the_catalog():
    known = settings.all_settings()
    assert known["model.name"].choices == catalog.names(catalog.NETS)
    assert set(catalog.names(catalog.NETS)) - set(MODEL_NAMES) == {"timm/NAME", "transformers/NAME", "MODULE:NAME"}
    assert known["adapt.loss"].choices == catalog.names(catalog.LOSSES)
    assert known["stages"].choices == catalog.names(catalog.STAGES)
    with_files = [row.name for row in catalog.DATA_SETS if row.needs_root]
    assert {"gta5", "synthia", "synscapes", "cityscapes", "folders"} <= set(with_files)
    assert set(known["source.dataset"].choices) == {
        *(row.name for row in catalog.DATA_SETS),
        *(f"{name}+generated_driver" for name in with_files),
    }
    assert all(settings.check_setting(target, "") is None for target in settings.ALIASES.values())


def test_a_class_that_changes_a_default_keeps_help_and_range():
    known = settings.all_settings()
    assert known["distill.lr"].default == 5e-4 and known["adapt.lr"].default == 2.5e-4
    assert known["distill.lr"].about == known["adapt.lr"].about and known["distill.lr"].about.above == 0


def test_every_setting_has_a_help_text():
    assert not [key for key, setting in settings.all_settings().items() if not setting.about.help]


def test_every_default_obeys_its_own_type_and_range():
    for key, setting in settings.all_settings().items():
        assert setting.read(setting.default) == setting.default, key
        assert setting.problem(setting.default) is None, key


def test_help_and_ranges_are_there_where_only_compiled_files_are_installed(tmp_path):
    root = tmp_path / "site"
    package = root / "spcl_fast"
    for path in (Path(spcl_fast.__file__).parent).rglob("*"):
        if path.is_file() and path.parent.name != "__pycache__":
            kept = package / path.relative_to(Path(spcl_fast.__file__).parent)
            kept.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".py":
                py_compile.compile(str(path), cfile=str(kept.with_suffix(".pyc")), doraise=True)
            elif path.suffix == ".yaml":
                kept.write_bytes(path.read_bytes())
    assert not list(root.rglob("*.py"))
    script = (
        "import spcl_fast, sys; assert spcl_fast.__file__.endswith('.pyc'), spcl_fast.__file__\n"
        "from spcl_fast.cli import main\n"
        "sys.exit([main(['run', '-h']), main(['adapt', '--preset', 'demo', '--adapt.keep', '2'])] != [0, 2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "share of the old prototype in each update" in done.stdout
    assert "adapt.keep: got 2.0, expected a number from 0 to 1" in done.stderr
