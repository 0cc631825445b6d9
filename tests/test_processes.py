"""Notebooks on several processes and machines: the same results as on one, and what happens when one breaks."""

import functools
import multiprocessing
import os
import signal
import sys
import time

import psutil
import pytest
import torch
from servers import free_port
from servers.embedded import cleaned

from executed import ForkedKernel, forked_kernels
from helpers import experiment, run, storage
from helpers.chapters import processes
from test_run import outputs_of, write


TRAIN = (
    "#parameters\nbucket = ''\nbatch_size = 64\nepochs = 3\nseed = 0",
    """
import torch
from torch.utils.data import DataLoader, TensorDataset
from helpers import experiment, storage
from helpers.training import TrainLoop
storage.connect()
storage.create_bucket(bucket)
run = experiment.Run(f"s3://{bucket}/runs/train", epochs=epochs)
torch.manual_seed(seed)
model, data = torch.nn.Linear(6, 2), TensorDataset(torch.randn(96, 6), torch.randint(2, (96,)))
train, val = (DataLoader(data, batch_size) for _ in range(2))
optimizer, criterion = torch.optim.SGD(model.parameters(), 0.5), torch.nn.CrossEntropyLoss()
loop = TrainLoop(model, train, val, optimizer=optimizer, criterion=criterion)
run.save_model(model, **loop.fit(epochs)[-1])
run.finish({})""",
)
MEET = (
    "#parameters\nmeets = 0",
    """
import os, time
from pathlib import Path
rank = os.environ["RANK"]
print("rank", rank)
if meets:
    from torch import distributed
    distributed.init_process_group("gloo")
Path(f"begun-{rank}").write_text(str(os.getpid()))""",
    """
if not meets:
    time.sleep(600)
if rank == "1":
    raise ValueError("no luck today")
distributed.barrier()  # where process 0 waits for the other one""",
)


@pytest.fixture(autouse=True)
def environment(embedded_env):
    """What a user has set who has an S3."""
    with cleaned():
        os.environ |= embedded_env
        yield


@pytest.fixture
def ready_kernels(monkeypatch):
    """Kernels have imported PyTorch already."""
    forked_kernels()
    monkeypatch.setattr(run, "run_papermill", functools.partial(run.run_papermill, kernel=ForkedKernel))


def main(folder, words):
    os.chdir(folder)
    with open("said", "w") as sys.stdout:
        sys.stderr = sys.stdout
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        sys.exit(processes.main([*map(str, words)]))


def launch(folder, *words):
    """Start `python -m helpers run` with these words in a copy of this process; what it says goes to folder/said."""
    folder.mkdir(exist_ok=True)
    launcher = multiprocessing.get_context("fork").Process(target=main, args=(folder, words))
    launcher.start()
    return launcher


