"""Real S3 servers for the tests: every one is a context manager around a process on loopback.

`with moto(directory) as env:` yields the standard variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_DEFAULT_REGION), logs into the directory and stops the process at the end,
whatever happens in between.
"""

import contextlib
import pathlib
import random
import socket
import subprocess
import sys
import time

# A server runs under this little guard, which kills it as soon as its standard input says so or ends. The end comes by
# itself when the tests die (even of SIGKILL) and, unlike PR_SET_PDEATHSIG, does not care which thread was the starter.
GUARD = """
import subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=lambda: (sys.stdin.buffer.raw.read(1), server.kill()), daemon=True).start()
sys.exit(server.wait() and 1)
"""


@contextlib.contextmanager
def running(command, log):
    """Run a server as long as the block lasts, its output in the file `log`; yields the Popen of its guard."""
    with open(log, "wb") as output:
        guarded = [sys.executable, "-I", "-S", "-c", GUARD, *map(str, command)]
        streams = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output}
        guard = subprocess.Popen(guarded, start_new_session=True, **streams)
    try:
        yield guard
    finally:
        guard.communicate(b"x")  # a byte and not only the end: a forked child may hold our end of the pipe open, too


def free_port():
    """A free port below the ones that the system gives to outgoing connections: nobody takes it by chance meanwhile."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port := random.randrange(20000, 32000)))
            return port


def wait_until(ready, what, log, *guards, seconds=60):
    """Poll `ready()` until it is true; raise with the end of the log when a server has died or the time is over."""
    deadline = time.monotonic() + seconds
    while not ready():
        dead = any(guard.poll() is not None for guard in guards)
        if dead or time.monotonic() > deadline:
            said = pathlib.Path(log).read_text(errors="replace")[-4000:]
            raise RuntimeError(f"{what} {'has stopped' if dead else f'is not ready after {seconds} s'}: {log}\n{said}")
        time.sleep(0.02)


def listening(port):
    """Whether somebody accepts connections at the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def environment(port, keys):
    """The standard variables for a server on loopback, with the variables of its keys."""
    region = dict.fromkeys(["AWS_REGION", "AWS_DEFAULT_REGION"], "us-east-1")
    return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **region, **keys}
