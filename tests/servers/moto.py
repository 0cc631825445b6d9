"""moto's server: a quick S3 in memory that is lenient (it checks no signature)."""

import contextlib
import pathlib
import sys

from . import environment, free_port, listening, running, wait_until

# A folder `million` of 1,002 folders with 999 objects each. moto looks at all keys for each answer; this makes those of
# the folder that is listed.
MILLION = """
import hashlib
from moto.core.utils import utcnow
from moto.s3.models import FakeKey, S3Backend
class Key(FakeKey):
    __module__ = FakeKey.__module__
    last_modified, size, storage_class, checksum_algorithm, disposed = utcnow(), 100_000, "STANDARD", None, True
    etag = property(lambda key: '"%s"' % hashlib.md5(key.name.encode()).hexdigest())
    def __init__(self, name):
        self.name = name
def list_objects(self, bucket, prefix, delimiter, marker, max_keys, original=S3Backend.list_objects):
    if not prefix.startswith("million/"):
        return original(self, bucket, prefix, delimiter, marker, max_keys)
    folder = prefix.split("/")[1]
    if delimiter and not folder:
        return [], [f"million/n{i:08}/" for i in range(1002)], False, None
    folders = [folder] if folder else ["n00000000", "n00000001"]  # more than an answer holds
    return [Key(f"million/{name}/{name}_{i:05}.JPEG") for name in folders for i in range(999)], [], False, None
S3Backend.list_objects = list_objects
"""


@contextlib.contextmanager
def moto(directory, setup=""):
    """Run moto's server, first this Python code; yields its environment variables. The log is directory/moto.log."""
    port, log = free_port(), pathlib.Path(directory) / "moto.log"
    code = f"{setup}\nfrom moto.server import main\nmain()"
    with running([sys.executable, "-c", code, "-H", "127.0.0.1", "-p", port], log) as server:
        wait_until(lambda: listening(port), "moto", log, server)
        yield environment(port, dict.fromkeys(["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], "testing"))
