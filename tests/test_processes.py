"""Notebooks on several processes and machines: the same results as on one, and what happens when one breaks."""

import contextlib
import io
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from servers import free_port
from servers.embedded import cleaned

from helpers import experiment, storage
from helpers.chapters import processes
from test_run import outputs_of, write


TRAIN = (
    "#parameters\nbatch_size = 64\nplace = ''",
    """
import os, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from helpers import experiment
from helpers.training import TrainLoop
torch.manual_seed(0)
inputs = torch.randn(96, 6)
data = TensorDataset(inputs, (inputs[:, 0] > inputs[:, 1]).long())
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
train, val = (DataLoader(data, batch_size) for _ in range(2))
loop = TrainLoop(model, train, val, optimizer=torch.optim.SGD(model.parameters(), 0.5), criterion=nn.CrossEntropyLoss())
loop.fit(3)
experiment.save_model(model, place, **{name: loop.history[-1][name] for name in ("train_loss", "val_loss")})
print("rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"))""",
)
MEET = (
    "#parameters\nmeets = 0\nnote = ''",
    """
import os, time
from pathlib import Path
rank = os.environ["RANK"]
print("rank", rank, note)
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


def left(processes, seconds=10):
    """Those of the processes that have not ended after some seconds; they are killed now."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    alive = [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    return alive


def launch(folder, *words):
    """`python -m helpers run` with these words, in this process: (exit code, what it prints)."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        code = processes.main([*map(str, words)])
    return code, printed.getvalue()


def launch_in_fork(folder, *words):
    """The same in a process of its own, which leaves its exit code and what it prints in files."""
    with open(folder / "said", "w") as said, contextlib.redirect_stderr(said):
        code, printed = launch(folder, *words)
    (folder / "printed").write_text(f"{code} {printed}")


@pytest.fixture(scope="module")
def environment(moto_env):
    """What a user has set who has an S3; this process has it, too."""
    with cleaned():
        os.environ |= moto_env
        yield dict(os.environ)
    logging.disable(logging.NOTSET)


@pytest.fixture
def hosts():
    """Two network namespaces joined by a cable, each with a loopback of its own: (names, addresses)."""
    names, net = [f"cloud{os.getpid()}{side}" for side in "ab"], f"10.{os.getpid() % 250}.77"
    ip = lambda words, check=True: subprocess.run(["ip", *words.split()], check=check, capture_output=True)
    try:
        try:
            for name in names:
                ip(f"netns add {name}")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs root and `ip netns add`: {getattr(error, 'stderr', b'').decode() or error}")
        ip(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
        for number, name in enumerate(names, 1):
            ip(f"-n {name} addr add {net}.{number}/24 dev cable")
            for device in ("lo", "cable"):
                ip(f"-n {name} link set {device} up")
        yield names, f"{net}.1"
    finally:
        for name in names:
            ip(f"netns del {name}", check=False)


@pytest.mark.slow
def test_two_hosts_come_to_what_one_process_comes_to(tmp_path, environment, hosts):
    """Two processes on one host do so on the page of 09."""
    names, first = hosts
    notebook, place = write(tmp_path, "train.ipynb", *TRAIN), tmp_path / "two"
    exec(TRAIN[1], {"batch_size": 16, "place": f"{tmp_path}/alone"})
    env = {name: value for name, value in environment.items() if not name.startswith("AWS_")}
    env |= {"GLOO_SOCKET_IFNAME": "cable", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    words = f"{notebook} --nodes 2 --rendezvous {first}:{free_port()} -o {place} -p place {place}/model".split()
    words += "-p batch_size 8 --node-rank".split()
    options = dict(cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-m", "helpers", "run", *words]
    nodes = [
        subprocess.Popen(["ip", "netns", "exec", name, *command, str(i)], **options) for i, name in enumerate(names)
    ]
    try:
        said = [node.communicate(timeout=180) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0] and "Traceback" not in said[0][1], said
    (one, losses), (two, others) = (experiment.load_model(tmp_path / each) for each in ("alone", "two/model"))
    assert losses == pytest.approx(others, rel=1e-4)
    for name, weights in one.items():
        torch.testing.assert_close(weights, two[name], rtol=1e-4, atol=1e-5)
    assert outputs_of(place / "train.ipynb").endswith("rank 0 of 2\n")
    assert "ok     train.ipynb" in said[1][0] and said[1][0].endswith("Results are on the first machine.\n")


def begun(folder):
    """The kernels of both processes, then the processes, when they are in the middle of a notebook."""
    deadline = time.monotonic() + 90
    while len(texts := [path.read_text() for path in sorted(folder.glob("begun-*"))]) < 2 or "" in texts:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kernels = [psutil.Process(int(text)) for text in texts]
    return kernels + [kernel.parent() for kernel in kernels]


def test_error_in_one_process_is_told_once_with_its_number_and_not_what_it_did_to_the_other(
    tmp_path, environment, capfd
):
    words = [write(tmp_path, "meet.ipynb", *MEET), "--processes", 2, "-o", "out", "-p", "meets", 1]
    code, printed = launch(tmp_path, *words, "-p", "note", "so ein Glück")
    assert code == 1 and printed.count("FAILED meet.ipynb, process 1: In [4]: ValueError: no luck today\n") == 1
    kernels = [int(path.read_text()) for path in tmp_path.glob("begun-*")]
    assert len(kernels) == 2 and not left([psutil.Process(one) for one in kernels if psutil.pid_exists(one)])
    assert "Traceback" not in capfd.readouterr().err
    assert outputs_of(tmp_path / "out/meet.ipynb").startswith("rank 0 so ein Glück\n")  # that of process 0 is kept
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"meet.ipynb", "meet.html", "index.html"}


def test_killed_process_is_told_with_its_number_and_takes_its_kernel_along(tmp_path, environment):
    def kill():
        family = begun(tmp_path)
        family[3].kill()
        return family

    with ThreadPoolExecutor(1) as pool:
        family = pool.submit(kill)
        code, printed = launch(tmp_path, write(tmp_path, "meet.ipynb", *MEET), "--processes", 2, "-o", "out")
    assert code == 1 and not left(family.result())
    assert re.search(r"FAILED meet.ipynb, process 1: ended with exit code -9 \(.*\)\n", printed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signal_to_the_launcher_ends_all_of_it(number, tmp_path, environment):
    words = tmp_path, write(tmp_path, "meet.ipynb", *MEET), "--processes", 2, "-o", "out"
    launcher = multiprocessing.get_context("fork").Process(target=launch_in_fork, args=words)
    launcher.start()
    try:
        family = begun(tmp_path)
        os.kill(launcher.pid, number)
        launcher.join(30)
        assert not launcher.is_alive() and not left(family)
    finally:
        launcher.kill()
    if number == signal.SIGTERM:  # the other says and saves nothing
        printed = (tmp_path / "printed").read_text()
        assert printed.startswith("130 ") and "interrupted meet.ipynb" in printed
        assert (tmp_path / "said").read_text() == ""
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
        ("-p nobody 1", "error: no parameter nobody in these notebooks; there are: meets, note\n"),
    ):
        with pytest.raises(SystemExit) as stopped:
            processes.main(["meet.ipynb", *words.split()])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and sentence in said.splitlines(True)[-1] and "Traceback" not in said
    assert [path.name for path in tmp_path.rglob("*")] == ["meet.ipynb"]
