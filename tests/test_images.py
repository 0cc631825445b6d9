"""Images in a bucket: the dataset, its loader and workers, packed shards, what is read ahead, the cache, and listings.

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
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.reduction import ForkingPickler

import numpy as np
import obstore
import pictures
import psutil
import pytest
import torch
import webdataset
from boto3.s3.transfer import TransferConfig
from cells import run_cells
from pictures import epoch, items, png, process, raw
from servers import wait_until
from servers.embedded import connected
from servers.fault_proxy import Connection, fault_proxy
from torch.utils.data import RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from helpers import catalog, images, storage
from helpers.chapters import pack

HERE = "s3://pictures"
NAMES = """ant/z.png ant/10.png ant/9.png ant/B.PNG ant/sub/a.png ant/sub_b/c.png ant/sub/deep/er/d.png ant/sub-1/e.png
Zebra/a.png bee/b+c_&_d%20é.png bee/.hidden.png bee/.png bee_hive/1.png bee-2/1.png ant/v1.2.final.png ant_hill/1.png"""
TREE = {name.replace("_", " "): png(number) for number, name in enumerate(NAMES.split())}
PHOTOS = {  # which `bytes` loads
    f"{'abc'[n % 3]}/{n:02}.jpg": np.random.default_rng(n).bytes(30_000 if n == 7 else 100 + 40 * n) for n in range(60)
}
DOZEN = dict(list(PHOTOS.items())[:12])
SETS = [{f"{'ab'[n % 2]}/{n:02}.jpg": bytes([s, n]) * 500 for n in range(20)} for s in range(4)]
CACHED = 20 * (1000 + 16)  # about the bytes of one of the sets in a cache
THOUSAND = {f"{'ab'[n > 499]}/{n:03}.jpg": b"%d" % n * 50 for n in range(1000)}
MB = 2**20
SHARD = 20_000


def expected(folder):
    """The items of {name: bytes}, in order."""
    classes = sorted({name[0] for name in folder})
    return [(folder[name], classes.index(name[0])) for name in sorted(folder)]


ITEMS = expected(PHOTOS)


def same(one, other):
    """Whether the items are the same: images, targets and order."""
    return len(one) == len(other) and all(torch.equal(a, b) and s == t for (a, s), (b, t) in zip(one, other))


def put(key, data):
    obstore.put(storage.store("pictures"), key, data, use_multipart=False)


def contents(prefix):
    return {name: storage.read(f"{HERE}/{prefix}/{name}") for name in storage.objects(f"{HERE}/{prefix}")}


def size(directory):
    """Bytes of the images in a cache."""
    return sum(path.stat().st_size for path in directory.glob("*/*/*"))


class Watched(Connection):
    """Notes what is passed on; what the proxy shall hold waits until it is `released`, and is dropped then."""

    def forward(self):
        proxy, path = self.server, urllib.parse.unquote(self.path).removeprefix("/pictures/")
        proxy.seen.append((self.command, path, self.headers.get("range")))
        if proxy.hold(self.command, path):
            proxy.released.wait(60)
            raise ConnectionError("dropped")
        super().forward()


@contextlib.contextmanager
def wire():
    """This process connected through a proxy that watches."""
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.RequestHandlerClass, proxy.seen, proxy.released = Watched, [], threading.Event()
        proxy.hold = lambda method, path: False
        with connected(os.environ | {"AWS_ENDPOINT_URL": proxy.url}):
            proxy.seen.clear()
            yield proxy


def gets(proxy, prefix):
    """The GETs of images and shards under a prefix, [(path, range)]."""
    asked = [(path, span) for method, path, span in proxy.seen if method == "GET" and path.startswith(f"{prefix}/")]
    return [(path, span) for path, span in asked if not path.endswith(catalog.INDEX)]


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
    others = dict.fromkeys(("readme.md", "top.png", "ant/notes.txt", "ant/sub/Thumbs.db"), b"no image of a class")
    folders = {"tree": TREE | others, "photos": PHOTOS, "thousand": THOUSAND, "huge": {"a/0.jpg": bytes(16 * MB)}}
    folders |= {f"sets/{n}": files for n, files in enumerate(SETS)}
    folders["large"] = {f"a/{n:02}.jpg": (b"%d" % n).ljust(MB, b"\0") for n in range(20)}
    files = {f"pictures/{prefix}/{name}": data for prefix, folder in folders.items() for name, data in folder.items()}
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
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


@pytest.fixture
def copied(fresh):
    """Some of the photos under a prefix of their own; its URL."""
    for name, data in DOZEN.items():
        put(f"{fresh}/{name}", data)
    return f"{HERE}/{fresh}"


# ----------------------------------------------------------------------------------------------------- the dataset


def test_it_is_torchvisions_image_folder(directory):
    ours = images.S3ImageFolder(f"{HERE}/tree/")
    theirs = ImageFolder(directory / "pictures/tree", v2.PILToTensor())
    assert (len(ours), ours.ignored) == (len(TREE), 4), "the others are no images, or in no class"
    assert (ours.classes, ours.class_to_idx) == (theirs.classes, theirs.class_to_idx)
    samples = [(path.replace(f"{directory}/", "s3://"), target) for path, target in theirs.samples]
    assert ours.samples == samples and ours.samples != samples[:-1] and repr(ours.samples) == repr(samples)
    assert (ours.samples[-1], ours.samples[3:-5:2]) == (samples[-1], samples[3:-5:2])
    assert torch.tensor(ours.targets).tolist() == theirs.targets
    assert same(list(ours), list(theirs)) and same(items(images.loader(ours, 5)), list(theirs))
    assert same(ours.__getitems__([5, 0, 5, 12]), [ours[5], ours[0], ours[5], ours[12]])


def test_validation_data_numbers_its_classes_as_the_training_set_does_and_there_must_be_some(fresh):
    for name in "train/ash", "train/beech", "train/oak", "val/beech", "val/oak":
        put(f"{fresh}/{name}/1.png", png(1))
    url = f"{HERE}/{fresh}"
    train = images.S3ImageFolder(f"{url}/train")
    with pytest.warns(UserWarning, match=f"{url}/val has no images of: ash"):
        val = images.S3ImageFolder(f"{url}/val", classes=train.classes)
    assert (val.classes, val.class_to_idx) == (train.classes, train.class_to_idx)
    assert val.targets == [1, 2] and [target for _, target in items(images.loader(val, 2))] == [1, 2]
    with pytest.raises(storage.StorageError, match=f"{url}/train .*: ash"):
        images.S3ImageFolder(f"{url}/train", classes=["beech", "oak"])
    with pytest.raises(storage.StorageError, match=f"{url}/val/oak.*notebook 01"):
        images.S3ImageFolder(f"{url}/val/oak")  # images, but no folders of classes


def test_transforms_are_applied_in_the_order_of_the_indices_however_the_images_come_in():
    def slow_at_first(data):
        time.sleep(0.2 if data == THOUSAND["a/000.jpg"] else 0)
        return data

    order, name = [], "class {}".format
    options = dict(transform=lambda data: order.append(data) or len(order), target_transform=name, loader=slow_at_first)
    folder = images.S3ImageFolder(f"{HERE}/thousand", **options)
    assert folder.__getitems__([0, 7, 900, 3]) == [(1, name(0)), (2, name(0)), (3, name(1)), (4, name(0))]
    assert order == [THOUSAND[f"{label}.jpg"] for label in ("a/000", "a/007", "b/900", "a/003")]


def test_the_seed_decides_order_and_augmentation_with_workers_and_without():
    folder, orders = images.S3ImageFolder(f"{HERE}/tree", partial(torch.rand_like, dtype=torch.float32)), set()
    for workers, seeds in (0, (1, 1, 2)), (1, (1, 1)):
        epochs = []
        for seed in seeds:
            torch.manual_seed(seed)
            loader = images.loader(folder, 4, shuffle=True, num_workers=workers, seed=seed)
            epochs.append((items(loader), items(loader)))
            orders.add(tuple(target for each in epochs[-1] for _, target in each))
        assert same(epochs[0][0], epochs[1][0]) and same(epochs[0][1], epochs[1][1])
    assert len(orders) == 2, "one for each seed"


def test_workers_of_the_server_connected_last_read_in_pytorchs_order_and_ask_for_no_image_twice(monkeypatch):
    with process() as first:
        assert first.submit(os.getenv, "PYTEST_CURRENT_TEST").result()
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with wire() as proxy, process() as other:
        assert other.submit(os.getenv, "PYTEST_CURRENT_TEST").result() is None, "though the fork server has it"
        folder = raw(f"{HERE}/thousand")
        loaded = items(images.loader(folder, 7, shuffle=True, num_workers=2))
        order = RandomSampler(folder, generator=torch.Generator().manual_seed(0))
        assert loaded == [expected(THOUSAND)[index] for index in order]
        assert len(gets(proxy, "thousand")) == len(set(gets(proxy, "thousand"))) == 1000


def test_an_image_that_cannot_be_read_is_an_error_with_its_url_or_the_next_of_its_class_takes_its_place(fresh):
    url, asked = f"{HERE}/{fresh}", []
    for number in range(8):
        put(f"{fresh}/{'bad' if number < 4 else 'good'}/{number}.png", png(number)[: 300 if number == 1 else None])
    put(f"{fresh}/bad/2.png", b"")
    strict = images.S3ImageFolder(url)
    folder = images.S3ImageFolder(url, on_error="skip", loader=lambda data: asked.append(data) or images.decode(data))
    bad = [f"{url}/bad/{number}.png" for number in (1, 2, 3)]  # corrupt, empty and gone
    storage.delete(bad[-1])
    for number, name in enumerate(bad, 1):
        with pytest.raises(storage.StorageError, match=name):
            strict[number]
    good = [(images.decode(png(number)), int(number > 3)) for number in (0, 0, 0, 0, 4, 5, 6, 7)]
    with pytest.warns(UserWarning) as said:
        assert same(items(images.loader(folder, 8)), good)
    asked.clear()
    assert same(items(images.loader(folder, 3)), good)
    assert set(asked) == {png(number) for number in (0, 4, 5, 6, 7)}  # those that are known to be bad no more
    assert sorted(folder.skipped) == bad and all(url in reason for url, reason in folder.skipped.items())
    assert {str(warning.message) for warning in said} == {f"skipped {reason}" for reason in folder.skipped.values()}
    storage.delete(f"{url}/bad/0.png")
    with pytest.warns(UserWarning), pytest.raises(OSError, match="class 'bad'"):
        folder[3]
    with pytest.raises(ValueError, match="on_error"):
        images.S3ImageFolder(url, on_error="ignore")


def test_an_image_that_is_in_a_batch_twice_is_asked_for_once_and_changed_in_place_once_each():
    folder = images.S3ImageFolder(f"{HERE}/tree", lambda image: image.bitwise_xor_(255))
    ((one, _),) = folder.__getitems__([0])
    with wire() as proxy:
        assert all(torch.equal(image, one) for image, _ in folder.__getitems__([0, 0]))
        assert len(gets(proxy, "tree")) == 1


# ------------------------------------------------------------------------------------------------------- what is packed


def test_what_is_packed_reads_as_the_folder_it_was_made_from(packed):
    tree = pack.pack(f"{HERE}/tree/", f"{HERE}/tree-as-it-was/", shard_bytes=8000)
    for url, there in (f"{HERE}/tree", tree), (f"{HERE}/photos", packed):
        loose, shards = raw(url), raw(there)
        assert len(shards.shards) > 2 and f"{len(shards)} images" in repr(shards)
        assert (shards.classes, shards.class_to_idx) == (loose.classes, loose.class_to_idx)
        assert [(path.replace(there, url), target) for path, target in shards.samples] == loose.samples
        assert list(shards) == list(loose)
        one, other = (images.loader(folder, 5, shuffle=True) for folder in (loose, shards))
        for _ in range(2):
            assert items(other) == items(one)


def test_in_blocks_each_image_comes_once_beside_its_neighbours_and_each_seed_has_its_order(packed):
    folder = raw(packed)
    order = pack.order_blocks(folder, block=5)
    assert sorted(order) == list(range(60)) and order != pack.order_blocks(folder, block=5, seed=1)
    lying = sorted(range(60), key=lambda index: (folder.span(index).object, folder.span(index).first))
    blocks, runs = ([some[i : i + 5] for i in range(0, 60, 5)] for some in (order, lying))
    assert sorted(blocks) == sorted(runs) and blocks != runs, "neighbours stay together, the blocks do not"


def test_neighbours_in_a_shard_come_with_one_request_and_a_small_pack_stays_in_memory(packed):
    folder = raw(packed)
    first = items(images.loader(folder, 7, shuffle=True))
    with wire() as proxy:
        assert sorted(items(images.loader(folder, 9, shuffle=True, seed=1))) == sorted(first)
        assert not proxy.seen
        assert items(images.loader(pickle.loads(pickle.dumps(folder)), 7, shuffle=True)) == first
        assert len(gets(proxy, "photos-packed")) == len(folder.shards) < 20


def test_transient_faults_of_the_server_show_neither_in_packing_nor_in_reading(copied):
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"], slow_down_every=7, reset_every=6, truncate_every=3) as proxy:
        with connected(os.environ | {"AWS_ENDPOINT_URL": proxy.url}):
            assert sorted(epoch(pack.pack(copied, shard_bytes=SHARD), 0)) == sorted(expected(DOZEN))
            assert min(proxy.slow_downs, proxy.resets, proxy.truncations) > 1


def test_a_shard_is_a_tar_of_images_and_their_class_indices_which_webdataset_reads(directory):
    folder = raw(pack.pack(f"{HERE}/tree", f"{HERE}/tree-tars", shard_bytes=8000))
    shards = [directory / "pictures/tree-tars" / shard for shard in folder.shards]
    assert max(shard.stat().st_size for shard in shards) <= 8000
    read = list(webdataset.WebDataset(list(map(str, shards)), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{number:08}" for number in range(len(TREE))]
    found = [(sample["png"], int(sample["cls"])) for sample in read]  # a.PNG's ending, too
    assert sorted(found) == sorted(folder) and found != list(folder)  # shuffled


def test_damage_is_an_error_that_names_image_and_shard_or_is_skipped_with_a_warning(fresh):
    url = pack.pack(f"{HERE}/photos", f"{HERE}/{fresh}", SHARD)
    folder = raw(url)
    spans = [folder.span(index) for index in range(60)]
    damaged, gone = spans[20].object, next(span.object for span in spans if span.object != spans[20].object)
    data = bytearray(storage.read(damaged))
    data[spans[20].first + 3] ^= 1
    storage.write(damaged, bytes(data))
    storage.delete(gone)
    bad = [index for index, span in enumerate(spans) if index == 20 or span.object == gone]
    for index in bad:
        with pytest.raises(storage.StorageError, match=f"{folder.url(index)}.*{spans[index].object}"):
            folder[index]
    folder = raw(url, on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        shown = items(images.loader(folder, 8))
    assert sorted(folder.skipped) == [*map(folder.url, bad)] and len(shown) == 60
    assert {data for data, _ in shown} == {data for index, (data, _) in enumerate(ITEMS) if index not in bad}


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
        proxy.hold = lambda method, path: False
        proxy.seen.clear()
        pack.pack(*arguments)
        redone = [raw(packed).span(index).object[-8:-4] in ("0002", "0004") for index in range(60)]
        assert len(gets(proxy, "photos")) == sum(redone)
    assert contents(fresh) == whole


def test_a_shard_goes_up_in_parts_and_no_more_of_its_images_is_read_than_the_next_part(fresh, monkeypatch):
    monkeypatch.setattr(pack, "PART", 2 * MB)
    with wire() as proxy, ThreadPoolExecutor(1) as pool:
        proxy.hold = lambda method, path: method == "PUT" and not proxy.released.is_set()
        packing = pool.submit(pack.pack, f"{HERE}/large", f"{HERE}/{fresh}", shard_bytes=10**9)
        wait_until(lambda: "PUT" in {method for method, *_ in proxy.seen}, "the first part", os.devnull)
        ahead = settled(lambda: len(gets(proxy, "large")))
        proxy.released.set()
        packing.result()
        assert 2 <= ahead <= 5
        assert sum("partNumber" in path for _, path, _ in proxy.seen) > 5
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


def test_a_pack_of_other_images_or_settings_is_not_overwritten_and_the_error_says_what_to_do(fresh, copied):
    put(f"{fresh}-packed/shard-000007.tar", b"left of other settings when packing was killed")
    there = pack.pack(copied)
    before = contents(f"{fresh}-packed")
    assert [*before] == [catalog.INDEX, "shard-000000.tar"]
    with wire() as proxy:
        assert pack.pack(copied) == there and "PUT" not in {method for method, *_ in proxy.seen}  # the same again
        assert not gets(proxy, f"{fresh}/b")
    for settings in {"shard_bytes": 5000}, {"seed": 1}, {}:
        if not settings:
            put(f"{fresh}/a/new.jpg", b"one more")
        with pytest.raises(storage.StorageError, match=re.escape(there) + r".*storage\.delete.*another packed_url"):
            pack.pack(copied, **settings)
    assert contents(f"{fresh}-packed") == before


def test_an_image_that_is_not_what_was_listed_is_an_error_that_names_it_and_nothing_is_packed(fresh, copied):
    replaced = "GET", f"{fresh}/b/01.jpg"
    with wire() as proxy:
        proxy.hold = lambda *request: request == replaced and put(request[1], PHOTOS["b/01.jpg"][::-1])
        with pytest.raises(storage.StorageError, match=f"{copied}/b/01.jpg.*checksum"):
            pack.pack(copied)
    assert not storage.objects(f"{copied}-packed")
    assert len(raw(pack.pack(copied))) == 12


def test_images_of_which_the_etag_is_no_checksum_are_packed_and_a_server_that_knows_ranges_gives_them(moto_env, bucket):
    with connected(moto_env):
        storage.create_bucket(bucket)
        for name, data in DOZEN.items():
            in_parts = TransferConfig(multipart_threshold=1 if name == "b/04.jpg" else MB)
            storage.client().upload_fileobj(io.BytesIO(data), bucket, f"of/{name}", Config=in_parts)
        assert "-" in storage.objects(f"s3://{bucket}/of")["b/04.jpg"]["e_tag"]
        assert items(images.loader(raw(pack.pack(f"s3://{bucket}/of", shard_bytes=SHARD)), 5)) == expected(DOZEN)


@pytest.mark.parametrize("batch_size, first, used, then", [(8, 4 * images.THREADS, 17, 384), (200, 600, 2, 800)])
def test_while_a_batch_is_used_as_many_images_are_asked_for_as_keep_the_threads_at_work(batch_size, first, used, then):
    folder = raw(f"{HERE}/thousand")
    with wire() as proxy:
        batches = iter(images.loader(folder, batch_size))
        shown = items([next(batches)])
        assert settled(lambda: len(gets(proxy, "thousand"))) == first
        shown += items(itertools.islice(batches, used - 1))
        assert settled(lambda: len(gets(proxy, "thousand"))) == then
        assert shown + items(batches) == expected(THOUSAND)
        assert len(gets(proxy, "thousand")) == len(set(gets(proxy, "thousand"))) == 1000


def test_no_more_bytes_are_asked_for_ahead_than_memory_is_meant_to_hold(monkeypatch):
    monkeypatch.setattr(images, "WINDOW", 10 * MB)
    for url in f"{HERE}/large", pack.pack(f"{HERE}/large", shard_bytes=8 * MB):
        folder = images.S3ImageFolder(url, loader=lambda data: int(data[:2].strip(b"\0")))
        folder[0]
        with wire() as proxy:
            batches = iter(images.loader(folder, 1))
            shown = [next(batches)]
            settled(lambda: len(proxy.seen))
            asked = [re.findall(r"\d+", span or f"0-{MB - 1}") for _, span in gets(proxy, url.split("/")[-1])]
            held = sum(int(last) + 1 - int(first) for first, last in asked)
            assert images.WINDOW / 2 < held <= images.WINDOW + MB + 1024 * 20
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


def test_when_the_program_ends_only_what_is_in_flight_is_waited_for(tmp_path):
    with process() as other:
        assert "Nothing answers" in str(other.submit(pictures.fail, f"{HERE}/thousand", tmp_path / "begun").exception())
    begun_before_the_error = 2 * images.THREADS + 8
    assert images.THREADS <= (tmp_path / "begun").stat().st_size <= begun_before_the_error


def test_a_sampler_that_repeats_images_within_and_across_batches_gives_them_as_often(packed):
    order = torch.randint(60, (250,), generator=torch.Generator().manual_seed(1)).tolist()
    for url, drop_last in (f"{HERE}/photos", False), (packed, True):
        loader = images.loader(raw(url), 40, sampler=order, drop_last=drop_last)
        batches = list(loader)
        assert len(loader) == len(batches) == (6 if drop_last else 7)
        assert items(batches) == [ITEMS[index] for index in order[: 240 if drop_last else 250]]


# --------------------------------------------------------------------------------------------------------------- cache


def test_what_was_read_once_is_read_from_the_cache_by_all_unless_it_is_not_as_it_was_written(packed, tmp_path):
    for url in f"{HERE}/photos", packed:
        cache, prefix = tmp_path / "made by itself" / url[-6:], url.removeprefix(f"{HERE}/")
        folder = raw(url, cache_dir=cache)
        assert items(images.loader(folder, 8)) == ITEMS
        with wire() as proxy, process() as other:
            for again in folder, raw(url, cache_dir=str(cache)):
                assert items(images.loader(again, 60)) == ITEMS
            assert sorted(other.submit(epoch, url, 1, cache_dir=cache).result()) == sorted(ITEMS)
            assert not gets(proxy, prefix)
            files = list(cache.glob("*/*/*"))
            first = files[0].read_bytes()
            for number, path in enumerate(files):
                data = path.read_bytes()
                end_not_written = data[:50] + bytes(len(data) - 50)
                path.write_bytes([data[:-1], b"", secrets.token_bytes(len(data)), first, end_not_written][number % 5])
            for again in False, True:
                proxy.seen.clear()
                assert items(images.loader(raw(url, cache_dir=cache), 9)) == ITEMS
                assert bool(gets(proxy, prefix)) != again


def test_an_image_that_is_put_anew_is_read_anew_and_no_other(fresh, copied, tmp_path):
    before = items(images.loader(raw(copied, cache_dir=tmp_path), 5))
    for data in PHOTOS["b/01.jpg"][::-1], b"shorter":
        put(f"{fresh}/b/01.jpg", data)
        with wire() as proxy:
            now = items(images.loader(raw(copied, cache_dir=tmp_path), 5))
            assert items(images.loader(raw(copied, cache_dir=tmp_path), 5)) == now
            assert [path for path, _ in gets(proxy, fresh)] == [f"{fresh}/b/01.jpg"]
        assert [new for old, new in zip(before, now) if old != new] == [(data, 1)]


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
    options = {"cache_dir": tmp_path, "cache_bytes": 20 * (MB + 16)}
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
    assert 4 * MB <= size(tmp_path) <= options["cache_bytes"]


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
        assert len(gets(proxy, "photos")) == 60 - (len(list(tmp_path.glob("*/*/*"))) - 40)


# ------------------------------------------------------------------------------------------------------- a million images


def test_what_is_known_of_an_image_takes_few_bytes_and_goes_to_a_worker_without_a_copy():
    folder = raw(f"{HERE}/thousand")
    assert sum(column.nbytes for column in folder.table.columns.values()) < 60 * 1000
    assert len(ForkingPickler.dumps(folder)) < 5000
    with process() as other:
        assert other.submit(pictures.change_sizes, folder).result() == list(folder.samples)
    assert folder.table.sizes[7] == 47  # what it wrote is seen here


@pytest.mark.slow
def test_a_million_objects_in_a_thousand_folders_take_little_memory():
    names = run_cells(
        "10",
        "ANSWERS =",
        "LISTING =",
        "IMPORTS =",
        "MEASURE =",
        "costs =",
        names={"scaling": 1_281_167, "display": print, "figures": {}},
    )
    million = names["costs"][1_281_167]
    assert million["MB of columns"] < 80 and million["MB in this process"] < 260, million


def test_a_folder_with_an_index_is_not_listed_and_what_has_changed_or_gone_since_is_noticed(fresh, copied):
    put(f"{fresh}/{catalog.INDEX}", b'{"a": 0, "b": 1}')
    with pytest.raises(storage.StorageError, match=f"{copied}/{catalog.INDEX} is no index.*delete"):
        raw(copied)
    catalog.write_index(copied)
    put(f"{fresh}/b/01.jpg", PHOTOS["b/01.jpg"][::-1])
    storage.delete(f"{copied}/c/02.jpg")
    put(f"{fresh}/a/new.jpg", b"new")
    with wire() as proxy:
        folder = raw(copied, on_error="skip")
        assert [path for _, path, _ in proxy.seen] == [f"{fresh}/{catalog.INDEX}"] and len(folder) == 12
    assert "as listed on 2" in repr(folder)
    with pytest.warns(UserWarning, match="b/01.jpg has changed .*write_index"):
        assert len(items(images.loader(folder, 4))) == 12
    assert sorted(folder.skipped) == [f"{copied}/b/01.jpg", f"{copied}/c/02.jpg"]
    catalog.write_index(copied)
    shown = items(images.loader(raw(copied), 4))
    assert len(shown) == 12 and {(b"new", 0), (PHOTOS["b/01.jpg"][::-1], 1)} < {*shown}


def test_more_objects_than_an_answer_holds_are_listed_as_boto3_lists_them(moto_env, bucket, monkeypatch):
    monkeypatch.setattr(storage, "PAGE", 40)
    deep, url = "o dd/b+c & d%20é~#", f"s3://{bucket}"
    counts = {"top{}": 50, "many/{}/x.png": 60, "few/{}": 5, deep + "/%2F{}": 50, deep + "/de/ep/{}": 5}
    counts |= {"marked/{:02}": 39, "marked/sub/": 1, "marked/sub/{}": 10, "marked/z": 1}  # the marker ends an answer
    names = [name.format(number) for name, count in counts.items() for number in range(count)]
    with connected(moto_env):
        storage.create_bucket(bucket)
        for number, name in enumerate(names):
            data = b"" if name.endswith("/") else b"x" * (number % 5)
            storage.client().put_object(Bucket=bucket, Key=name, Body=data)
        for folder in "", "/many", "/o dd", f"/{deep}/de", "/few", "/marked":
            prefix = f"{folder}/".lstrip("/")
            pages = storage.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            there = [(item["Key"], item["Size"], item["ETag"]) for item in pages.search("Contents[]")]
            found = itertools.chain.from_iterable(storage.list_pages(url + folder))  # each once, and no marker
            found = sorted((item["path"], item["size"], item["e_tag"]) for item in found)
            assert found == [item for item in there if item[0][-1] != "/"] and len(found) > 4
        with wire() as proxy:  # many small folders cost few requests
            assert len(storage.objects(f"{url}/many")) == 60 and len(proxy.seen) == 2
