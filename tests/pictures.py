"""What tests of image folders read: names that are hard to sort and to write, pictures, and how batches are compared."""

import cv2
import numpy as np

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
