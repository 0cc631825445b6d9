"""moto's server: a quick S3 in memory that is lenient (it checks no signature)."""

import contextlib
import pathlib
import sys

from . import environment, free_port, listening, running, wait_until


@contextlib.contextmanager
def moto(directory):
    """Run moto's server; yields its environment variables. The log is directory/moto.log."""
    port, log = free_port(), pathlib.Path(directory) / "moto.log"
    code = "from moto.server import main\nmain()"
    with running([sys.executable, "-c", code, "-H", "127.0.0.1", "-p", port], log) as server:
        wait_until(lambda: listening(port), "moto", log, server)
        yield environment(port, dict.fromkeys(["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], "testing"))
