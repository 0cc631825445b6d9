"""The notebooks as they are written; those of images, executed with papermill as a user does, over real S3 servers, and
what they leave in the bucket."""

import contextlib
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

from helpers import run, storage
from executed import BY_NUMBER, NOTEBOOKS, ROOT, execute, try_to_run
from servers import ceph
from servers.embedded import connected
from servers.fault_proxy import fault_proxy

PHOTOS = Path(os.environ.get("PHOTOS_ZIP", ROOT.parent / "shared/datasets/photos5.zip"))  # real photos, 5 classes


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
        assert name not in found
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
    assert any(re.search("^from helpers", cell.source, re.M) for cell in code)
    assert "application/json" in code[-1].source and "results" in code[-1].source
    assert max(len(cell.source.splitlines()) for cell in code if not cell.source.startswith("#| export")) <= 25


SHORT = dict(epochs=2, transfer="")  # with every(6): a short way from a zip to predictions


@pytest.fixture(scope="module")
def whole(embedded_env, tmp_path_factory, every):
    """A bucket that 01 to 03 have filled, and what is in it then."""
    bucket = f"test-{secrets.token_hex(6)}"
    with connected(embedded_env):
        execute("01 02 03", tmp_path_factory.mktemp("whole"), bucket=bucket, dataset_zip=every(6), **SHORT)
        return SimpleNamespace(bucket=bucket, contents=contents(bucket))


def call(folder, *words):
    """A command of the environment's in a folder; fails with what it said."""
    command = [Path(sys.executable).with_name(words[0]), *map(str, words[1:])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_from_any_folder_and_by_any_tool_it_is_the_same(whole, moto_env, tmp_path, bucket, every):
    with connected(moto_env):
        notebooks = f"s3://{bucket}-notebooks"
        storage.create_bucket(f"{bucket}-notebooks")
        storage.write(f"{notebooks}/01.ipynb", BY_NUMBER["01"].read_bytes())
        options = "-p", "bucket", bucket, "-p", "dataset_zip", every(6)
        call(tmp_path, "papermill", f"{notebooks}/01.ipynb", f"{notebooks}/out.ipynb", *options)
        executed = nbformat.reads(storage.read(f"{notebooks}/out.ipynb").decode(), as_version=4)
        assert run.read_results(executed)["train"] == 70
        for number, options in ("02", SHORT), ("03", {}):
            options = options | {"bucket": bucket}
            papermill.execute_notebook(BY_NUMBER[number], tmp_path / f"{number}.ipynb", options, prepare_only=True)
        call(tmp_path, "jupyter", "nbconvert", "--execute", "--to", "notebook", "--inplace", "02.ipynb")
        training = nbformat.read(tmp_path / "02.ipynb", as_version=4)
        bars = [cell.outputs for cell in training.cells if cell.cell_type == "code" and "loop.fit(" in cell.source]
        assert any(bars) and all(len(outputs) < 4 for outputs in bars), "a progress bar is one output"
        call(tmp_path, "pytest", "-p", "no:cacheprovider", "--nbmake", "03.ipynb")
        record = {"leaves/split.json": None}  # ETags of this server stand in it
        assert contents(bucket) | record == whole.contents | record


@pytest.mark.slow
def test_every_notebook_of_images_from_every_folder_and_by_every_tool(whole, embedded, tmp_path, bucket, every):
    """01 and 02 by papermill's command from three folders and from S3 to S3; 01 to 03 by nbconvert and by nbmake."""
    options = {"01": {"dataset_zip": every(6)}, "02": SHORT, "03": {}}
    storage.create_bucket(f"{bucket}-notebooks")
    for number in "01", "02":
        storage.write(f"s3://{bucket}-notebooks/{number}.ipynb", BY_NUMBER[number].read_bytes())
    trained = {name: value for name, value in whole.contents.items() if not name.startswith("runs/inference")}
    for i, folder in enumerate((ROOT, ROOT / "notebooks", tmp_path, None)):
        for number in "01", "02":
            words = [word for item in options[number].items() for word in ("-p", *item)]
            place = BY_NUMBER[number], tmp_path / "out.ipynb"
            if folder is None:
                place = f"s3://{bucket}-notebooks/{number}.ipynb", f"s3://{bucket}-notebooks/out.ipynb"
            call(folder or tmp_path, "papermill", *place, "-p", "bucket", f"{bucket}-{i}", *words)
        assert contents(f"{bucket}-{i}") == trained
    tools = ("jupyter", "nbconvert", "--execute", "--to", "notebook", "--inplace"), ("pytest", "--nbmake")
    for tool in tools:
        for number in options:
            given = options[number] | {"bucket": f"{bucket}-{tool[0]}"}
            papermill.execute_notebook(BY_NUMBER[number], tmp_path / f"{number}.ipynb", given, prepare_only=True)
            call(tmp_path, *tool, f"{number}.ipynb")
        assert contents(f"{bucket}-{tool[0]}") == whole.contents


def test_helpers_are_found_beside_a_notebook_without_installing(tmp_path):
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder)]\n"
        "sys.path.insert(0, '')\nimport helpers.storage; print(helpers.storage.REPOSITORY)"
    )
    for folder, found in (ROOT / "notebooks", str(ROOT)), (tmp_path, ""):
        done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True)
        assert done.stdout.strip() == found


