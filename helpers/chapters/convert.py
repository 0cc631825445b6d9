"""ConveRT: a dual encoder that finds the reply to a context. Henderson et al. 2019, https://arxiv.org/abs/1911.03688

One transformer reads contexts and replies alike, a tower each turns what it read into a unit vector, and the reply is the
one whose vector is nearest. Padding costs nothing: all that is done token by token is done for the real tokens only.
"""

import base64
import itertools
import json
import os
import random
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tokenizers
import torch
import torch.distributed.nn.functional
from sentencepiece import SentencePieceProcessor
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset, get_worker_info

from helpers import experiment, storage

PADDING = 0  # the id of no piece; the tokenizer's pieces follow, then the buckets of unknown ones
HELD_OUT = 15  # percent of the examples: the same ones always, whatever the corpus
TURNS = 10  # before the last one, newest first
POOL = 20  # batches read ahead, of which those of like length are put together


@dataclass(frozen=True)
class Config:
    """The numbers of section 2 of the paper; `preset` has the others."""

    vocab_size: int = 25_000  # pieces
    buckets: int = 1_000  # that unknown pieces are hashed into
    max_length: int = 60  # pieces of a text; the rest is cut
    width: int = 512  # of a token
    positions: tuple = (47, 11)  # rows of the two tables, added at i mod 47 and i mod 11
    attention_width: int = 64  # of queries, keys and values
    windows: tuple = (3, 5, 48, 48, 48, 48)  # a layer each: how far it looks to both sides, in tokens
    feed_forward: int = 2_048
    reduction_heads: int = 2  # each as wide as a token
    tower_layers: int = 3
    output_width: int = 512  # of an encoding
    label_smoothing: float = 0.2
    piece_dropout: float = 0.0  # of pieces left out in training, at random: the paper's 700 million pairs need none
    multi_context: bool = False  # with a tower for the turns before the last
    quantize: bool = False  # train as if embeddings had 8 bits and all else 16, and save it so


PRESETS = {"paper": Config(), "tiny": Config(vocab_size=4_000, buckets=100, width=128, attention_width=32,
                                             windows=(3, 5, 48), feed_forward=512, output_width=128, piece_dropout=0.15)}


