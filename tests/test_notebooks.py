"""The notebooks as they are written; those of images, executed with papermill as a user does, over real S3 servers, and
what they leave in the bucket."""

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import psutil
import pytest

from helpers import storage
from executed import BY_NUMBER, NOTEBOOKS, ROOT, execute, forked_kernels, try_to_run
from servers import ceph
from servers.embedded import connected
from servers.fault_proxy import fault_proxy


def on_disk():
    """{path: time} of the files of the working tree, without what does not belong to it."""
    others = {".git", ".venv", ".s3", "__pycache__"}
    paths = (path for path in ROOT.rglob("*") if not others & set(path.parts))
    return {path: path.stat().st_mtime for path in paths if path.is_file()}


def contents(bucket):
    """{name: checksum} of a bucket, the times in names of runs taken out; of what runs hold, names and models only."""
    found = {}
    for name, item in storage.objects(f"s3://{bucket}").items():
        name = re.sub(r"\d{4}-\d\d-\d\dT[\d.-]+", "TIME", name)
        checked = not name.startswith("runs/") or "/model/" in name
        found[name] = item["size"] and (item["e_tag"].strip('"') if checked else None)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_as_a_reader_expects_it(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    opening = notebook.cells[0]
    assert opening.cell_type == "markdown" and re.match(rf"# {path.name.split('_')[0]} · ", opening.source)
    assert all(words in opening.source for words in ("**You will learn**", "**You need**", "**It takes**"))
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip the outputs: they are not kept in git"
    [parameters] = [cell.source for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert all(re.fullmatch(r"\w+ = .+  # .+", line) for line in parameters.splitlines())
    assert not re.search(r"(?m)^(\w*_)?(secret|token|password|access_key) =", parameters)
    assert "application/json" in code[-1].source and "results" in code[-1].source
    assert max(len(cell.source.splitlines()) for cell in code if not cell.source.startswith("#| export")) <= 25


def call(folder, *words, **environment):
    """A command of the environment's in a folder; fails with what it said."""
    command = [Path(sys.executable).with_name(words[0]), *map(str, words[1:])]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


SHORT = dict(epochs=2, transfer="")  # with every(6): a short way from a zip to predictions


@pytest.fixture(scope="module")
def whole(embedded_env, tmp_path_factory, every):
    """A bucket that 01 to 03 have filled, each by another tool, one from S3 to S3, and what is in it then."""
    bucket, folder = f"test-{secrets.token_hex(6)}", tmp_path_factory.mktemp("whole")
    with connected(embedded_env):
        storage.create_bucket(f"{bucket}-pages")
        for number, options, command in (
            ("01", {"dataset_zip": every(6)}, f"papermill s3://{bucket}-pages/01.ipynb s3://{bucket}-pages/done.ipynb"),
            ("02", SHORT, "jupyter nbconvert --execute --to notebook --inplace 02.ipynb"),
            ("03", {}, "pytest -p no:cacheprovider --nbmake 03.ipynb"),
        ):
            page = folder / f"{number}.ipynb"
            papermill.execute_notebook(BY_NUMBER[number], page, options | {"bucket": bucket}, prepare_only=True)
            storage.write(f"s3://{bucket}-pages/{page.name}", page.read_bytes())
            call(folder, *command.split(), JUPYTER_PATH=str(forked_kernels()))
        return SimpleNamespace(folder=folder, bucket=bucket, contents=contents(bucket))


def test_any_tool_runs_them_from_any_folder_and_a_progress_bar_is_one_output(whole):
    cells = nbformat.read(whole.folder / "02.ipynb", as_version=4).cells
    [bar] = [cell.outputs for cell in cells if "loop.fit(epochs, callbacks" in cell.source]
    assert len(bar) < 4 and any("100%" in output.get("data", {}).get("text/plain", "") for output in bar)
    assert {"runs/inference/TIME/manifest.json", "models/cnn/model.json"} <= whole.contents.keys()


@pytest.mark.slow
def test_papermills_command_runs_them_from_s3_to_s3_in_fresh_kernels(whole, embedded, tmp_path, bucket, every):
    place = f"s3://{bucket}-notebooks"
    storage.create_bucket(f"{bucket}-notebooks")
    for i, folder in enumerate((ROOT, ROOT / "notebooks", tmp_path)):
        for number, options in ("01", {"dataset_zip": every(6)}), ("02", SHORT), ("03", {}):
            page, given = f"{place}/{number}.ipynb", options | {"bucket": f"{bucket}-{i}"}
            papermill.execute_notebook(BY_NUMBER[number], page, given, prepare_only=True)
            call(folder, "papermill", page, f"{place}/executed.ipynb")
        assert contents(f"{bucket}-{i}") == whole.contents


def test_helpers_are_found_beside_a_notebook_without_installing():
    assert (ROOT / "notebooks/helpers").readlink() == Path("../helpers") and storage.REPOSITORY == ROOT


def test_from_a_zip_to_predictions(request, tmp_path, bucket, every):
    """In a real Ceph where there is one, with worker processes; nothing is left on the disk, and no secret anywhere."""
    environment = request.getfixturevalue("embedded_env" if ceph.missing() else "ceph_env")
    with connected(environment):
        before = on_disk()
        options = dict(dataset_zip=every(2), epochs=6, num_workers=2, transfer="")
        results = execute("01 02 03", tmp_path, bucket=bucket, **options)
        assert results["classes"] == 5 and results["test"] == results["images"] == 45
        assert results["objects"] == 2 * sum(results[part] for part in ("train", "val", "test")) + 1
        assert results["loader_speedup_over_naive"] > 1.5, "six times is usual"
        assert min(results["val_accuracy"], results["test_accuracy"], results["test_macro_f1"]) > 0.4, "chance is 0.2"

        names = contents(bucket)
        for part in "history.csv", "metrics.json", "manifest.json", "plots/curves.png", "model/model.json":
            assert f"runs/train_cnn/TIME/{part}" in names
        assert sum(name.startswith("models/cnn/") for name in names) == 2
        assert on_disk() == before, "the notebooks leave nothing on the local disk"

        objects = [name for name in storage.objects(f"s3://{bucket}") if name.startswith(("runs/", "models/"))]
        written = [storage.read(f"s3://{bucket}/{name}") for name in objects]
        written += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            assert not any(environment[name].encode() in text for text in written), f"{name} is in an output"


@pytest.mark.slow
def test_the_readmes_accuracy(embedded, tmp_path, bucket):
    results = execute("01 02 03", tmp_path, bucket=bucket, transfer="")
    assert (results["objects"], results["train"], results["val"], results["test"]) == (1201, 420, 90, 90)
    assert min(results["val_accuracy"], results["test_accuracy"], results["test_macro_f1"]) > 0.75


def test_a_local_folder_is_predicted_too_and_another_split_is_refused(embedded, tmp_path, whole, every):
    for name in (names := list(storage.objects(f"s3://{whole.bucket}/leaves/test"))[::2]):
        storage.write(tmp_path / "mine" / name, storage.read(f"s3://{whole.bucket}/leaves/test/{name}"))
    assert execute("03", tmp_path, bucket=whole.bucket, test_url=str(tmp_path / "mine"))["images"] == len(names) > 5

    before = storage.objects(f"s3://{whole.bucket}/leaves")
    options = dict(bucket=whole.bucket, dataset_zip=every(6), split="80/10/10")
    [outcome] = try_to_run("01", options, tmp_path / "again")
    assert outcome.status == "FAILED" and "is split already, with other ratios" in outcome.error
    assert storage.objects(f"s3://{whole.bucket}/leaves") == before  # nor is anything uploaded again


def test_each_notebook_alone_says_which_one_it_needs(embedded, tmp_path, bucket):
    for number, needed in ("02", "01"), ("03", "02"), ("05b", "05a"), ("07a", "05"):
        [outcome] = try_to_run(number, dict(bucket=bucket), tmp_path / number)
        assert bucket in outcome.error and f"make run NOTEBOOKS={needed}" in outcome.error
        storage.create_bucket(bucket)  # the first looks for data where there is no bucket


def test_a_server_that_fails_all_the_time_and_a_kernel_killed_in_the_middle(embedded, tmp_path, bucket, every, whole):
    """On a server that cannot copy either, and killed while it trains: in the end all is as if nothing had been."""
    faults, seen = dict(slow_down_every=9, reset_every=11, truncate_every=7, no_copy=True), set()
    with (
        fault_proxy(embedded["AWS_ENDPOINT_URL"], **faults) as proxy,
        connected(embedded | {"AWS_ENDPOINT_URL": proxy.url}),
    ):

        def kill_at_the_second_checkpoint(_):
            if re.match("PUT .*/checkpoints/", proxy.latest) and proxy.latest not in seen:
                seen.add(proxy.latest)
                if len(seen) == 2:
                    alive = [child for child in psutil.Process().children() if child.status() != "zombie"]
                    [client] = [child for child in alive if "-ISc" in child.cmdline()]
                    client.kill()  # the forked kernel ends with the process that asked for it

        proxy.on_request = kill_at_the_second_checkpoint
        first, second = try_to_run("01 02", dict(bucket=bucket, dataset_zip=every(6), **SHORT), tmp_path / "killed")
        assert (first.status, second.status) == ("ok", "FAILED") and "DeadKernelError" in second.error
        names = storage.objects(f"s3://{bucket}")
        assert any("/checkpoints/step_" in name for name in names) and not any("models/" in name for name in names)
        execute("02 03", tmp_path, bucket=bucket, **SHORT)
        assert min(proxy.slow_downs, proxy.resets, proxy.truncations) > 10 and proxy.copies_refused
        assert contents(bucket) == whole.contents
