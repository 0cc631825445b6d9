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

import pytest
import sentencepiece
import tokenizers
import torch
from accelerate.state import AcceleratorState
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from helpers import experiment, storage
from helpers.callbacks import Checkpoint, ClipGradients, LearningRate
from helpers.chapters import convert, evaluation
from helpers.chapters.convert import PADDING, ConveRT, Tokenizer, collate, pad, preset, train_tokenizer
from helpers.chapters.dialogues import Batches, Dialogues, parse_example
from helpers.training import TrainLoop
from loops import LAST, Call, at, fail, same, timeless
from servers import free_port


SMALL = dict(vocab_size=300, buckets=20, width=16, attention_width=8, windows=(1, 3), feed_forward=32)
SMALL |= dict(output_width=16, piece_dropout=0.0)
TEXTS = """Good morning, how are you?
I am well, and you?
What is the capital of France, number 0123456789?
Never.
Because the tea was hot, the cup was full and the table was small.""".splitlines()
TOKENIZER = train_tokenizer(TEXTS, preset("tiny", **SMALL))


@pytest.fixture
def s3(embedded, bucket):
    storage.create_bucket(bucket)
    return f"s3://{bucket}"


def small(**changes):
    """A small model with noise in all that starts at zero or alike, so that nothing cancels out."""
    torch.manual_seed(0)
    model = ConveRT(preset("tiny", **{**SMALL, **changes}), TOKENIZER)
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
    return [parse_example(json.dumps(record)) for record in records(count)]


def write(url, rows):
    storage.write(url, "".join(json.dumps(row) + "\n" for row in rows).encode())


def records(count, first=0):
    fixed = {"context/0": "before", "context/1": "before that"}
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


def plain_reading(model, row):
    """What the towers get of one text, its ids without padding."""
    first, second = (table.weight for table in model.positions)
    x = torch.stack([model.pieces.weight[id] + first[i % 47] + second[i % 11] for i, id in enumerate(row)])
    for block in model.blocks:
        x = block.norm1(x + block.output(plain_attention(block.attention, x)))
        hidden = block.feed_forward1(x)
        x = block.norm2(x + block.feed_forward2(hidden / (1 + (-1.702 * hidden).exp())))
    return plain_attention(model.reduction, x).sum(0) / math.sqrt(len(row))


def plain_tower(tower, x):
    for layer, norm in zip(tower.layers, tower.norms):
        hidden = layer(x)
        x = norm(x + hidden / (1 + (-1.702 * hidden).exp()))
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
    expected, targets = 0, 0.2 / 3 + 0.8 * torch.eye(3)
    for contexts in (context, extra, normalize(context + extra, dim=1)):
        scores = 4 * torch.sigmoid(model.similarity) * contexts @ replies.T
        expected = expected - (targets * (scores.exp() / scores.exp().sum(1, keepdim=True)).log()).sum() / 9
    loss, weights = model.get_loss(batch), list(model.parameters())
    assert torch.allclose(loss, expected, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(value, weights) for value in (loss, expected))):
        assert one.any() and torch.allclose(one, other, atol=1e-3 * other.abs().max()), "relative to the largest"


def test_texts_and_lists_of_turns_are_encoded_in_their_order_without_dropout():
    model, turns = small(multi_context=True, piece_dropout=0.5).train(), [f"turn {i}" for i in range(30)]
    contexts = [text for i in range(60) for text in (TEXTS[i % 5], [TEXTS[i % 5]], [TEXTS[i % 5], *turns[:10]])]
    vectors = model.encode_context([*contexts, [TEXTS[4], *turns]])
    plain, alone, ten, thirty = vectors[-4:]
    assert torch.equal(plain, alone) and torch.allclose(ten, thirty) and (plain - ten).abs().max() > 1e-3
    assert torch.allclose(vectors[[0, 77, 149]], model.encode_context([contexts[i] for i in (0, 77, 149)]), atol=1e-5)
    assert model.training and not vectors.requires_grad and model.encode_reply([]).shape == (0, 16)
    batch = collate([{"turns": contexts[-1], "reply": TEXTS[3]}], TOKENIZER, multi_context=True)
    assert TOKENIZER([" ".join(turns[:10])])[0] == batch["extra"][0].tolist(), "newest first, one text"
    assert torch.allclose(model.eval().encode(batch)[0][2][0], ten, atol=1e-5)


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


