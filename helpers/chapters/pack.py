"""Many small images side by side in tar shards."""

import hashlib
import io
import itertools
import json
import random
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import obstore

from helpers import storage
from helpers.images import EXTENSIONS, INDEX, THREADS, image_names, _md5, _threads, fetch

SHARDS = 4  # written at once, each held in memory


def pack(url, packed_url=None, shard_bytes=64 * 2**20, seed=0):
    """Write the images of class folders as tar shards with an index, which `S3ImageFolder` reads like the folders.

    A shard is a tar in WebDataset's layout: 00000042.jpg and 00000042.cls, its class index, for each image, in an order
    shuffled by seed. The index has, for each, its shard, offset, size and CRC-32. What comes in and what goes out is
    compared with the server's checksum. Shards are written several at once; what was cut off is completed.

    Returns packed_url, by default `url`-packed. Raises StorageError when something else is there already.
    """
    url, packed_url = str(url).rstrip("/"), str(packed_url or f"{str(url).rstrip('/')}-packed").rstrip("/")
    source = storage.objects(url)
    names = image_names(source)
    if not names:
        raise storage.StorageError(f"There are no class folders with images under {url}: check the name.")
    classes = sorted({name.split("/")[0] for name in names})
    random.Random(seed).shuffle(names)
    shards, room = [], 0
    for name in names:
        size = 3 * 512 + -(-source[name]["size"] // 512) * 512  # two headers, and contents filled up to blocks
        if size > room:
            shards.append([])
            room = shard_bytes - 1024  # which end a tar
        shards[-1].append(name)
        room -= size
    content = "".join(f"{name} {source[name]['e_tag']} {source[name]['size']}\n" for name in names)
    plan = {"images": hashlib.sha256(content.encode()).hexdigest(), "shard_bytes": shard_bytes, "seed": seed}
    there, first = storage.objects(packed_url), list(itertools.accumulate(map(len, shards), initial=0))
    if INDEX in there:
        _same(json.loads(fetch(f"{packed_url}/{INDEX}")), plan, packed_url)
        if any(name.startswith("index/") for name in there):  # it was killed at the very end
            storage.delete(f"{packed_url}/index")
        return packed_url

    def write(number):
        shard, piece = f"shard-{number:06}.tar", f"index/{number:06}.json"
        if piece in there and shard in there:
            rows = _same(json.loads(fetch(f"{packed_url}/{piece}")), plan, packed_url)["samples"]
        else:
            members = _threads("fetch", THREADS).map(lambda name: _verified(f"{url}/{name}", source[name]), shards[number])
            rows, tar = [], io.BytesIO()
            with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for i, (name, data) in enumerate(zip(shards[number], members), first[number]):
                    rows.append([name, number, tar.tell() + 512, len(data), zlib.crc32(data)])
                    label = str(classes.index(name.split("/")[0])).encode()
                    for ending, content in ((next(filter(name.lower().endswith, EXTENSIONS)), data), (".cls", label)):
                        member = tarfile.TarInfo(f"{i:08}{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
            _put(f"{packed_url}/{shard}", tar.getvalue())
            _put(f"{packed_url}/{piece}", json.dumps({**plan, "samples": rows}).encode())
        bar.update(len(rows))
        return rows

    with storage.progress(len(names), f"packing {url}", "image") as bar, ThreadPoolExecutor(SHARDS) as pool:
        try:
            rows = list(itertools.chain.from_iterable(pool.map(write, range(len(shards)))))
        finally:
            pool.shutdown(cancel_futures=True)
    written = [f"shard-{number:06}.tar" for number in range(len(shards))]
    _put(f"{packed_url}/{INDEX}", json.dumps({**plan, "classes": classes, "shards": written, "samples": rows}).encode())
    storage.delete(f"{packed_url}/index")
    return packed_url


def _same(record, plan, url):
    if any(record.get(name) != value for name, value in plan.items()):
        raise storage.StorageError(f"{url} holds a pack of other images, or with other settings: delete it "
                                   f"(storage.delete({url!r})), or use another packed_url.")
    return record


def _verified(url, file):
    """The object's bytes, which have its ETag for their MD5 or, where that is none, come twice the same."""
    data = fetch(url)
    e_tag = (file["e_tag"] or "").strip('"')
    if len(data) != file["size"] or _md5(data) != e_tag and (_is_md5(url, e_tag) or data != fetch(url)):
        raise storage.StorageError(f"{url} does not come as it was put: its checksum is another. Put it again.")
    return data


def _is_md5(url, e_tag):
    """Whether an ETag is the contents' MD5: not that of parts, nor of what is encrypted with a key of its owner."""
    bucket, key = storage.parse(url)
    with storage.translate_errors(url):
        head = storage.client().head_object(Bucket=bucket, Key=key)
    return len(e_tag) == 32 and "SSECustomerAlgorithm" not in head and "kms" not in head.get("ServerSideEncryption", "")


def _put(url, data):
    """Put an object and see to it that it is there as it is here."""
    bucket, key = storage.parse(url)
    with storage.translate_errors(url):
        put = obstore.put(storage.store(bucket), key, data, use_multipart=False)
        if _md5(data) != (put["e_tag"] or "").strip('"') and fetch(url) != data:
            raise storage.StorageError(f"{url} is not there as it was put: try again.")
