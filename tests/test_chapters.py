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


def test_imports_go_one_way():
    rooms = ["storage", "catalog", "experiment", "training", "callbacks", "images", "run", "__main__"]
    assert {path.stem for path in (ROOT / "helpers").glob("*.py")} == {"__init__", *rooms}
    for number, room in enumerate(rooms):  # each uses those before it
        lines = re.findall(r"(?m)^ *(?:from|import) helpers.*", (ROOT / f"helpers/{room}.py").read_text("utf-8"))
        assert not re.search(rf"\b({'|'.join(rooms[number:])})\b", " ".join(lines)), f"{room}: {lines}"


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
        assert not own & {*re.findall(r"helpers\.chapters(?:\.| import )(\w+)", cell.source)}, "it stands on this page"
        if cell.source.startswith("#| export"):
            longest = 45 if any(isinstance(node, ast.ClassDef) for node in tree.body) else 25
            assert len(lines) <= longest, cell.source[:200]
            imports = all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)) for node in tree.body)
            assert before.cell_type == "markdown" or imports, f"say what it is for before:\n{cell.source[:200]}"
