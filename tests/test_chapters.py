"""Each notebook shows what it teaches: the modules of helpers/chapters are its exported cells, word for word."""

import ast
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from executed import NOTEBOOKS, ROOT


def test_pages_and_modules_are_the_same(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "helpers/chapters").mkdir(parents=True)
    subprocess.run([sys.executable, ROOT / ".ci/export.py", tmp_path], check=True, timeout=120)
    written = {path.name: path.read_bytes() for path in (tmp_path / "helpers/chapters").iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "helpers/chapters").glob("[a-z]*.py")}
    assert written.keys() == committed.keys(), "every module of helpers/chapters comes from a notebook"
    drifted = [name for name in written if written[name] != committed[name]]
    assert not drifted, "make export writes them from the notebooks; change the notebook, not the module"


def imported(node):
    """The names of modules that a statement imports."""
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_imports_go_one_way():
    # Each uses those before it.
    rooms = ["storage", "catalog", "experiment", "training", "callbacks", "images", "run", "__main__"]
    assert {path.stem for path in (ROOT / "helpers").glob("*.py")} == {"__init__", *rooms}
    for number, room in enumerate(rooms):
        nodes = ast.walk(ast.parse((ROOT / f"helpers/{room}.py").read_text(encoding="utf-8")))
        parts = [name.split(".") for node in nodes for name in imported(node)]
        assert {part[1] for part in parts if part[0] == "helpers"} <= {*rooms[:number]}, room


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
        names = {name for node in ast.walk(tree) for name in imported(node)}
        assert not names & {f"helpers.chapters.{name}" for name in own}, "a page uses what stands on it"
        if cell.source.startswith("#| export"):
            longest = 45 if any(isinstance(node, ast.ClassDef) for node in tree.body) else 25
            assert len(lines) <= longest, cell.source[:200]
            imports = all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)) for node in tree.body)
            assert before.cell_type == "markdown" or imports, f"say what it is for before:\n{cell.source[:200]}"
