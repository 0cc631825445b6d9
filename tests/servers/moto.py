"""moto's server: a quick S3 in memory that is lenient (it checks no signature)."""

import contextlib
import pathlib
import sys

from . import environment, free_port, listening, running, wait_until

# As a bucket that is encrypted with KMS, whose ETags are no MD5s: an object that is put again gets another one.
OTHER_ETAGS = """
import uuid
from moto.s3.models import FakeKey
FakeKey.etag = property(lambda key: '"%s"' % key.__dict__.setdefault("random_etag", uuid.uuid4().hex))
"""


@contextlib.contextmanager
def moto(directory, setup="", certificate=None):
    """Run moto's server; yields its environment variables. The log is directory/moto.log.

    setup: Python code that it runs first. certificate: a PEM file of a certificate and its key, for https.
    """
    port, log = free_port(), pathlib.Path(directory) / "moto.log"
    options = ["-c", certificate, "-k", certificate] if certificate else []
    code = f"{setup}\nfrom moto.server import main\nmain()"
    with running([sys.executable, "-c", code, "-H", "127.0.0.1", "-p", port, *options], log) as server:
        wait_until(lambda: listening(port), "moto", log, server)
        env = environment(port, "testing", "testing")
        yield env | {"AWS_ENDPOINT_URL": env["AWS_ENDPOINT_URL"].replace("http", "https" if certificate else "http")}
