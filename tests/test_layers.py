"""Imports point one way: an arrow the other way fails here, with the line that draws it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spcl_fast
from spcl_fast import catalog

ROOT = Path(__file__).resolve().parent.parent
# word -> words it may import; a word is a file or folder of spcl_fast/ (kernels/ lies next to it: spcl_fast.kernels)
ALLOWED = {
    "catalog": set(),
    "errors": set(),
    "distributed": {"errors"},
    "config": {"catalog", "errors"},
    "labels": set(),  # spcl_fast/backends/labels.py: the index rule and the flag of bad labels, below every backend
    "kernels": set(),  # torch and triton alone
    "backends": {"catalog", "errors", "labels", "kernels"},
    "ops": {"errors", "labels", "backends"},
    "losses": {"errors", "ops", "estimators"},  # an objective is a loss and the estimator that it is taken against
    "estimators": {"errors", "ops", "distributed"},
    "compat": {"errors", "ops", "losses", "estimators"},
    "models": {"catalog", "errors", "config"},  # of config: the defaults of ModelConfig
    "data": {"catalog", "errors", "config", "runs"},  # of runs: durable, to write a file whole
    "runs": {"catalog", "errors", "config", "distributed"},
    "train": {"errors", "config", "distributed", "runs", "data", "models", "ops"},
    "method": {
        "catalog",
        "errors",
        "config",
        "distributed",
        "runs",
        "data",
        "models",
        "ops",
        "losses",
        "estimators",
        "compat",
        "train",
    },
    "memory_plan": {"catalog", "errors", "config", "data", "models", "ops", "runs", "train", "method"},
    "report": {"catalog", "errors", "config", "data", "runs"},
    "cli": {
        "catalog",
        "errors",
        "config",
        "distributed",
        "runs",
        "data",
        "models",
        "ops",
        "backends",
        "losses",
        "estimators",
        "compat",
        "train",
        "method",
        "memory_plan",
        "report",
        "kernels",
    },
    "__main__": {"cli"},
    "__init__": {"ops", "backends", "losses", "estimators"},
}


def modules():
    for top, name in ((ROOT / "spcl_fast", ""), (ROOT / "kernels", "kernels")):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            yield path, ("spcl_fast", *([name] if name else []), *parts)


def imported_words(path: Path, module: tuple[str, ...]):
    """(line, word of spcl_fast that the line imports)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module[: len(module) - node.level] if node.level else ()
            base = (*above, *filter(None, (node.module or "").split(".")))
            names = [(*base, alias.name) for alias in node.names] if base == ("spcl_fast",) else [base]
        for name in names:
            if name[0] == "spcl_fast" and len(name) > 1 and not name[1].startswith("__"):
                yield node.lineno, "labels" if name[1:] == ("backends", "labels") else name[1]


def test_imports_point_one_way():
    wrong = []
    for path, module in modules():
        word = module[1]
        assert word in ALLOWED, f"{path}: a new word {word!r}; say in tests/test_layers.py which layers it may import"
        for line, target in imported_words(path, module):
            if target not in {word, "_cpu", "_cuda"} | ALLOWED[word]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {word} imports {target}")
    assert not wrong, "\n".join(wrong)


def libraries(path: Path) -> set[str]:
    """The libraries that a file imports, wherever the line stands; Python's own are left out."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_kernels_need_torch_and_triton_alone():
    others = {str(path): more for path, _ in kernel_files() if (more := libraries(path) - {"torch", "triton"})}
    assert not others


def kernel_files():
    return [(path, module) for path, module in modules() if module[1] == "kernels"]


def test_an_arrow_the_other_way_is_seen(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "from ..train.loop import fit\nimport spcl_fast.cli\nfrom spcl_fast import bank\nfrom .. import settings\n"
    )
    assert [word for _, word in imported_words(path, ("spcl_fast", "ops", "x"))] == ["train", "cli", "bank", "settings"]


BACKENDS = {tuple(row.home.partition(":")[0].split(".")) for row in catalog.BACKENDS}


def imported_backends(path: Path, module: tuple[str, ...]):
    """Lines that import a backend's module, by whatever form of import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module[: len(module) - node.level] if node.level else ()
            base = (*above, *filter(None, (node.module or "").split(".")))
            named = {base, *((*base, alias.name) for alias in node.names)}
        else:
            continue
        if named & BACKENDS:
            yield node.lineno


