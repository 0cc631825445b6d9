"""What is known of the images in a bucket, in columns: names, sizes, versions, and where each one lies."""

import hashlib
import itertools
import json
import operator
import re
import zlib
from collections.abc import Sequence
from datetime import date
from typing import NamedTuple

import numpy as np
import obstore
import safetensors.torch
import torch
from obstore.exceptions import GenericError

from helpers import storage

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")  # as ImageFolder
INDEX = "index.safetensors"


class Span(NamedTuple):
    """Where an image lies: the bytes from first up to last of an object, and what changes when they do."""

    object: str  # its URL
    first: int
    last: int
    version: bytes  # CRC-32 of an image in a shard; the MD5 of an object, or of its ETag or date


class MadeList(Sequence):
    """A list of which each item is made when it is asked for."""

    def __init__(self, length, make):
        self.length, self.make = length, make

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        wanted = range(self.length)[index]
        return self.make(wanted) if isinstance(wanted, int) else [self.make(i) for i in wanted]

    def __eq__(self, other):
        return isinstance(other, (list, MadeList)) and len(self) == len(other) and all(map(operator.eq, self, other))

    def __repr__(self):
        return repr(list(self))


class Table:
    """What is known of a million images, in columns: 60 bytes an image, of which all processes share one copy.

    names: UTF-8, a zero after each; starts: where each begins. targets: numbers in about["classes"]. sizes: bytes.
    versions: see Span. places, firsts, of a pack: numbers in about["shards"], and where in the shard an image begins.
    """

    def __init__(self, columns, about):
        self.columns, self.about = columns, about  # tensors, which PyTorch hands to a process without a copy
        vars(self).update({name: column.numpy() for name, column in columns.items()})

    def __reduce__(self):
        shared = {
            name: column if column.is_shared() else column.clone().share_memory_()
            for name, column in self.columns.items()
        }
        self.__init__(shared, self.about)  # this process uses the same copy
        return Table, (shared, self.about)

    def replace(self, about=None, **columns):
        """Another table of the same images; columns: arrays, which become of the smallest type that holds them."""
        new = {}
        for name, column in columns.items():  # signed types, since PyTorch pickles no other, or bytes
            kind = np.uint8 if column.dtype == np.uint8 else np.min_scalar_type(-1 - column.max())
            new[name] = torch.from_numpy(np.ascontiguousarray(column, kind))
        return Table(self.columns | new, about or self.about)

    def name(self, index):
        return self.names[self.starts[index] : self.starts[index + 1] - 1].tobytes().decode()

    def to_bytes(self):
        about = torch.frombuffer(bytearray(json.dumps(self.about).encode()), dtype=torch.uint8)
        return safetensors.torch.save({**self.columns, "about": about})


