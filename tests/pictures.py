"""What tests of image folders read, and processes to read it, which import this module and nothing of the tests."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np

from helpers import images, storage


def png(number, size=16):
    """A PNG that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def items(loader):
    """The items of all batches of an epoch."""
    return [(image, int(target)) for batch, targets in loader for image, target in zip(batch, targets)]


def raw(url, **options):
    """A folder of which the items are the bytes of the objects."""
    return images.S3ImageFolder(url, loader=bytes, **options)


def epoch(url, seed, **options):
    """The items of an epoch of such a folder."""
    return items(images.loader(raw(url, **options), 4, shuffle=True, seed=seed))


def process():
    """A process of its own with this one's environment, from a fork server that has imported PyTorch once."""
    multiprocessing.set_forkserver_preload(["__main__", "helpers.images"])  # as images.loader says, or not at all
    start = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(1, start, images._start_worker, (dict(os.environ), 0))


def change_sizes(folder):
    folder.table.columns["sizes"][7] = 47
    return list(folder.samples)


def fail(url, begun):
    """Read a folder of which each request adds a byte to the file `begun`, and fails a moment later."""
    file = os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def fetch(url, **options):
        os.write(file, b"x")
        time.sleep(0.3)
        raise storage.StorageError("Nothing answers")

    folder, images.fetch = raw(url), fetch
    images.batches = iter(images.loader(folder, 8))  # kept, as the traceback keeps it that a program ends with
    next(images.batches)
