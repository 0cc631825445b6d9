"""This process as a user of an S3, for instance of the embedded server: `with connected(storage.serve(directory)):`."""

import contextlib
import os

from helpers import storage


@contextlib.contextmanager
def connected(env):
    """Connect to a server as long as the block lasts; no setting of the person who runs the tests gets in."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, **env}
    try:
        storage.connect()
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        storage.forget_connection()
