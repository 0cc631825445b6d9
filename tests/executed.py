"""The notebooks, and how tests execute them."""

import atexit
import functools
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import run

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
BY_NUMBER = {path.name.split("_")[0]: path for path in NOTEBOOKS}

SERVER = """
import functools, json, os, socket, sys, threading
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
import accelerate, boto3, botocore.loaders, botocore.session, torch, torchmetrics.classification, torchvision, transformers
import matplotlib.pyplot, s3fs
from ipykernel.kernelapp import launch_new_instance
from helpers import callbacks, experiment, images, training
botocore.session.create_loader = functools.cache(botocore.loaders.create_loader)  # as in conftest.py
boto3.Session().client("s3", "us-east-1")
server, parent = socket.socket(socket.AF_UNIX), os.getppid()
server.bind(sys.argv[1])
server.listen()
server.settimeout(1)
print("ready", flush=True)
while os.getppid() == parent:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:  # those that have ended
            pass
    except ChildProcessError:
        pass
    try:
        peer = server.accept()[0]
    except TimeoutError:
        continue
    if os.fork():
        peer.close()
        continue
    server.close()
    peer.settimeout(None)
    folder, environment, sys.argv = json.loads(peer.makefile().readline())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = ""
    peer.sendall(b"%d\\n" % os.getpid())
    threading.Thread(target=lambda: (peer.recv(1), os._exit(1)), daemon=True).start()  # with the client
    launch_new_instance()
    os._exit(0)
"""
CLIENT = """
import json, os, signal, socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
peer.sendall(json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:]]).encode() + b"\\n")
kernel = int(peer.makefile().readline())
signal.signal(signal.SIGINT, lambda *_: os.kill(kernel, signal.SIGINT))
peer.recv(1)
"""


@functools.cache
def start_server():
    """The address of a process that has imported what the notebooks import, once for all, and forks kernels."""
    address = f"{tempfile.mkdtemp()}/kernels"
    server = subprocess.Popen([sys.executable, "-c", SERVER, address], stdout=subprocess.PIPE, cwd=ROOT)
    assert server.stdout.readline() == b"ready\n"
    atexit.register(lambda: (server.terminate(), server.wait()))  # waited for: its time is the tests'
    return address


class ForkedKernel(run.OwnKernel):
    """Kernels forked from there: each is a process of its own, as soon as it is asked for."""

    def format_kernel_cmd(self, extra_arguments=None):
        command = super().format_kernel_cmd(extra_arguments)
        return [sys.executable, "-ISc", CLIENT, start_server(), *command[command.index("ipykernel_launcher") + 1 :]]


def try_to_run(notebooks, parameters, output):
    """The Outcomes of notebooks by number: `04` means all pages of that stage, `04a` one of them."""
    return run.run_notebooks(
        [path for number in notebooks.split() for path in NOTEBOOKS if path.name.startswith(number)],
        parameters,
        output,
        functools.partial(run.run_papermill, kernel=ForkedKernel),
    )


def execute(numbers, output, **parameters):
    """Run notebooks by number; returns their results. Fails with the first error."""
    outcomes = try_to_run(numbers, parameters, Path(output) / secrets.token_hex(4))
    assert not [outcome.error for outcome in outcomes if outcome.status != "ok"]
    return {name: value for outcome in outcomes for name, value in outcome.results.items()}