def test_from_a_zip_to_predictions(request, tmp_path, bucket, every):
    """In a real Ceph where there is one, with worker processes; nothing is left on the disk, and no secret anywhere."""
    environment = request.getfixturevalue("embedded_env" if ceph.missing() else "ceph_env")
    with connected(environment):
        before = on_disk()
        options = dict(dataset_zip=every(2), epochs=6, num_workers=2, transfer="")
        results = execute("01 02 03", tmp_path, bucket=bucket, **options)
        assert min(results[f"{each}_images_per_second"] for each in ("train", "loader")) > 0
        assert results["classes"] == 5 and results["test"] == results["images"] == 45
        assert results["objects"] == 2 * sum(results[part] for part in ("train", "val", "test")) + 1
        assert results["loader_speedup_over_naive"] > 1.5, "six times is usual"
        assert min(results["val_accuracy"], results["test_accuracy"], results["test_macro_f1"]) > 0.4, "chance is 0.2"

        names, kept = contents(bucket), "hyperparameters.json history.csv metrics.json manifest.json code.py"
        for part in *kept.split(), "plots/curves.png", "model/model.json":
            assert f"runs/train_cnn/TIME/{part}" in names
        assert sum(name.startswith("models/cnn/") for name in names) == 2
        assert on_disk() == before, "the notebooks leave nothing on the local disk"

        objects = [name for name in storage.objects(f"s3://{bucket}") if name.startswith(("runs/", "models/"))]
        written = [storage.read(f"s3://{bucket}/{name}") for name in objects]
        written += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        assert len(written) > 20
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            assert not any(environment[name].encode() in text for text in written), f"{name} is in an output"


@pytest.mark.slow
def test_the_readmes_accuracy(embedded, tmp_path, bucket):
    results = execute("01 02 03", tmp_path, bucket=bucket, transfer="")
    assert (results["objects"], results["train"], results["val"], results["test"]) == (1201, 420, 90, 90)
    assert min(results["val_accuracy"], results["test_accuracy"], results["test_macro_f1"]) > 0.75


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason=f"no {PHOTOS.name}: set PHOTOS_ZIP to a zip of real photos to run this")
def test_real_photos(embedded, tmp_path, bucket):
    options = dict(dataset_zip=str(PHOTOS), dataset="photos", model_url=f"s3://{bucket}/models/photos", image_size=32)
    results = execute("01 02 03", tmp_path, bucket=bucket, transfer="", **options)
    assert (results["train"], results["val"], results["test"]) == (1260, 270, 270)
    assert results["test_accuracy"] >= 0.65


def test_a_local_folder_is_predicted_too_and_another_split_is_refused(embedded, tmp_path, whole, every):
    names = list(storage.objects(f"s3://{whole.bucket}/leaves/test"))[::2]
    for name in names:
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
        assert outcome.status == "FAILED" and bucket in outcome.error
        assert f"make run NOTEBOOKS={needed}" in outcome.error
        storage.create_bucket(bucket)  # the first looks for data where there is no bucket


def kill_the_kernel():
    for process in psutil.Process().children():  # the forked kernel ends with the process that asked for it
        with contextlib.suppress(psutil.Error):
            if "-ISc" in process.cmdline():
                process.kill()


def test_a_server_that_fails_all_the_time_and_a_kernel_killed_in_the_middle(embedded, tmp_path, bucket, every, whole):
    """On a server that cannot copy either, and killed while it trains: in the end all is as if nothing had been."""
    faults, seen = dict(slow_down_every=5, reset_every=11, truncate_every=7, no_copy=True), set()
    with (
        fault_proxy(embedded["AWS_ENDPOINT_URL"], **faults) as proxy,
        connected(embedded | {"AWS_ENDPOINT_URL": proxy.url}),
    ):

        def look(_):
            if re.match("PUT .*/checkpoints/", proxy.latest) and proxy.latest not in seen:
                seen.add(proxy.latest)
                if len(seen) == 2:
                    kill_the_kernel()

        proxy.on_request = look
        first, second = try_to_run("01 02", dict(bucket=bucket, dataset_zip=every(6), **SHORT), tmp_path / "killed")
        assert (first.status, second.status) == ("ok", "FAILED") and "DeadKernelError" in second.error
        names = storage.objects(f"s3://{bucket}")
        assert any("/checkpoints/step_" in name for name in names) and not any("models/" in name for name in names)
        execute("02 03", tmp_path, bucket=bucket, **SHORT)
        assert min(proxy.slow_downs, proxy.resets, proxy.truncations) > 10 and proxy.copies_refused
        assert contents(bucket) == whole.contents
