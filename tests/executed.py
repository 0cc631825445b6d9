"""The notebooks, and how tests execute them."""

import atexit
import functools
import json
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager

from helpers import run

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))
BY_NUMBER = {path.name.split("_")[0]: path for path in NOTEBOOKS}

SERVER = """
import functools, json, os, socketserver, sys, threading
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
import accelerate, boto3, botocore.loaders, botocore.session, torch, torchmetrics.classification, torchvision, transformers
import matplotlib.pyplot, s3fs
from ipykernel.kernelapp import launch_new_instance
from helpers import callbacks, experiment, images, training
botocore.session.create_loader = functools.cache(botocore.loaders.create_loader)  # as in conftest.py
boto3.Session().client("s3", "us-east-1")
experiment.list_packages()
parent = os.getppid()

class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    def service_actions(self):  # twice a second
        super().service_actions()
        if os.getppid() != parent:
            os._exit(0)

class Kernel(socketserver.StreamRequestHandler):
    def handle(self):
        folder, environment, sys.argv = json.loads(self.rfile.readline())
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[0] = ""
        threading.Thread(target=lambda: (self.rfile.read(1), os._exit(1)), daemon=True).start()  # with the client
        launch_new_instance()
server = Server(sys.argv[1], Kernel)
print("ready", flush=True)
server.serve_forever()
"""
CLIENT = """
import json, os, signal, socket, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # which comes before each end of a kernel
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
peer.sendall(json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:]]).encode() + b"\\n")
peer.recv(1)
"""


@functools.cache
def forked_kernels():
    """A Jupyter folder: the kernels of its "python3" are forked from a process that has imported what notebooks import."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-c", SERVER, folder / "socket"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    assert server.stdout.readline() == b"ready\n"
    atexit.register(lambda: (server.terminate(), server.wait()))  # waited for: its time is the tests'
    argv = [sys.executable, "-ISc", CLIENT, str(folder / "socket"), "-f", "{connection_file}"]
    (folder / "kernels/python3").mkdir(parents=True)
    spec = json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"})
    (folder / "kernels/python3/kernel.json").write_text(spec)
    return folder


class ForkedKernel(run.OwnKernel):
    def _kernel_spec_manager_default(self):
        return KernelSpecManager(kernel_dirs=[str(forked_kernels() / "kernels")])


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