def preset(name, **changes):
    """The `Config` of that name, with changes. Raises ValueError for a name that is not in `PRESETS`."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)


# ----------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """Texts to lists of piece ids, by a model of Hugging Face's tokenizers (JSON) or of sentencepiece (its own bytes).

    A piece that the model does not know gets one of the buckets, the same always. Raises ValueError when the model has
    more pieces than config.vocab_size.
    """

    def __init__(self, model, config):
        self.model, self.config = model, config
        if model.startswith(b"{"):
            self.backend = tokenizers.Tokenizer.from_str(model.decode())
            self.backend.no_padding()
            self.backend.no_truncation()
            size, unknown = self.backend.get_vocab_size(), getattr(self.backend.model, "unk_token", None)
            self.unknown = self.backend.token_to_id(unknown) if unknown else None
        else:
            self.backend = SentencePieceProcessor(model_proto=model)
            size, self.unknown = self.backend.get_piece_size(), self.backend.unk_id()
        if size > config.vocab_size:
            raise ValueError(f"The tokenizer has {size:,} pieces, the model's embedding takes {config.vocab_size:,}: "
                             f"set vocab_size to {size} or more.")

    @classmethod
    def train(cls, texts, config):
        """Byte pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) of lower-case texts."""
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
        backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFKC(),
                                                              tokenizers.normalizers.Lowercase()])
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Metaspace(),
                                                                    tokenizers.pre_tokenizers.Punctuation()])
        backend.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
            vocab_size=config.vocab_size, min_frequency=2, special_tokens=["<unk>"], show_progress=False))
        return cls(backend.to_str().encode(), config)

    @classmethod
    def load(cls, url, config):
        """A tokenizer.json or a sentencepiece model at any fsspec URL."""
        return cls(storage.read(url), config)

    def _split(self, texts):
        """For each text its pieces, as pairs (id, text), cut to max_length."""
        texts = list(texts)
        if isinstance(self.backend, tokenizers.Tokenizer):
            pairs = ([(id, text[start:end]) for id, (start, end) in zip(encoding.ids, encoding.offsets)]
                     for text, encoding in zip(texts, self.backend.encode_batch(texts, add_special_tokens=False)))
        else:
            pairs = ([(id, piece.replace("▁", " ")) for id, piece in zip(ids, pieces)] for ids, pieces in zip(
                self.backend.encode(texts), self.backend.encode(texts, out_type=str)))
        return [row[:self.config.max_length] for row in pairs]

    def __call__(self, texts):
        """A list of ids for each text."""
        first = self.config.vocab_size + 1
        return [[first + zlib.crc32(piece.lower().encode()) % self.config.buckets if id == self.unknown else id + 1
                 for id, piece in row] for row in self._split(texts)]

    def pieces(self, text):
        """The text of each piece, as many as there are ids."""
        return [piece for _, piece in self._split([text])[0]]


# --------------------------------------------------------------------------------------------------------- model


class Layout:
    """Where the real tokens of padded ids (texts, length) are: `flat` lists them, `padded` puts them back."""

    def __init__(self, ids):
        self.shape, self.mask = ids.shape, ids != PADDING
        self.index = self.mask.flatten().nonzero().squeeze(1)
        self.position = self.index % ids.shape[1]
        self.text = self.index // ids.shape[1]
        place = torch.arange(ids.shape[1], device=ids.device)
        self.distance = place[None, :] - place[:, None]  # (target, source)

    def padded(self, flat):
        """(tokens, width) -> (texts, length, width), zero at padding."""
        rows = flat.new_zeros(self.mask.numel(), flat.shape[1]).index_copy(0, self.index, flat)
        return rows.view(*self.shape, -1)

    def flat(self, padded):
        """(texts, length, width) -> (tokens, width)."""
        return padded.reshape(self.mask.numel(), -1).index_select(0, self.index)


class Embedding(nn.Embedding):
    """Rows that are, with `quantize`, seen through 8 bits each value: a scale for every row."""

    quantize = False

    def forward(self, ids):
        rows = super().forward(ids)
        if self.quantize:
            values, scale = eight_bits(rows.detach())
            rows = rows + (values * scale - rows.detach())  # straight through: the gradient of rows themselves
        return rows


def eight_bits(rows):
    """Values of -127 to 127 and scales such that values * scale are the rows, nearly: (…, width), (…, 1)."""
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (rows / scale).round(), scale


class SixteenBits(nn.Module):
    """A weight seen through 16 bits (float16) with the gradient of the weight itself."""

    def forward(self, weight):
        return weight + (weight.detach().half().to(weight.dtype) - weight.detach())


class Attention(nn.Module):
    """Self-attention over (tokens, width); with a window, as far as that to both sides, plus a learned bias for each
    distance: scores are q·k / √(width of q) + bias. Returns (tokens, heads * value_width).
    """

    def __init__(self, width, attention_width, value_width, heads=1, window=None):
        super().__init__()
        self.heads, self.widths, self.window = heads, [heads * attention_width] * 2 + [heads * value_width], window
        self.scale = attention_width**-0.5
        self.project = nn.Linear(width, sum(self.widths))
        if window is not None:
            self.bias = nn.Parameter(torch.zeros(heads, 2 * window + 1))

    def weights(self, queries, keys, layout):
        """(texts, heads, target, source), each target's summing to 1 over the real tokens it may look at."""
        allowed = layout.mask[:, None, None, :]
        scores = (queries * self.scale) @ keys.transpose(-1, -2)
        if self.window is not None:
            scores = scores + self.bias[:, layout.distance.clamp(-self.window, self.window) + self.window]
            allowed = allowed & (layout.distance.abs() <= self.window)
        return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)  # not -inf: no row is empty

    def forward(self, x, layout):
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                 for part in layout.padded(self.project(x)).split(self.widths, -1))
        queries, keys, values = heads  # (texts, heads, length, width)
        return layout.flat((self.weights(queries, keys, layout) @ values).transpose(1, 2).flatten(2))


