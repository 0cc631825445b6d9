"""An emulator of Google Cloud Storage (gcp-storage-emulator), in memory: it asks for no credentials."""

import contextlib
import os
import pathlib
import sys
from unittest import mock

import fsspec

from . import free_port, listening, running, wait_until


@contextlib.contextmanager
def gcs(directory, bucket):
    """Run the emulator with a bucket; gs:// URLs of this process lead to it. The log is directory/gcs.log."""
    port, log = free_port(), pathlib.Path(directory) / "gcs.log"
    options = "-M -q -H 127.0.0.1 --default-bucket".split()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", *options, bucket, "--port", port]
    with running(command, log) as server, mock.patch.dict(os.environ, STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{port}"):
        wait_until(lambda: listening(port), "the emulator", log, server)
        # gcsfs.GCSFileSystem asks for the kind of the bucket over gRPC, which the emulator does not speak: a minute of
        # trying. The plain one of gcsfs.core does not.
        fsspec.register_implementation("gs", "gcsfs.core.GCSFileSystem", clobber=True)
        try:
            with mock.patch.dict(fsspec.config.conf, gs={"token": "anon"}):
                yield
        finally:
            fsspec.get_filesystem_class("gs").clear_instance_cache()  # they lead to this server
            fsspec.register_implementation("gs", "gcsfs.GCSFileSystem", clobber=True)