def left(processes):
    """Those of the processes that have not ended after some seconds."""
    alive = psutil.wait_procs(processes, timeout=10)[1]
    return [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def begun(folder):
    """The kernels of both processes, then the processes, when they are in the middle of a notebook."""
    deadline = time.monotonic() + 90
    while len(texts := [path.read_text() for path in sorted(folder.glob("begun-*"))]) < 2 or "" in texts:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kernels = [psutil.Process(int(text)) for text in texts]
    return kernels + [kernel.parent() for kernel in kernels]


@pytest.mark.slow
def test_two_machines_come_to_what_one_process_comes_to(tmp_path, ready_kernels):
    """Here these are two launchers on one machine. Two processes of one launcher do so on the page of 09."""
    notebook, host = write(tmp_path, "train.ipynb", *TRAIN), f"127.0.0.1:{free_port()}"
    launch(tmp_path / "alone", notebook, "-p", "bucket", "alone", "-p", "batch_size", 16).join(180)
    words = [notebook, "-p", "bucket", "two", "-p", "batch_size", 8, "--nodes", 2, "--rendezvous", host, "--node-rank"]
    nodes = [launch(tmp_path / str(rank), *words, rank) for rank in range(2)]
    for node in nodes:
        node.join(180)
        node.kill()
    said = [(tmp_path / f"{rank}/said").read_text() for rank in range(2)]
    assert [node.exitcode for node in nodes] == [0, 0] and "Traceback" not in said[0], said
    assert said[1].endswith("Results are on the first machine.\n")
    storage.connect()
    found = []
    for runs in "s3://alone/runs/train", "s3://two/runs/train":
        [run] = {name.split("/")[0] for name in storage.list_files(runs)}
        found.append(experiment.load_model(f"{runs}/{run}/model"))
    (one, losses), (two, others) = found
    assert [losses["train_loss"], losses["val_loss"]] == pytest.approx([others["train_loss"], others["val_loss"]])
    for name, weights in one.items():
        torch.testing.assert_close(weights, two[name], rtol=1e-4, atol=1e-5)


def test_error_in_one_process_is_told_once_with_its_number_and_not_what_it_did_to_the_other(tmp_path, ready_kernels):
    notebook = write(tmp_path, "meet.ipynb", *MEET)
    launcher = launch(tmp_path, notebook, "--processes", 2, "-o", "out", "-p", "meets", 1)
    launcher.join()
    said = (tmp_path / "said").read_text()
    assert launcher.exitcode == 1 and "Traceback" not in said
    assert said.count("FAILED meet.ipynb, process 1: In [4]: ValueError: no luck today\n") == 1
    kernels = [int(path.read_text()) for path in tmp_path.glob("begun-*")]
    assert len(kernels) == 2 and not left([psutil.Process(one) for one in kernels if psutil.pid_exists(one)])
    assert outputs_of(tmp_path / "out/meet.ipynb").startswith("rank 0\n")  # that of process 0 is kept
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"meet.ipynb", "meet.html", "index.html"}
    (tmp_path / "errors").mkdir()
    for name, text in ("1", "process 0: closed by peer"), ("2", "process 1: no luck"):
        (tmp_path / "errors" / name).write_text(text)
    assert processes.first_error(tmp_path / "errors", 0, None) == "process 1: no luck"  # the other noticed it first


@pytest.mark.parametrize(
    "who, number, code, sentence",
    [
        ("process 1", signal.SIGKILL, 1, "FAILED meet.ipynb, process 1: ended with exit code -9 ("),
        ("launcher", signal.SIGTERM, 130, "interrupted meet.ipynb"),
        ("launcher", signal.SIGKILL, -9, ""),  # says and saves nothing
    ],
)
def test_what_is_killed_takes_all_of_it_along(who, number, code, sentence, tmp_path):
    launcher = launch(tmp_path, write(tmp_path, "meet.ipynb", *MEET), "--processes", 2, "-o", "out")
    try:
        family = begun(tmp_path)
        os.kill(launcher.pid if who == "launcher" else family[3].pid, number)
        launcher.join(30)
        assert not launcher.is_alive() and not left(family)
    finally:
        launcher.kill()
    said = (tmp_path / "said").read_text()
    assert launcher.exitcode == code and sentence in said and "Traceback" not in said
    if sentence:
        assert "distributed.barrier" in (tmp_path / "out/meet.ipynb").read_text()
        assert (tmp_path / "out/index.html").exists()


def test_wrong_words_are_told_in_a_sentence_and_start_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "connect", lambda: None)
    write(tmp_path, "meet.ipynb", *MEET)
    for words, sentence in (
        ("--processes -1", "--processes is 0 or more, not -1"),
        ("--nodes 2", "several nodes take"),
        ("--nodes 2 --node-rank 2 --rendezvous 10.0.0.1:29500", "several nodes take"),
        ("-p nobody 1", "error: no parameter nobody in these notebooks; there are: meets\n"),
    ):
        with pytest.raises(SystemExit) as stopped:
            processes.main(["meet.ipynb", *words.split()])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and sentence in said.splitlines(True)[-1] and "Traceback" not in said
    assert [path.name for path in tmp_path.rglob("*")] == ["meet.ipynb"]
