"""ConveRT against plainly written references, its data over real S3, its training on one process and on two."""

import gzip
import json
import math
import os
import pickle
import random
import tracemalloc
from collections import Counter
from functools import partial

import chitchat_dataset
import pytest
import sentencepiece
import torch
from accelerate.state import AcceleratorState
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from helpers import experiment, storage
from helpers.callbacks import Checkpoint, ClipGradients, LearningRate
from helpers.chapters import convert, evaluation
from helpers.chapters.convert import PADDING, ConveRT, Tokenizer, collate, pad, preset, train_tokenizer
from helpers.chapters.dialogues import Batches, Dialogues
from helpers.training import TrainLoop
from cells import run_cells
from loops import LAST, Call, at, fail, same, timeless
from servers import free_port
from servers.embedded import connected

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(vocab_size=300, buckets=20, width=16, attention_width=8, windows=(1, 3), feed_forward=32)
SMALL |= dict(output_width=16, piece_dropout=0.0)
TEXTS = """Good morning, how are you?
I am well, and you?
What is the capital of France?
Paris, of course.
Do you like to swim in the sea when it is cold outside, or do you wait for the summer?
Never.
why
Because the tea was hot, the cup was full and the table was small.""".splitlines()


@pytest.fixture(scope="module")
def s3(embedded_env):
    """The URL of a new bucket on the embedded server."""
    with connected(embedded_env):
        storage.create_bucket("dialogues")
        yield "s3://dialogues"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, preset("tiny", **SMALL))


def small(seed=0, tokenizer=None, **changes):
    """A small model with noise in all that starts at zero or alike, so that nothing cancels out."""
    torch.manual_seed(seed)
    config = preset("tiny", **{**SMALL, **changes})
    model = ConveRT(config, tokenizer or train_tokenizer(TEXTS, config))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model


def ids(*lengths, seed=0):
    """Padded ids of texts of these lengths."""
    order = random.Random(seed)
    return pad([order.choices(range(1, 321), k=length) for length in lengths])


def examples(count):
    """Pairs that can be learned: the reply repeats a number."""
    return [{"turns": [f"tell me number {i}"], "reply": f"number {i} it is"} for i in range(count)]


def write(url, rows):
    storage.write(url, "".join(json.dumps(row) + "\n" for row in rows).encode())


def records(count, first=0):
    fixed = {"context/0": "before", "context/1": "before that", "subreddit": "topic"}
    return [{"context": f"question {i} ?", "response": f"answer {i}"} | fixed for i in range(first, first + count)]


def plain_attention(layer, text):
    """Of one text (length, width), token by token."""
    parts = (*layer.queries_keys(text).chunk(2, -1), layer.values(text))
    queries, keys, values = (part.unflatten(1, (layer.heads, -1)) for part in parts)
    rows = []
    for i in range(len(text)):
        seen = torch.tensor([j for j in range(len(text)) if layer.window is None or abs(i - j) <= layer.window])
        scores = (queries[i] * keys[seen]).sum(2) / math.sqrt(queries.shape[2])
        if layer.window is not None:
            scores = scores + layer.bias[:, seen - i + layer.window].T
        shares = scores.exp() / scores.exp().sum(0)
        rows.append((shares[:, :, None] * values[seen]).sum(0).flatten())
    return torch.stack(rows)


def plain_gelu(x):
    return x / (1 + (-1.702 * x).exp())


def plain_reading(model, row):
    """What the towers get of one text, its ids without padding."""
    first, second = (table.weight for table in model.positions)
    x = torch.stack([model.pieces.weight[id] + first[i % 47] + second[i % 11] for i, id in enumerate(row)])
    for block in model.blocks:
        x = block.norm1(x + block.output(plain_attention(block.attention, x)))
        x = block.norm2(x + block.feed_forward2(plain_gelu(block.feed_forward1(x))))
    return plain_attention(model.reduction, x).sum(0) / math.sqrt(len(row))


def plain_tower(tower, x):
    for layer, norm in zip(tower.layers, tower.norms):
        x = norm(x + plain_gelu(layer(x)))
    return normalize(tower.output(x), dim=1)


