"""The sample data sets: well-formed, small, and the pictures reproducible and worth a network."""

import csv
import io
import json
import re
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
from helpers.chapters import cnn
from helpers.training import TrainLoop

FOLDER = Path(__file__).parent.parent / "data_samples"
CLASSES = ["blight", "healthy", "leaf_spot", "mildew", "rust"]


@pytest.fixture(scope="module")
def committed():
    """The members of the zip in the repository, {name: bytes}."""
    with zipfile.ZipFile(FOLDER / "leaves.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def draw(path, *options):
    """Draw 8 pictures of each class."""
    subprocess.run([sys.executable, FOLDER / "leaves.py", "--per-class", "8", "--out", path, *options],
                   check=True, capture_output=True, timeout=60)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the zip was drawn with what the lock has for Python 3.11")
def test_the_committed_zip_is_what_the_default_seed_draws_and_another_seed_draws_others(tmp_path, committed):
    draw(tmp_path / "leaves.zip"), draw(tmp_path / "other.zip", "--seed", "1")
    with (zipfile.ZipFile(tmp_path / "leaves.zip") as drawn, zipfile.ZipFile(tmp_path / "other.zip") as other,
          zipfile.ZipFile(FOLDER / "leaves.zip") as whole):
        assert len(drawn.namelist()) == 40 and drawn.namelist() == other.namelist()
        assert not {other.read(name) for name in other.namelist()} & set(committed.values())
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
    network = accuracy(cnn.small_cnn(5, width=16), 3e-3, epochs=4)
    print(f"linear {linear:.2f}, small_cnn {network:.2f}")
    assert 0.2 < linear < 0.55 and network > 0.7 and network > linear + 0.2


def test_the_jokes_are_a_clean_csv_of_questions_and_answers():
    text = (FOLDER / "jokes.csv").read_bytes().decode("utf-8")
    assert "\r" not in text and text.endswith("\n")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert list(rows[0]) == ["ID", "Question", "Answer"]
    assert len(rows) >= 450 and [row["ID"] for row in rows] == [str(i) for i in range(1, len(rows) + 1)]
    assert f"holds {len(rows)} short jokes" in (FOLDER / "jokes.md").read_text(encoding="utf-8")
    for row in rows:
        assert None not in row and all(cell and cell == cell.strip() for cell in row.values()), row
        assert row["Question"].endswith("?"), row
    for column in ("Question", "Answer"):
        normalised = Counter(" ".join(re.findall(r"\w+", row[column].lower())) for row in rows)
        assert normalised.most_common(1)[0][1] == 1, normalised.most_common(3)


def test_every_dialogue_is_a_chain_of_turns_and_no_reply_is_there_twice():
    threads = {}  # {thread_id: [example, ...]} in the order of the file
    for line in (FOLDER / "dialogues.jsonl").read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        threads.setdefault(example["thread_id"], []).append(example)
    for examples in threads.values():
        turns = [examples[0]["context"]]
        authors = [examples[0]["context_author"], examples[0]["response_author"]]
        for k, example in enumerate(examples):
            older = {f"context/{i}": turn for i, turn in enumerate(reversed(turns[:-1]))}
            assert example == {
                "subreddit": examples[0]["subreddit"], "thread_id": examples[0]["thread_id"], "context": turns[-1],
                "context_author": authors[k % 2], "response_author": authors[(k + 1) % 2],
                "response": example["response"], **older}
            turns.append(example["response"])
        assert 6 <= len(turns) <= 10 and all(3 <= len(turn.split()) <= 25 for turn in turns), turns
        assert authors[0] != authors[1]
    replies = [example["response"] for examples in threads.values() for example in examples]
    assert len(threads) >= 120 and len(replies) >= 700 and len(set(replies)) == len(replies)
    topics = Counter(examples[0]["subreddit"] for examples in threads.values())
    assert len(topics) == 12 and len(set(topics.values())) == 1
    page = (FOLDER / "dialogues.md").read_text(encoding="utf-8")
    assert f"holds {len(replies):,} examples" in page and f"out of {len(threads)} dialogues" in page
