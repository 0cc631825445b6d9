"""The notebooks as they are written; those of images, executed with papermill as a user does, over real S3 servers, and
what they leave in the bucket."""

import contextlib
import os
import re
from pathlib import Path

import nbformat
import psutil
import pytest

from helpers import run, storage
from executed import BY_NUMBER, NOTEBOOKS, ROOT, execute
from servers.embedded import connected
from servers.fault_proxy import fault_proxy

PHOTOS = Path(os.environ.get("PHOTOS_ZIP", ROOT.parent / "shared/datasets/photos5.zip"))  # real photos, 5 classes


def on_disk():
    """{path: time} of the files of the working tree, without what does not belong to it."""
    others = {".git", ".venv", ".s3", "__pycache__", "condaenv.requirements.txt"}  # the last is of another test
    paths = (path for path in ROOT.rglob("*") if not others & set(path.parts))
    return {path: path.stat().st_mtime for path in paths if path.is_file()}


def contents(bucket):
    """{name: checksum} of a bucket, the times in names of runs taken out; of what runs hold, names and models only."""
    found = {}
    for name, item in storage.objects(f"s3://{bucket}").items():
        name = re.sub(r"\d{4}-\d\d-\d\dT[\d.-]+", "TIME", name)
        assert name not in found
        found[name] = item["size"] and (item["e_tag"] if not name.startswith("runs/") or "/model/" in name else None)
    return found


# ------------------------------------------------------------------------------------------- how they are written


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_as_a_reader_expects_it(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    opening = notebook.cells[0]
    assert opening.cell_type == "markdown" and all(
        words in opening.source for words in ("**You will learn**", "**You need**", "**It takes**"))
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip the outputs: they are not kept in git"
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert all(re.fullmatch(r"\w+ = .+  # .+", line) for line in tagged[0].source.splitlines())
    assert not re.search(r"(?m)^\w*(secret|token|password|access_key)", tagged[0].source)
    assert any(re.search("^from helpers", cell.source, re.M) for cell in code)
    assert "application/json" in code[-1].source and "results" in code[-1].source
    assert max(len(cell.source.splitlines()) for cell in code if not cell.source.startswith("#| export")) <= 25


# ---------------------------------------------------------------------------------------- from a zip to predictions


@pytest.mark.parametrize("server", ["embedded", "moto", "ceph"])
def test_from_a_zip_to_predictions(server, request, tmp_path, bucket, every):
    environment = request.getfixturevalue(f"{server}_env")
    with connected(environment):
        before = on_disk()
        options = {"embedded": {}, "moto": dict(epochs=1, dataset_zip=every(4)),
                   "ceph": dict(epochs=1, dataset_zip=every(4), num_workers=2)}[server]

        results = execute("01 02 03", tmp_path, bucket=bucket, **options)
        for rate in ("train_images_per_second", "loader_images_per_second", "loader_speedup_over_naive"):
            assert results[rate] > 0
        assert results["classes"] == 5 and results["test"] == results["images"] > 0
        assert results["objects"] == 2 * sum(results[part] for part in ("train", "val", "test")) + 1
        if server == "embedded":  # with the parameters as they stand
            assert (results["objects"], results["train"], results["val"], results["test"]) == (1201, 420, 90, 90)
            assert min(results["val_accuracy"], results["test_accuracy"], results["test_macro_f1"]) > 0.75
            assert results["loader_speedup_over_naive"] > 1.5, "six times is usual"

        names = contents(bucket)
        for part in ("hyperparameters.json", "history.csv", "metrics.json", "manifest.json", "code.py", "plots/curves.png",
                     "model/model.json"):
            assert f"runs/train_cnn/TIME/{part}" in names
        assert sum(name.startswith("models/cnn/") for name in names) == 2
        assert on_disk() == before, "the notebooks leave nothing on the local disk"

        written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        written += [bytes(storage.obstore.get(storage.store(bucket), item["path"]).bytes())
                    for name, item in storage.objects(f"s3://{bucket}").items() if name.startswith(("runs/", "models/"))]
        assert len(written) > 20
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            assert not any(environment[name].encode() in text for text in written), f"{name} is in an output"

        if server == "moto":  # 03 predicts a local folder, too
            names = list(storage.objects(f"s3://{bucket}/leaves/test"))[::2]
            for name in names:
                path = tmp_path / "mine" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(bytes(storage.obstore.get(storage.store(bucket), f"leaves/test/{name}").bytes()))
            local = execute("03", tmp_path, bucket=bucket, test_url=str(tmp_path / "mine"))
            assert local["images"] == len(names) > 5


def test_running_01_again_changes_nothing_and_another_split_is_refused(embedded, tmp_path, bucket, every):
    some = dict(bucket=bucket, dataset_zip=every(6))

    def written():
        return {name: item["last_modified"] for name, item in storage.objects(f"s3://{bucket}/leaves").items()}

    execute("01", tmp_path, **some)
    first = written()
    execute("01", tmp_path, **some)
    assert written() == first
    [outcome] = run.run_notebooks([BY_NUMBER["01"]], dict(some, split="80/10/10"), tmp_path / "again")
    assert outcome.status == "FAILED" and "is split already, with other ratios" in outcome.error
    assert written() == first


@pytest.mark.parametrize("number, needed", [("02", "01"), ("03", "02"), ("07", "05")])
def test_each_notebook_alone_says_which_one_it_needs(number, needed, embedded, tmp_path, bucket):
    for exists in (False, True):
        if exists:
            storage.create_bucket(bucket)
        [outcome] = run.run_notebooks([BY_NUMBER[number]], dict(bucket=bucket), tmp_path / f"{exists}")
        assert outcome.status == "FAILED"
        assert f"make run NOTEBOOKS={needed if exists or number == '07' else '01'}" in outcome.error
        assert bucket in outcome.error


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"no {PHOTOS.name}: set PHOTOS_ZIP to a zip of real photos to run this")
def test_real_photos(embedded, tmp_path, bucket):
    results = execute("01 02 03", tmp_path, bucket=bucket, dataset_zip=str(PHOTOS), dataset="photos",
                      model_url=f"s3://{bucket}/models/photos", image_size=32)
    assert (results["train"], results["val"], results["test"]) == (1260, 270, 270)
    assert results["test_accuracy"] >= 0.65


