"""Each notebook shows what it teaches: the modules of helpers/chapters are its exported cells, word for word."""

import ast
import graphlib
import importlib
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from executed import NOTEBOOKS, ROOT

CHAPTERS = sorted(path.stem for path in (ROOT / "helpers/chapters").glob("[a-z]*.py"))


def test_pages_and_modules_are_the_same(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "helpers/chapters").mkdir(parents=True)
    subprocess.run([sys.executable, ROOT / ".ci/export.py", tmp_path], check=True, timeout=120)
    written = {path.name: path.read_bytes() for path in (tmp_path / "helpers/chapters").iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "helpers/chapters").glob("[a-z]*.py")}
    assert written.keys() == committed.keys(), "every module of helpers/chapters comes from a notebook"
    drifted = [name for name in written if written[name] != committed[name]]
    assert not drifted, "make export writes them from the notebooks; change the notebook, not the module"


def imported(path):
    """The helpers modules that a file imports, wherever in it, as (line, name)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def test_imports_go_one_way():
    # Each uses those before it.
    rooms = ["storage", "catalog", "experiment", "training", "callbacks", "images", "run", "__main__"]
    assert {path.stem for path in (ROOT / "helpers").glob("*.py")} == {"__init__", *rooms}
    for number, room in enumerate(rooms):
        for line, name in imported(ROOT / f"helpers/{room}.py"):
            parts = name.split(".")
            if parts[0] == "helpers":
                assert parts[1] in rooms[:number], f"helpers/{room}.py:{line} imports {name}"


def test_chapters_import_no_circle_and_neither_their_notebooks_nor_nbdev():
    uses = {chapter: [name for _, name in imported(ROOT / f"helpers/chapters/{chapter}.py")] for chapter in CHAPTERS}
    assert not [name for names in uses.values() for name in names if name.startswith("nbdev")]
    chapters = {
        chapter: [n.split(".")[2] for n in uses[chapter] if n.startswith("helpers.chapters.")] for chapter in uses
    }
    graphlib.TopologicalSorter(chapters).prepare()  # raises CycleError, which names the circle
    for chapter in CHAPTERS:
        importlib.import_module(f"helpers.chapters.{chapter}")


def test_no_name_is_undefined_and_nothing_is_unused():
    words = "ruff check --no-cache --output-format=concise helpers tests notebooks".split()
    found = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exported_cells_are_short_and_explained(path):
    cells = nbformat.read(path, as_version=4).cells
    own = {match[1] for cell in cells if (match := re.match(r"#\| default_exp (\w+)", cell.source))}
    for before, cell in zip(cells, cells[1:]):
        if cell.cell_type != "code":
            continue
        lines = [] if cell.source.startswith("%%") else cell.source.splitlines()
        tree = ast.parse("\n".join(line for line in lines if not line.startswith("%")))
        names = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "helpers.chapters"
            for alias in node.names
        }
        assert not names & own, "a page uses what stands on it"
        if cell.source.startswith("#| export"):
            body = tree.body
            assert len(lines) <= (45 if any(isinstance(node, ast.ClassDef) for node in body) else 25), cell.source[:200]
            imports = all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)) for node in body)
            explained = before.cell_type == "markdown" or imports
            assert explained, f"say what it is for before this cell:\n{cell.source[:200]}"
