"""moto's server: a quick S3 in memory that is lenient (it checks no signature)."""

import contextlib
import pathlib
import sys

from . import environment, free_port, listening, running, wait_until


@contextlib.contextmanager
def moto(directory):
    """Run moto's server; yields its environment variables. The log is directory/moto.log."""
    port, log = free_port(), pathlib.Path(directory) / "moto.log"
    with running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port], log) as server:
        wait_until(lambda: listening(port), "moto", log, server)
        yield environment(port, "testing", "testing")