def test_rare_pieces_count_for_more_at_first():
    def lead(weighed):
        torch.manual_seed(0)
        model = ConveRT(preset("tiny", **SMALL), TOKENIZER, weighed)
        sentence, common, rare = model.encode_context(["the tea", "the", "tea"])
        return sentence @ rare - sentence @ common

    assert lead(["the cup", "the table", "the capital", "the morning"] * 6) > lead(()) + 0.1


@pytest.mark.parametrize("kind", ["tokenizers", "sentencepiece"])
def test_tokenizer_from_anywhere_hashes_what_it_does_not_know_and_cuts_long_texts(kind, tmp_path):
    config, tokenizer = preset("tiny", **SMALL), TOKENIZER
    if kind == "sentencepiece":
        options = dict(model_prefix=str(tmp_path / "pieces"), vocab_size=50, minloglevel=2)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 3), **options)
        tokenizer = Tokenizer((tmp_path / "pieces.model").read_bytes(), config)
    known, chinese, russian = tokenizer(["and you?", "and 日本 you?", "and москва you?"])
    assert all(0 < id <= 300 for id in known) and tokenizer(["and you?"])[0] == known
    [bucket], [other] = ([id for id in row if id > 300] for row in (chinese, russian))
    assert 301 <= bucket <= 320 and 301 <= other <= 320 and bucket != other
    assert [id for id in chinese if id <= 300] == [id for id in russian if id <= 300] != []
    assert [len(row) for row in tokenizer(["you " * 100, ""])] == [60, 0]
    for text in (*TEXTS, "and москва you?", "you " * 100, ""):
        assert len(tokenizer.pieces(text)) == len(tokenizer([text])[0])
        assert text.startswith("".join(tokenizer.pieces(text)).lstrip(" "))
    with pytest.raises(ValueError, match=r"set vocab_size to \d+ or more"):
        Tokenizer(tokenizer.model, preset("tiny", vocab_size=20))


def test_training_sees_eight_and_sixteen_bits_and_the_saved_model_has_no_more(s3):
    options, contexts = dict(multi_context=True), [TEXTS[:3], TEXTS[4]]
    model, plain = small(quantize=True, **options).eval(), small(**options).eval()
    plain.load_state_dict(convert.plain_state(model))
    for name, each in {"plain": plain, "quantized": model}.items():
        convert.save(each, f"{s3}/models/{name}")
        loaded = convert.load(f"{s3}/models/{name}")
        assert torch.allclose(loaded.encode_context(contexts), each.encode_context(contexts), atol=1e-6)
        assert name == "quantized" or same(loaded, each) and not loaded.training
    assert 1e-5 < (plain.encode_context(contexts) - model.encode_context(contexts)).abs().max() < 0.05
    kinds = Counter(weight.dtype for weight in experiment.load_model(f"{s3}/models/quantized")[0].values())
    assert kinds == {torch.int8: 3, torch.float32: 3, torch.float16: len(list(model.parameters())) - 3}
    with pytest.raises(storage.NotFound, match="make run NOTEBOOKS=04"):
        convert.load(f"{s3}/models/none")


def test_the_paper_preset_quantized_takes_no_more_than_59_mb(tmp_path):
    words, config = {"<unk>": 0} | {f"▁{i:05}": i for i in range(1, 25_000)}, preset("paper", quantize=True)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="<unk>"))
    convert.save(ConveRT(config, Tokenizer(backend.to_str().encode(), config)), tmp_path)
    assert 50e6 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 59e6
    with pytest.raises(ValueError, match="'huge' is not one of paper, small, tiny"):
        preset("huge")


def test_a_folder_is_read_whole_and_lines_that_are_no_examples_are_counted(s3, tmp_path):
    bad = ["", "   ", "{not json", "[1, 2]", '{"response": "a"}', '{"context": "a"}', "\udcff"]
    bad += ['{"context": "", "response": "a"}', *('{"context": "a", "response": %s}' % each for each in ('"  "', 7))]
    for folder in (f"{s3}/folder", str(tmp_path)):
        write(f"{folder}/a.jsonl", records(5))
        storage.write(f"{folder}/bad.jsonl", "\n".join(bad).encode("utf-8", "surrogateescape"))
        write(f"{folder}/deep/b.json", records(5, 5))
        storage.write(f"{folder}/c.jsonl.gz", gzip.compress(json.dumps(records(1, 10)[0]).encode()))
        storage.write(f"{folder}/readme.txt", b"not this")
        dialogues = Dialogues(folder)
        for _ in range(2):
            assert sorted(int(example["reply"].split()[1]) for example in dialogues) == list(range(11))
            assert dialogues.skipped == {"empty line": 2, "not a JSON object": 3, "no context": 2, "no response": 3}
        assert len(list(Dialogues(f"{folder}/a.jsonl"))) == 5 and len(list(Dialogues(f"{folder}/*/*.json"))) == 5
    turns = ["question 0 ?", "before", "before that"]
    assert next(iter(dialogues)) == {"turns": turns, "reply": "answer 0", "thread": None}
    with pytest.raises(storage.NotFound, match="nothing"):
        Dialogues(f"{s3}/nothing")


