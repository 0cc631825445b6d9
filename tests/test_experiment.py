"""Runs and models in a local folder, in memory and on S3; what is left when the writing process is killed."""

import csv
import io
import json
import os
import queue
import shutil
import signal
import subprocess
import sys

import cv2
import fsspec
import matplotlib.figure
import numpy as np
import pytest
import torch
from servers.embedded import connected
from servers.fault_proxy import fault_proxy
from torch import nn

from helpers import experiment, storage

SECRET = "AWS_SECRET_ACCESS_KEY"


@pytest.fixture(scope="module", autouse=True)
def s3(tmp_path_factory):
    """A connected server with a bucket."""
    with connected(storage.serve(tmp_path_factory.mktemp("served"))):
        storage.create_bucket("experiments")
        yield


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path):
    """A place for runs and models that is not there yet."""
    name = request.node.originalname
    places = {"local": tmp_path, "memory": "memory:/", "s3": "s3://experiments"}
    return f"{places[request.param]}/{name}"


def linear(seed, size=4):
    torch.manual_seed(seed)
    return nn.Linear(size, 3)


def same(weights, model):
    state = model.state_dict()
    return weights.keys() == state.keys() and all(
        torch.equal(weights[name], state[name]) and weights[name].dtype == state[name].dtype for name in state)


def figure():
    drawn = matplotlib.figure.Figure(figsize=(2, 1))
    drawn.subplots().plot([1, 2], [3, 4])
    return drawn


def full_run(url, **hyperparameters):
    run = experiment.Run(url, **hyperparameters)
    run.save_history([{"epoch": 1, "loss": 0.5}])
    run.save_history([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "größe, neu": 'a "b"'}])
    run.save_figure("curves", figure())
    run.save_model(linear(0), classes=["a", "b"])
    run.save_model(linear(1), classes=["a", "b", "c"])
    run.finish({"accuracy": 0.75, "model": "there"})
    return run


# --------------------------------------------------------------------------------------------------------------- runs


def test_a_run_leaves_all_its_files_and_a_manifest_that_lists_them(url):
    run = full_run(url, epochs=2, rate=0.1, sizes=(1, 2), note="é", nothing=None)
    folder, of = run.url.rsplit("/", 1)
    assert folder == url
    weights, = (name for name in experiment.files(run.url) if name.endswith(".safetensors"))
    listed = json.loads(experiment.read(f"{run.url}/manifest.json"))
    assert listed == ["history.csv", "hyperparameters.json", "metrics.json", weights, "model/model.json",
                      "plots/curves.png"]
    assert experiment.files(url) == sorted(f"{of}/{name}" for name in [*listed, "manifest.json"])
    assert json.loads(experiment.read(f"{run.url}/hyperparameters.json")) == {
        "epochs": 2, "rate": 0.1, "sizes": [1, 2], "note": "é", "nothing": None}
    assert json.loads(experiment.read(f"{run.url}/metrics.json")) == {"accuracy": 0.75, "model": "there"}
    text = experiment.read(f"{run.url}/history.csv").decode()
    assert list(csv.DictReader(io.StringIO(text, newline=""))) == [
        {"epoch": "1", "loss": "0.5", "größe, neu": ""}, {"epoch": "2", "loss": "0.25", "größe, neu": 'a "b"'}]
    image = experiment.read(f"{run.url}/plots/curves.png")
    assert image.startswith(b"\x89PNG\r\n") and cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR).std() > 0
    loaded, config = experiment.load_model(f"{run.url}/model")
    assert same(loaded, linear(1)) and config == {"classes": ["a", "b", "c"]}


def test_the_manifest_comes_last():
    order = []

    class Remember(experiment.Run):
        def _write(self, name, data):
            super()._write(name, data)
            order.append(experiment.files(self.url))

    Remember("memory://order").finish({})
    assert "manifest.json" not in order[-2] and "metrics.json" in order[-2] and "manifest.json" in order[-1]


