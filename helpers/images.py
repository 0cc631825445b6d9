"""Images of an S3 prefix as a PyTorch Dataset, and the networks that learn from them."""

import functools
import itertools
import multiprocessing
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import obstore
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.models import resnet18

from helpers import experiment, storage

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")  # as ImageFolder
THREADS = 64  # images of a batch in flight: hides 40 ms a request; decoding runs in them too, OpenCV releases the GIL


def decode(data, size=None):
    """Decode an encoded image (JPEG, PNG, WebP, BMP, …; grey, alpha or 16 bits too) to RGB: (3, H, W) uint8 tensor.

    size: pixels; the image is resized to size x size, so that images of any size fit one batch.
    Raises ValueError for what is not an image.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if len(data) else None
    except cv2.error:
        image = None
    if image is None:
        raise ValueError("not an image that OpenCV can decode")
    if size and image.shape[:2] != (size, size):
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class S3ImageFolder(Dataset):
    """torchvision's ImageFolder over s3://bucket/prefix/{class}/…/{file}, read as it is used, never through a disk.

    Items are (image, class index): the image (3, H, W) uint8 as `loader` makes it from the object's bytes, then
    `transform`. A DataLoader asks for all of a batch at once (`__getitems__`), so its objects are fetched together.

    on_error: "raise" a StorageError that names the object, or "skip": put the next image of the same class in its
    place, warn, and note it in `skipped` ({url: reason}; a worker's are its own, but its warnings are seen).
    Raises StorageError when there is no class folder with images. Other files are counted in `ignored`.
    """

    def __init__(self, root, transform=None, target_transform=None, loader=decode, on_error="raise"):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error is "raise" or "skip", not {on_error!r}')
        self.root, self.transform, self.target_transform = str(root).rstrip("/"), transform, target_transform
        self.loader, self.on_error, self.skipped = loader, on_error, {}
        names = storage.objects(self.root)
        images = [name for name in names if "/" in name and name.lower().endswith(EXTENSIONS)]
        images.sort(key=lambda name: (name.split("/")[0], *name.rpartition("/")))  # a folder's files, then its folders'
        self.ignored = len(names) - len(images)
        self.classes = sorted({name.split("/")[0] for name in images})
        if not images:
            raise storage.StorageError(f"There are no class folders with images under {self.root}: put some there with "
                                       "notebook 01 (make run NOTEBOOKS=01), or check the name.")
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self.samples = [(f"{self.root}/{name}", self.class_to_idx[name.split("/")[0]]) for name in images]
        self.targets = [target for _, target in self.samples]

    def __len__(self):
        return len(self.samples)

    def __repr__(self):
        return f"S3ImageFolder({self.root!r}): {len(self):,} images of {len(self.classes)} classes"

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        # Fetched and decoded in threads, transformed here in order: random augmentation stays the same for a seed.
        storage.store(storage.parse(self.root)[0])  # made once, not in every thread; tells of a fork, which is no skip
        items = []
        for index, image in zip(indices, _threads().map(self._load, indices)):
            target = self.samples[index][1]
            items.append((self.transform(image) if self.transform else image,
                          self.target_transform(target) if self.target_transform else target))
        return items

    def _load(self, index):
        wanted = self.targets[index]
        for i in itertools.chain(range(index, len(self)), range(index)):
            url, target = self.samples[i]
            if target != wanted or url in self.skipped:
                continue
            try:
                return self.loader(fetch(url))
            except (OSError, ValueError) as error:
                reason = str(error) if url in str(error) else f"{url}: {error}"
                if self.on_error == "raise":
                    raise storage.StorageError(reason) from None
                self.skipped[url] = reason
                warnings.warn(f"skipped {reason}")
        raise storage.StorageError(f"No image of the class {self.classes[wanted]!r} under {self.root} can be read.")


@functools.cache
def _threads():
    return ThreadPoolExecutor(THREADS, thread_name_prefix="images")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork


def fetch(url):
    """The bytes of one object. Faults of the server are retried; raises StorageError when it cannot be read."""
    bucket, key = storage.parse(url)
    with storage.explained(url):
        return bytes(obstore.get(storage.store(bucket), key).bytes())  # obstore's own bytes lack most methods


def loader(dataset, batch_size, shuffle=False, num_workers=0, seed=0, **options):
    """A DataLoader of a dataset on S3; the same seed gives the same order, however many workers there are.

    It gives the same augmentation, too, in workers; without them augmentation follows torch.manual_seed. Workers come
    from a fork server, since S3 clients do not survive a fork, and have this process's environment.
    """
    workers = {}
    if num_workers:
        multiprocessing.set_forkserver_preload(["__main__", __name__])  # PyTorch is imported once, not by every worker
        workers = dict(multiprocessing_context="forkserver", persistent_workers=True,
                       worker_init_fn=functools.partial(_start_worker, dict(os.environ)))
    # A generator for the order alone: from the loader's own, persistent workers and none draw differently.
    order = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed)) if shuffle else None
    return DataLoader(dataset, batch_size, sampler=order, num_workers=num_workers,
                      generator=torch.Generator().manual_seed(seed), **workers, **options)


def _start_worker(environment, worker):
    os.environ.clear()  # the fork server's, from when it started
    os.environ.update(environment)


# ------------------------------------------------------------------------------------------------------ networks


def small_cnn(num_classes, width=32):
    """Four blocks of convolution, batch norm, ReLU and pooling, then the mean over the plane: any image size from 16.

    (N, 3, H, W) float -> (N, num_classes) logits; 0.25 million weights.
    """
    def block(inputs, outputs):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)

    widths = [3, width, 2 * width, 4 * width, 4 * width]
    blocks = [layer for pair in zip(widths, widths[1:]) for layer in block(*pair)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(widths[-1], num_classes)
    return nn.Sequential(*blocks, *head)


ARCHITECTURES = {"small_cnn": small_cnn, "resnet18": lambda num_classes: resnet18(num_classes=num_classes)}


def build(architecture, num_classes):
    """An untrained network by name. Raises ValueError for a name that is not in `ARCHITECTURES`."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture](num_classes)


def load_model(url):
    """A saved network, ready to predict, and what was saved with it (architecture, classes, image_size, mean, std)."""
    try:
        weights, config = experiment.load_model(url)
    except storage.NotFound as error:
        raise storage.NotFound(f"{error} Train a model first, with notebook 02 (make run NOTEBOOKS=02).") from None
    model = build(config["architecture"], len(config["classes"]))
    model.load_state_dict(weights)
    return model.eval(), config
