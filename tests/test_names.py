"""A name stands in one place: stages, files of a run, tests of an op."""

from __future__ import annotations

import ast
from pathlib import Path

from spcl_fast import catalog
from spcl_fast.runs import layout

ROOT = Path(__file__).resolve().parent.parent


# ---- names of stages -------------------------------------------------------------------------------------------------

# where a stage's name may stand as a literal: the catalog, the schema of settings, and the file of that stage
AT_HOME = {"spcl_fast/catalog.py": None, "spcl_fast/config/schema.py": None} | {
    f"spcl_fast/method/{file}.py": names
    for file, names in {
        "supervised": {"source_only", "control", "few_labels", "oracle"},
        "warmup": {"warmup"},
        "prototypes": {"prototypes"},
        "pseudo_labels": {"pseudo_labels", "pseudo_labels_2"},
        "adapt": {"adapt"},
        "distill": {"distill"},
        "online": {"online"},
    }.items()
}
OTHER_WORDS = {"prototypes", "control"}  # a tensor's name, a role of a net: which no parser can tell from a stage
STILL = {  # a key of the committed result lines that is spelled like a stage
    "benchmarks/adaptation/seed.py",
    "benchmarks/adaptation/table.py",
}


def named_stages(text: str) -> set[str]:
    """The names of stages that are string literals."""
    found = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    return found & set(catalog.names(catalog.STAGES))


def test_a_stage_is_named_in_the_catalog_the_schema_and_its_own_file_only():
    strangers = {}
    for top in ("spcl_fast", "kernels", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            own = AT_HOME.get(file, OTHER_WORDS)
            found = named_stages(path.read_text(encoding="utf-8")) - (
                own if own is not None else set(catalog.names(catalog.STAGES))
            )
            if found:
                strangers[file] = sorted(found)
    assert not {file: names for file, names in strangers.items() if file not in STILL}


def test_a_stage_that_is_named_elsewhere_is_seen():
    assert named_stages("def f(run):\n    return run.done('adapt') or \"distill\"\n") == {"adapt", "distill"}
    assert not named_stages("x = run.adapt  # adapt\n")


# who else may say such a name: the classes.json of a data set and the plan.json of benchmarks/results are no files of a run
OWN_FILES = {(f"spcl_fast/data/{name}.py", layout.CLASSES) for name in ("layouts", "build")} | {
    ("benchmarks/adaptation/day_to_dusk.py", layout.CLASSES),
    *((f"benchmarks/{name}.py", layout.PLAN) for name in ("figures", "gpu/step", "memory/tables")),
}


def file_names() -> set[str]:
    """What runs/layout.py calls the files of a run, and the folder of its pictures."""
    values = [value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)]
    return {value for value in values if "." in value[1:]} | {layout.SAMPLES}


def said_names(path: Path, names: set[str]):
    """(line, name) of the strings of a file, docstrings aside, that hold a name of a run's file as a path's last part."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            for name in names:
                if node.value == name or node.value.endswith("/" + name):
                    yield node.lineno, name


def test_a_file_of_a_run_is_named_in_its_layout_alone():
    wrong = []
    for path in sorted([*(ROOT / "spcl_fast").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]):
        where = path.relative_to(ROOT).as_posix()
        if where != "spcl_fast/runs/layout.py":
            said = [(line, name) for line, name in said_names(path, file_names()) if (where, name) not in OWN_FILES]
            wrong += [f"{where}:{line}: {name!r}; take it from runs/layout.py" for line, name in said]
    assert not wrong, "\n".join(wrong)


def test_a_file_name_that_stands_elsewhere_is_seen(tmp_path):
    path = tmp_path / "x.py"
    path.write_text('"""summary.json"""\nopen("summary.json")\nfolder / f"{stage}/done.json"\nx = "no.json"\n')
    assert list(said_names(path, file_names())) == [(2, "summary.json"), (3, "done.json")]
    assert {"config.yaml", "metrics.jsonl", "report_samples", "_truth.png"} <= file_names()


# ---- the tests of the ops ----------------------------------------------------------------------------------------------


def names_of_tests(folder: Path) -> dict[str, list[str]]:
    """The names of test functions, and the files in which each is defined."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        names = {
            node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
        }
        for name in sorted(name for name in names if name.startswith("test_")):
            found.setdefault(name, []).append(path.name)
    return found


def defined(folder: Path, name: str) -> list[str]:
    """The files with a function or a variable of this name at their top."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            if any(name == getattr(target, "id", getattr(target, "name", None)) for target in targets):
                found.append(path.name)
    return found


def test_no_test_of_an_op_is_written_twice_and_there_is_one_problem_and_one_table_of_shapes():
    """A test of an op runs on every backend that can do it; what is about the inside of one backend is in tests/kernels."""
    tests = names_of_tests(ROOT / "tests" / "ops")
    assert len(tests) > 100
    assert not {name: files for name, files in tests.items() if len(files) > 1}
    assert defined(ROOT / "tests", "problem") == ["problems.py"] and defined(ROOT / "tests", "SHAPES") == ["shapes.py"]
    of_one_backend = [
        path.name for path in (ROOT / "tests" / "ops").rglob("test_*.py") if path.name.split("_")[1] in BACKEND_NAMES
    ]
    assert not of_one_backend


BACKEND_NAMES = catalog.names(catalog.BACKENDS)


def test_a_test_that_is_written_twice_is_seen(tmp_path):
    (tmp_path / "test_a.py").write_text("def test_x(): ...\ndef problem(): ...\n")
    (tmp_path / "test_b.py").write_text("def test_x(): ...\nproblem = 1\n")
    assert names_of_tests(tmp_path) == {"test_x": ["test_a.py", "test_b.py"]}
    assert defined(tmp_path, "problem") == ["test_a.py", "test_b.py"]
