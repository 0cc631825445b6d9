"""The sample data set: reproducible, small, and worth a network."""

import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from helpers import images
from helpers.training import TrainLoop

FOLDER = Path(__file__).parent.parent / "data_samples"
CLASSES = ["blight", "healthy", "leaf_spot", "mildew", "rust"]


@pytest.fixture(scope="module")
def committed():
    """The members of the zip in the repository, {name: bytes}."""
    with zipfile.ZipFile(FOLDER / "leaves.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def one_thread():
    """Several threads wait for each other, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(path, *options):
    """Draw 8 pictures of each class."""
    subprocess.run([sys.executable, FOLDER / "leaves.py", "--per-class", "8", "--out", path, *options],
                   check=True, capture_output=True, timeout=60)
    return path.read_bytes()


def test_the_same_seed_draws_the_same_zip_and_another_seed_another(tmp_path):
    first = draw(tmp_path / "first.zip")
    assert draw(tmp_path / "second.zip") == first
    draw(tmp_path / "other.zip", "--seed", "1")
    with zipfile.ZipFile(tmp_path / "first.zip") as one, zipfile.ZipFile(tmp_path / "other.zip") as other:
        assert one.namelist() == other.namelist()
        assert not {one.read(name) for name in one.namelist()} & {other.read(name) for name in one.namelist()}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the zip was drawn with what the lock has for Python 3.11")
def test_the_committed_zip_is_what_the_default_seed_draws(tmp_path, committed):
    draw(tmp_path / "leaves.zip")
    with zipfile.ZipFile(tmp_path / "leaves.zip") as drawn, zipfile.ZipFile(FOLDER / "leaves.zip") as whole:
        assert len(drawn.namelist()) == 40
        for info in drawn.infolist():
            assert drawn.read(info) == committed[info.filename]
            ours = whole.getinfo(info.filename)
            assert ours.date_time == info.date_time == (1980, 1, 1, 0, 0, 0)
            assert (ours.create_system, ours.external_attr) == (info.create_system, info.external_attr)


def test_it_is_600_small_pictures_of_5_classes(committed):
    assert Counter(name.split("/")[0] for name in committed) == dict.fromkeys(CLASSES, 120)
    assert {images.decode(data).shape for data in committed.values()} == {(3, 64, 64)}
    assert len(set(committed.values())) == 600
    assert (FOLDER / "leaves.zip").stat().st_size < 2e6


def test_the_small_cnn_sees_what_a_linear_classifier_on_the_pixels_cannot(committed, one_thread):
    inputs = torch.stack([images.decode(data) for data in committed.values()]) / 64 - 2
    targets = torch.tensor([CLASSES.index(name.split("/")[0]) for name in committed])
    train, test = torch.randperm(600, generator=torch.Generator().manual_seed(0)).split([450, 150])
    flipped = torch.cat([inputs[train], inputs[train].flip(3), inputs[train].flip(2)]), targets[train].repeat(3)

    def accuracy(model, learning_rate, epochs):
        loader = images.loader(TensorDataset(*flipped), 32, shuffle=True)
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, epochs * len(loader))
        loop = TrainLoop(model, loader, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), scheduler=scheduler,
                         metrics={"accuracy": MulticlassAccuracy(5, average="micro")})
        loop.fit(epochs)
        return loop.evaluate(images.loader(TensorDataset(inputs[test], targets[test]), 50))["accuracy"]

    torch.manual_seed(0)
    linear = accuracy(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5)), 1e-4, epochs=8)
    cnn = accuracy(images.small_cnn(5, width=16), 3e-3, epochs=4)
    print(f"linear {linear:.2f}, small_cnn {cnn:.2f}")
    assert 0.2 < linear < 0.55 and cnn > 0.7 and cnn > linear + 0.2