def test_the_loss_and_its_gradients_equal_the_paper_written_plainly():
    model = small(multi_context=True)
    batch = {"context": ids(3, 5, 2), "reply": ids(4, 4, 6, seed=1), "extra": ids(14, 0, 2, seed=2)}

    def read(name):
        rows = [row[row != PADDING].tolist() for row in batch[name]]
        read = [plain_reading(model, row) if row else torch.zeros(32) for row in rows]
        return plain_tower(model.towers[name], torch.stack(read))

    context, replies, extra = read("context"), read("reply"), read("extra")
    extra = torch.stack([extra[0], context[1], extra[2]])  # where there are no turns before, the last stands for them
    expected = 0
    for contexts in (context, extra, normalize(context + extra, dim=1)):
        scores = 4 * torch.sigmoid(model.similarity) * contexts @ replies.T
        targets = 0.2 / 3 + 0.8 * torch.eye(3)
        expected = expected - (targets * (scores.exp() / scores.exp().sum(1, keepdim=True)).log()).sum() / 9
    loss, weights = model.get_loss(batch), list(model.parameters())
    assert torch.allclose(loss, expected, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(value, weights) for value in (loss, expected))):
        assert one.any() and torch.allclose(one, other, atol=1e-3 * other.abs().max()), "relative to the largest"


def test_a_reply_that_the_batch_has_twice_is_not_pushed_away():
    model, replies = small(), torch.zeros(3, 16, requires_grad=True)
    contexts = torch.eye(1, 16)[None] * torch.tensor([[[1.0], [0.0], [0.0]]])  # only the first one pulls at replies
    model.encode = lambda batch: (contexts, replies)
    model.get_loss({"reply": torch.tensor([[7, 8, 0], [7, 8, 0], [7, 8, 9]])}).backward()
    assert replies.grad[0, 0] == replies.grad[1, 0] < 0 < replies.grad[2, 0]


def test_a_model_with_several_contexts_takes_texts_and_lists_of_turns(tokenizer):
    model = small(tokenizer=tokenizer, multi_context=True)
    plain, alone, older = model.encode_context([TEXTS[0], [TEXTS[0]], [TEXTS[0], *TEXTS[1:3]]])
    assert torch.equal(plain, alone) and (plain - older).abs().max() > 1e-3
    batch = collate([{"turns": TEXTS[:3], "reply": TEXTS[3]}], model.tokenizer, multi_context=True)
    assert model.tokenizer([f"{TEXTS[1]} {TEXTS[2]}"])[0] == batch["extra"][0].tolist(), "newest first, one text"
    assert torch.allclose(model.eval().encode(batch)[0][2][0], older, atol=1e-5)
    turns = [f"turn {i}" for i in range(30)]
    ten, thirty = model.encode_context([[TEXTS[0], *turns[:10]], [TEXTS[0], *turns]])
    assert torch.allclose(ten, thirty), "ten turns and no more"