def test_only_backends_names_a_backend_module():
    outside = [(path, module) for path, module in modules() if module[1] not in ("backends", "kernels")]
    named = [f"{path.relative_to(ROOT)}:{line}" for path, module in outside for line in imported_backends(path, module)]
    assert not named, "only backends/ names backends: " + ", ".join(named)


def test_a_backend_that_is_named_elsewhere_is_seen(tmp_path):
    path = tmp_path / "x.py"
    lines = [
        "from ..backends.cpu import _load",
        "from ..backends import cuda",
        "import spcl_fast.backends.reference",
        "from spcl_fast.backends import reference as r",
        "from .. import backends",
        "from ..backends import pick",
        "from ..backends.labels import label_flag",
    ]
    path.write_text("\n".join(lines))
    assert list(imported_backends(path, ("spcl_fast", "ops", "x"))) == [1, 2, 3, 4]


@pytest.mark.parametrize("module", ["spcl_fast", "spcl_fast.cli", "spcl_fast.cli.commands"])
def test_importing_the_package_or_its_command_line_does_not_import_torch(module):
    code = f"import {module}, sys; print([m for m in ('torch', 'numpy', 'jsonargparse', 'yaml') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_every_public_name_is_there():
    missing = [name for name in spcl_fast.__all__ if not hasattr(spcl_fast, name)]
    assert not missing


def test_no_file_is_called_after_nothing():
    vague = {"utils", "helpers", "common", "misc", "util", "helper"}
    assert not [path for path, module in modules() if vague & set(module)]


# Words that once stood for two or three things each, so that a reader had to ask which
ONE_THING = ("plan", "fit", "predict", "Prediction", "memory", "settings", "signals", "Context")


