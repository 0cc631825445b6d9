"""What reads images fast: packed shards, batches that say what comes next, the local cache; listings, reduced decoding.

Requests are counted, held and changed by a proxy in front of a real server; processes are killed for real.
"""

import contextlib
import io
import itertools
import os
import pickle
import re
import secrets
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import cv2
import numpy as np
import obstore
import pictures
import psutil
import pytest
import torch
from boto3.s3.transfer import TransferConfig
from PIL import Image
from pictures import epoch, items, png, process, raw
from servers import wait_until
from servers.embedded import connected
from servers.fault_proxy import Connection, FaultProxy, fault_proxy
from torch.utils.data import RandomSampler
from torchvision.transforms import v2

from helpers import catalog, images, storage
from helpers.chapters import pack

HERE = "s3://pictures"
TREE = {name: png(number) for number, name in enumerate([*pictures.TREE, "ant/v1.2.final.png", "bee/.png"])}
PHOTOS = {
    f"{'abc'[n % 3]}/{n:02}.jpg": np.random.default_rng(n).bytes(30_000 if n == 7 else 100 + 40 * n) for n in range(60)
}  # which `bytes` loads
SETS = [{f"{'ab'[n % 2]}/{n:02}.jpg": bytes([s, n]) * 500 for n in range(20)} for s in range(4)]
CACHED = 20 * (1000 + 16)  # about the bytes of one of the sets in a cache
THOUSAND = {f"{'ab'[n > 499]}/{n:03}.jpg": b"%d" % n * 50 for n in range(1000)}
MB = 2**20
SHARD = 20_000
ENDS = """
import time
from helpers import images, storage

def fetch(url, **options):
    print(end="x", flush=True)
    time.sleep(0.3)
    raise storage.StorageError("Nothing answers")

storage.connect()
folder = images.S3ImageFolder("s3://pictures/thousand", loader=bytes)
images.fetch = fetch
next(iter(images.loader(folder, 8)))
"""


def expected(folder):
    """The items of {name: bytes}, in order."""
    classes = sorted({name[0] for name in folder})
    return [(folder[name], classes.index(name[0])) for name in sorted(folder)]


ITEMS = expected(PHOTOS)


def put(key, data):
    obstore.put(storage.store("pictures"), key, data, use_multipart=False)