def test_a_bag_is_what_blocks_that_change_nothing_read_and_trains_neither_them_nor_positions():
    model, rows = small().eval(), ids(9, 2, 0, 12)
    with torch.no_grad():
        for block in model.blocks:
            parts = block.output, block.feed_forward2, model.positions
            for weight in (weight for part in parts for weight in part.parameters()):
                weight.zero_()
            for norm in (block.norm1, block.norm2):
                norm.reset_parameters()
        model.reduction.queries_keys.weight[: 2 * 8].zero_()  # the queries: two heads of 8
        model.pieces.weight *= 100  # so that a layer norm's epsilon does not show
    read = model(rows)
    convert.read_as_bag(model)
    assert torch.allclose(model(rows), read, atol=1e-3) and not read[2].any()
    model.train().get_loss({"context": rows, "reply": ids(3, 4, 5, 6)}).backward()
    trained = {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {"similarity", "pieces", "reduction", "towers"}
    assert not any(weight.requires_grad for weight in model.blocks.parameters()), "DDP would wait for gradients"


def test_rare_pieces_count_for_more_at_first(tokenizer):
    texts = [f"the {word}" for word in "tea cup table sea winter summer morning capital".split()]
    common, rare = [], []
    for weighed in ((), texts * 3):
        torch.manual_seed(0)
        model = ConveRT(preset("tiny", **SMALL), tokenizer, weighed)
        sentence, the, tea = model.encode_context(["the tea", "the", "tea"])
        common.append(sentence @ the)
        rare.append(sentence @ tea)
    assert rare[1] > rare[0] + 0.05 and common[1] < common[0] - 0.05


def test_many_texts_are_encoded_in_their_order_without_dropout(tokenizer):
    model = small(tokenizer=tokenizer, piece_dropout=0.5).train()
    texts = [f"{text} {i}" for i in range(80) for text in TEXTS] + [""]
    vectors = model.encode_reply(texts)
    assert model.training and not vectors.requires_grad and vectors.isfinite().all()
    assert torch.allclose(vectors[[0, 333, 639]], model.encode_reply([texts[i] for i in (0, 333, 639)]), atol=1e-5)
    assert model.encode_context([]).shape == (0, 16)


@pytest.mark.parametrize("kind", ["tokenizers", "sentencepiece"])
def test_tokenizer_from_anywhere_hashes_what_it_does_not_know_and_cuts_long_texts(kind, tmp_path, tokenizer):
    config = preset("tiny", **SMALL)
    if kind == "sentencepiece":
        options = dict(model_prefix=str(tmp_path / "pieces"), vocab_size=60, minloglevel=2)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 3), **options)
        tokenizer = Tokenizer((tmp_path / "pieces.model").read_bytes(), config)
    known, chinese, russian = tokenizer(["and you?", "and 日本 you?", "and москва you?"])
    assert all(0 < id <= 300 for id in known) and tokenizer(["and you?"])[0] == known
    [bucket], [other] = ([id for id in row if id > 300] for row in (chinese, russian))
    assert 301 <= bucket <= 320 and 301 <= other <= 320 and bucket != other and len(chinese) > 2
    assert [id for id in chinese if id <= 300] == [id for id in russian if id <= 300]
    assert [len(row) for row in tokenizer(["you " * 100, ""])] == [60, 0]
    assert Tokenizer(tokenizer.model, config)(TEXTS) == tokenizer(TEXTS)
    for text in (*TEXTS, "and москва you?", "you " * 100, ""):
        assert len(tokenizer.pieces(text)) == len(tokenizer([text])[0])
        assert text.startswith("".join(tokenizer.pieces(text)).lstrip(" "))


def test_a_model_saved_to_s3_encodes_the_same_when_loaded(s3):
    model = small(multi_context=True).eval()
    convert.save(model, f"{s3}/models/plain")
    loaded = convert.load(f"{s3}/models/plain")
    assert torch.equal(loaded.encode_context([TEXTS[:3], TEXTS[4]]), model.encode_context([TEXTS[:3], TEXTS[4]]))
    assert same(loaded, model) and loaded.config == model.config and not loaded.training
    with pytest.raises(storage.NotFound, match="make run NOTEBOOKS=04"):
        convert.load(f"{s3}/models/none")


def test_training_sees_eight_and_sixteen_bits_and_the_saved_model_has_no_more(s3):
    model, plain = small(quantize=True), small()
    plain.load_state_dict(convert.plain_state(model))
    convert.save(model.eval(), f"{s3}/models/quantized")
    loaded = convert.load(f"{s3}/models/quantized")
    assert torch.allclose(loaded.encode_reply(TEXTS), model.encode_reply(TEXTS), atol=1e-6)
    difference = (plain.eval().encode_reply(TEXTS) - model.encode_reply(TEXTS)).abs().max()
    assert 1e-5 < difference < 0.05
    for embedding in (loaded.pieces, *loaded.positions):
        rows = embedding.weight / embedding.weight.abs().amax(1, keepdim=True).clamp(min=1e-12) * 127
        assert (rows - rows.round()).abs().max() < 1e-3 and rows.round().unique().numel() > 100
    others = [weight for name, weight in loaded.named_parameters() if not name.startswith(("pieces", "positions"))]
    assert all(torch.equal(weight, weight.half().float()) for weight in others)
    kinds = Counter(weight.dtype for weight in experiment.load_model(f"{s3}/models/quantized")[0].values())
    assert kinds == {torch.int8: 3, torch.float32: 3, torch.float16: len(others)}


def test_the_paper_preset_quantized_takes_no_more_than_59_mb(tmp_path):
    words = {"<unk>": 0} | {f"▁{i:05}": i for i in range(1, 25_000)}
    words = {"type": "BPE", "vocab": words, "merges": [], "unk_token": "<unk>", "fuse_unk": True, "ignore_merges": True}
    words |= dict.fromkeys(["dropout", "continuing_subword_prefix", "end_of_word_suffix"]) | {"byte_fallback": False}
    config = preset("paper", quantize=True)
    model = ConveRT(config, Tokenizer(json.dumps({"version": "1.0", "model": words}).encode(), config))
    convert.save(model, tmp_path)
    assert 50e6 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 59e6
    loaded = convert.load(tmp_path)
    assert loaded.pieces.weight.shape == (26_001, 512) and loaded.towers["reply"].layers[2].weight.shape == (1024, 1024)
    assert [block.attention.window for block in loaded.blocks] == [3, 5, 48, 48, 48, 48]
    with pytest.raises(ValueError, match="'huge' is not one of paper, small, tiny"):
        preset("huge")
    with pytest.raises(ValueError, match=r"set vocab_size to \d+ or more"):
        Tokenizer(model.tokenizer.model, preset("tiny"))