GELU = 1.702  # fast GELU is x·σ(1.702 x): Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415


class Block(nn.Module):
    """Attention, then two feed-forward layers, with a residual and a layer norm of its own around each."""

    def __init__(self, config, window):
        super().__init__()
        width = config.width
        self.attention = Attention(width, config.attention_width, config.attention_width, window=window)
        self.output = nn.Linear(config.attention_width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward1, self.feed_forward2 = nn.Linear(width, config.feed_forward), nn.Linear(config.feed_forward, width)

    def forward(self, x, layout):
        x = self.norm1(x + self.output(self.attention(x, layout)))
        inner, outer = self.feed_forward1, self.feed_forward2  # GELU goes into the weights, fewer than what they make
        hidden = F.silu(F.linear(x, GELU * inner.weight, GELU * inner.bias))
        return self.norm2(x + F.linear(hidden, outer.weight / GELU, outer.bias))


class Tower(nn.Module):
    """Fully connected layers with skip connections and layer norms, then a linear layer: (texts, output_width)."""

    def __init__(self, config):
        super().__init__()
        width = config.reduction_heads * config.width
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.tower_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.tower_layers))
        self.output = nn.Linear(width, config.output_width)

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms):
            x = norm(x + F.silu(GELU * layer(x)) / GELU)
        return self.output(x)


