"""Images under an S3 prefix as a PyTorch Dataset: fetched and decoded ahead of their use, loose or packed into shards.

Every image is a span of bytes: all of an object of its own, or a part of the shard that it is packed into.
"""

import copy
import functools
import itertools
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

import cv2
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from helpers import storage
from helpers.catalog import MadeList, Span, crc32, fetch, list_images, md5, read_index

with suppress(ImportError):  # Windows: no cache_dir there
    import fcntl

THREADS = 64  # requests in flight: hides 40 ms each
CORES = os.cpu_count()  # threads that decode: OpenCV releases the GIL
CHUNK = 4  # loose objects that a thread fetches one after the other: switching threads costs as much as decoding
DECODE_CHUNK = 8  # images, or a core's share of a batch, that a thread decodes one after the other, for the same reason
ANNOUNCED = 4096  # images that a batch announces
WINDOW = 64 * 2**20  # bytes of announced images that are held at once, encoded
DECODED = 2  # batches that are decoded ahead
GAP = 128 * 2**10  # bytes that are read for nothing where that saves a request: it costs about as much time
RANGE = 2 * 2**20  # bytes of a shard in one request


def decode(data, size=None, resize=None, squash=False):
    """Decode an encoded image (JPEG, PNG, WebP, BMP, …; grey, alpha or 16 bits too) to RGB: (3, H, W) uint8 tensor.

    size: pixels; the middle size x size of the image, whose shorter side is scaled to `resize` pixels (by default size
        as well), so that images of any shape fit one batch and keep their proportions.
    squash: scale both sides to size instead.
    Raises ValueError for what is not an image.
    """
    shorter = size if squash else resize or size
    try:
        reduced = choose_reduction(data, shorter) if size else 0
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | reduced) if len(data) else None
    except cv2.error:
        image = None
    if image is None:
        raise ValueError("not an image that OpenCV can decode")
    if size:
        image = fit(image, size, shorter, squash)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def fit(image, size, shorter, squash):
    """(H, W, 3) -> (size, size, 3): the middle of the image scaled to `shorter`, or all of it squashed."""
    height, width = image.shape[:2]
    scale = shorter / min(height, width)
    to = (size, size) if squash else (max(round(width * scale), size), max(round(height * scale), size))
    if to != (width, height):
        image = cv2.resize(image, to, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (to[1] - size) // 2, (to[0] - size) // 2
    return image[top : top + size, left : left + size]


def choose_reduction(data, size):
    """OpenCV's flag to decode a JPEG at 1/8, 1/4 or 1/2, which costs less, if both sides still have size pixels."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 < len(data) and data[at] == 0xFF:  # marker by marker to the frame header
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            shorter = min(int.from_bytes(data[i : i + 2], "big") for i in (at + 5, at + 7))
            return next((8 * scale for scale in (8, 4, 2) if shorter >= scale * size), 0)  # 64, 32, 16
        at += 1 if marker == 0xFF else 2 + length  # 0xFF may be repeated before a marker
    return 0


class S3ImageFolder(Dataset):
    """torchvision's ImageFolder over s3://bucket/prefix/{class}/…/{file}, read as it is used, never through a disk.

    Items are (image, class index): the image (3, H, W) uint8 as `loader` makes it from the object's bytes, then
    `transform`. A DataLoader asks for all of a batch at once (`__getitems__`), so its images are fetched together; the
    batches of `images.loader` also say what comes after them, which is fetched meanwhile. What `pack` wrote is read as
    the folder it was made from, many images a request, and stays in memory up to 64 MB. A folder of which
    `catalog.write_index` has kept the list is not listed again. What is known of the images is in one memory for all
    workers, 60 bytes an image; `samples` and `targets` are made of it as they are asked for.

    on_error: "raise" a StorageError that names the object, or "skip": put the next image of the same class in its
        place, warn, and note it in `skipped` ({url: reason}; a worker's are its own, but its warnings are seen).
    classes: those of the training set, so that validation and test data number theirs alike; by default the folders.
    cache_dir: a local folder that keeps what was read, up to `cache_bytes`, for later epochs, runs and processes.
    Raises StorageError when there is no class folder with images, or one that is not in classes. Other files are
    counted in `ignored`.
    """

    def __init__(
        self,
        root,
        transform=None,
        target_transform=None,
        loader=decode,
        on_error="raise",
        cache_dir=None,
        cache_bytes=20 * 2**30,
        classes=None,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error is "raise" or "skip", not {on_error!r}')
        self.root, self.transform, self.target_transform = str(root).rstrip("/"), transform, target_transform
        self.loader, self.on_error, self.skipped = loader, on_error, {}
        self.cache = (str(Path(cache_dir).expanduser().absolute()), cache_bytes, self.root) if cache_dir else None
        self.table = read_index(self.root) or list_images(self.root)
        found, self.shards, self.ignored = (self.table.about[name] for name in ("classes", "shards", "ignored"))
        self.classes = list(classes or found)
        if unknown := ", ".join(name for name in found if name not in self.classes):
            raise storage.StorageError(f"{self.root} has classes that are not among those given: {unknown}.")
        if missing := ", ".join(name for name in self.classes if name not in found):
            warnings.warn(f"{self.root} has no images of: {missing}", stacklevel=2)
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        if self.classes != found:
            self.table = self.table.replace(targets=np.array([*map(self.class_to_idx.get, found)])[self.table.targets])
        small = self.shards and self.table.sizes.sum() <= WINDOW
        self._memory = {} if small else None  # {index: bytes}: a small pack stays there
        self._kept = bytearray(len(self) * bool(cache_dir))  # 1: seen whole in the cache

    samples = property(
        lambda self: MadeList(len(self), lambda i: (self.url(i), int(self.table.targets[i]))),
        doc="[(URL, class index)] of all images, each made when it is asked for.",
    )
    targets = property(
        lambda self: MadeList(len(self), lambda i: int(self.table.targets[i])),
        doc="[class index] of all images, each made when it is asked for.",
    )

    def url(self, index):
        return f"{self.root}/{self.table.name(index)}"

    def span(self, index):
        """Where an image lies."""
        table = self.table
        size, version = int(table.sizes[index]), table.versions[index].tobytes()
        if not self.shards:
            return Span(self.url(index), 0, size, version)
        first = int(table.firsts[index])
        return Span(f"{self.root}/{self.shards[table.places[index]]}", first, first + size, version)

    def __getstate__(self):
        return {**vars(self), "_memory": self._memory and {}}  # a worker reads its own

    def __len__(self):
        return len(self.table.sizes)

    def __repr__(self):
        how = f" in {len(self.shards)} shards" if self.shards else ""
        how += f", as listed on {self.table.about['listed']}" if "listed" in self.table.about else ""
        return f"S3ImageFolder({self.root!r}): {len(self):,} images of {len(self.classes)} classes{how}"

    def __getitem__(self, index):
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices):
        # Fetched and decoded in threads, transformed here in order: random augmentation stays the same for a seed.
        storage.store(storage.parse(self.root)[0])  # made here, not in every thread; its error after a fork is no skip
        prefetch, ahead = getattr(indices, "prefetch", None) or Prefetch(), getattr(indices, "ahead", ())
        self._fetch_ahead(prefetch, (indices, *ahead))
        for batch in (indices, *ahead[:DECODED]):
            new = [index for index in dict.fromkeys(batch) if index not in prefetch.decoding]
            for chunk in chunks(new, max(DECODE_CHUNK, len(new) // CORES)):
                fetching = {index: prefetch.fetching.pop(index, None) for index in chunk}
                prefetch.decoding |= dict.fromkeys(chunk, threads("decode", CORES).submit(self._load_all, fetching))
        images = {index: prefetch.decoding.pop(index).result()[index] for index in dict.fromkeys(indices)}
        items = []
        for index in indices:
            image, target = images[index], int(self.table.targets[index])
            if len(images) < len(indices):  # some come more than once, and a transform may change an image in place
                image = copy.deepcopy(image)
            image = self.transform(image) if self.transform else image
            items.append((image, self.target_transform(target) if self.target_transform else target))
        return items

    def _fetch_ahead(self, prefetch, batches):
        """Ask for the images of a batch and of those after it.

        Of loose objects as many as keep all threads at work. Of shards as many as memory may hold, thousands, and again
        when half of them are used, so that many of them lie close together though their order is random.
        """
        if self.shards and len(prefetch.fetching) + len(prefetch.decoding) > prefetch.enough:
            return
        wanted, held = {}, 0
        for number, batch in enumerate(batches):
            if number > DECODED and (held > WINDOW or not self.shards and len(wanted) >= CHUNK * THREADS):
                break
            wanted |= dict.fromkeys(batch)
            held += self.table.sizes[batch].sum()
        prefetch.enough = max(len(wanted) // 2, (1 + DECODED) * len(batches[0]))
        new = [index for index in wanted if index not in prefetch.fetching and index not in prefetch.decoding]
        # As a pass begins, one request a task: the images then come in the order in which they are waited for.
        chunk = 1 if self.shards or not (prefetch.fetching or prefetch.decoding) else CHUNK
        prefetch.fetching |= dict.fromkeys(new)  # None: no request, for what is here already
        cache, memory = self._open_cache(), self._memory or ()
        here = {i for i in new if i in memory or cache and (self._kept[i] or cache.has(self.url(i)))}
        for task in chunks(self.group([index for index in new if index not in here]), chunk):
            future = threads("fetch", THREADS).submit(self._fetch, task)
            prefetch.fetching |= dict.fromkeys(itertools.chain(*task), future)

    def group(self, indices):
        """The indices in lists, one for each request: what lies close together in a shard. Soonest needed first."""
        if not self.shards:
            return [[index] for index in indices]
        position = {index: i for i, index in enumerate(indices)}
        places, firsts, sizes = (column[indices] for column in (self.table.places, self.table.firsts, self.table.sizes))
        order, requests, start, end = np.lexsort((firsts, places)), [], None, 0
        for i, place, first, size in zip(
            *(column[order].tolist() for column in (np.array(indices), places, firsts, sizes))
        ):
            if not requests or place != start[0] or first - end > GAP or first + size - start[1] > RANGE:
                requests.append([])
                start = place, first
            requests[-1].append(i)
            end = first + size
        return sorted(requests, key=lambda request: min(map(position.get, request)))

    def _fetch(self, requests):
        """Make requests one after the other: {index: the image's bytes, or the OSError that there was}."""
        received = {}
        for request in requests:
            try:
                if storage.ended.is_set():
                    raise OSError("the program has ended")
                if self.shards:
                    start, end = self.span(request[0]), self.span(request[-1])
                    data = fetch(start.object, start.first, end.last)
                    firsts = self.table.firsts[request].astype(int) - start.first
                    parts = [data[first:last] for first, last in zip(firsts, firsts + self.table.sizes[request])]
                else:  # all of it, since an object may have grown
                    version = self.table.versions[request[0]].tobytes() if "listed" in self.table.about else None
                    parts = [fetch(self.url(request[0]), expected=version)]
            except OSError as error:
                parts = [error] * len(request)
            received |= zip(request, parts)
        return received

    def _load_all(self, fetching):
        return {index: self._load(index, future) for index, future in fetching.items()}

    def _load(self, index, future):
        """The decoded image or, with on_error="skip", the next one of its class that can be read."""
        wanted = self.table.targets[index]
        for i in itertools.chain(range(index, len(self)), range(index)):
            if self.table.targets[i] != wanted or self.skipped and self.url(i) in self.skipped:
                continue
            try:
                return self.loader(self._read(i, future if i == index else None))
            except (OSError, ValueError) as error:
                url = self.url(i)
                reason = str(error) if url in str(error) else f"{url}: {error}"
                if self.on_error == "raise":
                    raise storage.StorageError(reason) from None
                self.skipped[url] = reason
                warnings.warn(f"skipped {reason}")
        raise storage.StorageError(f"No image of the class {self.classes[wanted]!r} under {self.root} can be read.")

    def _read(self, index, future):
        """The bytes of an image: from memory, from the local cache, or from the server by the request in the future."""
        if self._memory and index in self._memory:
            return self._memory[index]
        cache = self._open_cache()
        if cache and (data := cache.get(self.url(index), self.span(index), checked=self._kept[index])) is not None:
            self._kept[index] = 1
            return data
        data = (future.result() if future else self._fetch([[index]]))[index]
        if self.shards and not isinstance(data, OSError) and crc32(data) != self.table.versions[index].tobytes():
            data = storage.StorageError(
                f"{self.url(index)} is damaged in {self.span(index).object}: delete {self.root} and pack it again."
            )
        if isinstance(data, OSError):
            raise data
        if self._memory is not None:
            self._memory[index] = data
        if cache:
            cache.put(self.url(index), self.span(index), data)
        return data

    def _open_cache(self):
        return open_cache(*self.cache) if self.cache else None


def loader(dataset, batch_size, shuffle=False, num_workers=0, seed=0, **options):
    """A DataLoader of a dataset on S3; the same seed gives the same order, however many workers there are.

    It gives the same augmentation, too, in workers; without them augmentation follows torch.manual_seed. Workers come
    from a fork server, since S3 clients do not survive a fork, and have this process's environment.
    """
    multiprocessing.set_forkserver_preload(["__main__", __name__])  # PyTorch is imported once, not by every worker
    # A generator for the order alone: from the loader's own, persistent workers and none draw differently.
    order = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed)) if shuffle else None
    batches = dict(batch_size=batch_size, sampler=order)
    if isinstance(dataset, S3ImageFolder):
        order = options.pop("sampler", order or SequentialSampler(dataset))
        batches = dict(batch_sampler=AnnouncedBatches(order, batch_size, options.pop("drop_last", False)))
        batches["batch_sampler"].num_workers = num_workers
    return DataLoader(
        dataset,
        **batches,
        num_workers=num_workers,
        multiprocessing_context="forkserver" if num_workers else None,
        persistent_workers=num_workers > 0,
        worker_init_fn=functools.partial(_start_worker, dict(os.environ)),
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def _start_worker(environment, worker):
    os.environ.clear()  # the fork server's, from when it started
    os.environ.update(environment)


class AnnouncedBatches(BatchSampler):
    """PyTorch's batches of indices, each of which knows which come after it: batch.ahead, and its epoch's Prefetch."""

    num_workers = 0

    def __iter__(self):
        prefetch, batches = Prefetch(), super().__iter__()
        readers = max(self.num_workers, 1)  # processes, which take turns
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            readers *= torch.distributed.get_world_size()
        window = deque(itertools.islice(batches, 1 + readers * max(ANNOUNCED // self.batch_size, 2)))
        while window:
            batch = Batch(window.popleft())
            batch.prefetch, batch.ahead = prefetch, tuple(itertools.islice(window, readers - 1, None, readers))
            yield batch
            window.extend(itertools.islice(batches, 1))


class Batch(list):
    """Indices that can carry attributes."""


class Prefetch:
    """What one pass over a dataset has asked for and not used yet.

    It belongs to the pass, not to the dataset, so that several loaders and threads can read one dataset at a time. Its
    batches hold it; when the last of them is gone, so is the pass, and what has not begun is cancelled.
    """

    def __init__(self, key=None):
        self.key = key or uuid.uuid4().hex
        self.fetching = {}  # {index: future of {index: bytes}}
        self.decoding = {}  # {index: future of {index: image}}
        self.enough = 0  # while there are more than these in both, nothing is asked for

    def __del__(self):
        for future in (*self.decoding.values(), *self.fetching.values()):
            if future:
                future.cancel()

    def __reduce__(self):  # to a worker goes the key alone, and all batches of a pass meet there again
        return resume_prefetch, (self.key,)


@functools.lru_cache(maxsize=1)  # a worker serves one pass after the other
def resume_prefetch(key):
    return Prefetch(key)


def chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


@functools.cache
def threads(name, count):
    return ThreadPoolExecutor(count, thread_name_prefix=name)


class Cache:
    """Images of a data set in a local folder, with a bound on its bytes that holds for all processes that share it.

    A file appears whole, by renaming, while the process holds the lock of the account of bytes. A lock ends with the
    process that holds it, so that one may be killed at any time. When the bound is reached, data sets that no process
    uses are deleted, the one used longest ago first. Of those in use everything stays and nothing comes in: an epoch
    needs each of its images once, so that one is worth as much as another.
    """

    def __init__(self, directory, limit, root):
        self.directory, self.limit, self.full = Path(directory), limit, False
        self.folder = self.directory / md5(root.encode()).hex()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self._locked_account():
                self.folder.mkdir(exist_ok=True)
                self.in_use = open(self.folder / "in-use", "w")  # locked as long as this process lives
                fcntl.flock(self.in_use, fcntl.LOCK_SH)
        except OSError as error:
            self.full = True
            warnings.warn(f"There is no cache at {self.directory}: {error}")

    def get(self, url, span, checked=False):
        """The image's bytes, or None when they are not here, of another length or, unless checked, version or checksum."""
        length = span.last - span.first
        try:
            file = os.open(self._path(url), os.O_RDONLY)  # for a file this small, Python's own takes twice the calls
            try:
                data = os.read(file, 4 + length + 1)
            finally:
                os.close(file)
        except OSError:
            return None
        checksum, data = data[:4], data[4:]
        return data if len(data) == length and (checked or checksum == self._checksum(span, data)) else None

    def has(self, url):
        return os.path.exists(self._path(url))

    def put(self, url, span, data):
        if self.full:
            return
        path, data = Path(self._path(url)), self._checksum(span, data) + data
        try:
            with self._locked_account() as account:
                number = account.read()
                total = int(number) if number.isdigit() else self.limit  # damaged: to be counted anew
                if path.exists():  # another version
                    total -= path.stat().st_size
                    path.unlink()
                if total + len(data) > self.limit:
                    total = self._make_room(len(data))
                self.full = total + len(data) > self.limit
                total += 0 if self.full else len(data)
                # First the account: a process that is killed between leaves room unused, never too many bytes.
                os.pwrite(account.fileno(), b"%020d" % total, 0)
                if not self.full:
                    path.parent.mkdir(exist_ok=True)
                    path.with_suffix(".new").write_bytes(data)
                    path.with_suffix(".new").replace(path)
        except OSError as error:  # such as a full disk: the images are there without it
            self.full = True
            warnings.warn(f"The cache at {self.directory} takes no more: {error}")

    @contextmanager
    def _locked_account(self):
        """The file with the number of bytes of all others, while no other process may write."""
        with open(os.open(self.directory / "bytes", os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as account:
            fcntl.flock(account, fcntl.LOCK_EX)
            yield account

    def _make_room(self, needed):
        """Delete data sets that no process uses until there is room; the bytes that are left, counted."""
        sizes = {}
        for in_use in self.directory.glob("*/in-use"):
            sizes[in_use] = 0
            for path in in_use.parent.glob("*/*"):
                if path.suffix == ".new":  # of a process that was killed
                    path.unlink()
                else:
                    sizes[in_use] += path.stat().st_size
        for in_use in sorted(sizes, key=lambda path: path.stat().st_mtime):
            if sum(sizes.values()) + needed <= self.limit:
                break
            with open(in_use) as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(in_use.parent)
                del sizes[in_use]
        return sum(sizes.values())

    def _path(self, url):
        name = md5(url.encode()).hex()
        return f"{self.folder}/{name[:2]}/{name}"

    @staticmethod
    def _checksum(span, data):  # of the version as well
        return zlib.crc32(data, zlib.crc32(repr(span.version).encode())).to_bytes(4, "big")


open_cache = functools.cache(Cache)  # one per process
