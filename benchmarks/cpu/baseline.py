"""An older revision of this repository next to today's: built from git into build/baseline, timed call by call in a process of its own."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT
from benchmarks.cpu.timing import ROUNDS

BUILD = ROOT / "build" / "baseline"
_SERVE = Path(__file__).with_name("serve.py")
_PROCESSES = 2  # fresh pairs of processes: where a process's memory lies is part of the noise
_ORDER = ("before", "now")


class Revision(NamedTuple):
    name: str  # the commit, 7 letters
    site: Path  # where its package is


def build(revision: str) -> Revision:
    """The package of a commit, installed into a folder of its own; nothing is repeated. SystemExit where that fails."""
    name = _git("rev-parse", "--short=7", f"{revision}^{{commit}}").strip()
    folder = BUILD / name
    site, source = folder / "site", folder / "source"
    if not (site / "spcl_fast").is_dir():
        source.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x"], cwd=source, input=archive, check=True)
        print(f"building {name} into {site} (a minute, once)", flush=True)
        command = [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-build-isolation", "--no-deps",
            "--target", str(site), str(source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SPCL_FAST_NO_CUDA": "1"})
        if done.returncode:
            raise SystemExit(f"{revision} does not build:\n{done.stdout}{done.stderr}")
    if not list((site / "spcl_fast").glob("*.so")):
        raise SystemExit(f"{revision} was built without its C++ part: remove {folder} and see why with pip -v")
    return Revision(name, site)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Server:
    """A process that imports spcl_fast from one folder and times calls on demand."""

    def __init__(self, site: Path, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(_SERVE), str(site), str(ROOT)]
        self.process = subprocess.Popen(
            command, cwd="/", env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the baseline ended with {self.process.wait()}: what it said stands above")
        return line

    def ms(self, op: str, shape: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{op} {shape}\n")
        self.process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def ratios(
    revision: Revision, chosen: Sequence[tuple[str, str]], threads: int
) -> Iterator[tuple[str, str, dict[str, object]]]:
    """op, shape, {before_ms, now_ms, times_as_fast, quartiles}: medians over pairs of calls, one right after the other."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {case: [] for case in chosen}
    for number in range(_PROCESSES):
        sites = {"before": revision.site, "now": ROOT}
        servers = {name: Server(sites[name], threads) for name in (_ORDER if number % 2 == 0 else _ORDER[::-1])}
        for case in chosen:
            found[case] += _pairs(servers, *case)
        for server in servers.values():
            server.close()
    for (op, shape), pairs in found.items():
        low, middle, high = statistics.quantiles([before / now for before, now in pairs], n=4, method="inclusive")
        before, now = (round(statistics.median(pair[i] for pair in pairs), 3) for i in (0, 1))
        quartiles = [round(low, 3), round(high, 3)]
        ratio = {"before_ms": before, "now_ms": now, "times_as_fast": round(middle, 3), "quartiles": quartiles}
        yield op, shape, ratio | {"pairs": len(pairs)}


def _pairs(servers: dict[str, Server], op: str, shape: str) -> list[tuple[float, float]]:
    """The order changes from pair to pair."""
    for server in servers.values():
        server.ms(op, shape)
    found = []
    for i in range(ROUNDS):
        times = {name: servers[name].ms(op, shape) for name in (_ORDER if i % 2 == 0 else _ORDER[::-1])}
        found.append((times["before"], times["now"]))
    return found