class ConveRT(nn.Module):
    """The dual encoder with its tokenizer. `TrainLoop` trains it on the batches of `Batches`, without a criterion.

    A context is a text, or, for a model with multi_context, a list of turns, the newest first.
    """

    def __init__(self, config, tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.pieces = Embedding(1 + config.vocab_size + config.buckets, config.width, padding_idx=PADDING)
        self.positions = nn.ModuleList(Embedding(rows, config.width) for rows in config.positions)
        self.blocks = nn.ModuleList(Block(config, window) for window in config.windows)
        self.reduction = Attention(config.width, config.attention_width, config.width, config.reduction_heads)
        self.context_tower, self.reply_tower = Tower(config), Tower(config)
        self.extra_tower = Tower(config) if config.multi_context else None
        self.similarity = nn.Parameter(torch.zeros(()))  # C, before it is bounded
        self._initialise()
        if config.quantize:
            for module in list(self.modules())[1:]:
                if isinstance(module, Embedding):
                    module.quantize = True
                else:
                    for name, _ in list(module.named_parameters(recurse=False)):
                        parametrize.register_parametrization(module, name, SixteenBits())

    @torch.no_grad()
    def _initialise(self):
        """So that an untrained model compares the pieces that two texts have in common: the branches beside the skips
        start small, positions smaller, biases at zero, and the towers alike. From there little data leads far.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        std = self.config.width**-0.5
        nn.init.normal_(self.pieces.weight, std=std)[PADDING] = 0
        for table in self.positions:
            nn.init.normal_(table.weight, std=0.03 * std)
        for block in self.blocks:
            for layer in (block.output, block.feed_forward2):
                layer.weight *= 0.1
        nn.init.orthogonal_(self.reduction.project.weight[sum(self.reduction.widths[:2]):])  # the values'
        for tower in (self.context_tower, self.reply_tower, *filter(None, [self.extra_tower])):
            for layer in tower.layers:
                nn.init.orthogonal_(layer.weight, gain=0.3)
            nn.init.orthogonal_(tower.output.weight)
            tower.load_state_dict(self.context_tower.state_dict())

    def attention_layers(self):
        """[(name, module), …] in the order they run; each module's `weights(queries, keys, layout)` are its attention."""
        return [*((f"layer {number}, window {block.attention.window}", block.attention)
                  for number, block in enumerate(self.blocks, 1)), ("pooling", self.reduction)]

    @property
    def scale(self):
        """C, learned within 0 and √output_width."""
        return self.config.output_width**0.5 * self.similarity.sigmoid()

    def forward(self, ids):
        """Padded ids (texts, length) -> what the towers get: (texts, reduction_heads * width)."""
        if self.training and self.config.piece_dropout:
            ids = ids.masked_fill(torch.rand(ids.shape, device=ids.device) < self.config.piece_dropout, PADDING)
        layout = Layout(ids)
        x = self.pieces(layout.flat(ids).squeeze(1))
        for table in self.positions:
            x = x + table(layout.position % table.num_embeddings)
        for block in self.blocks:
            x = block(x, layout)
        x = self.reduction(x, layout)
        total = x.new_zeros(len(ids), x.shape[1], dtype=torch.float32).index_add(0, layout.text, x.float())
        return total / layout.mask.sum(1, keepdim=True).clamp(min=1).sqrt()

    def encode(self, batch):
        """[the contexts' vectors, …], the replies': each (texts, output_width), of length 1.

        With extra contexts there are three: of the last turn, of the turns before it, and of both (their mean).
        """
        names = [name for name in ("context", "reply", "extra") if name in batch]
        length = max(batch[name].shape[1] for name in names)
        ids = torch.cat([F.pad(batch[name], (0, length - batch[name].shape[1])) for name in names])
        read = self(ids).split([len(batch[name]) for name in names])
        context, reply = self.context_tower(read[0]), self.reply_tower(read[1])
        contexts = [context]
        if "extra" in batch:
            some = (batch["extra"] != PADDING).any(1, keepdim=True)
            contexts += self._joined(context, self.extra_tower(read[2]), some)
        return [F.normalize(each, dim=1) for each in contexts], F.normalize(reply, dim=1)

    @staticmethod
    def _joined(context, extra, some):
        """The extra turns' vector and the mean of both; where there are none, the last turn's stands for either."""
        context, extra = F.normalize(context, dim=1), F.normalize(extra, dim=1)
        extra = torch.where(some, extra, context)
        return [extra, context + extra]

    def get_loss(self, batch, criterion=None):
        """Softmax over the replies of the batch, of all processes, for each kind of context; their mean."""
        contexts, replies = self.encode(batch)
        first = 0
        if self.training and torch.distributed.is_initialized():
            first = torch.distributed.get_rank() * len(replies)
            replies = torch.cat(torch.distributed.nn.functional.all_gather(replies))
        targets = torch.arange(first, first + len(contexts[0]), device=replies.device)
        with torch.autocast(replies.device.type, enabled=False):  # C times what bf16 leaves out of a cosine is too much
            scores = [self.scale * context.float() @ replies.float().T for context in contexts]
        losses = [F.cross_entropy(each, targets, label_smoothing=self.config.label_smoothing) for each in scores]
        return torch.stack(losses).mean()

    def get_predictions(self, batch):
        """Cosines (contexts, replies), of which the diagonal is right, for evaluation.retrieval."""
        contexts, replies = self.encode(batch)
        return contexts[-1] @ replies.T, torch.arange(len(replies), device=replies.device)

    def encode_context(self, contexts):
        """Contexts -> unit vectors (n, output_width), on the CPU."""
        turns = [[context] if isinstance(context, str) else list(context) for context in contexts]
        vectors = self._vectors(self.context_tower, [each[0] for each in turns])
        if self.extra_tower and any(len(each) > 1 for each in turns):
            extra = self._vectors(self.extra_tower, [_older(each) for each in turns])
            some = torch.tensor([len(each) > 1 for each in turns])[:, None]
            vectors = F.normalize(self._joined(vectors, extra, some)[1], dim=1)
        return vectors

    def encode_reply(self, replies):
        """Replies -> unit vectors (n, output_width), on the CPU."""
        return self._vectors(self.reply_tower, replies)

    @torch.inference_mode()
    def _vectors(self, tower, texts):
        """Those of texts of like length together."""
        training, ids = self.training, self.tokenizer(texts)
        vectors, order = torch.empty(len(ids), self.config.output_width), torch.tensor([len(row) for row in ids]).argsort()
        self.eval()
        for chosen in (order[i:i + 256] for i in range(0, len(ids), 256)):
            batch = _pad(torch.tensor(ids[i], dtype=torch.long) for i in chosen).to(self.similarity.device)
            vectors[chosen] = F.normalize(tower(self(batch)), dim=1).float().cpu()
        self.train(training)
        return vectors


# ---------------------------------------------------------------------------------------------------- save, load


def plain_state(model):
    """The weights with all their bits, by the names that they have in a model that is not quantized."""
    return {name.replace("parametrizations.", "").replace(".original", ""): weight
            for name, weight in model.state_dict().items()}


def save(model, url):
    """Save a model with its tokenizer and config under any fsspec URL; a quantized one as int8 and float16."""
    state = plain_state(model)
    if model.config.quantize:
        state = {name: weight.half() for name, weight in state.items()}
        for name, module in model.named_modules():
            if isinstance(module, Embedding):
                values, state[f"{name}.weight.scale"] = eight_bits(module.weight.detach())
                state[f"{name}.weight"] = values.to(torch.int8)
    tokenizer = base64.b85encode(model.tokenizer.model).decode()
    experiment.save_model(state, url, convert=asdict(model.config), tokenizer=tokenizer)


def load(url):
    """What `save` saved, ready to encode. Raises storage.NotFound when there is none."""
    try:
        state, saved = experiment.load_model(url)
    except storage.NotFound as error:
        raise storage.NotFound(f"{error} Train one first, with notebook 04 (make run NOTEBOOKS=04).") from None
    config = Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved["convert"].items()})
    scales = {name: state.pop(name) for name in list(state) if name.endswith(".scale")}
    state = {name: weight.float() * scales[f"{name}.scale"] if f"{name}.scale" in scales else weight.float()
             for name, weight in state.items()}
    model = ConveRT(replace(config, quantize=False), Tokenizer(base64.b85decode(saved["tokenizer"]), config))
    model.load_state_dict(state)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------- data