def test_lines_that_are_no_examples_are_counted(s3):
    bad = ["", "   ", "{not json", "[1, 2]", '{"response": "a"}', '{"context": "a"}', "\udcff"]
    bad += ['{"context": "", "response": "a"}', *('{"context": "a", "response": %s}' % each for each in ('"  "', 7))]
    lines = [line.encode("utf-8", "surrogateescape") for line in [*map(json.dumps, records(3)), *bad]]
    storage.write(f"{s3}/bad.jsonl", b"\n".join(lines))
    dialogues = Dialogues(f"{s3}/bad.jsonl")
    for _ in range(2):
        assert [example["reply"] for example in dialogues] == ["answer 0", "answer 1", "answer 2"]
        assert dialogues.skipped == {"empty line": 2, "not a JSON object": 3, "no context": 2, "no reply": 3}
    [first, *_] = dialogues
    turns = ["question 0 ?", "before", "before that"]
    assert first == {"turns": turns, "reply": "answer 0", "topic": "topic", "thread": None}


def test_a_folder_of_files_is_read_whole_gzipped_ones_too(s3, tmp_path):
    for folder in (f"{s3}/folder", str(tmp_path)):
        write(f"{folder}/a.jsonl", records(5))
        write(f"{folder}/deep/b.json", records(5, 5))
        storage.write(f"{folder}/c.jsonl.gz", gzip.compress(json.dumps(records(1, 10)[0]).encode()))
        storage.write(f"{folder}/readme.txt", b"not this")
        assert sorted(int(example["reply"].split()[1]) for example in Dialogues(folder)) == list(range(11))
        assert len(list(Dialogues(f"{folder}/a.jsonl"))) == 5
    with pytest.raises(storage.NotFound, match="nothing"):
        Dialogues(f"{s3}/nothing")


def test_a_file_is_read_as_it_arrives_and_not_kept(tmp_path):
    row = json.dumps({"context": "a " * 2000, "response": "b " * 2000}) + "\n"
    (tmp_path / "large.jsonl").write_text(row * 5000)  # 40 MB
    tracemalloc.start()
    assert sum(1 for _ in Dialogues(tmp_path / "large.jsonl")) == 5000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6


def test_conversations_of_the_package_are_written_once_with_their_older_turns(s3, monkeypatch):
    some = dict(list(chitchat_dataset.Dataset().items())[::50])
    given = dict(dialogues="chitchat", bucket="dialogues", parameters={}, experiment=experiment)
    monkeypatch.setattr(chitchat_dataset, "Dataset", lambda: some)
    url = f"{s3}/dialogues/chitchat"
    for _ in range(2):
        run_cells("04b", "def make_records", "def put_dialogues", names=dict(given))
        written = storage.objects(url)
    assert len(written) == 8 and storage.objects(url) == written
    pairs = list(Dialogues(url))
    assert len(pairs) > 1500 and sum(len(pair["turns"]) > 1 for pair in pairs) > 0.9 * len(pairs)
    assert {pair["thread"] for pair in pairs} <= {*some}