def turned(data, at=0):
    """The data with one byte changed."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def size(directory):
    """Bytes of the images in a cache."""
    return sum(path.stat().st_size for path in directory.glob("*/*/*"))


class Wire(FaultProxy):
    """Notes what it passes on as (method, path, range) in `seen`.

    hold(method, path) is asked before: a request for which it is true waits until `released`, and is dropped then.
    """

    def __init__(self, upstream):
        super().__init__(upstream)
        self.RequestHandlerClass, self.released, self.seen, self.held = Watched, threading.Event(), [], []
        self.hold = lambda method, path: False

    def gets(self, prefix):
        """The GETs of images and shards under a prefix."""
        return [
            (path, span)
            for method, path, span in self.seen
            if method == "GET" and path.startswith(f"{prefix}/") and not path.endswith(catalog.INDEX)
        ]

    def puts(self):
        return [path for method, path, _ in self.seen if method == "PUT"]


class Watched(Connection):
    def forward(self):
        path = urllib.parse.unquote(self.path).removeprefix("/pictures/")
        self.server.seen.append((self.command, path, self.headers.get("range")))
        if self.server.hold(self.command, path):
            self.server.held.append(path)
            self.server.released.wait(60)
            raise ConnectionError("dropped")
        super().forward()


@contextlib.contextmanager
def wire():
    """This process connected through a Wire."""
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], Wire) as proxy:
        with connected(os.environ | {"AWS_ENDPOINT_URL": proxy.url}):
            proxy.seen.clear()
            yield proxy


def settled(count):
    """The number when it has not grown for a while."""
    before, now = -1, count()
    while before != now:
        time.sleep(0.15)
        before, now = now, count()
    return now


@pytest.fixture(scope="module", autouse=True)
def directory(tmp_path_factory):
    """A connected server and the folder that it serves: buckets and objects are folders and files."""
    directory = tmp_path_factory.mktemp("served")
    folders = {"tree": TREE | {"readme.md": b"no image", "ant/notes.txt": b"no image"}, "photos": PHOTOS}
    folders |= {"thousand": THOUSAND} | {f"sets/{n}": files for n, files in enumerate(SETS)}
    folders["large"] = {f"a/{n:02}.jpg": b"%d" % n for n in range(20)}
    folders["huge"] = {"a/0.jpg": bytes(64 * MB)}
    files = {f"pictures/{prefix}/{name}": data for prefix, folder in folders.items() for name, data in folder.items()}
    for n in range(1100):  # what is listed folder by folder, at the top and further down, and more folders than that
        files |= {f"many/top{n}": b"x" * (n % 7), f"many/folders/{n}/x.png": b"x" * (n % 3)}
        files[f"many/o dd/b+c & d%20é~#/%2F{n}"] = b"x" * (n % 5)
    files |= {f"many/o dd/{name}/{n}": b"x" for name in ("b+c & d%20é~#/de/ep", "few") for n in range(5)}
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if "/large/" in name:
            os.truncate(path, 4 * MB)
    with connected(storage.serve(directory)):
        yield directory


@pytest.fixture(scope="module")
def packed(directory):
    """The packed photos."""
    return pack.pack(f"{HERE}/photos", shard_bytes=SHARD)


@pytest.fixture
def fresh():
    """The name of a prefix that no other test has."""
    return f"test-{secrets.token_hex(4)}"


DOZEN = dict(list(PHOTOS.items())[:12])


def copied(prefix):
    """Some of the photos under a prefix of their own; its URL."""
    for name, data in DOZEN.items():
        put(f"{prefix}/{name}", data)
    return f"{HERE}/{prefix}"


# ------------------------------------------------------------------------------------------------------- what is packed


def test_what_is_packed_reads_as_the_folder_it_was_made_from(packed):
    tree = pack.pack(f"{HERE}/tree/", f"{HERE}/tree-as-it-was/", shard_bytes=8000)
    for url, there in (f"{HERE}/tree", tree), (f"{HERE}/photos", packed):
        loose, shards = raw(url), raw(there)
        assert len(shards.shards) > 4 and f"{len(shards)} images" in repr(shards)
        for name in "classes", "class_to_idx", "targets":
            assert getattr(shards, name) == getattr(loose, name)
        assert [(path.replace(there, url), target) for path, target in shards.samples] == loose.samples
        assert list(shards) == list(loose)
        for shuffle in False, True:
            one, other = (images.loader(folder, 5, shuffle=shuffle) for folder in (loose, shards))
            for _ in range(2):
                read = items(other)
                assert read == items(one) and sorted(read) == sorted(loose)


def test_workers_read_packed_images_through_a_cache_in_the_same_order_and_ask_for_none_twice(packed, tmp_path):
    here = images.loader(raw(packed), 7, shuffle=True)
    there = images.loader(raw(packed, cache_dir=tmp_path), 7, shuffle=True, num_workers=2)
    for _ in range(2):
        assert items(there) == items(here)
    with wire() as proxy:
        loose = images.loader(raw(f"{HERE}/thousand"), 7, shuffle=True, num_workers=2)
        assert sorted(items(loose)) == sorted(expected(THOUSAND))
        assert len(proxy.gets("thousand")) == len(set(proxy.gets("thousand"))) == 1000


def test_in_blocks_each_image_comes_once_beside_its_neighbours_and_each_seed_has_its_order(packed):
    folder = raw(packed)
    order = pack.order_blocks(folder, block=5)
    assert sorted(order) == list(range(60)) and order != pack.order_blocks(folder, block=5, seed=1)
    lying = sorted(range(60), key=lambda index: (folder.span(index).object, folder.span(index).first))
    blocks, runs = ([some[i : i + 5] for i in range(0, 60, 5)] for some in (order, lying))
    assert sorted(blocks) == sorted(runs) and blocks != runs, "neighbours stay together, the blocks do not"
    assert sorted(items(images.loader(folder, 6, sampler=order))) == sorted(ITEMS)


def test_neighbours_in_a_shard_come_with_one_request_and_a_small_pack_stays_in_memory(packed):
    folder = raw(packed)
    first = items(images.loader(folder, 7, shuffle=True))
    with wire() as proxy:
        assert sorted(items(images.loader(folder, 9, shuffle=True, seed=1))) == sorted(first)
        assert not proxy.seen
        assert items(images.loader(pickle.loads(pickle.dumps(folder)), 7, shuffle=True)) == first
        assert len(proxy.gets("photos-packed")) == len(folder.shards) < 20


def test_transient_faults_of_the_server_show_neither_in_packing_nor_in_reading_nor_in_a_listing(fresh):
    url, there = copied(fresh), pages("many/o dd")
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], slow_down_every=7, reset_every=6, truncate_every=3) as proxy:
        with connected(os.environ | {"AWS_ENDPOINT_URL": proxy.url}):
            assert sorted(epoch(pack.pack(url, shard_bytes=SHARD), 0)) == sorted(expected(DOZEN))
            assert min(proxy.slow_downs, proxy.resets, proxy.truncations) > 1
            before = proxy.resets
            assert all(listed("s3://many/o dd") == there for _ in range(5)) and proxy.resets > before


def test_a_shard_is_a_tar_of_images_and_their_class_indices_which_webdataset_reads(directory):
    folder, found = raw(pack.pack(f"{HERE}/tree", f"{HERE}/tree-tars", shard_bytes=8000)), []
    shards = [directory / "pictures/tree-tars" / shard for shard in folder.shards]
    for shard in shards:
        with tarfile.open(shard) as archive:
            members = [(member.name, archive.extractfile(member).read()) for member in archive]
        assert sum(len(data) for _, data in members) < 8000
        for (image, data), (label, target) in zip(members[::2], members[1::2], strict=True):
            number = f"{len(found):08}"
            assert (image, label) == (f"{number}.png", f"{number}.cls")  # a.PNG's ending, too
            found.append((data, int(target)))
    assert sorted(found) == sorted(folder) and found != list(folder)  # shuffled
    webdataset = pytest.importorskip("webdataset")
    read = webdataset.WebDataset(list(map(str, shards)), shardshuffle=False)
    assert [(sample["png"], int(sample["cls"])) for sample in read] == found


def test_damage_is_an_error_that_names_image_and_shard_or_is_skipped_with_a_warning(fresh):
    url = pack.pack(f"{HERE}/photos", f"{HERE}/{fresh}", SHARD)
    folder = raw(url)
    spans = [folder.span(index) for index in range(60)]
    damaged, gone = spans[20].object, next(span.object for span in spans if span.object != spans[20].object)
    storage.write(damaged, turned(storage.read(damaged), spans[20].first + 3))
    storage.delete(gone)
    bad = {folder.url(index): span.object for index, span in enumerate(spans) if index == 20 or span.object == gone}
    for name, shard in bad.items():
        with pytest.raises(storage.StorageError, match=f"{name}.*{shard}"):
            folder[sorted(PHOTOS).index(name.removeprefix(f"{url}/"))]
    folder = raw(url, on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        shown = items(images.loader(folder, 8))
    assert sorted(folder.skipped) == sorted(bad) and len(shown) == 60
    assert {data for data, _ in shown} == {data for name, data in PHOTOS.items() if f"{url}/{name}" not in bad}


def contents(prefix):
    return {name: storage.read(f"{HERE}/{prefix}/{name}") for name in storage.objects(f"{HERE}/{prefix}")}


def test_packing_that_was_killed_is_completed_to_the_same_bytes_and_no_finished_shard_is_written_again(fresh, packed):
    url, whole = f"{HERE}/{fresh}", contents("photos-packed")
    arguments, shards = (f"{HERE}/photos", url, SHARD), len(whole) - 1
    with wire() as proxy, process() as other:
        number = other.submit(os.getpid).result()
        proxy.hold = lambda method, path: path in (f"{fresh}/shard-000002.tar", f"{fresh}/index/000004.json")
        packing = other.submit(pack.pack, *arguments)
        wait_until(lambda: len(storage.objects(url)) == 2 * shards - 3, "all but what is held", os.devnull)
        os.kill(number, signal.SIGKILL)
        assert packing.exception()
        left = storage.objects(url)
        proxy.hold = lambda method, path: False
        proxy.seen.clear()
        pack.pack(*arguments)
        redone = [raw(packed).span(index).object[-8:-4] in ("0002", "0004") for index in range(60)]
        assert len(proxy.gets("photos")) == sum(redone)
    assert contents(fresh) == whole
    now = storage.objects(url)
    assert all(now[name] == left[name] for name in now if name in left and "000004" not in name)  # its date, too


def test_a_shard_goes_up_in_parts_and_no_more_of_its_images_is_read_than_the_next_part(fresh):
    with wire() as proxy, ThreadPoolExecutor(1) as pool:
        proxy.hold = lambda method, path: method == "PUT" and not proxy.released.is_set()
        packing = pool.submit(pack.pack, f"{HERE}/large", f"{HERE}/{fresh}", shard_bytes=10**9)
        wait_until(lambda: proxy.held, "the first part", os.devnull)
        ahead = settled(lambda: len(proxy.gets("large")))
        proxy.released.set()
        packing.result()
        assert 2 <= ahead <= 2 * pack.PART // (4 * MB) + 1
        assert sum("partNumber" in path for path in proxy.puts()) > 80 * MB // (2 * pack.PART)
    folder = raw(f"{HERE}/{fresh}")
    assert len(folder.shards) == 1 and [folder[index][0][:3].strip(b"\0") for index in (0, 19)] == [b"0", b"19"]


def test_a_part_that_arrives_damaged_is_refused_and_leaves_nothing(fresh, monkeypatch):
    url = f"{HERE}/{fresh}"
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "md5", lambda data: bytes(16))  # of other bytes
        for parts in [b"small"], [bytes(pack.PART), b"end"]:
            with pytest.raises(storage.StorageError, match=url):
                pack.put_verified(url, parts)
    assert not storage.objects(url)
    assert not storage.client().list_multipart_uploads(Bucket="pictures").get("Uploads")


def test_a_pack_of_other_images_or_settings_is_not_overwritten_and_the_error_says_what_to_do(fresh):
    url = copied(fresh)
    put(f"{fresh}-packed/shard-000007.tar", b"left of other settings when packing was killed")
    there = pack.pack(url)
    before = contents(f"{fresh}-packed")
    assert [*before] == [catalog.INDEX, "shard-000000.tar"]
    with wire() as proxy:
        assert pack.pack(url) == there and not proxy.puts() and not proxy.gets(f"{fresh}/b")  # the same again
    seeds = (raw(folder).table.firsts.tolist() for folder in (there, pack.pack(url, f"{there}-1", seed=1)))
    assert next(seeds) != next(seeds)
    say = re.escape(there) + r".*storage\.delete.*another packed_url"
    for settings in {"shard_bytes": 5000}, {"seed": 1}, {}:
        if not settings:
            put(f"{fresh}/a/new.jpg", b"one more")
        with pytest.raises(storage.StorageError, match=say):
            pack.pack(url, **settings)
    assert contents(f"{fresh}-packed") == before


def test_an_image_that_is_not_what_was_listed_is_an_error_that_names_it_and_nothing_is_packed(fresh):
    url, replaced = copied(fresh), ("GET", f"{fresh}/b/01.jpg")
    with wire() as proxy:
        proxy.hold = lambda *request: request == replaced and put(request[1], PHOTOS["b/01.jpg"][::-1])
        with pytest.raises(storage.StorageError, match=f"{url}/b/01.jpg.*checksum"):
            pack.pack(url)
    assert not storage.objects(f"{url}-packed")
    assert len(raw(pack.pack(url))) == 12


def test_images_of_which_the_etag_is_no_checksum_are_packed_and_a_server_that_knows_ranges_gives_them(moto_env, bucket):
    with connected(moto_env):
        storage.create_bucket(bucket)
        in_parts = TransferConfig(multipart_threshold=1)
        for name, data in DOZEN.items():
            options = {"Config": in_parts} if name == "b/04.jpg" else {}
            storage.client().upload_fileobj(io.BytesIO(data), bucket, f"of/{name}", **options)
        assert "-" in storage.objects(f"s3://{bucket}/of")["b/04.jpg"]["e_tag"]
        packed = raw(pack.pack(f"s3://{bucket}/of", shard_bytes=SHARD))
        assert items(images.loader(packed, 5)) == expected(DOZEN)


@pytest.mark.parametrize("batch_size, first, used, then", [(8, 4 * images.THREADS, 17, 384), (200, 600, 2, 800)])
def test_while_a_batch_is_used_as_many_images_are_asked_for_as_keep_the_threads_at_work(batch_size, first, used, then):
    folder = raw(f"{HERE}/thousand")
    with wire() as proxy:
        batches = iter(images.loader(folder, batch_size))
        shown = items([next(batches)])
        assert settled(lambda: len(proxy.gets("thousand"))) == first
        shown += items(itertools.islice(batches, used - 1))
        assert settled(lambda: len(proxy.gets("thousand"))) == then
        assert shown + items(batches) == expected(THOUSAND)
        assert len(proxy.gets("thousand")) == len(set(proxy.gets("thousand"))) == 1000


def test_no_more_bytes_are_asked_for_ahead_than_memory_is_meant_to_hold():
    for url in f"{HERE}/large", pack.pack(f"{HERE}/large", shard_bytes=40 * MB):
        folder = images.S3ImageFolder(url, loader=lambda data: int(data[:2].strip(b"\0")))
        folder[0]
        with wire() as proxy:
            batches = iter(images.loader(folder, 1))
            shown = [next(batches)]
            settled(lambda: len(proxy.seen))
            asked = [re.findall(r"\d+", span or f"0-{4 * MB - 1}") for _, span in proxy.gets(url.split("/")[-1])]
            held = sum(int(last) + 1 - int(first) for first, last in asked)
            assert images.WINDOW / 2 < held <= images.WINDOW + 4 * MB + 1024 * 20
            assert [int(number) for number, _ in [*shown, *batches]] == list(range(20))


def test_loaders_over_one_folder_broken_off_in_turns_and_in_threads_each_have_pytorchs_order_of_their_seed(packed):
    for url in f"{HERE}/photos", packed:
        folder = raw(url)

        def read(seed):
            sampler = RandomSampler(folder, generator=torch.Generator().manual_seed(seed))
            loader = images.loader(folder, 4, shuffle=True, seed=seed)
            epochs = [(items(itertools.islice(loader, taken)), list(sampler)) for taken in (1, 3, 15, 15)]
            return all(shown == [ITEMS[index] for index in order[: len(shown)]] for shown, order in epochs)

        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(read, range(6)))
        in_turns = zip(images.loader(folder, 8), images.loader(folder, 8))
        assert [items(batches) for batches in zip(*in_turns)] == [ITEMS, ITEMS]


def test_when_the_program_ends_only_what_is_in_flight_is_waited_for():
    command = [sys.executable, "-c", ENDS]
    done = subprocess.run(command, cwd=storage.REPOSITORY, capture_output=True, text=True, timeout=60)
    assert "Nothing answers" in done.stderr and done.returncode == 1
    begun_before_the_error = 2 * images.THREADS + 8
    assert images.THREADS <= done.stdout.count("x") <= begun_before_the_error


def test_a_sampler_that_repeats_images_within_and_across_batches_gives_them_as_often(packed):
    order = torch.randint(60, (250,), generator=torch.Generator().manual_seed(1)).tolist()
    for url, drop_last in (f"{HERE}/photos", False), (packed, True):
        loader = images.loader(raw(url), 40, sampler=order, drop_last=drop_last)
        batches = list(loader)
        assert len(loader) == len(batches) == (6 if drop_last else 7)
        assert items(batches) == [ITEMS[index] for index in order[: 240 if drop_last else 250]]


def test_an_image_that_is_in_a_batch_twice_is_asked_for_once_and_changed_in_place_once_each():
    folder = images.S3ImageFolder(f"{HERE}/tree", lambda image: image.bitwise_xor_(255))
    ((one, _),) = folder.__getitems__([0])
    with wire() as proxy:
        assert all(torch.equal(image, one) for image, _ in folder.__getitems__([0, 0]))
        assert len(proxy.gets("tree")) == 1


# --------------------------------------------------------------------------------------------------------------- cache


def test_what_was_read_once_is_read_from_the_cache_by_all_datasets_and_processes(packed, tmp_path):
    cache = tmp_path / "made/by itself"
    for url in f"{HERE}/photos", packed:
        folder = raw(url, cache_dir=cache)
        assert items(images.loader(folder, 8)) == ITEMS
        with wire() as proxy, process() as other:
            for again in folder, raw(url, cache_dir=str(cache)):
                assert items(images.loader(again, 60)) == ITEMS
            assert sorted(other.submit(epoch, url, 1, cache_dir=cache).result()) == sorted(ITEMS)
            assert not proxy.gets(url.removeprefix(f"{HERE}/"))


def test_an_image_that_is_put_anew_is_read_anew_and_no_other(fresh, tmp_path):
    url = copied(fresh)
    before = items(images.loader(raw(url, cache_dir=tmp_path), 5))
    for data in PHOTOS["b/01.jpg"][::-1], b"shorter":
        put(f"{fresh}/b/01.jpg", data)
        with wire() as proxy:
            now = items(images.loader(raw(url, cache_dir=tmp_path), 5))
            assert items(images.loader(raw(url, cache_dir=tmp_path), 5)) == now
            assert [path for path, _ in proxy.gets(fresh)] == [f"{fresh}/b/01.jpg"]
        assert [new for old, new in zip(before, now) if old != new] == [(data, 1)]


def test_a_file_of_the_cache_that_is_not_as_it_was_written_is_not_believed(packed, tmp_path):
    for url in f"{HERE}/photos", packed:
        cache = tmp_path / url[-6:]
        items(images.loader(raw(url, cache_dir=cache), 9))
        files = list(cache.glob("*/*/*"))
        assert len(files) == 60
        other = files[0].read_bytes()
        for number, path in enumerate(files):
            data = path.read_bytes()
            end_not_written = data[:50] + bytes(len(data) - 50)
            path.write_bytes([data[:-1], b"", secrets.token_bytes(len(data)), other, end_not_written][number % 5])
        with wire() as proxy:
            for again in False, True:
                proxy.seen.clear()
                assert items(images.loader(raw(url, cache_dir=cache), 9)) == ITEMS
                assert bool(proxy.gets(url.removeprefix(f"{HERE}/"))) != again


def test_where_a_cache_is_damaged_or_cannot_be_made_or_written_any_more_the_images_are_there_nevertheless(tmp_path):
    url, (cache, elsewhere) = f"{HERE}/photos", (tmp_path / "cache", tmp_path / "elsewhere")
    cache.mkdir()
    (cache / "bytes").write_bytes(bytes(20))  # the account, such as a file is after the power failed
    assert items(images.loader(raw(url, cache_dir=cache), 9)) == ITEMS
    with pytest.warns(UserWarning, match="There is no cache"):
        assert items(images.loader(raw(url, cache_dir=cache / "bytes/in it"), 9)) == ITEMS
    folder, batches = raw(url, cache_dir=elsewhere), []
    with pytest.warns(UserWarning, match=f"cache at {elsewhere} takes no more"):
        for batch in images.loader(folder, 4):
            batches.append(batch)
            if len(batches) == 3:
                elsewhere.rename(tmp_path / "away")
                elsewhere.write_text("a file in its place")
    assert items(batches) == ITEMS == items(images.loader(folder, 4))


def test_the_bound_holds_at_all_times_while_several_processes_write(tmp_path):
    options, shares = {"cache_dir": tmp_path, "cache_bytes": 2 * CACHED + 5000}, []
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(process()) for _ in SETS[:3]]
        numbers = [psutil.Process(other.submit(os.getpid).result()) for other in others]
        epochs = [other.submit(epoch, f"{HERE}/sets/{n}", n, **options) for n, other in enumerate(others)]
        while not shares or not all(each.done() for each in epochs):
            list(map(psutil.Process.suspend, numbers))
            while any(number.status() != psutil.STATUS_STOPPED for number in numbers):
                pass
            shares.append(size(tmp_path))
            list(map(psutil.Process.resume, numbers))
            time.sleep(0.005)
        for each, folder in zip(epochs, SETS):
            assert sorted(each.result()) == sorted(expected(folder))
    shares.append(size(tmp_path))
    assert CACHED < max(shares) <= options["cache_bytes"] and len(set(shares)) > 1


def test_the_bound_holds_after_a_process_was_killed_while_it_filled_the_cache_and_the_next_goes_on(tmp_path):
    options = {"cache_dir": tmp_path, "cache_bytes": 20 * (4 * MB + 16)}
    with process() as other:
        number = other.submit(os.getpid).result()
        filling = other.submit(epoch, f"{HERE}/huge", 0, **options)
        while not size(tmp_path):
            assert not filling.done()
        os.kill(number, signal.SIGKILL)
        assert filling.exception()
    assert size(tmp_path) <= options["cache_bytes"]
    folder = raw(f"{HERE}/large", **options)
    assert [data[:2].strip(b"\0") for data, _ in items(images.loader(folder, 2))] == [b"%d" % n for n in range(20)]
    assert 16 * MB <= size(tmp_path) <= options["cache_bytes"]


def test_images_that_no_process_uses_make_room_longest_ago_first_and_what_has_none_is_read_without(tmp_path):
    options, kept = {"cache_dir": tmp_path, "cache_bytes": 3 * CACHED + 5000}, []
    with process() as living:
        for n in range(4):  # 0 and 3 by a process that lives on
            with process() as ended:
                read = ended if n in (1, 2) else living
                read.submit(epoch, f"{HERE}/sets/{n}", 0, **options).result()
            kept.append(set(tmp_path.glob("*/*/*")).difference(*kept))
            time.sleep(0.02)
        now = set(tmp_path.glob("*/*/*"))
        assert now == kept[0] | kept[2] | kept[3] and len(now) == 60
        for seed in range(2):
            with wire() as proxy:
                assert sorted(epoch(f"{HERE}/photos", seed, **options)) == sorted(ITEMS)
                assert kept[0] | kept[3] < set(tmp_path.glob("*/*/*")) and size(tmp_path) <= options["cache_bytes"]
        assert len(proxy.gets("photos")) == 60 - (len(list(tmp_path.glob("*/*/*"))) - 40)


# ------------------------------------------------------------------------------------------------- a million images


def test_what_is_known_of_an_image_takes_few_bytes_and_goes_to_a_worker_without_a_copy():
    folder = raw(f"{HERE}/thousand")
    assert sum(column.nbytes for column in folder.table.columns.values()) < 60 * 1000
    assert len(ForkingPickler.dumps(folder)) < 5000
    with process() as other:
        assert other.submit(change_sizes, folder).result() == list(folder.samples)
    assert folder.table.sizes[7] == 47  # what it wrote is seen here


def change_sizes(folder):
    folder.table.columns["sizes"][7] = 47
    return list(folder.samples)


def test_samples_and_targets_are_as_lists():
    folder = raw(f"{HERE}/photos")
    samples = [(f"{HERE}/photos/{name}", "abc".index(name[0])) for name in sorted(PHOTOS)]
    targets = [target for _, target in samples]
    for made, wanted in (folder.samples, samples), (folder.targets, targets):
        assert made == wanted and wanted == made and made != wanted[:-1]
        assert (made[-1], made[3:-50:2], repr(made)) == (wanted[-1], wanted[3:-50:2], repr(wanted))
    assert torch.tensor(folder.targets).tolist() == np.array(folder.targets).tolist() == targets
    assert folder[-1] == folder[59] and len(list(folder)) == 60


def test_a_folder_with_an_index_is_not_listed_and_what_has_changed_or_gone_since_is_noticed(fresh):
    url = copied(fresh)
    put(f"{fresh}/{catalog.INDEX}", b'{"a": 0, "b": 1}')
    with pytest.raises(storage.StorageError, match=f"{url}/{catalog.INDEX} is no index.*delete"):
        raw(url)
    catalog.write_index(url)
    put(f"{fresh}/b/01.jpg", PHOTOS["b/01.jpg"][::-1])
    obstore.delete(storage.store("pictures"), f"{fresh}/c/02.jpg")
    put(f"{fresh}/a/new.jpg", b"new")
    with wire() as proxy:
        folder = raw(url, on_error="skip")
        assert [path for _, path, _ in proxy.seen] == [f"{fresh}/{catalog.INDEX}"] and len(folder) == 12
    assert "as listed on 2" in repr(folder)
    with pytest.warns(UserWarning, match="b/01.jpg has changed .*write_index"):
        assert len(items(images.loader(folder, 4))) == 12
    assert sorted(folder.skipped) == [f"{url}/b/01.jpg", f"{url}/c/02.jpg"]
    assert "There is no" in folder.skipped[f"{url}/c/02.jpg"]
    catalog.write_index(url)
    now = {name: data for name, data in DOZEN.items() if name != "c/02.jpg"}
    now |= {"a/new.jpg": b"new", "b/01.jpg": PHOTOS["b/01.jpg"][::-1]}
    assert items(images.loader(raw(url), 4)) == expected(now)


def listed(url):
    return [(item["path"], item["size"], item["e_tag"]) for item in storage.objects(url).values()]


def pages(url):
    """The objects under a prefix as boto3 lists them."""
    bucket, _, prefix = url.partition("/")
    found = storage.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix and f"{prefix}/")
    return [(item["Key"], item["Size"], item["ETag"]) for item in found.search("Contents[]")]


def test_thousands_of_objects_in_nested_folders_are_listed_as_boto3_lists_them():
    counts = {"many": 3310, "many/folders": 1100, "many/o dd": 1110, "many/o dd/few": 5, "pictures/thousand": 1000}
    for url, count in counts.items():
        found = listed(f"s3://{url}")
        assert len(found) == count and found == pages(url)
    with wire() as proxy:  # a thousand small folders cost few requests
        assert len(storage.objects("s3://many/folders")) == 1100 and len(proxy.seen) == 2


def test_the_marker_of_a_folder_at_the_end_of_an_answer_repeats_nothing(moto_env, bucket):
    with connected(moto_env), ThreadPoolExecutor(8) as pool:
        storage.create_bucket(bucket)
        names = [*(f"a/{n:03}" for n in range(999)), *(f"a/b/{n:03}" for n in range(10)), "a/c"]
        list(pool.map(lambda name: obstore.put(storage.store(bucket), name, b"x", use_multipart=False), names))
        storage.client().put_object(Bucket=bucket, Key="a/b/")
        assert sum(storage.list_pages(f"s3://{bucket}/a", len)) == len(names)
        assert [*storage.objects(f"s3://{bucket}")] == sorted(names)


# ---------------------------------------------------------------------------------------------------- reduced decoding


def smooth(height, width):
    """A colourful picture without symmetry."""
    few = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.resize(few, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(pixels, quality=95, mode="RGB", **options):
    data = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(data, "jpeg", quality=quality, **options)
    return data.getvalue()


def in_full(data, size):
    """The image decoded in full, then resized."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA).astype(int)


