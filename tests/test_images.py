"""Images from the embedded server: the dataset, its loader and workers, and every kind of file."""

import functools
import io
import os
import re
import subprocess
import sys
import time
import warnings
from hashlib import md5
from pathlib import Path

import cv2
import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from pictures import items, png
from servers import moto
from servers.embedded import connected
from torchvision.datasets import ImageFolder

from helpers import images, storage

TREE = [*pictures.TREE, "ant hill/1.png"]
PIXELS = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8), (0, 0), 3)
PIXELS = cv2.normalize(PIXELS, None, 0, 255, cv2.NORM_MINMAX)  # smooth, so that JPEG keeps it, in all of the range


def put(key, data):
    storage.client().put_object(Bucket="pictures", Key=key, Body=data)


def same(one, other):
    """Whether the items are the same: images, targets and order."""
    return len(one) == len(other) and all(torch.equal(a, b) and s == t for (a, s), (b, t) in zip(one, other))


@pytest.fixture(scope="module", autouse=True)
def directory(tmp_path_factory):
    """A connected server and the folder that it serves: buckets and objects are folders and files."""
    directory = tmp_path_factory.mktemp("served")
    with connected(storage.serve(directory)):
        storage.create_bucket("pictures")
        for number, name in enumerate(TREE):
            put(f"tree/{name}", png(number))
        for name in "readme.md", "top.png", "ant/notes.txt", "ant/sub/Thumbs.db":
            put(f"tree/{name}", b"no image of a class")
        for number in range(36):
            put(f"plain/{'abc'[number % 3]}/{number:02}.png", png(number))
        yield directory


@pytest.fixture(scope="module")
def plain(directory):
    """36 images of 3 classes."""
    return images.S3ImageFolder("s3://pictures/plain")


@pytest.fixture
def spoilt(request):
    """A folder of this test alone: 4 images of `good`, 4 of `bad`, of which 1 is corrupt, 2 is empty and 3 is gone."""
    prefix = f"spoilt/{request.node.name}"
    for number in range(8):
        put(f"{prefix}/{'bad' if number < 4 else 'good'}/{number}.png", png(number))
    put(f"{prefix}/bad/1.png", png(1)[:300])
    put(f"{prefix}/bad/2.png", b"")

    def dataset(**options):
        put(f"{prefix}/bad/3.png", b"")
        folder = images.S3ImageFolder(f"s3://pictures/{prefix}", **options)
        storage.client().delete_object(Bucket="pictures", Key=f"{prefix}/bad/3.png")
        return folder

    return dataset


# ----------------------------------------------------------------------------------------------------- the dataset


def test_classes_targets_and_order_are_those_of_torchvisions_image_folder(directory):
    ours = images.S3ImageFolder("s3://pictures/tree/")
    theirs = ImageFolder(directory / "pictures" / "tree")
    assert (len(ours), ours.ignored) == (len(TREE), 4), "the others are no images, or in no class"
    assert (ours.classes, ours.class_to_idx, ours.targets) == (theirs.classes, theirs.class_to_idx, theirs.targets)
    local = f"{directory}/pictures/"
    assert ours.samples == [(path.replace(local, "s3://pictures/"), target) for path, target in theirs.samples]
    contents = [Path(path).read_bytes() for path, _ in theirs.samples]
    assert ours.table.sizes.tolist() == [len(data) for data in contents]
    assert [version.tobytes() for version in ours.table.versions] == [md5(data).digest() for data in contents]


def test_validation_data_numbers_its_classes_as_the_training_set_does_and_there_must_be_some():
    for name in "ash", "beech", "oak":
        put(f"trees/train/{name}/1.png", png(1))
        if name != "ash":
            put(f"trees/val/{name}/2.png", png(2))
    train = images.S3ImageFolder("s3://pictures/trees/train")
    with pytest.warns(UserWarning, match="s3://pictures/trees/val has no images of: ash"):
        val = images.S3ImageFolder("s3://pictures/trees/val", classes=train.classes)
    assert (val.classes, val.class_to_idx) == (train.classes, train.class_to_idx)
    assert val.targets == [1, 2] and [target for _, target in items(images.loader(val, 2))] == [1, 2]
    with pytest.raises(storage.StorageError, match="s3://pictures/trees/train .*: ash"):
        images.S3ImageFolder("s3://pictures/trees/train", classes=["beech", "oak"])
    with pytest.raises(storage.StorageError, match="s3://pictures/trees/val/oak.*notebook 01"):
        images.S3ImageFolder("s3://pictures/trees/val/oak")  # images, but no folders of classes