def test_only_a_cut_off_run_with_the_same_hyperparameters_is_taken_up_again(url):
    first = experiment.Run(url, a=1, b=(2, 3))
    first.save_figure("early", figure())
    assert experiment.Run(url, b=(2, 3), a=1).url == first.url
    other = experiment.Run(url, a=1, b=(2, 4))
    assert other.url != first.url
    again = experiment.Run(f"{url}/", a=1, b=(2, 3))
    assert again.url == first.url
    again.finish({})
    assert "plots/early.png" in json.loads(experiment.read(f"{again.url}/manifest.json"))
    new = experiment.Run(url, a=1, b=(2, 3))
    assert new.url not in (first.url, other.url) and new.url > first.url


def test_runs_of_another_folder_are_left_alone(url):
    inside, beside = experiment.Run(f"{url}/train", a=1), experiment.Run(f"{url}-2", a=1)
    mine = experiment.Run(url, a=1)
    assert mine.url.rsplit("/", 1)[0] == url and mine.url not in (inside.url, beside.url)
    assert experiment.Run(f"{url}/train", a=1).url == inside.url


def test_the_newest_of_several_cut_off_runs_is_taken_up():
    for name in "2025-01-01", "2026-01-01":
        experiment.write(f"memory://several/{name}/hyperparameters.json", b'{"a": 1}')
    assert experiment.Run("memory://several", a=1).url == "memory://several/2026-01-01"


def test_no_file_of_a_run_holds_a_secret():
    run = full_run("s3://experiments/secrets", bucket="experiments")
    for name in experiment.files(run.url):
        data = experiment.read(f"{run.url}/{name}")
        assert os.environ[SECRET].encode() not in data and os.environ["AWS_ACCESS_KEY_ID"].encode() not in data


def test_a_bucket_that_is_not_there_is_a_clear_error():
    with pytest.raises(storage.StorageError, match="no-such-bucket"):
        experiment.Run("s3://no-such-bucket/runs", a=1)


# ------------------------------------------------------------------------------------------------------------- models


class Odd(nn.Module):
    """Weights of many types and memory layouts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.brain = nn.Parameter(torch.randn(5, 3).to(torch.bfloat16))
        self.transposed = nn.Parameter(torch.randn(4, 6).T)
        self.channels_last = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.register_buffer("expanded", torch.randn(3, 1).expand(3, 7))
        self.register_buffer("part", torch.randn(10)[2:5])
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("count", torch.tensor(2**40))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.one, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.one.weight


def test_a_model_comes_back_with_every_weight_and_its_config(url):
    config = {"architecture": "odd", "classes": ["größe", "b"], "mean": [0.5, 0.25], "nothing": None}
    names = experiment.save_model(Odd(), url, **config)
    loaded, loaded_config = experiment.load_model(url)
    assert same(loaded, Odd()) and loaded_config == config
    assert sorted(names) == experiment.files(url)
    target = Odd()
    target.expanded = torch.zeros(3, 7)  # PyTorch copies nothing into the other
    nn.init.zeros_(target.one.weight)
    target.load_state_dict(loaded)
    assert same(loaded, target)


def test_a_slash_at_the_end_makes_no_difference(url):
    experiment.save_model(linear(0), f"{url}/")
    experiment.save_model(linear(1), url)
    assert same(experiment.load_model(f"{url}/")[0], linear(1)) and len(experiment.files(url)) == 2


def test_saving_again_leaves_no_old_weights_and_touches_nothing_else(url):
    experiment.write(f"{url}/notes.txt", b"mine")
    experiment.write(f"{url}/model-of/model-1.safetensors", b"another's")
    experiment.write(f"{url}-2/model-1.safetensors", b"another's")
    for seed in 0, 1, 1, 2:
        names = experiment.save_model(linear(seed), url, seed=seed)
    assert experiment.files(url) == sorted([*names, "notes.txt", "model-of/model-1.safetensors"])
    assert experiment.files(f"{url}-2") == ["model-1.safetensors"]
    loaded, config = experiment.load_model(url)
    assert same(loaded, linear(2)) and config == {"seed": 2}


def test_damaged_weights_are_a_clear_error(url):
    weights, _ = experiment.save_model(linear(0), url)
    data = bytearray(experiment.read(f"{url}/{weights}"))
    data[-1] ^= 1
    for damaged in bytes(data), data[:-5], b"":
        experiment.write(f"{url}/{weights}", bytes(damaged))
        with pytest.raises(storage.StorageError, match=f"{url}/{weights} is damaged.*save the model again"):
            experiment.load_model(url)


def test_a_model_that_is_not_there_is_not_found(url):
    with pytest.raises(storage.NotFound, match=f"{url}/model.json"):
        experiment.load_model(url)


# ----------------------------------------------------------------------------------------------- whole or not at all


def old_or_new(url):
    """The seed of the model that is at the URL, which must be whole."""
    weights, config = experiment.load_model(url)
    assert same(weights, linear(config["seed"]))
    return config["seed"]


@pytest.fixture(scope="module")
def savers(tmp_path_factory):
    """A process that has imported all there is to import and forks one that saves a model for every line it reads."""
    program = tmp_path_factory.mktemp("savers") / "savers.py"
    program.write_text("""