class Dialogues:
    """Examples of conversations, one after the other, never all in memory: {"turns": [newest, …, oldest], "reply": …,
    "topic": …, "thread": …}.

    source: "chatterbot", the English pairs of the chatterbot-corpus package; or the fsspec URL of a file or a folder of
        JSON lines (.json, .jsonl, also .gz) in the format of https://github.com/PolyAI-LDN/conversational-datasets
    split: "train", "held_out" (HELD_OUT percent of the threads; see `split`), or "" for both.
    `skipped` counts {reason: lines} of the last pass. Raises storage.NotFound when there is no such file.
    """

    def __init__(self, source, split=""):
        self.source, self.split, self.skipped = str(source).rstrip("/"), split, Counter()
        self.files = [] if source == "chatterbot" else storage.find_files(self.source, (".json", ".jsonl", ".json.gz", ".jsonl.gz"))

    def __iter__(self):
        return self.part(0, 1)

    def part(self, share, shares):
        """One of `shares` parts, for each of several readers its own: of the files, or of the lines if files are few."""
        self.skipped.clear()
        files, step = (self.files[share::shares], 1) if len(self.files) >= shares else (self.files, shares)
        for lines in [_chatterbot()] if self.source == "chatterbot" else map(storage.read_lines, files):
            for line in itertools.islice(lines, 0 if step == 1 else share, None, step):
                if (example := self._example(line)) and self.split in ("", split(example)):
                    yield example

    def _example(self, line):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            self.skipped["not a JSON object" if line.strip() else "empty line"] += 1
            return None
        turns = [record.get(name) for name in ("context", *(f"context/{i}" for i in range(TURNS)))]
        turns, reply = [turn if isinstance(turn, str) else "" for turn in turns], record.get("response")
        if not turns[0].strip():
            self.skipped["no context"] += 1
        elif not (isinstance(reply, str) and reply.strip()):
            self.skipped["no reply"] += 1
        else:
            return {"turns": [turn for turn in turns if turn.strip()], "reply": reply,
                    "topic": record.get("subreddit"), "thread": record.get("thread_id")}