# ------------------------------------------------------------------------------------------------ when things break


def test_a_server_that_fails_all_the_time_and_cannot_copy(embedded, tmp_path, bucket, every):
    execute("01 02 03", tmp_path, bucket=bucket, epochs=1, dataset_zip=every(20))
    whole = contents(bucket)
    faults = dict(slow_down_every=3, reset_every=7, truncate_every=5, no_copy=True)
    url = embedded["AWS_ENDPOINT_URL"]
    with fault_proxy(url, **faults) as proxy, connected({**embedded, "AWS_ENDPOINT_URL": proxy.url}):
        execute("01 02 03", tmp_path, bucket=f"{bucket}-faults", epochs=1, dataset_zip=every(20))
        assert min(proxy.slow_downs, proxy.resets, proxy.truncations) > 10 and proxy.copies_refused
    assert contents(f"{bucket}-faults") == whole


def kill_the_kernel():
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ipykernel_launcher" in " ".join(process.cmdline()):
                process.kill()


MOMENTS = [("upload", "01", 0.25), ("split", "01", 0.65), ("training", "02", 0.8)]  # and when, as a part of the requests


@pytest.mark.parametrize("moment, number, part", MOMENTS)
def test_a_kernel_killed_in_the_middle(moment, number, part, embedded, tmp_path, bucket, every):
    whole, killed, data = f"{bucket}-whole", f"{bucket}-killed", dict(dataset_zip=every(4))
    options = data if number == "01" else dict(epochs=2)
    url = embedded["AWS_ENDPOINT_URL"]
    with fault_proxy(url) as proxy, connected({**embedded, "AWS_ENDPOINT_URL": proxy.url}):
        if number == "02":
            execute("01", tmp_path, bucket=whole, **data)
            execute("01", tmp_path, bucket=killed, **data)
        before = proxy.requests
        execute(number, tmp_path, bucket=whole, **options)
        last = proxy.requests + int(part * (proxy.requests - before))

        proxy.on_request = lambda count: kill_the_kernel() if count == last else None
        [outcome] = run.run_notebooks([BY_NUMBER[number]], dict(bucket=killed, **options), tmp_path / "killed")
        proxy.on_request = None
        assert outcome.status == "FAILED" and "DeadKernelError" in outcome.error
        names = storage.objects(f"s3://{killed}")
        if moment == "upload":
            assert 0 < sum("/raw/" in name for name in names) < 150
        if moment == "split":
            assert 0 < sum("/train/" in name for name in names) < 105
        if moment == "training":
            assert not any(name.startswith("models/") for name in names)

            assert any("/checkpoints/step_" in name for name in names)  # to go on from

        execute(number, tmp_path, bucket=killed, **options)
        assert contents(killed) == contents(whole)