def distance(data, size):
    """The mean difference from that."""
    image = images.decode(data, size=size, squash=True)
    assert image.shape == (3, size, size) and image.dtype == torch.uint8 and image.is_contiguous()
    return np.abs(image.permute(1, 2, 0).numpy() - in_full(data, size)).mean()


def test_a_large_jpeg_of_any_kind_decoded_to_a_small_size_looks_like_the_whole():
    turned_by = Image.Exif()
    turned_by[0x0112] = 6
    thumbnail = jpeg(smooth(40, 50))  # other data in front of the frame's header
    kinds = {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}, {"exif": turned_by}, {"subsampling": 0}
    for options in *kinds, {"comment": thumbnail}:
        assert distance(jpeg(smooth(600, 900), **options), 70) < 1.5, options
        for size in 16, 75, 224, 301, 700:
            assert distance(jpeg(smooth(903, 601), **options), size) < 4, options
    for ending in ".png", ".webp", ".bmp":
        assert distance(cv2.imencode(ending, smooth(600, 900))[1].tobytes(), 64) == 0


def test_a_jpeg_is_never_decoded_smaller_than_what_is_wanted():
    detail = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    for scale in 8, 4, 2:
        shorter = 96 * scale - 8  # just not large enough for this scale
        for size in (shorter, shorter), (shorter, 1600), (1600, shorter):
            data = jpeg(cv2.resize(detail, size, interpolation=cv2.INTER_NEAREST), subsampling=0)
            small = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | 8 * scale)  # 1 / scale
            small = cv2.resize(small, (96, 96), interpolation=cv2.INTER_AREA)
            assert distance(data, 96) < 0.6 * np.abs(small - in_full(data, 96)).mean()


