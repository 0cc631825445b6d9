"""The two commands and the files they stand on: Makefile, lock, environment.yml."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import yaml
from packaging.requirements import Requirement

from executed import NOTEBOOKS, ROOT

LOCK, BENCH = ((ROOT / f"requirements{name}.lock").read_text().splitlines() for name in ("", "-bench"))


def make(*arguments):
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of another make
    return subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, env=outside, capture_output=True, text=True, check=True
    ).stdout


def test_the_locks_hold_names_versions_and_markers_only_and_the_command_that_makes_them():
    assert LOCK[0].startswith("# uv pip compile pyproject.toml --universal") and BENCH[0].startswith(LOCK[0][:60])
    assert not {*LOCK} & {*BENCH}
    for line in (*LOCK[1:], *BENCH[1:]):
        [specifier] = Requirement(line).specifier
        assert specifier.operator == "==" and not Requirement(line).url and not Requirement(line).extras


def test_the_lock_asks_for_cuda_on_linux_only():
    cuda = [Requirement(line) for line in LOCK[1:] if re.match("nvidia|cuda|triton", line)]
    assert len(cuda) > 10
    for platform in ("darwin", "win32"):
        elsewhere = {"sys_platform": platform, "python_full_version": "3.11.7"}
        assert not any(requirement.marker.evaluate(elsewhere) for requirement in cuda)


def test_every_dependency_of_the_project_is_in_the_lock_at_a_version_it_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {}
    for requirement in map(Requirement, LOCK[1:] + BENCH[1:]):
        locked.setdefault(requirement.name, []).append(requirement.specifier)
    for wanted in map(Requirement, project["dependencies"] + sum(project["optional-dependencies"].values(), [])):
        for specifier in locked[wanted.name]:
            assert wanted.specifier.contains(str(specifier).removeprefix("=="))


def test_environment_yml_is_python_and_pip_then_the_lock_and_the_project(tmp_path):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip"]
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    # conda hands this section to pip as a requirements file beside environment.yml: pip finds nothing left to install
    # in the environment that `make setup` made, so both are the same.
    requirements = ROOT / "condaenv.requirements.txt"
    try:
        requirements.write_text("\n".join(pip["pip"]))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-build-isolation", "-r", requirements]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finally:
        requirements.unlink()
    assert said.returncode == 0, said.stderr
    would = re.findall("Would install (.*)", said.stdout)
    assert not would or re.fullmatch(r"s3-deep-learning-notebooks-[\d.]+", would[0].strip())


def test_make_passes_notebooks_and_parameters_on_and_a_second_one_installs_nothing():
    command = make("run", "NOTEBOOKS=02 03", "ARGS=-p epochs 3").splitlines()[-1]
    assert command.split()[1:] == "-m helpers run 02 03 -p epochs 3".split()
    assert "pip install" not in make("run") + make("test") + make("lab")


def test_the_readmes_commands_work_as_typed(embedded, tmp_path):
    """Those that need no account, token, installation or time; of the notebooks, the parameters alone, and not executed."""
    for name in "Makefile", "pyproject.toml", "requirements.lock":
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebooks").mkdir()
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        nbformat.write(notebook, tmp_path / "notebooks" / path.name)
    (tmp_path / ".venv").mkdir()
    for name in "bin", "lib", "share", "pyvenv.cfg":
        (tmp_path / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (tmp_path / ".venv/installed").touch()
    (tmp_path / "sitecustomize.py").write_text(
        "import functools, papermill\n"
        "papermill.execute_notebook = functools.partial(papermill.execute_notebook, prepare_only=True)\n"
    )
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = [
        line
        for line in "".join(blocks).splitlines()
        if re.match(r"make run|make site|\S+ -m helpers", line) and not re.search(" rent | bot |--processes", line)
    ]
    assert len(commands) >= 8
    outside = os.environ | {"PYTHONPATH": str(tmp_path)}
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=outside, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert len(list((tmp_path / "site").glob("*.html"))) == len(NOTEBOOKS) + 1, "and the index"
    assert any(len(list(run.glob("02_*-0[1-4].ipynb"))) == 4 for run in (tmp_path / "runs").iterdir()), "the sweep"


def test_ci_calls_the_readmes_test_command():
    assert "\nmake test" in (ROOT / "README.md").read_text()
    assert "\nmake test" in (ROOT / ".ci/run").read_text()