def test_items_are_what_opencv_decodes_of_the_same_bytes_and_batches_are_their_items(directory):
    folder = images.S3ImageFolder("s3://pictures/tree")
    for index, (url, target) in enumerate(folder.samples):
        pixels = cv2.cvtColor(cv2.imread(str(directory / url.removeprefix("s3://"))), cv2.COLOR_BGR2RGB)
        assert same([folder[index]], [(torch.from_numpy(pixels).permute(2, 0, 1), target)])
    assert same(folder.__getitems__([5, 0, 5, 12]), [folder[5], folder[0], folder[5], folder[12]])
    assert same(items(images.loader(folder, 5)), list(folder))


def test_transforms_are_applied_in_the_order_of_the_indices_however_the_images_come_in(plain):
    def slow_at_first(data):
        time.sleep(0.2 if data == png(0) else 0)
        return images.decode(data)

    order = []
    folder = images.S3ImageFolder(
        "s3://pictures/plain",
        lambda image: order.append(image) or len(order),
        loader=slow_at_first,
        target_transform=lambda target: f"class {target}",
    )
    assert folder.__getitems__([0, 7, 20, 3]) == [(1, "class 0"), (2, "class 0"), (3, "class 1"), (4, "class 0")]
    assert all(torch.equal(image, plain[i][0]) for image, i in zip(order, [0, 7, 20, 3]))


def test_the_seed_decides_order_and_augmentation_with_workers_and_without():
    folder = images.S3ImageFolder("s3://pictures/plain", functools.partial(torch.rand_like, dtype=torch.float32))
    for workers in 0, 2:

        def epochs(seed):
            torch.manual_seed(seed)
            loader = images.loader(folder, 8, shuffle=True, num_workers=workers, seed=seed)
            return items(loader), items(loader)

        (first, second), (first_again, second_again), (other, _) = epochs(1), epochs(1), epochs(2)
        assert same(first, first_again) and same(second, second_again)
        targets = [[target for _, target in each] for each in (first, second, other)]
        assert targets[0] != targets[1] and targets[0] != targets[2]


# ------------------------------------------------------------------------------------------- images that cannot be read


def test_an_image_that_is_corrupt_empty_or_gone_is_an_error_with_its_url(spoilt):
    folder = spoilt()
    for index in 1, 2, 3:
        with pytest.raises(storage.StorageError, match=re.escape(folder.samples[index][0])):
            folder[index]
    assert len(folder.__getitems__([0, 4, 5])) == 3
    with pytest.raises(ValueError, match="on_error"):
        spoilt(on_error="ignore")


def test_skip_puts_the_next_image_of_the_class_in_the_place_and_reports_every_url(spoilt):
    asked = []
    folder = spoilt(on_error="skip", loader=lambda data: asked.append(data) or images.decode(data))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first = items(images.loader(folder, 8))
        asked.clear()
        second = items(images.loader(folder, 3))
    good = [(images.decode(png(number)), int(number > 3)) for number in (0, 0, 0, 0, 4, 5, 6, 7)]
    bad = [url for url, _ in folder.samples[1:4]]
    assert same(first, good) and same(second, good)
    assert set(asked) == {png(number) for number in (0, 4, 5, 6, 7)}  # those that are known to be bad no more
    assert sorted(folder.skipped) == bad and all(url in reason for url, reason in folder.skipped.items())
    assert {str(warning.message) for warning in said} == {f"skipped {reason}" for reason in folder.skipped.values()}


def test_skip_ends_with_an_error_when_no_image_of_a_class_can_be_read(spoilt):
    def decode(data):
        if data in map(png, range(4, 8)):
            return images.decode(data)
        raise OSError("a custom loader's words")

    folder = spoilt(on_error="skip", loader=decode)
    with pytest.warns(UserWarning) as said, pytest.raises(OSError, match="class 'bad'"):
        folder.__getitems__([4, 0])
    assert len(said) == len(folder.skipped) == 4 and "custom" in folder.skipped[folder.samples[0][0]]
    assert len(folder.__getitems__([4, 5, 6, 7])) == 4


def script(text, folder, timeout=60, **more):
    """Run a program of its own, connected to nothing yet; more: of its environment."""
    (folder / "script.py").write_text(text)
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    env |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull} | more
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