def test_a_picture_keeps_its_shape_and_its_middle_is_taken_as_torchvision_does():
    stripes = np.zeros((60, 120, 3), np.uint8)
    stripes[:, :30] = stripes[:, 90:] = 255
    for turned_picture in stripes, stripes.transpose(1, 0, 2):
        data = cv2.imencode(".png", np.ascontiguousarray(turned_picture))[1].tobytes()
        assert images.decode(data, 60).max() == 0 and images.decode(data, 60, squash=True).max() == 255
        evaluation = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
        theirs = evaluation(Image.fromarray(turned_picture))
        assert (theirs.float() - images.decode(data, 224, resize=256).float()).abs().mean() < 0.5
    data = jpeg(smooth(600, 900))
    middle = images.decode(data)[:, :, 150:750]
    assert (v2.functional.resize(middle, [30, 30]).float() - images.decode(data, 30).float()).abs().mean() < 6


def test_a_jpeg_that_is_cut_off_is_an_error_at_any_size_where_it_is_one_in_full():
    data, outcomes = jpeg(smooth(300, 300)), set()
    spoilt = [turned(data, 3), data[:2] + bytes(200) + data[2:], data[:2] + b"\xff" * 500, data[:2] + bytes(500)]
    for part in (*spoilt, *(data[:length] for length in [*range(0, 700, 3), *range(700, len(data), 500)])):
        answers = set()
        for size in None, 30:
            try:
                answers.add(images.decode(part, size=size).ndim)
            except ValueError:
                answers.add("no image")
        assert len(answers) == 1
        outcomes |= answers
    assert outcomes == {"no image", 3}
