"""This process as a user of an S3, for instance of the embedded server: `with connected(storage.serve(directory)):`."""

import contextlib
import os

from helpers import storage


@contextlib.contextmanager
def cleaned():
    """No setting of the person who runs the tests gets in, and none that is made within gets out."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def connected(env):
    """Connect to a server as long as the block lasts."""
    try:
        with cleaned():
            os.environ |= env
            storage.connect()
            yield
    finally:
        storage.forget_connection()
