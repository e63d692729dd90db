"""What is installed with the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def copied(folder: Path, *more: str) -> Path:
    """The checkout's sources without what was built."""
    for part in ("spcl_fast", "kernels", *more):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_an_sdist_that_is_made_without_torch_has_every_source_of_the_compiled_parts(tmp_path):
    copied(tmp_path, "csrc")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"SPCL_FAST_NO_CPU": "1"},
    )
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        held = {Path(*Path(name).parts[1:]) for name in files.getnames()}
    suffixes = {".cpp", ".h", ".cu", ".cuh", ".py", ".yaml", ".html"}
    needed = {
        path.relative_to(ROOT)
        for part in ("spcl_fast", "kernels", "csrc")
        for path in (ROOT / part).rglob("*")
        if path.suffix in suffixes
    }
    assert len(needed) > 250 and not needed - held, done.stderr


def test_an_installed_package_has_the_table_and_every_other_file_that_is_read(tmp_path):
    copied(tmp_path)
    (tmp_path / "spcl_fast/backends/measured.json").write_text("{}")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "installed"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"SPCL_FAST_NO_CPU": "1"}
    )
    source = tmp_path / "spcl_fast"
    read = {path.relative_to(source) for path in source.rglob("*") if path.suffix in {".yaml", ".html", ".json"}}
    missing = {path for path in read if not (tmp_path / "installed/spcl_fast" / path).is_file()}
    assert len(read) > 8 and not missing, done.stderr