WORKERS = """
import os, cv2, numpy
from helpers import images, storage

def read(size):
    os.environ.update(storage.serve(f"served{size}"))
    storage.connect()
    storage.create_bucket("pictures")
    storage.write("s3://pictures/class/bad.png", b"no image")
    storage.write("s3://pictures/class/good.png", cv2.imencode(".png", numpy.zeros((size, size, 3)))[1].tobytes())
    folder = images.S3ImageFolder("s3://pictures", on_error="skip")
    print([list(batch.shape) for batch, _ in images.loader(folder, 2, num_workers=1)])

if __name__ == "__main__":
    before = {"AWS_PROFILE": "of_before", "AWS_CONFIG_FILE": "config"}  # which is not there any more later
    open("config", "w").write("[profile of_before]\\nregion = eu-west-1\\n")
    os.environ |= before
    read(5)
    os.remove("config")
    for name in before:
        del os.environ[name]
    read(6)
"""


def test_workers_use_the_server_connected_last_and_their_skips_are_seen(tmp_path):
    done = script(WORKERS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == ["[[2, 3, 5, 5]]", "[[2, 3, 6, 6]]"]
    assert done.stderr.count("UserWarning: skipped s3://pictures/class/bad.png: not an image") == 2


@pytest.mark.slow
def test_a_million_objects_in_a_thousand_folders_take_little_memory_and_are_not_listed_twice(tmp_path):
    program = """
from helpers import catalog, images, storage

def memory(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))

storage.connect()
storage.create_bucket("pictures")
storage.write("s3://pictures/small/class/image.png", b"1")
images.S3ImageFolder("s3://pictures/small")
before = memory("VmRSS")
table = images.S3ImageFolder("s3://pictures/million").table
print(memory("VmRSS") - before, memory("VmHWM") - before)
kept = table.replace({**table.about, "listed": "Monday"})
storage.write("s3://pictures/million/index.safetensors", kept.to_bytes())
folder = images.S3ImageFolder("s3://pictures/million")
print(folder, *folder.samples[-1])
"""
    with moto.moto(tmp_path, moto.MILLION) as env:
        done = script(program, tmp_path, 1200, **env)
    memory, folder = done.stdout.splitlines()[-2:]
    assert "1,000,998 images of 1002 classes, as listed on Monday" in folder, done.stderr
    assert folder.endswith("s3://pictures/million/n00001001/n00001001_00998.JPEG 1001")
    at_rest, peak = map(float, memory.split())
    assert at_rest < 120 and peak < 150, f"{at_rest} and {peak} MB"


# ----------------------------------------------------------------------------------------------------- kinds of files


def pillow(pixels, kind, mode=None, **options):
    """The pixels in a file that Pillow writes."""
    data = io.BytesIO()
    image = Image.fromarray(pixels)
    image = image.quantize(256, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)
    image.save(data, kind, **options)
    return data.getvalue()


def test_every_kind_of_file_becomes_three_planes_of_bytes_in_rgb():
    grey, alpha = PIXELS[..., 0], np.full_like(PIXELS[..., :1], 7)
    wide = np.dstack([PIXELS[..., ::-1], alpha]).astype(np.uint16) * 256 + 128  # as OpenCV writes it: BGR
    with_alpha, binary = np.dstack([PIXELS, alpha]), (grey > 127) * np.uint8(255)
    files = {  # the file and how far its pixels may be from the original, at most
        "PNG of a palette": (pillow(PIXELS, "png", "P"), PIXELS, 24),
        "grey PNG with alpha": (pillow(np.dstack([grey, alpha]), "png"), grey, 0),
        "PNG of 16 bits": (cv2.imencode(".png", wide[..., :3])[1].tobytes(), PIXELS, 1),
        "PNG of 16 bits with alpha": (cv2.imencode(".png", wide)[1].tobytes(), PIXELS, 1),
        "PNG of 1 bit": (pillow(binary, "png", "1"), binary, 0),
        "JPEG": (pillow(PIXELS, "jpeg", quality=100, subsampling=0), PIXELS, 8),
        "grey JPEG": (pillow(grey, "jpeg", quality=100), grey, 8),
        "CMYK JPEG": (pillow(PIXELS, "jpeg", "CMYK", quality=100), PIXELS, 40),
        "WebP with alpha": (pillow(with_alpha, "webp", lossless=True, exact=True), PIXELS, 0),
        "grey BMP": (pillow(grey, "bmp"), grey, 0),
        "TIFF": (pillow(PIXELS, "tiff"), PIXELS, 0),
        "PPM": (pillow(PIXELS, "ppm"), PIXELS, 0),
    }
    for kind, (data, pixels, most) in files.items():
        image = images.decode(data)
        assert image.shape == (3, 20, 24) and image.dtype == torch.uint8 and image.is_contiguous(), kind
        expected = pixels if pixels.ndim == 3 else np.dstack([pixels] * 3)
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= most, kind
    for data in b"", b"no image", png(0)[:40], png(0)[:-30], files["JPEG"][0][:200]:
        with pytest.raises(ValueError, match="not an image"):
            images.decode(data)
