"""Question-answer jokes: read and cleaned, packed for a language model to learn from, and told by it."""

import csv
import html
import io
import re
import zlib
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasketch import MinHash, MinHashLSH
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import Dataset
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, LogitsProcessor,
                          PreTrainedTokenizerFast)

from helpers import storage

QUESTION, ANSWER, END, PAD = "[QUESTION]", "[ANSWER]", "<|endoftext|>", "[PAD]"
UNTOLD = "Have you heard the one about the language model?", "It never came to an end."  # see Joker.tell


# ----------------------------------------------------------------------------------------------------------- the data


def read(url):
    """The (question, answer) rows of a CSV at any fsspec URL, and how many other rows are broken: (rows, broken).

    Columns are found by name, in any order and case; the header shows the delimiter (, ; tab or |) and the quotes.
    Broken: too few or too many fields, no UTF-8. Raises StorageError when it has no columns Question and Answer.
    """
    text = storage.read(url).decode("utf-8-sig", errors="replace").replace("\0", "\ufffd")
    lines = list(io.StringIO(text, newline=""))
    try:
        dialect = csv.Sniffer().sniff(lines[0].strip() if lines else "", ",;\t|")
    except csv.Error:  # a header of one column
        dialect = csv.excel
    options = dict(doublequote=True, escapechar="\\" if '\\"' in text else None, strict=True)  # no header shows these
    columns = [name.strip().lower() for name in next(csv.reader(lines, dialect, **options), [])]
    if not {"question", "answer"} <= set(columns):
        raise storage.StorageError(f"{url} has no columns Question and Answer; it has: {', '.join(columns) or 'none'}.")
    question, answer, rows, broken, start = columns.index("question"), columns.index("answer"), [], 0, 1
    while start < len(lines):
        reader, first = csv.reader(lines[start:], dialect, **options), start
        try:
            for fields in reader:
                if fields and (len(fields) != len(columns) or any("\ufffd" in field for field in fields)):
                    raise csv.Error
                rows += [(fields[question], fields[answer])] if fields else []
                start = first + reader.line_num
        except csv.Error:  # go on with the next line: a quote that never ends swallows no other jokes
            broken, start = broken + 1, start + 1
    return rows, broken


_QUOTES = str.maketrans("“”„«»‘’‚`´", "\"\"\"\"\"'''''")
_HERE = r"(?:^|(?<=[.!?)*\n])|(?<=[.!?][\"']))\s*[(\[*_~-]*\s*"  # where a remark starts: at first, or after a sentence
_REMARK = re.compile(_HERE + r"(?:(?:\w+ )?(?:note|edit|update|disclaimer|p\.?\s?s\.?)\s*\d*\s*:|"
                     r"edit(?:ed)?\s*\d*\s*[-–]\s|tl;?dr\b).*", re.I | re.S)
_CREDIT = re.compile(r"\s*[(\[]\s*(?:credits?|source|h/t|hat tip|stolen|courtesy|thanks|via|x-?post)\b[^)\]]*[)\]]\s*$|"
                     + _HERE + r"(?:(?:(?:all |full )?credits?(?: goes)? to|courtesy of|h/t|stolen from)\b|"
                     r"(?:credits?|source)\s*:).*", re.I | re.S)


def _tidy(text):
    text = re.sub(r"\"\"|''", '"', html.unescape(text).translate(_QUOTES))
    text = re.sub(r"[^\S\n]+", " ", text).strip()
    return text[1:-1].strip() if re.fullmatch('"[^"]*"', text) else text


def _unrepeated(question, answer):
    question = " ".join(re.sub(r"^(?:q|question)\s*:", "", question, flags=re.I).split())
    answer = " ".join(re.sub(r"^(?:(?:q|question)\s*:.*?)?\b(?:a|answer)\s*:", "", answer, flags=re.I | re.S).split())
    if answer.casefold().startswith(question.casefold()) and len(answer) > len(question) > 0:
        answer = answer[len(question):].lstrip(" .:-")
    return question, answer


_CHANGES = {"quotes and spaces": lambda joke: tuple(map(_tidy, joke)),
            "note or edit": lambda joke: tuple(_REMARK.sub("", text) for text in joke),
            "credit": lambda joke: tuple(_CREDIT.sub("", text) for text in joke),
            "repeated question": lambda joke: _unrepeated(*joke)}