def named_things(path: Path, module: tuple[str, ...]) -> list[str]:
    """The module's own name and those of its top-level functions and classes."""
    top_level = ast.parse(path.read_text(encoding="utf-8")).body
    defined = [node.name for node in top_level if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [module[-2] if module[-1] == "__init__" else module[-1], *defined]


def test_no_name_stands_for_two_things():
    places = [(name, path.relative_to(ROOT)) for path, module in modules() for name in named_things(path, module)]
    found = {name: [str(path) for other, path in places if other == name] for name in ONE_THING}
    assert not {name: paths for name, paths in found.items() if len(paths) > 1}


def defined_names(path: Path) -> list[str]:
    """Public classes and constants at a file's top level."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets if isinstance(target, ast.Name) and target.id.isupper()]
    return [name for name in found if not name.startswith("_")]


# of each stage, backend, net; and the catalog's row of what backends/contract.py describes
EACH_ITS_OWN = {"STAGE", "OPTIONS", "Backend", "WIDTHS", "DILATIONS"}


def test_no_class_and_no_constant_of_the_house_has_a_name_that_another_has():
    """Not counted: compat/, which has other projects' names; generated scenes."""
    found: dict[str, list[str]] = {}
    for path, module in modules():
        if module[1] != "compat" and "generated" not in module:
            for name in set(defined_names(path)) - EACH_ITS_OWN:
                found.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    assert not {name: files for name, files in found.items() if len(files) > 1}


def test_names_and_libraries_of_every_form_are_seen(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import os, numpy.linalg\nA = B = 1\n_C = 2\nclass D: ...\ndef f():\n    from yaml import load\n")
    assert defined_names(path) == ["A", "B", "D"]
    assert libraries(path) == {"numpy", "yaml"}


# ---- sizes -----------------------------------------------------------------------------------------------------------

CODE = {".py", ".h", ".cpp", ".cuh", ".cu"}
MOST_LINES = 400
MOST_PARAMETERS, MOST_OF_A_KERNEL = 10, 16


def parameters(path: Path) -> list[tuple[str, int, bool]]:
    """(name, number of parameters, whether Triton compiles it) of every function, methods and inner ones too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            given = node.args
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            compiled = any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
            found.append((node.name, count, compiled))
    return found


def test_no_file_needs_two_sittings():
    folders = ("spcl_fast", "kernels", "csrc", "tests", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in CODE]
    assert len(files) > 200
    lengths = {path.relative_to(ROOT): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert not {str(path): lines for path, lines in lengths.items() if lines > MOST_LINES}


def test_ops_backends_and_kernels_take_structs_not_rows_of_arguments():
    """The public functions are not counted: each of their options is one word of the contract, given by name."""
    wrong = []
    for path, module in modules():
        if module[1] in ("ops", "backends", "kernels"):
            for name, count, compiled in parameters(path):
                most = MOST_OF_A_KERNEL if compiled else MOST_PARAMETERS
                if count > most and name not in spcl_fast.__all__:
                    wrong.append(f"{path.relative_to(ROOT)}: {name} takes {count} of at most {most}")
    assert not wrong, "\n".join(wrong)


def test_parameters_of_every_kind_of_function_are_counted(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "@triton.jit\ndef a(p, q, /, r, *, s): ...\n@triton.jit(do_not_specialize=[0])\ndef b(p): ...\n"
        "class C:\n    def d(self):\n        def e(p, *q): ...\n"
    )
    assert sorted(parameters(path)) == [("a", 4, True), ("b", 1, True), ("d", 1, False), ("e", 1, False)]


# ---- cycles ----------------------------------------------------------------------------------------------------------


def module_names() -> dict[str, Path]:
    """Every module of spcl_fast and spcl_fast.kernels by its dotted name; a package is its __init__."""
    found = {}
    for path, parts in modules():
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
    return found


def imported_modules(path: Path, name: str, known: set[str]) -> set[str]:
    """The modules of the house that a file imports, wherever the line stands: also in functions and for type checkers alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            submodules = {f"{base}.{alias.name}" for alias in node.names} & known
            # `from .package import module` needs the module; what else a line names is in the package itself
            found |= submodules | ({base} if len(submodules) < len(node.names) else set())
    return (found & known) - {name}


def first_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Module names along one circle of imports, or None."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph.get(name, ())):
            cycle = visit(other, [*path, name])
            if cycle is not None:
                return cycle
        done.add(name)
        return None

    return next((cycle for name in sorted(graph) if (cycle := visit(name, [])) is not None), None)


def test_no_module_imports_itself_through_others():
    files = module_names()
    graph = {name: imported_modules(path, name, set(files)) for name, path in files.items()}
    cycle = first_cycle(graph)
    assert cycle is None, " -> ".join(cycle or [])


def test_a_circle_of_imports_is_seen(tmp_path):
    known = {"spcl_fast", "spcl_fast.a", "spcl_fast.a.x", "spcl_fast.b"}
    (tmp_path / "x.py").write_text("from .. import b\nfrom ..b import thing\n")
    (tmp_path / "b.py").write_text("def f():\n    from .a.x import other\n")
    graph = {
        "spcl_fast.a.x": imported_modules(tmp_path / "x.py", "spcl_fast.a.x", known),
        "spcl_fast.b": imported_modules(tmp_path / "b.py", "spcl_fast.b", known),
    }
    assert graph == {"spcl_fast.a.x": {"spcl_fast.b"}, "spcl_fast.b": {"spcl_fast.a.x"}}
    assert first_cycle(graph) == ["spcl_fast.a.x", "spcl_fast.b", "spcl_fast.a.x"]
    assert first_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
