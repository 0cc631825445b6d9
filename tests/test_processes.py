"""Notebooks on several processes and machines: the same results as on one, and what happens when one breaks."""

import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch
from servers import free_port

from helpers import experiment, run, storage
from helpers.chapters import processes
from test_run import SECRET, outputs_of, write


TRAIN = (
    "#parameters\nbatch_size = 64\nplace = ''\nnote = 'none'\nshows_secret = False",
    """
import os, socket, torch
from IPython.display import display
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from helpers import experiment
from helpers.training import TrainLoop
torch.set_num_threads(1)
run = experiment.Run(f"{place}/runs", note=note)""",
    """
torch.manual_seed(0)
inputs = torch.randn(96, 6)
data = TensorDataset(inputs, (inputs[:, 0] > inputs[:, 1]).long())
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
train, val = (DataLoader(data, batch_size) for _ in range(2))
loop = TrainLoop(model, train, val, optimizer=torch.optim.SGD(model.parameters(), 0.5), criterion=nn.CrossEntropyLoss())
loop.fit(3)
run.save_history(loop.history)
run.save_model(model)
experiment.save_model(model, f"{place}/model", note=note)
print("rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), "on", socket.gethostname())
if shows_secret:
    print(os.environ["AWS_SECRET_ACCESS_KEY"])
results = {"note": note, "steps": loop.steps, "val_loss": loop.history[-1]["val_loss"]}
run.finish(results)
display({"application/json": results, "text/plain": ""}, raw=True)""",
)
MEET = (
    "#parameters\nmeets = 0",
    """
import os, time
from pathlib import Path
rank = os.environ["RANK"]
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


def start(folder, env, *words, prefix=()):
    """`python -m helpers run` with these words."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "helpers", "run", *map(str, words)],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, seconds=180):
    """(exit code, stdout, stderr); with what is left of it after that killed, and an error for a hang."""
    family = psutil.Process(process.pid).children(recursive=True)
    try:
        return (lambda said: (process.returncode, *said))(process.communicate(timeout=seconds))
    finally:
        end(process, *family)


def end(*processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.kill()


def left(processes, seconds=5):
    """Those of the processes that have not ended after some seconds."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def environment(moto_env):
    """What a user has set who has an S3, with a key whose secret can be told from other text."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return mine | moto_env | {"AWS_SECRET_ACCESS_KEY": SECRET}


def outcome(folder, expected_code, exit_code, stdout, stderr):
    assert exit_code == expected_code and "Traceback" not in stderr, stdout + stderr
    [kept] = (folder / "runs").iterdir()
    rows = list(csv.DictReader((kept / "history.csv").read_text().splitlines()))
    return SimpleNamespace(
        run=kept,
        stdout=stdout,
        executed=folder / "train.ipynb",
        weights=experiment.load_model(str(folder / "model"))[0],
        config=experiment.load_model(str(folder / "model"))[1],
        history=torch.tensor([[float(row[name]) for name in ("epoch", "train_loss", "val_loss")] for row in rows]),
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The training in this process, with the whole batch: its results and what it has left."""
    place = tmp_path_factory.mktemp("alone")
    names = {"batch_size": 16, "place": str(place), "note": "so ein Glück", "shows_secret": False}
    exec("\n".join(TRAIN[1:]), names)
    return SimpleNamespace(**vars(outcome(place, 0, 0, "", "")), results=names["results"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, environment):
    """The same training in two processes, with half the batch."""
    folder = tmp_path_factory.mktemp("trained")
    place = folder / "2"
    return outcome(
        place,
        1,
        *finish(
            start(
                folder,
                environment,
                write(folder, "train.ipynb", *TRAIN),
                "--processes",
                2,
                "-o",
                place,
                "-p",
                "place",
                place,
                "-p",
                "batch_size",
                8,
                "-p",
                "note",
                "so ein Glück",
                "-p",
                "shows_secret",
                True,
            )
        ),
    )


def same(one, other):
    torch.testing.assert_close(one.history, other.history, rtol=1e-4, atol=1e-5)
    assert one.weights.keys() == other.weights.keys()
    for name, weights in one.weights.items():
        torch.testing.assert_close(weights, other.weights[name], rtol=1e-4, atol=1e-5)


def test_two_processes_with_half_the_batch_come_to_what_one_comes_to(alone, trained):
    same(alone, trained)
    assert len(alone.history) == 3 and alone.history[-1, 1] < 0.9 * alone.history[0, 1]
    assert alone.results["steps"] == run.read_results(trained.executed)["steps"] == 18


def test_two_processes_leave_one_run_and_one_notebook_that_of_process_0(trained):
    names = {str(path.relative_to(trained.run)) for path in trained.run.rglob("*") if path.is_file()}
    weights = {name for name in names if name.startswith("model/model-")}
    assert len(weights) == 1 and names - weights == {
        "hyperparameters.json",
        "environment.json",
        "code.py",
        "history.csv",
        "model/model.json",
        "metrics.json",
        "report.html",
        "manifest.json",
    }
    assert f"rank 0 of 2 on {os.uname().nodename}" in outputs_of(trained.executed)
    assert {path.name for path in trained.run.parent.parent.iterdir()} == {
        "train.ipynb",
        "train.html",
        "index.html",
        "model",
        "runs",
    }


def test_parameters_and_results_arrive_and_a_printed_secret_is_not_kept(trained):
    cells = nbformat.read(trained.executed, as_version=4).cells
    [injected] = [cell.source for cell in cells if "injected-parameters" in cell.metadata.tags]
    assert "note = " in injected and trained.config == {"note": "so ein Glück"}
    assert run.read_results(trained.executed)["note"] == "so ein Glück"
    assert f"Results: {trained.executed.parent}/index.html\n" in trained.stdout
    assert "FAILED train.ipynb, the notebook showed AWS_SECRET_ACCESS_KEY, replaced by ***" in trained.stdout
    kept = [path.read_bytes() for path in trained.executed.parent.rglob("*") if path.is_file()]
    assert len(kept) > 8 and not any(SECRET.encode() in data for data in kept) and SECRET not in trained.stdout
    assert "***" in outputs_of(trained.executed)


# ------------------------------------------------------------------------------------------------------- two hosts


@pytest.fixture
def hosts():
    """Two network namespaces joined by a cable, each with a loopback of its own: (names, addresses)."""
    names, net = [f"cloud{os.getpid()}{side}" for side in "ab"], f"10.{os.getpid() % 250}.77"
    ip = lambda *words, check=True: subprocess.run(["ip", *words], check=check, capture_output=True)  # noqa: E731
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs root and `ip netns add`: {getattr(error, 'stderr', b'').decode() or error}")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"{net}.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names, f"{net}.1"
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


@pytest.mark.slow
def test_two_hosts_come_to_what_one_process_comes_to(tmp_path, alone, environment, hosts):
    names, first = hosts
    notebook, place = write(tmp_path, "train.ipynb", *TRAIN), tmp_path / "two"
    env = {name: value for name, value in environment.items() if not name.startswith("AWS_")}
    env |= {"GLOO_SOCKET_IFNAME": "cable", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    rendezvous = f"{first}:{free_port()}"
    nodes = [
        start(
            tmp_path,
            env,
            notebook,
            "--nodes",
            2,
            "--node-rank",
            rank,
            "--rendezvous",
            rendezvous,
            "-o",
            place,
            "-p",
            "place",
            place,
            "-p",
            "batch_size",
            8,
            prefix=["ip", "netns", "exec", name],
        )
        for rank, name in enumerate(names)
    ]
    try:
        said = [finish(node) for node in nodes]
    finally:
        end(*nodes)
    assert [code for code, _, _ in said] == [0, 0], said
    both = outcome(place, 0, *said[0])
    same(both, alone)
    assert "rank 0 of 2" in outputs_of(both.executed) and run.read_results(both.executed)["steps"] == 18
    assert "ok     train.ipynb" in said[1][1] and said[1][1].endswith("Results are on the first machine.\n")


# ------------------------------------------------------------------------------------------------ when things break


class Broken:
    """Two processes in the middle of a notebook; with all that belongs to them, and what they said in the end."""

    def __init__(self, folder, environment):
        self.folder, self.process = (
            folder,
            start(folder, environment, write(folder, "meet.ipynb", *MEET), "--processes", 2, "-o", "out"),
        )

    def begin(self):
        deadline = time.monotonic() + 60
        while len(begun := [path.read_text() for path in self.folder.glob("begun-*")]) < 2 or "" in begun:
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        self.ranks = [psutil.Process(int((self.folder / f"begun-{rank}").read_text())).parent() for rank in (0, 1)]
        assert {*self.ranks} <= {*self.family}

    def finish(self, seconds=20):
        self.code, self.stdout, self.stderr = finish(self.process, seconds)
        assert not left(self.family), (self.code, self.stderr)


@pytest.fixture
def broken(tmp_path, environment):
    one = Broken(tmp_path, environment)
    try:
        one.begin()
        yield one
    finally:
        end(one.process, *getattr(one, "family", ()))


def test_error_in_one_process_is_told_once_with_its_number_and_not_what_it_did_to_the_other(tmp_path, environment):
    notebook = write(tmp_path, "meet.ipynb", *MEET)
    code, printed, stderr = finish(
        start(tmp_path, environment, notebook, "--processes", 2, "-o", "out", "-p", "meets", 1)
    )
    assert code == 1
    assert stderr == "" and printed.count("FAILED meet.ipynb, process 1: In [4]: ValueError: no luck today\n") == 1
    assert not left(
        [
            psutil.Process(number)
            for path in tmp_path.glob("begun-*")
            if psutil.pid_exists(number := int(path.read_text()))
        ]
    )


def test_killed_process_is_told_with_its_number_and_takes_its_kernel_along(broken):
    broken.ranks[1].kill()
    broken.finish()
    assert broken.code == 1
    assert re.search(r"FAILED meet.ipynb, process 1: ended with exit code -9 \(.*\)\n", broken.stdout)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signal_to_the_launcher_ends_all_of_it(broken, number):
    broken.process.send_signal(number)
    broken.finish()
    if number == signal.SIGKILL:  # it can say and save nothing
        return
    assert broken.code == 130 and broken.stderr == ""
    cells = nbformat.read(broken.folder / "out/meet.ipynb", as_version=4).cells
    assert any("distributed.barrier" in cell.source for cell in cells)
    assert "interrupted meet.ipynb" in broken.stdout and (broken.folder / "out/index.html").exists()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--processes", "-1"), "--processes is 0 or more, not -1"),
        (("--nodes", "2"), "several nodes take"),
        (("--nodes", "2", "--node-rank", "2", "--rendezvous", "10.0.0.1:29500"), "several nodes take"),
        (("-p", "nobody", "1"), "error: no parameter nobody in these notebooks; there are: meets\n"),
    ],
)
def test_wrong_words_are_told_in_a_sentence_and_start_nothing(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "connect", lambda: None)
    write(tmp_path, "meet.ipynb", *MEET)
    with pytest.raises(SystemExit) as stopped:
        processes.main(["meet.ipynb", *words])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in said.splitlines(True)[-1] and "Traceback" not in said
    assert [path.name for path in tmp_path.rglob("*")] == ["meet.ipynb"]
