"""What tests of image folders read: names that are hard to sort and to write, pictures; batches, and processes to read them."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np

from helpers import images

TREE = [
    "ant/z.png",
    "ant/10.png",
    "ant/9.png",
    "ant/B.PNG",
    "ant/sub/a.png",
    "ant/sub b/c.png",
    "ant/sub/deep/er/d.png",
    "ant/sub-1/e.png",
    "Zebra/a.png",
    "bee/b+c & d%20é.png",
    "bee/.hidden.png",
    "bee hive/1.png",
    "bee-2/1.png",
]


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