def test_conversations_stay_whole_in_one_of_three_parts_and_none_is_kept(tmp_path):
    write(tmp_path / "threads.jsonl", [row | {"thread_id": i // 4} for i, row in enumerate(records(4000))])
    tracemalloc.start()
    assert sum(1 for _ in Dialogues(tmp_path)) == 4000 and tracemalloc.get_traced_memory()[1] < 300_000
    tracemalloc.stop()
    parts = {split: list(Dialogues(tmp_path, split)) for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == len({pair["reply"] for part in parts.values() for pair in part}) == 4000
    threads = {split: {pair["thread"] for pair in part} for split, part in parts.items()}
    assert sum(map(len, threads.values())) == 1000, "no thread in two"
    assert 80 < len(threads["test"]) < 120 and 35 < len(threads["validation"]) < 65
    few = Dialogues(tmp_path, "train", limit=100)
    assert list(few) == parts["train"][:100] and sum(1 for share in (0, 1) for _ in few.read_share(share, 2)) == 100


def test_each_process_and_worker_gets_as_many_batches(tmp_path, monkeypatch):
    write(tmp_path / "uneven.jsonl", [{}] * 50 + records(50))
    dialogues = Dialogues(tmp_path / "uneven.jsonl")
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []  # by each process; whose share is short begins it again
    for process in range(2):
        monkeypatch.setenv("RANK", str(process))
        batches = pickle.loads(pickle.dumps(Batches(dialogues, TOKENIZER, 4, 60)))
        batches.collate = list
        one, other = (list(DataLoader(batches, batch_size=None, num_workers=2)) for _ in range(2))
        assert len(one) == len(batches) == 7 and all(len(batch) == 4 for batch in one)
        assert one != other, "another order each time"
        seen.append({example["reply"] for batch in one for example in batch})
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) > 40, "each its own"
    with pytest.raises(ValueError, match="100 examples are too few for 2 batches of 64"):
        Batches(dialogues, TOKENIZER, 64, 100)
    with pytest.raises(ValueError, match="too few examples"):
        list(Batches(Dialogues(tmp_path / "uneven.jsonl", limit=0), TOKENIZER, 4, 60))


def test_training_as_in_the_paper_lowers_the_loss_and_goes_on_exactly_where_it_was_cut_off(s3):
    def fit(*callbacks):
        torch.manual_seed(5)
        config = preset("tiny", **SMALL | dict(multi_context=True, quantize=True, piece_dropout=0.1))
        model = ConveRT(config, TOKENIZER)
        batches = Batches(Dialogues(f"{s3}/numbers.jsonl"), TOKENIZER, 8, 64, multi_context=True)
        merge = partial(collate, tokenizer=TOKENIZER, multi_context=True)
        loaders = DataLoader(batches, batch_size=None), DataLoader(examples(20), 10, collate_fn=merge)
        optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0, rho=0.9, weight_decay=1e-5)
        loops.append(TrainLoop(model, *loaders, metrics=evaluation.retrieval(), optimizer=optimizer))
        clip = ClipGradients(norm=1, weights=list(model.pieces.parameters()))
        loops[-1].fit(5, callbacks=[LearningRate("cosine", warmup=4), clip, *callbacks])

    loops, checkpoint = [], partial(Checkpoint, f"{s3}/checkpoints", every=3)
    write(f"{s3}/numbers.jsonl", records(64))
    fit()
    with pytest.raises(ZeroDivisionError):
        fit(checkpoint(), Call(LAST, after_step=at(13, fail)))
    fit(checkpoint())
    whole, _, resumed = loops
    assert timeless(whole.history) == timeless(resumed.history) and same(whole.model, resumed.model)
    first, *_, last = whole.history
    assert last["train_loss"] < first["train_loss"] - 0.1 and last["val_mrr"] > 0


def trained(size):
    """The weights after four steps on batches of this size, of each process its own."""
    model = small()
    loader = DataLoader(examples(16), size, collate_fn=partial(collate, tokenizer=TOKENIZER))
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
