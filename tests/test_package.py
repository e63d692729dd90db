"""What is installed with the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_an_installed_package_has_the_table_and_every_other_file_that_is_read(tmp_path):
    for part in ("spcl_fast", "kernels"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "spcl_fast/backends/measured.json").write_text("{}")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "installed"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"SPCL_FAST_NO_CPU": "1"}
    )
    source = tmp_path / "spcl_fast"
    read = {path.relative_to(source) for path in source.rglob("*") if path.suffix in {".yaml", ".html", ".json"}}
    missing = {path for path in read if not (tmp_path / "installed/spcl_fast" / path).is_file()}
    assert len(read) > 8 and not missing, done.stderr