def split(example):
    """Whether an example is of the "train" or the "held_out" part, by its thread or, where that has no name, context."""
    name = str(example["thread"] or example["turns"][0].lower())
    return "held_out" if zlib.crc32(name.encode()) % 100 < HELD_OUT else "train"


def _chatterbot():
    """The corpus as JSON lines, each pair once."""
    import chatterbot_corpus  # here: other data do without
    import yaml

    lines = {}
    for path in sorted((Path(chatterbot_corpus.__file__).parent / "data/english").glob("*.yml")):
        for turns in yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)["conversations"]:
            for i, (context, reply) in enumerate(itertools.pairwise(map(str, turns))):
                older = {f"context/{j}": str(turns[i - 1 - j]) for j in range(min(i, TURNS))}
                record = {"context": context, **older, "response": reply, "subreddit": path.stem}
                lines.setdefault((context, reply), json.dumps(record))
    return lines.values()


class Batches(IterableDataset):
    """Batches for `TrainLoop`: those of `collate`, of random examples of like length, the remainder left out.

    examples: how many `dialogues` has, for a stream cannot tell. Several processes and workers get different examples,
    but as many batches: one whose share is short starts again. DataLoader(Batches(…), batch_size=None) reads it.
    """

    def __init__(self, dialogues, tokenizer, batch_size, examples, multi_context=False):
        self.dialogues, self.tokenizer, self.batch_size, self.multi_context = dialogues, tokenizer, batch_size, multi_context
        self.process, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
        self.length = examples // batch_size // self.processes
        if not self.length:
            raise ValueError(f"{examples:,} examples are too few for {self.processes} batches of {batch_size}.")

    def __len__(self):
        return self.length

    def __iter__(self):
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = len(range(number, self.length, workers))
        return itertools.islice(self._endless(self.process * workers + number, self.processes * workers), mine)

    def _endless(self, share, shares):
        order = random.Random(torch.randint(2**62, ()).item())  # of torch's: so TrainLoop can draw the same once more
        full = True
        while full:
            full, examples = False, self.dialogues.part(share, shares)
            while pool := list(itertools.islice(examples, POOL * self.batch_size)):
                order.shuffle(pool)
                pool = pool[:len(pool) // self.batch_size * self.batch_size]
                rows = _ids(pool, self.tokenizer, self.multi_context)
                rows.sort(key=lambda row: sum(map(len, row.values())))
                batches = [rows[i:i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
                order.shuffle(batches)
                for full, batch in zip(itertools.repeat(True), batches):
                    yield _stacked(batch)
        raise ValueError(f"{self.dialogues.source} has too few examples for a batch of {self.batch_size} for each process.")


def collate(examples, tokenizer, multi_context=False):
    """Examples -> {"context": padded ids (examples, length), "reply": …} and, for multi_context, "extra"."""
    return _stacked(_ids(examples, tokenizer, multi_context))


def _ids(examples, tokenizer, multi_context):
    texts = {"context": [example["turns"][0] for example in examples], "reply": [example["reply"] for example in examples]}
    if multi_context:
        texts["extra"] = [_older(example["turns"]) for example in examples]
    return [dict(zip(texts, row)) for row in zip(*map(tokenizer, texts.values()))]


def _older(turns):
    """The turns before the last, newest first, as one text."""
    return " ".join(turns[1:TURNS + 1])


def _stacked(rows):
    return {name: _pad(torch.tensor(row[name], dtype=torch.long) for row in rows) for name in rows[0]}


def _pad(rows):
    return pad_sequence(list(rows), batch_first=True, padding_value=PADDING)
