"""The two commands and the files they stand on: Makefile, lock, environment.yml."""

import functools
import os
import re
import shlex
import subprocess
import tomllib
from importlib import metadata

import nbformat
import papermill
import yaml
from packaging.requirements import Requirement

from executed import NOTEBOOKS, ROOT
from helpers import storage
from helpers.chapters import processes

LOCK, BENCH = ((ROOT / f"requirements{name}.lock").read_text().splitlines() for name in ("", "-bench"))


def make(*arguments):
    """The commands that make would call."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of another make
    command = ["make", "--dry-run", "--old-file=.venv/installed", *arguments]
    return subprocess.check_output(command, cwd=ROOT, env=outside, text=True)


def test_the_locks_hold_versions_only_that_the_project_allows_and_the_command_that_makes_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert LOCK[0].startswith("# uv pip compile pyproject.toml --universal") and BENCH[0].startswith(LOCK[0][:60])
    assert not {*LOCK} & {*BENCH}
    locked = {}
    for requirement in map(Requirement, LOCK[1:] + BENCH[1:]):
        [specifier] = requirement.specifier
        assert specifier.operator == "==" and not requirement.url and not requirement.extras
        locked.setdefault(requirement.name, []).append(specifier.version)
    for wanted in map(Requirement, project["dependencies"] + sum(project["optional-dependencies"].values(), [])):
        assert all(map(wanted.specifier.contains, locked[wanted.name]))


def test_what_the_lock_installs_is_here_and_fits_together():
    applies = lambda requirement: not requirement.marker or requirement.marker.evaluate({"extra": ""})
    locked = [requirement for requirement in map(Requirement, LOCK[1:]) if applies(requirement)]
    needed = [Requirement(text) for each in locked for text in metadata.requires(each.name) or ()]
    for requirement in [*locked, *filter(applies, needed)]:
        assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), requirement


def test_conda_ci_and_make_install_the_lock_once_and_pass_on_what_they_are_given():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda == ["python=3.11", "pip"] and pip == {"pip": ["-r requirements.lock", "-e ."]}
    command = make("run", "NOTEBOOKS=02 03", "ARGS=-p epochs 3").splitlines()[-1]
    assert command.split()[1:] == "-m helpers run 02 03 -p epochs 3".split()
    assert "pip install" not in make("run") + make("test") + make("lab")
    assert all("\nmake test" in (ROOT / name).read_text() for name in ("README.md", ".ci/run"))


def test_the_readmes_commands_work_as_typed(embedded, tmp_path, monkeypatch):
    """Those that need no account, token, installation or time; of the notebooks, the parameters alone, not executed."""
    (tmp_path / "notebooks").mkdir()
    for path in NOTEBOOKS[:7]:  # 01 to 05
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        nbformat.write(notebook, tmp_path / "notebooks" / path.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "connect", lambda: None)
    prepare = functools.partial(papermill.execute_notebook, prepare_only=True)
    monkeypatch.setattr(papermill, "execute_notebook", prepare)
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.partition("  #")[0] for line in "".join(blocks).splitlines()]
    lines = [line for line in lines if re.match(r"make run|make site|\S+ -m helpers run", line)]
    lines = [line for line in lines if "--processes" not in line]
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(make(*shlex.split(line)[1:]) if line.startswith("make") else line)
        assert processes.main(words[words.index("helpers") + 2 :]) == 0, line
    assert len(list((tmp_path / "site").glob("*.html"))) == 7 + 1, "and the index"
    assert any(len(list(run.glob("02_*-0[1-4].ipynb"))) == 4 for run in (tmp_path / "runs").iterdir()), "the sweep"