import os, sys, torch
from helpers import experiment
for line in sys.stdin:
    os.environ["AWS_ENDPOINT_URL"], url, seed = line.split()
    if pid := os.fork():
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        torch.manual_seed(int(seed))
        experiment.save_model(torch.nn.Linear(4, 3), url, seed=int(seed))
        os._exit(0)
""")
    process = subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.communicate(timeout=30)


def test_a_process_killed_at_any_request_leaves_the_old_or_the_new_model(savers):
    url, found, status, number = "s3://experiments/killed", [], None, 0
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        while status != 0:
            experiment.save_model(linear(0), url, seed=0)
            number += 1
            pids, last = queue.SimpleQueue(), proxy.requests + number

            def kill(request):
                if request == last:
                    os.kill(pids.get(timeout=30), signal.SIGKILL)

            proxy.on_request = kill
            print(proxy.url, url, 1, file=savers.stdin, flush=True)
            pids.put(int(savers.stdout.readline()))
            status = int(savers.stdout.readline())
            found.append(old_or_new(url))
            assert status in (0, -signal.SIGKILL)
    assert found == sorted(found) and found.count(0) > 1 and found.count(1) > 1  # killed before and after the change
    assert len(experiment.files(url)) == 2


def test_a_local_write_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file"
    experiment.write(path, b"old")
    process = subprocess.Popen([sys.executable, "-c", """
import sys
from helpers import experiment
print("ready", flush=True)
while True:
    for letter in b"ab":
        experiment.write(sys.argv[1], bytes([letter]) * 3_000_000)
""", path], stdout=subprocess.PIPE)
    process.stdout.readline()
    while path.read_bytes() == b"old":
        pass
    seen = {path.read_bytes() for _ in range(200)}
    process.kill()
    process.communicate()
    seen.add(path.read_bytes())
    assert seen == {b"a" * 3_000_000, b"b" * 3_000_000}


def test_a_local_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    experiment.write(f"{tmp_path}/file", b"old")
    with pytest.raises(TypeError):
        experiment.write(f"{tmp_path}/file", "no bytes")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(storage.StorageError, match="folder"):
        experiment.write(f"{tmp_path}/folder", b"new")
    assert experiment.files(tmp_path) == ["file"] and experiment.read(f"{tmp_path}/file") == b"old"


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
def test_a_local_write_is_whole_on_another_file_system_than_that_of_temporary_files(tmp_path):
    folder = f"/dev/shm/{tmp_path.name}-{os.getpid()}"
    try:
        experiment.write(f"{folder}/file", b"old")
        inode = os.stat(f"{folder}/file").st_ino
        with open(f"{folder}/file", "rb") as before:
            experiment.write(f"{folder}/file", b"new")
            assert before.read() == b"old" and os.stat(f"{folder}/file").st_ino != inode
        assert os.listdir(folder) == ["file"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_files_of_local_urls_are_found_in_every_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in "here", f"file://{tmp_path}/there", tmp_path / "path":
        experiment.write(f"{place}/a/b", b"data")
        assert experiment.files(place) == ["a/b"] and experiment.read(f"{place}/a/b") == b"data"
    assert fsspec.filesystem("file").exists(tmp_path / "here/a/b")