def clean(rows, max_chars=300):
    """What of (question, answer) rows is worth learning, in their order, and all that was done: (jokes, report).

    report: {what: [(before, after)]}. Texts are changed: "quotes and spaces", "note or edit", "credit", "repeated
    question". Rows are dropped: "empty", "too long" (question and answer over `max_chars` characters), after being
    None; "exact duplicate" (but for case and punctuation), "near duplicate", after being the joke that was there first.
    """
    report = {what: [] for what in (*_CHANGES, "empty", "too long", "exact duplicate", "near duplicate")}
    first, jokes = {}, []
    for row in rows:
        joke = row
        for what, change in _CHANGES.items():
            before, joke = joke, change(joke)
            if " ".join(" ".join(joke).split()) != " ".join(" ".join(before).split()):
                report[what].append((before, joke))
        key = tuple(_words(text) for text in joke)
        if not all(key):
            report["empty"].append((row, None))
        elif sum(map(len, joke)) > max_chars:
            report["too long"].append((row, None))
        elif first.setdefault(key, joke) is not joke:
            report["exact duplicate"].append((joke, first[key]))
    for joke, twin in zip(first.values(), near_duplicates(first.values())):
        report["near duplicate"] += [(joke, twin)] if twin else []
        jokes += [] if twin else [joke]
    return jokes, report


def _words(text):
    return " ".join(re.findall(r"\w+", text.casefold()))


def _shingles(text):
    text = f" {_words(text)} "
    return {text[i:i + 4].encode() for i in range(max(len(text) - 3, 1))}


def _alike(one, other):
    one, other = _shingles(one), _shingles(other)
    return len(one & other) / len(one | other)


def near_duplicates(jokes, known=()):
    """For each joke the one of `known` that it nearly repeats, or None; without any known: of the jokes before it.

    Near: of their runs of four letters, 70 % are in both (Jaccard), and half of those of the answers: an old question
    with another punch line is another joke. MinHash (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900) finds
    whom to compare, without which each would have to be with all: over nine in ten of the pairs that are 80 % alike.
    """
    known, jokes = list(known), list(jokes)
    everything, found = known + jokes, []
    index, shingles = MinHashLSH(num_perm=84, params=(12, 7)), (_shingles(" ".join(joke)) for joke in everything)
    with storage.progress(len(everything), "comparing", "joke") as bar:
        for i, hashed in enumerate(MinHash.generator(shingles, num_perm=84, hashfunc=zlib.crc32)):
            if i >= len(known):
                joke, candidates = everything[i], (everything[j] for j in sorted(index.query(hashed)))
                found.append(next((twin for twin in candidates if _alike(" ".join(twin), " ".join(joke)) >= 0.7
                                   and _alike(twin[1], joke[1]) >= 0.5), None))
            if i < len(known) or not known and not found[-1]:
                index.insert(i, hashed, check_duplication=False)
            bar.update()
    return found


# ----------------------------------------------------------------------------------------------------- for the model


def encode(tokenizer, jokes):
    """The token ids of (question, answer) jokes, a list each: [QUESTION] question [ANSWER] answer, and the end token.

    Without an answer (None) it is what a model answers: [QUESTION] question [ANSWER]; without a question [QUESTION].
    """
    question, answer = tokenizer.convert_tokens_to_ids([QUESTION, ANSWER])
    special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))  # in a text they are none
    texts = [" " + special.sub(" ", text).strip() for joke in jokes for text in joke if text]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    return [[question, *(next(ids) + [answer] if first else []),
             *(next(ids) + [tokenizer.eos_token_id] if second else [])] for first, second in jokes]


class PackedRows(Dataset):
    """Token ids of texts side by side in rows of `length` tokens, as full as they get, where no text sees another.

    Items are dicts of what a causal language model takes: input_ids, position_ids (from 0 in each text) and labels, all
    (length,), and attention_mask (1, length, length), True where a token may look: at its own text, up to itself.
    Labels are -100, not learned, on padding and on a text's first token, which nothing comes before.
    Texts of more than `length` tokens are left out, never cut, and counted in `ignored`; `tokens` is what is in.
    """

    def __init__(self, texts, length, pad=0):
        fitting = sorted((ids for ids in texts if len(ids) <= length), key=len, reverse=True)
        self.ignored, self.tokens = len(texts) - len(fitting), sum(map(len, fitting))
        rows, free = [], defaultdict(list)  # {tokens that are free: rows}
        for ids in fitting:  # the longest first, each into the fullest row that has room
            room = next((room for room in range(len(ids), length + 1) if free[room]), None)
            if room is None:
                rows.append([])
            row = rows[-1] if room is None else free[room].pop()
            row.append(ids)
            free[(length if room is None else room) - len(ids)].append(row)
        self.ids = torch.full((len(rows), length), pad)
        self.texts, self.positions = torch.zeros_like(self.ids), torch.zeros_like(self.ids)  # texts from 1; 0: padding
        for i, row in enumerate(rows):
            used = sum(map(len, row))
            self.ids[i, :used] = torch.tensor([token for ids in row for token in ids])
            self.positions[i, :used] = torch.cat([torch.arange(len(ids)) for ids in row])
            self.texts[i, :used] = (self.positions[i, :used] == 0).cumsum(0)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids, texts, positions = self.ids[index], self.texts[index], self.positions[index]
        return {"input_ids": ids, "attention_mask": (texts[:, None] == texts).tril()[None], "position_ids": positions,
                "labels": ids.masked_fill(positions == 0, -100)}  # padding's positions are 0, too