def list_images(url):
    """A Table of the images in class folders under a prefix in ImageFolder's order: a folder's files, then its folders'."""
    prefix = storage.parse(url)[1]

    def by_folder(items):
        """[(folder, names, sizes, versions)] of the images of a page, and how many other files it has."""
        names = (item["path"].removeprefix(f"{prefix}/") for item in items)
        found = [(name, item) for name, item in zip(names, items) if "/" in name and name.lower().endswith(EXTENSIONS)]
        parts = []
        for folder, pairs in itertools.groupby(found, lambda pair: pair[0].rpartition("/")[0]):
            names, files = zip(*pairs)
            sizes = np.array([file["size"] for file in files]).tobytes()
            parts.append((folder, "\0".join((*names, "")).encode(), sizes, b"".join(map(version, files))))
        return parts, len(items) - len(found)

    parts, buffers, others = [], [bytearray(), bytearray(), bytearray()], 0  # what comes goes into three large pieces
    for page, more in storage.list_pages(url, by_folder):
        for folder, *columns in page:
            places = [slice(len(buffer), len(buffer) + len(new)) for buffer, new in zip(buffers, columns)]
            for i, new in enumerate(columns):
                buffers[i] += new
            parts.append((folder.split("/")[0], folder, places))
        others += more
    if not parts:
        raise storage.StorageError(
            f"There are no class folders with images under {url}: put some there with "
            "notebook 01 (make run NOTEBOOKS=01), or check the name."
        )
    parts.sort(key=operator.itemgetter(0, 1))  # the names of one folder are in order already
    numbers = {name: i for i, name in enumerate(dict.fromkeys(name for name, _, _ in parts))}

    def join(column):
        buffer = memoryview(buffers.pop(0))  # dropped as soon as it is sorted
        return bytearray().join(buffer[places[column]] for _, _, places in parts)

    names, sizes, versions = (np.frombuffer(join(i), kind) for i, kind in enumerate((np.uint8, np.int64, np.uint8)))
    counts = [(places[1].stop - places[1].start) // sizes.itemsize for _, _, places in parts]
    return Table({}, {"classes": [*numbers], "shards": None, "ignored": others}).replace(
        names=names,
        starts=np.concatenate([[0], np.flatnonzero(names == 0) + 1]),
        targets=np.repeat([numbers[name] for name, _, _ in parts], counts),
        sizes=sizes,
        versions=versions.reshape(-1, 16),
    )


def version(file):
    """16 bytes that change with an object: its ETag, where that is an MD5, or the MD5 of the ETag or date."""
    text = (file["e_tag"] or str(file["last_modified"])).strip('"')
    return bytes.fromhex(text) if re.fullmatch("[0-9a-f]{32}", text) else md5(text.encode())


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).digest()


def crc32(data):
    return zlib.crc32(data).to_bytes(4, "big")


def write_index(url):
    """List the images of a folder, and keep the list there: `S3ImageFolder` starts with it, until you delete or write it.

    An image that has changed or is gone since is an error when it is fetched. New ones are not seen, and what `cache_dir`
    holds is as it was listed.
    """
    table = list_images(url)
    storage.write(f"{url}/{INDEX}", table.replace({**table.about, "listed": str(date.today())}).to_bytes())


def read_index(url):
    """The Table that `write_index` or `pack` has left under a prefix, or None."""
    try:
        columns = safetensors.torch.load(fetch(f"{url}/{INDEX}"))
        return Table(columns, json.loads(columns.pop("about").numpy().tobytes()))
    except storage.NotFound:
        return None
    except (safetensors.SafetensorError, KeyError):
        raise storage.StorageError(f"{url}/{INDEX} is no index of images: delete it.") from None


def fetch(url, first=0, last=None, expected=None):
    """The bytes of an object, all or from first up to last.

    Raises StorageError when it cannot be read or, if all of it is asked for, has another version than expected.
    """
    bucket, key = storage.parse(url)

    def get_whole():
        answer = obstore.get(store, key)
        if expected and answer.meta["e_tag"] and version(answer.meta) != expected:
            raise storage.StorageError(
                f"{url} has changed since its folder was indexed: call catalog.write_index again."
            )
        return bytes(answer.bytes())  # obstore's own bytes lack most methods

    with storage.translate_errors(url):
        store = storage.store(bucket)
        if last is None:
            return storage.retry(get_whole)
        try:
            if bucket not in _without_206:
                return storage.retry(lambda: bytes(obstore.get_range(store, key, start=first, end=last)))
        except GenericError as error:
            if "non-partial" not in str(error):
                raise
            _without_206.add(bucket)
        span = {"Bucket": bucket, "Key": key, "Range": f"bytes={first}-{last - 1}"}
        data = storage.retry(lambda: storage.client(bucket).get_object(**span)["Body"].read())
        if len(data) != last - first:
            raise ValueError(f"the server gives {len(data)} bytes where {last - first} are asked for")
        return data


_without_206 = set()  # buckets of a server that gives a range with status 200, as rclone does; obstore refuses that