def test_conversations_stay_whole_in_one_of_three_parts(tmp_path):
    write(tmp_path / "threads.jsonl", [row | {"thread_id": i // 4} for i, row in enumerate(records(4000))])
    parts = {split: list(Dialogues(tmp_path, split)) for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == len({pair["reply"] for part in parts.values() for pair in part}) == 4000
    threads = {split: {pair["thread"] for pair in part} for split, part in parts.items()}
    assert sum(map(len, threads.values())) == 1000, "no thread in two"
    assert 80 < len(threads["test"]) < 120 and 35 < len(threads["validation"]) < 65
    few = Dialogues(tmp_path, "train", limit=100)
    assert list(few) == parts["train"][:100] and sum(1 for share in (0, 1) for _ in few.read_share(share, 2)) == 100


def test_each_process_and_worker_gets_as_many_batches(tmp_path, tokenizer, monkeypatch):
    write(tmp_path / "uneven.jsonl", [{}] * 50 + records(50))
    dialogues = Dialogues(tmp_path / "uneven.jsonl")
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []  # by each process; whose share is short begins it again
    for process in range(2):
        monkeypatch.setenv("RANK", str(process))
        batches = pickle.loads(pickle.dumps(Batches(dialogues, tokenizer, 4, 60)))
        batches.collate = list
        read = list(DataLoader(batches, batch_size=None, num_workers=2))
        assert len(read) == len(batches) == 7 and all(len(batch) == 4 for batch in read)
        assert list(DataLoader(batches, batch_size=None, num_workers=2)) != read, "another order each time"
        seen.append({example["reply"] for batch in read for example in batch})
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) > 40, "each its own"
    with pytest.raises(ValueError, match="100 examples are too few for 2 batches of 64"):
        Batches(dialogues, tokenizer, 64, 100)
    with pytest.raises(ValueError, match="too few examples"):
        list(Batches(Dialogues(tmp_path / "uneven.jsonl", limit=0), tokenizer, 4, 60))


def make_loop(s3, **changes):
    pairs = examples(64)
    rows = [{"context": pair["turns"][0], "context/0": "before?", "response": pair["reply"]} for pair in pairs]
    write(f"{s3}/numbers.jsonl", rows)
    tokenizer = train_tokenizer([pair["reply"] for pair in pairs], preset("tiny", **SMALL))
    model = small(tokenizer=tokenizer, **changes)
    batches = Batches(Dialogues(f"{s3}/numbers.jsonl"), tokenizer, 8, 64, model.config.multi_context)
    merge = partial(collate, tokenizer=tokenizer, multi_context=model.config.multi_context)
    loaders = DataLoader(batches, batch_size=None), DataLoader(examples(20), 10, collate_fn=merge)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    return TrainLoop(model, *loaders, metrics=evaluation.retrieval(), optimizer=optimizer)


def test_training_cut_off_within_an_epoch_goes_on_exactly(s3):
    whole, cut_off, resumed = (make_loop(s3, piece_dropout=0.1) for _ in range(3))
    checkpoint = partial(Checkpoint, f"{s3}/checkpoints", every=3)
    torch.manual_seed(5)
    whole.fit(3)
    torch.manual_seed(5)
    with pytest.raises(ZeroDivisionError):
        cut_off.fit(3, callbacks=[checkpoint(), Call(LAST, after_step=at(13, fail))])
    resumed.fit(3, callbacks=[checkpoint()])
    assert timeless(whole.history) == timeless(resumed.history) and same(whole.model, resumed.model)


def test_a_few_epochs_with_the_papers_optimizer_lower_the_loss_quantized_and_with_several_contexts(s3):
    loop = make_loop(s3, multi_context=True, quantize=True)
    loop.optimizers = [torch.optim.Adadelta(loop.model.parameters(), lr=1.0, rho=0.9, weight_decay=1e-5)]
    clip = ClipGradients(norm=1, weights=list(loop.model.pieces.parameters()))
    first, *_, last = loop.fit(8, callbacks=[LearningRate("cosine", warmup=4), clip])
    assert last["train_loss"] < first["train_loss"] - 0.1
    assert {"val_loss", "val_recall@1", "val_recall@3", "val_recall@10", "val_mrr"} <= last.keys()


def trained(size):
    """The weights after four steps on batches of this size, of each process its own."""
    model = small()
    loader = DataLoader(examples(16), size, collate_fn=partial(collate, tokenizer=model.tokenizer))
    TrainLoop(model, loader, optimizer=torch.optim.SGD(model.parameters(), 0.1)).fit(4)
    return model.state_dict()


def in_a_process(process, port, results):
    os.environ |= {"RANK": str(process), "LOCAL_RANK": str(process), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(True)  # of the process that this one is forked from
    torch.save(trained(8), f"{results}/{process}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_half_the_batch_learn_from_the_whole_one(tmp_path):
    torch.multiprocessing.start_processes(in_a_process, (free_port(), tmp_path), nprocs=2, start_method="fork")
    one, two = trained(16), [torch.load(tmp_path / f"{process}.pt") for process in range(2)]
    for name, weight in one.items():
        assert torch.equal(two[0][name], two[1][name]) and torch.allclose(weight, two[0][name], atol=1e-5), name