# ----------------------------------------------------------------------------------------------------------- models


def base_model(name, jokes, max_length):
    """A causal language model and its tokenizer, with the special tokens of a joke, to be trained: (model, tokenizer).

    name: of a model of the Hugging Face Hub, a local folder or an fsspec URL in its layout, BERT as a decoder too; or
    empty: a small GPT-2 and a BPE tokenizer of these jokes, which needs no network. Only safetensors are read.
    max_length: tokens of the longest joke, cut to what the model can take; stays in the tokenizer's model_max_length.
    Raises storage.NotFound when it is not there, or the Hub does not answer.
    """
    model, tokenizer = _pretrained(name) if name else _small_gpt2(jokes, max_length)
    tokenizer.add_special_tokens({"extra_special_tokens": [QUESTION, ANSWER],
                                  "eos_token": tokenizer.eos_token or END,
                                  "pad_token": PAD})  # its own: with the end's, padding would count as a repetition
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.model_max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    for config in model.config, model.generation_config:
        config.bos_token_id, config.eos_token_id, config.pad_token_id = (
            tokenizer.convert_tokens_to_ids([QUESTION, tokenizer.eos_token, PAD]))
    return model, tokenizer


def _small_gpt2(jokes, max_length):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator((f" {text}" for joke in jokes for text in joke), vocab_size=2000, show_progress=False)
    config = GPT2Config(vocab_size=2000, n_positions=max_length, n_embd=192, n_layer=4, n_head=6, bos_token_id=None,
                        eos_token_id=None)
    return AutoModelForCausalLM.from_config(config), PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)


def _pretrained(source):
    source = str(source).rstrip("/")
    with TemporaryDirectory() as folder:  # only as long as it loads
        place = Path(source).expanduser()
        if "://" in source:
            for name in storage.list_files(source):
                if name.endswith((".json", ".safetensors", ".txt", ".model")) and "/" not in name:
                    Path(folder, name).write_bytes(storage.read(f"{source}/{name}"))
            place = Path(folder)
        local = "://" in source or place.is_dir() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source)
        if local and not (place / "config.json").is_file():
            raise storage.NotFound(f"There is no model in Hugging Face layout (config.json) at {source}.")
        place = str(place) if local else source
        try:
            config = AutoConfig.from_pretrained(place)
            config.is_decoder = True  # BERT and its kind
            tokenizer = AutoTokenizer.from_pretrained(place)
            model = AutoModelForCausalLM.from_pretrained(place, config=config, use_safetensors=True,
                                                         attn_implementation="sdpa")  # takes masks of True and False
        except (OSError, ValueError) as error:
            said = str(error).splitlines()[0]
            if local:
                raise storage.StorageError(f"{source} is no causal language model with safetensors: {said}") from None
            raise storage.NotFound(f"There is no folder {source!r}, and the Hugging Face Hub does not give it ({said}) "
                                   f"Where there is a network, jokes.mirror({source!r}, 's3://bucket/models/name') "
                                   "copies the model into a bucket: base_model is then that URL.") from None
    return model.float(), tokenizer


def save(model, tokenizer, url):
    """A model and its tokenizer in Hugging Face layout to any fsspec URL, for `load` and AutoModelForCausalLM.

    config.json goes first and comes last: what was cut off is no model, rather than half of an old and a new one.
    """
    url = str(url).rstrip("/")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        new, old = {path.name for path in Path(folder).iterdir()}, set(storage.list_files(url))
        for name in ["config.json"] * ("config.json" in old) + sorted(old - new):
            storage.remove(f"{url}/{name}")
        for name in sorted(new, key=lambda name: name == "config.json"):
            storage.write(f"{url}/{name}", Path(folder, name).read_bytes())


def mirror(name, url):
    """Copy a causal language model of the Hugging Face Hub to any fsspec URL, to be a base_model without a network."""
    save(*_pretrained(name), url)


