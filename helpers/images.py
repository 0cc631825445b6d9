"""Images of an S3 prefix as a PyTorch Dataset, loose or packed into shards, and the networks that learn from them."""

import copy
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import uuid
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

try:
    import fcntl
except ImportError:  # Windows: no cache_dir there
    fcntl = None

import cv2
import numpy as np
import obstore
import torch
from botocore.exceptions import HTTPClientError
from obstore.exceptions import GenericError
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from helpers import storage

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")  # as ImageFolder
THREADS = 64  # requests in flight: hides 40 ms each
CORES = os.cpu_count()  # threads that decode: OpenCV releases the GIL
CHUNK = 4  # loose objects that a thread fetches one after the other: switching threads costs as much as decoding
AHEAD = 4096  # images that a batch announces
WINDOW = 64 * 2**20  # bytes of announced images that are held at once, encoded
DECODED = 2  # batches that are decoded ahead
GAP = 128 * 2**10  # bytes that are read for nothing where that saves a request: it costs about as much time
RANGE = 2 * 2**20  # bytes of a shard in one request
SHARDS = 4  # written at once, each held in memory
INDEX = "index.json"


def decode(data, size=None):
    """Decode an encoded image (JPEG, PNG, WebP, BMP, …; grey, alpha or 16 bits too) to RGB: (3, H, W) uint8 tensor.

    size: pixels; the image is resized to size x size, so that images of any size fit one batch.
    Raises ValueError for what is not an image.
    """
    try:
        smaller = _smaller(data, size) if size else 0
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | smaller) if len(data) else None
    except cv2.error:
        image = None
    if image is None:
        raise ValueError("not an image that OpenCV can decode")
    if size and image.shape[:2] != (size, size):
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _smaller(data, size):
    """OpenCV's flag to decode a JPEG at 1/2, 1/4 or 1/8, which costs less, where that still is no smaller than size."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 < len(data) and data[at] == 0xFF:  # from marker to marker: the frame's
        marker, length = data[at + 1], int.from_bytes(data[at + 2:at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            shorter = min(int.from_bytes(data[i:i + 2], "big") for i in (at + 5, at + 7))
            return next((16 * scale // 2 for scale in (8, 4, 2) if shorter >= scale * size), 0)  # 64, 32, 16
        at += 1 if marker == 0xFF else 2 + length  # a byte to fill up
    return 0


class S3ImageFolder(Dataset):
    """torchvision's ImageFolder over s3://bucket/prefix/{class}/…/{file}, read as it is used, never through a disk.

    Items are (image, class index): the image (3, H, W) uint8 as `loader` makes it from the object's bytes, then
    `transform`. A DataLoader asks for all of a batch at once (`__getitems__`), so its objects are fetched together; the
    batches of `images.loader` also say what comes after them, which is fetched meanwhile. What `pack` wrote is read as
    the folder it was made from, many images a request, and stays in memory up to 64 MB.

    on_error: "raise" a StorageError that names the object, or "skip": put the next image of the same class in its
        place, warn, and note it in `skipped` ({url: reason}; a worker's are its own, but its warnings are seen).
    cache_dir: a local folder that keeps what was read, up to `cache_bytes`, for later epochs, runs and processes.
    Raises StorageError when there is no class folder with images. Other files are counted in `ignored`.
    """

    def __init__(self, root, transform=None, target_transform=None, loader=decode, on_error="raise", cache_dir=None,
                 cache_bytes=20 * 2**30):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error is "raise" or "skip", not {on_error!r}')
        self.root, self.transform, self.target_transform = str(root).rstrip("/"), transform, target_transform
        self.loader, self.on_error, self.skipped = loader, on_error, {}
        self.cache = (str(Path(cache_dir).expanduser().absolute()), cache_bytes, self.root) if cache_dir else None
        files = storage.objects(self.root)
        self.shards, files = _members(self.root) if {INDEX, "shard-000000.tar"} <= files.keys() else (None, files)
        images = image_names(files)
        self.ignored = len(files) - len(images)
        self.classes = sorted({name.split("/")[0] for name in images})
        if not images:
            raise storage.StorageError(f"There are no class folders with images under {self.root}: put some there with "
                                       "notebook 01 (make run NOTEBOOKS=01), or check the name.")
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self.samples = [(f"{self.root}/{name}", self.class_to_idx[name.split("/")[0]]) for name in images]
        self.targets = [target for _, target in self.samples]
        self._files = [files[name] for name in images]
        self._stays = bool(self.shards) and sum(file["size"] for file in self._files) <= WINDOW  # in memory, once read
        self._asked = {}
        self._forget(None)

    def _forget(self, order):
        self._order, self._coming, self._rest = order, {}, 0
        if not self._stays:
            self._asked = {}

    def __getstate__(self):
        return {**vars(self), "_order": None, "_asked": {}, "_coming": {}, "_rest": 0}

    def __len__(self):
        return len(self.samples)

    def __repr__(self):
        packed = f" in {len(self.shards)} shards" if self.shards else ""
        return f"S3ImageFolder({self.root!r}): {len(self):,} images of {len(self.classes)} classes{packed}"

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        # Fetched and decoded in threads, transformed here in order: random augmentation stays the same for a seed.
        storage.store(storage.parse(self.root)[0])  # made once, not in every thread; tells of a fork, which is no skip
        order, ahead = getattr(indices, "order", None), getattr(indices, "ahead", ())
        if order != self._order:  # another epoch or loader: what was fetched for the one before is of no use
            for future in (*self._coming.values(), *(() if self._stays else filter(None, self._asked.values()))):
                future.cancel()
            self._forget(order)
        self._ask(indices, ahead)
        for batch in (indices, *ahead[:DECODED]):
            new = [index for index in dict.fromkeys(batch) if index not in self._coming]
            for chunk in _chunks(new, 8):
                self._coming |= dict.fromkeys(chunk, _threads("decode", CORES).submit(self._load_all, chunk))
        images, items = {}, []
        for index in dict.fromkeys(indices):
            coming = self._coming.pop(index, None)  # None where another thread has taken it
            images[index] = coming.result()[index] if coming else self._load(index)
        for index in indices:
            image, target = images[index], self.targets[index]
            if len(images) < len(indices):  # some come more than once, and a transform may change an image in place
                image = copy.deepcopy(image)
            items.append((self.transform(image) if self.transform else image,
                          self.target_transform(target) if self.target_transform else target))
        return items

    def _load_all(self, indices):
        return {index: self._load(index) for index in indices}

    def _load(self, index):
        wanted = self.targets[index]
        for i in itertools.chain(range(index, len(self)), range(index)):
            url, target = self.samples[i]
            if target != wanted or url in self.skipped:
                continue
            try:
                return self.loader(self._read(i))
            except (OSError, ValueError) as error:
                reason = str(error) if url in str(error) else f"{url}: {error}"
                if self.on_error == "raise":
                    raise storage.StorageError(reason) from None
                self.skipped[url] = reason
                warnings.warn(f"skipped {reason}")
        raise storage.StorageError(f"No image of the class {self.classes[wanted]!r} under {self.root} can be read.")

    def _read(self, index):
        """The object's bytes: from the local cache, or from the server, where most have been asked for already."""
        url, file = self.samples[index][0], self._files[index]
        cache = self.cache and _cache(*self.cache)
        asked = self._asked.get(index) if self._stays else self._asked.pop(index, None)
        if cache and (data := cache.get(url, file)) is not None:
            return data
        data = (asked.result() if asked else self._fetch([index]))[index]
        if self.shards and not isinstance(data, OSError) and zlib.crc32(data) != file["crc32"]:
            data = storage.StorageError(f"{url} is damaged in {file['shard']}: delete {self.root} and pack it again.")
        if isinstance(data, OSError):
            self._asked.pop(index, None)  # to be tried again
            raise data
        if cache:
            cache.put(url, file, data)
        return data

    def _ask(self, indices, ahead):
        """Ask for what comes next: of loose objects for enough to keep all threads at work.

        Of shards for thousands at once, when half of those before are used, so that many of them lie close together
        though the order is random.
        """
        self._rest -= len(indices)
        if self.shards and self._rest > 0:
            return
        held, wanted, cache = 0, {}, self.cache and _cache(*self.cache)
        for number, batch in enumerate((indices, *ahead)):
            if number > DECODED and (held > WINDOW or not self.shards and len(wanted) >= CHUNK * THREADS):
                break
            wanted |= dict.fromkeys(batch)
            held += sum(self._files[index]["size"] for index in batch)
        self._rest = len(wanted) // 2
        new = [index for index in wanted if index not in self._asked and index not in self._coming]
        if cache:
            here = {index for index in new if cache.has(self.samples[index][0])}
            self._asked |= dict.fromkeys(here)  # with no request: None
            new = [index for index in new if index not in here]
        if self.shards:
            groups = self._neighbours(new)
        else:
            waited_for = set(indices)  # they come first, and each is fetched by a thread of its own
            first = sum(index in waited_for for index in new)
            groups = [*_chunks(new[:first], 1), *_chunks(new[first:], CHUNK)]
        for group in groups:
            self._asked |= dict.fromkeys(group, _threads("fetch", THREADS).submit(self._fetch, group))

    def _neighbours(self, indices):
        """The indices in groups that lie close together in a shard."""
        places = sorted((file["shard"], file["offset"], file["size"], index) for index in indices
                        for file in [self._files[index]])
        groups, at = [], None
        for shard, offset, size, index in places:
            if at != shard or offset - end > GAP or offset + size - start > RANGE:
                groups.append([])
                at, start = shard, offset
            groups[-1].append(index)
            end = offset + size
        return groups

    def _fetch(self, group):
        """{index: its bytes, or the OSError that there was}: of neighbours in a shard, by one request, or of objects."""
        found = {}
        if self.shards:
            first, last = self._files[group[0]], self._files[group[-1]]
            try:
                part = memoryview(_part(f"{self.root}/{first['shard']}", first["offset"], last["offset"] + last["size"]))
            except OSError as error:
                return dict.fromkeys(group, error)
            for index in group:
                start = self._files[index]["offset"] - first["offset"]
                found[index] = bytes(part[start:start + self._files[index]["size"]])
        else:
            for index in group:
                try:
                    found[index] = fetch(self.samples[index][0])
                except OSError as error:
                    found[index] = error
        return found


def image_names(files):
    """The names of images in class folders, in ImageFolder's order: a folder's files, then its folders'."""
    names = [name for name in files if "/" in name and name.lower().endswith(EXTENSIONS)]
    return sorted(names, key=lambda name: (name.split("/")[0], *name.rpartition("/")))


def _chunks(indices, size):
    return [indices[i:i + size] for i in range(0, len(indices), size)]


@functools.cache
def _threads(name, count):
    return ThreadPoolExecutor(count, thread_name_prefix=name)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork


def fetch(url):
    """The bytes of one object. Faults of the server are retried; raises StorageError when it cannot be read."""
    bucket, key = storage.parse(url)
    with storage.translate_errors(url):
        return bytes(obstore.get(storage.store(bucket), key).bytes())  # obstore's own bytes lack most methods


def _part(url, start, end):
    """Bytes start to end of an object."""
    bucket, key = storage.parse(url)
    with storage.translate_errors(url):
        if bucket not in _whole:
            try:
                return obstore.get_range(storage.store(bucket), key, start=start, end=end)
            except GenericError as error:
                if "non-partial" not in str(error):
                    raise
                _whole.add(bucket)
        for last in (False, False, True):  # boto3 does not ask again for a body that broke off
            try:
                body = storage.client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")["Body"]
                data = body.read()
                break
            except HTTPClientError:
                if last:
                    raise
        if len(data) != end - start:
            raise ValueError(f"the server gives {len(data)} bytes where {end - start} are asked for")
        return data


_whole = set()  # buckets whose server says 200 to a range, as for a whole object: rclone does, and obstore refuses it


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
    batches = dict(batch_size=batch_size, sampler=order)
    if isinstance(dataset, S3ImageFolder):
        order = options.pop("sampler", order or SequentialSampler(dataset))
        batches = dict(batch_sampler=Announced(order, batch_size, options.pop("drop_last", False), num_workers))
    return DataLoader(dataset, **batches, num_workers=num_workers, generator=torch.Generator().manual_seed(seed),
                      **workers, **options)


def _start_worker(environment, worker):
    os.environ.clear()  # the fork server's, from when it started
    os.environ.update(environment)


class Announced(BatchSampler):
    """PyTorch's batches of indices, each of which knows which come after it: batch.ahead, of the epoch batch.order."""

    def __init__(self, sampler, batch_size, drop_last, num_workers):
        super().__init__(sampler, batch_size, drop_last)
        self.num_workers = num_workers

    def __iter__(self):
        order, batches = uuid.uuid4().hex, super().__iter__()
        readers = max(self.num_workers, 1)  # processes, which take turns
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            readers *= torch.distributed.get_world_size()
        window = deque(itertools.islice(batches, 1 + readers * max(AHEAD // self.batch_size, 2)))
        while window:
            batch = _Batch(window.popleft())
            batch.order, batch.ahead = order, tuple(itertools.islice(window, readers - 1, None, readers))
            yield batch
            window.extend(itertools.islice(batches, 1))


class _Batch(list):
    pass


# -------------------------------------------------------------------------------------------------------- shards

def _md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _members(url):
    """The shards of what `pack` wrote, and its images as objects: {name: {"shard", "offset", "size", "crc32"}}."""
    index = json.loads(fetch(f"{url}/{INDEX}"))
    shards = index["shards"]
    return shards, {name: {"shard": shards[shard], "offset": offset, "size": size, "crc32": crc32}
                    for name, shard, offset, size, crc32 in index["samples"]}


# --------------------------------------------------------------------------------------------------------- cache


class _Cache:
    """Objects in a local folder, with a bound on their bytes that holds for all processes that use it together.

    A file comes into being whole, by renaming, and under the lock of the account of bytes; locks end with the process
    that holds them, so it may be killed at any time. When the bound is reached, data sets that no process uses make
    room, the one used longest ago first. Of those in use everything stays, and nothing more comes in: an epoch needs
    all of its images once, so that one is worth as much as another.
    """

    def __init__(self, directory, limit, root):
        self.directory, self.limit, self.full = Path(directory), limit, False
        self.folder = self.directory / _md5(root.encode())
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self._account():
                self.folder.mkdir(exist_ok=True)
                self.used = open(self.folder / "in-use", "w")  # a lock on it says so, as long as this process lives
                fcntl.flock(self.used, fcntl.LOCK_SH)
        except OSError as error:
            self.full = True
            warnings.warn(f"There is no cache at {self.directory}: {error}")

    def get(self, url, file):
        """The object's bytes, or None when they are not here, or not those of this version."""
        try:
            with open(self._path(url), "rb", buffering=0) as cached:
                data = cached.read()
        except OSError:
            return None
        version, checksum, data = data[:16], data[16:20], data[20:]
        whole = version == self._version(file) and checksum == zlib.crc32(data).to_bytes(4, "big")
        return data if whole and len(data) == file["size"] else None

    def has(self, url):
        return os.path.exists(self._path(url))

    def put(self, url, file, data):
        if self.full:
            return
        path, data = Path(self._path(url)), self._version(file) + zlib.crc32(data).to_bytes(4, "big") + data
        try:
            with self._account() as account:
                account.bytes -= path.stat().st_size if path.exists() else 0
                if account.bytes + len(data) > self.limit:
                    self._make_room(account, len(data))
                if account.bytes + len(data) > self.limit:
                    self.full = True
                    return
                account.bytes += len(data)
                account.write()  # before the file: who is killed leaves room unused, never too little of it
                path.unlink(missing_ok=True)
                path.parent.mkdir(exist_ok=True)
                path.with_suffix(".new").write_bytes(data)
                path.with_suffix(".new").replace(path)
        except OSError as error:  # such as a full disk: the images are there without it
            self.full = True
            warnings.warn(f"The cache at {self.directory} takes no more: {error}")

    @contextmanager
    def _account(self):
        """Within it no other process writes; its `bytes` are those of all files."""
        with open(os.open(self.directory / "bytes", os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            said = file.read()
            account = SimpleNamespace(bytes=int(said) if said.isdigit() else self.limit)  # to be counted anew
            account.write = lambda: os.pwrite(file.fileno(), b"%020d" % account.bytes, 0)
            yield account
            account.write()

    def _make_room(self, account, needed):
        sizes = {}  # counted anew: a process that was killed may have left the account wrong, or a file half-written
        for used in self.directory.glob("*/in-use"):
            sizes[used] = 0
            for path in used.parent.glob("*/*"):
                if path.suffix == ".new":
                    path.unlink()
                else:
                    sizes[used] += path.stat().st_size
        account.bytes = sum(sizes.values())
        for used in sorted(sizes, key=lambda used: used.stat().st_mtime):
            if account.bytes + needed <= self.limit:
                return
            with open(used) as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(used.parent)
                account.bytes -= sizes[used]

    def _path(self, url):
        name = _md5(url.encode())
        return f"{self.folder}/{name[:2]}/{name}"

    @staticmethod
    def _version(file):
        return hashlib.md5(repr(file["crc32"] if "crc32" in file else file["e_tag"] or file["last_modified"]).encode(),
                           usedforsecurity=False).digest()


_cache = functools.cache(_Cache)
