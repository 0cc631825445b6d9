"""The sample data sets: well-formed and small, and the pictures reproducible."""

import csv
import hashlib
import io
import json
import re
import runpy
import sys
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "data_samples"


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the zip was drawn with what the lock has for Python 3.11")
def test_the_committed_zip_is_what_the_default_seed_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["leaves.py", "--per-class", "2", "--out", str(tmp_path / "leaves.zip")])
    runpy.run_path(str(FOLDER / "leaves.py"), run_name="__main__")
    drawn = members(tmp_path / "leaves.zip")
    assert len(drawn) == 10 and drawn.items() <= members(FOLDER / "leaves.zip").items()
    with zipfile.ZipFile(tmp_path / "leaves.zip") as made:  # the same bytes on any system, whenever
        heads = {(info.date_time, info.create_system, info.external_attr) for info in made.infolist()}
    assert heads == {((1980, 1, 1, 0, 0, 0), 3, 25165824)}


def test_the_page_tells_the_zips_checksum_and_how_many_pictures_it_holds():
    zipped, page = FOLDER / "leaves.zip", (FOLDER / "leaves.md").read_text(encoding="utf-8")
    assert hashlib.sha256(zipped.read_bytes()).hexdigest() in page
    assert f"holds {len(set(members(zipped).values()))} pictures" in page


def test_the_jokes_are_a_clean_csv_of_questions_and_answers():
    text = (FOLDER / "jokes.csv").read_bytes().decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert "\r" not in text and list(rows[0]) == ["ID", "Question", "Answer"]
    assert [row["ID"] for row in rows] == [str(i) for i in range(1, len(rows) + 1)]
    assert f"holds {len(rows)} short jokes" in (FOLDER / "jokes.md").read_text(encoding="utf-8")
    assert all(cell and cell == cell.strip() for row in rows for cell in row.values())
    assert all(row["Question"].endswith("?") for row in rows)
    for column in ("Question", "Answer"):
        assert len({" ".join(re.findall(r"\w+", row[column].lower())) for row in rows}) == len(rows)


def test_every_dialogue_is_a_chain_of_turns_and_no_reply_is_there_twice():
    threads = {}  # {thread_id: [example, ...]} in the order of the file
    for line in (FOLDER / "dialogues.jsonl").read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        threads.setdefault(example["thread_id"], []).append(example)
    for thread, examples in threads.items():
        first, *_ = examples
        turns = [first["context"], *(example["response"] for example in examples)]
        authors = 5 * [first["context_author"], first["response_author"]]
        for k, example in enumerate(examples):
            expected = {"context": turns[k], "response": turns[k + 1], "subreddit": first["subreddit"]}
            expected |= {"context_author": authors[k], "response_author": authors[k + 1], "thread_id": thread}
            assert example == expected | {f"context/{i}": turn for i, turn in enumerate(reversed(turns[:k]))}
        assert 6 <= len(turns) <= 10 and authors[0] != authors[1]
    replies = [example["response"] for examples in threads.values() for example in examples]
    assert len(set(replies)) == len(replies)
    page = (FOLDER / "dialogues.md").read_text(encoding="utf-8")
    assert f"holds {len(replies):,} examples" in page and f"out of {len(threads)} dialogues" in page