def load(url):
    """A model that notebook 05 saved, ready to tell jokes, on the GPU if there is one: a `Joker`.

    url: any fsspec URL, a local folder, or a name at the Hugging Face Hub.
    Raises storage.NotFound when nothing is there, StorageError when it is no model of jokes.
    """
    try:
        model, tokenizer = _pretrained(url)
    except storage.NotFound as error:
        raise storage.NotFound(f"{error} Train a model first, with notebook 05 (make run NOTEBOOKS=05).") from None
    if not {QUESTION, ANSWER} <= tokenizer.get_vocab().keys():
        raise storage.StorageError(f"{url} has learned no jokes: make it the base_model of notebook 05.")
    return Joker(model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer)


class Joker:
    """A language model that tells jokes."""

    TRIES = 4  # of a joke that does not end, says nothing, or repeats its question

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.question, self.answer = tokenizer.convert_tokens_to_ids([QUESTION, ANSWER])

    @torch.inference_mode()
    def tell(self, questions, *, temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=None):
        """[(question, answer)]: an answer to each question (a text), or a whole joke for None; all of them together.

        temperature: below 1 the likely gets likelier, above less so; top_k: of so many tokens the next is drawn, top_p:
        of the likeliest that have this probability together (1: of all); repetition_penalty: above 1 what was said
        becomes less likely. The same questions and seed give the same jokes; without a seed they differ.

        A joke that is no good is told anew, three times at most. One that still has not ended by then is cut after its
        last sentence, or its last whole word; one that is still none gets UNTOLD.
        A question may take half of the tokenizer's model_max_length: the rest of it the model does not see.
        """
        told, device = {}, self.model.device
        self.model.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            for attempt in range(self.TRIES):
                left = [i for i in range(len(questions)) if i not in told]
                if left:
                    generated = self._generate([questions[i] for i in left], temperature=temperature, top_k=top_k,
                                               top_p=top_p, repetition_penalty=repetition_penalty)
                    for i, ids in zip(left, generated):
                        if joke := self._joke(questions[i], *ids, last=attempt == self.TRIES - 1):
                            told[i] = joke
        return [told.get(i, (question or UNTOLD[0], UNTOLD[1])) for i, question in enumerate(questions)]

    def _generate(self, questions, **options):
        """For each question what the model says: the ids of a question, of an answer, and whether it had to be cut."""
        limit, pad, end = self.tokenizer.model_max_length, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        prompts = [ids if len(ids) <= limit // 2 else [*ids[:limit // 2 - 1], self.answer]
                   for ids in encode(self.tokenizer, [(question, None) for question in questions])]
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=self.model.device)
        form = _Form(self.answer, end, self.tokenizer.all_special_ids, longest, limit)
        for prompt, said in zip(prompts, self.model.generate(
                ids, attention_mask=(ids != pad).long(), logits_processor=[form], do_sample=True, use_cache=True,
                max_new_tokens=limit - longest, **options)[:, longest:].tolist()):
            split, stop = 0 if self.answer in prompt else said.index(self.answer), said.index(end)
            yield said[:split], said[split:stop], stop == limit - longest - 1

    def _joke(self, question, asked, answer, cut, last):
        """(question, answer), or None where it is no joke."""
        asked, answer = (self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (asked, answer))
        if last:  # take what there is
            asked, answer = (text.replace("\ufffd", "") for text in (asked, answer))
            answer = re.match(r".*[.!?]|.*(?=\s)|", answer, re.S)[0].strip() if cut else answer
        asked = (question or "").strip() or asked
        good = (last or not cut) and _words(asked) and _words(answer) and "\ufffd" not in asked + answer
        return (asked, answer) if good and not _words(answer).startswith(_words(asked)) else None


class _Form(LogitsProcessor):
    """A question, [ANSWER], an answer, the end: none of them empty, and no special token anywhere else.

    The question may take half of the tokens from `start` to `limit`; the last token is the end.
    """

    def __init__(self, answer, end, special, start, limit):
        self.answer, self.end, self.special = answer, end, torch.tensor(special)
        self.half, self.last = (start + limit) // 2, limit - 1

    def __call__(self, ids, scores):
        special = self.special.to(ids.device)
        answered = (ids == self.answer).any(1)
        wanted = torch.where(answered, self.end, self.answer)[:, None]  # the one special token that may come
        late = torch.where(answered, ids.shape[1] >= self.last, ids.shape[1] >= self.half)
        begun = ~torch.isin(ids[:, -1], special)
        score = scores.gather(1, wanted).masked_fill(~begun[:, None], -torch.inf).masked_fill(late[:, None], 0.0)
        scores = scores.index_fill(1, special, -torch.inf).masked_fill(late[:, None], -torch.inf)
        return scores.scatter(1, wanted, score)
