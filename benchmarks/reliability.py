"""docs/reliability.md: what happens with what, and the test that shows it. `make reliability` writes it; a test asks that it is current.

Every line names a test, which is looked up in its file: a test that is renamed or gone is an error here. A number in the second table must
stand in the test's own source (or, for one that a helper counts, in its file).
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT, soak

PAGE, TABLE = ROOT / "docs" / "reliability.md", ROOT / "benchmarks" / "reliability.txt"
WAYS = ("accepted", "refused", "reported")


class Line(NamedTuple):
    situation: str
    how: str  # one of WAYS
    what: str
    test: str  # file::function, or a file


class Run(NamedTuple):
    what: str
    count: str  # a number of it, such as 25, stands in the test
    where: str
    test: str


def read_table(text: str) -> tuple[dict[str, list[Line]], list[Run]]:
    """The sections of benchmarks/reliability.txt; the last one is that of the machinery. Raises ValueError for a line of another form."""
    sections: dict[str, list[list[str]]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("## "):
            cells = sections.setdefault(line[3:], [])
        elif line and not line.startswith("# "):
            parts = [part.strip() for part in line.split(" | ")]
            if len(parts) != 4:
                raise ValueError(f"{TABLE.name}, line {number}: expected four cells, got {len(parts)}")
            cells.append(parts)
    *users, machinery = sections
    return {title: [Line(*cells) for cells in sections[title]] for title in users}, [
        Run(*cells) for cells in sections[machinery]
    ]


def page(users: dict[str, list[Line]], machinery: list[Run], soaked: list[dict] | None = None) -> str:
    """The whole page. soaked: kept results of `make soak`; None: those of its log.

    Raises LookupError that names a line whose test is not there, or does not hold its number.
    """
    lines = [
        "# Reliability: what happens with what, and the test that shows it",
        "",
        "<!-- made by `make reliability` from benchmarks/reliability.txt and the tests; edit those -->",
        "",
        "Tried first by people who reported it to this or another project of the field. *Accepted*: it works, as said. *Refused*: an",
        "error that names the file, key or setting and what to do; exit code 2 (settings), 3 (data), 4 (numbers) or 5 (checkpoints).",
        "*Reported*: the work goes on, and a line is logged.",
    ]
    for title, found in users.items():
        lines += ["", f"## {title}", "", "| situation | | what happens | test |", "|---|---|---|---|"]
        lines += [f"| {line.situation} | {line.how} | {line.what} | {_link(line.test)} |" for line in found]
    lines += [
        "",
        "## Kills, damage, leaks, memory errors",
        "",
        "| what is done | how often | where it runs | test |",
        "|---|---|---|---|",
    ]
    soaked = soak.read() if soaked is None else soaked
    for run in machinery:
        _check_count(run)
        _check_where(run)
        where = f"{run.where}: {soak.summary(run.test, soaked)}" if "`make soak`" in run.where else run.where
        lines.append(f"| {run.what} | {run.count.replace('_', ' ')} | {where} | {_link(run.test)} |")
    return "\n".join([*lines, ""])


def _link(test: str) -> str:
    file, _, name = test.partition("::")
    _source(test)
    shown = name.removeprefix("test_").replace("_", " ") if name else file
    return f"[{shown}](../tests/{file})"


def _source(test: str) -> str:
    """The source of a test with its decorators, or of its whole file where no function is named."""
    file, _, name = test.partition("::")
    path = ROOT / "tests" / file
    if not path.is_file():
        raise LookupError(f"{test}: there is no {path.relative_to(ROOT)}")
    text = path.read_text(encoding="utf-8")
    if not name:
        return text
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    raise LookupError(f"{test}: there is no such test; correct benchmarks/reliability.txt, or the test's name")


def _check_count(run: Run) -> None:
    number = run.count.split()[0]
    path = Path(run.test.partition("::")[0])
    file = _source(path.as_posix())
    if number.replace("_", "").isdigit() and int(number) > 9 and number not in _source(run.test) and number not in file:
        raise LookupError(f"{run.test}: {run.what!r} says {run.count}, and {number} does not stand in {path}")


def _check_where(run: Run) -> None:
    """Every `make test` leaves out what is marked as soak, and `make soak` everything else."""
    is_soak = "@pytest.mark.soak" in _source(run.test)
    if "::" in run.test and is_soak != ("`make soak`" in run.where):
        raise LookupError(
            f"{run.test}: {run.what!r} says {run.where}, and the test is {'' if is_soak else 'not '}marked as soak"
        )


def main() -> int:
    PAGE.write_text(page(*read_table(TABLE.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
