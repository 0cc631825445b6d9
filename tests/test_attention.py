"""Attention against the models' own softmax computed by hand, and heatmaps read back colour by colour."""

import base64
import io
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.utils.data import DataLoader

from helpers import experiment, storage
from helpers.chapters import attention, convert
from helpers.training import TrainLoop


WORDS = "<pad> </s> <unk> the cat sat on a mat and dog ran far away".split()
TEXTS = ["the cat sat", "a dog ran far away and the cat sat on the mat", "on a mat", "dog", "a cat ran away"]
LONG = "the cat sat on a mat and the dog ran far away"
SIZE = dict(vocab_size=len(WORDS), bos_token_id=1, eos_token_id=1, attn_implementation="sdpa")


def word_tokenizer():
    """One id a word, and an end."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special)


def gpt2():
    """Random weights large enough that its attention is not just even."""
    torch.manual_seed(0)
    shape = dict(n_positions=32, n_embd=24, n_layer=3, n_head=4, initializer_range=0.5)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **SIZE))


def bart():
    torch.manual_seed(0)
    shape = dict(max_position_embeddings=32, d_model=24, encoder_layers=1, decoder_layers=2, init_std=0.5)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=3, encoder_ffn_dim=32, decoder_ffn_dim=32)
    ends = dict(pad_token_id=0, decoder_start_token_id=1, forced_eos_token_id=None)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**shape, **heads, **ends, **SIZE))


def conversation_model():
    config = convert.preset("tiny", vocab_size=300, width=32, attention_width=8, windows=(1, 2), feed_forward=32)
    torch.manual_seed(0)
    return convert.ConveRT(config, convert.train_tokenizer(TEXTS * 3, config))


def inputs_of(module):
    """A list that gets what goes into a module each time."""
    kept = []
    module.register_forward_hook(lambda _, args, out: kept.append(args))
    return kept


def scores_of(queries, keys, heads):
    """Two of (length, width) -> (heads, queries, keys), before the softmax."""
    queries, keys = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (queries, keys))
    return queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5


def collected(model, texts):
    """Of many texts of a model in training: without padding and dropout; and everything is as before."""
    tokenizer = word_tokenizer()
    examples = attention.collect(model.train(), tokenizer, texts)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(ValueError, match="Text 1 has no tokens"):
        attention.collect(model, tokenizer, ["the", ""])
    assert model.training and len(examples) == len(texts)
    configs = [part.config for part in model.modules() if hasattr(part, "config")]
    assert {getattr(config, "_attn_implementation", "sdpa") for config in configs} == {"sdpa"}  # the fast one again
    model.eval()
    return examples


@torch.no_grad()
def test_a_causal_language_models_weights_are_the_softmax_of_its_queries_and_keys():
    model, tokenizer = gpt2(), word_tokenizer()
    kept = [inputs_of(block.attn.c_attn) for block in model.transformer.h]
    for text, example in zip(TEXTS, collected(model, TEXTS)):
        assert example.source == example.target == [*text.split(), "</s>"] and example.residuals == (True,) * 3
        model(tokenizer(text, return_tensors="pt")["input_ids"])  # alone
        for block, inputs, weights in zip(model.transformer.h, kept, example.weights, strict=True):
            queries, keys, _ = block.attn.c_attn(inputs[-1][0][0]).split(24, -1)
            scores = scores_of(queries, keys, 4)
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
            assert (
                np.allclose(weights, scores.softmax(-1), atol=1e-6) and weights.std() > 0.1
            )  # or it could be anything
    [example] = attention.collect(model, tokenizer, " ".join([LONG] * 3))  # one text, too, cut to what a model can take
    assert example.source == [*LONG.split() * 2, *LONG.split()[:7], "</s>"] and len(example.layers) == 3


@torch.no_grad()
def test_cross_attention_is_the_decoders_over_the_encoders_tokens():
    model, tokenizer, target = bart(), word_tokenizer(), "a dog ran away"
    model.generation_config.max_new_tokens = 8
    layers = [layer.encoder_attn for layer in model.model.decoder.layers]
    kept = [[inputs_of(layer.q_proj), inputs_of(layer.k_proj)] for layer in layers]
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in (*TEXTS, target)]
    for text, source, example in zip(TEXTS, ids, collected(model, [(text, target) for text in TEXTS])):
        assert example.source == [*text.split(), "</s>"] and example.target == [*target.split(), "</s>"]
        model(source, labels=ids[-1])  # alone
        for layer, (queries, keys), weights in zip(layers, kept, example.weights, strict=True):
            query, key = (layer.q_proj(queries[-1][0].reshape(-1, 24)), layer.k_proj(keys[-1][0].reshape(-1, 24)))
            assert np.allclose(weights, scores_of(query, key, 3).softmax(-1), atol=1e-6) and weights.std() > 0.05
    [spoken] = attention.collect(model, tokenizer, TEXTS[:1])  # without a target: what the model writes
    assert spoken.target == [WORDS[i] for i in model.generate(ids[0], do_sample=False)[0, 1:]]
    assert len(spoken.weights[0][0]) == len(spoken.target) and spoken.residuals == ()


@torch.no_grad()
def test_converts_windows_and_pooling():
    model = conversation_model()
    attentions = [*(block.attention for block in model.blocks), model.reduction]
    kept = [inputs_of(each) for each in attentions]
    for text, example in zip(TEXTS, collected(model, TEXTS)):
        assert "".join(example.source).strip() == text and example.source == example.target
        assert example.layers == ["layer 1, window 1", "layer 2, window 2", "pooling"]
        assert [len(heads) for heads in example.weights] == [1, 1, 2] and example.residuals == (True, True, False)
        model(torch.tensor(model.tokenizer([text])))  # alone
        for weights, each, inputs in zip(example.weights, attentions, kept):
            assert np.allclose(weights, each.weights(*inputs[-1])[0], atol=1e-6)  # see test_convert
            assert len(each._forward_hooks) == 1  # the one from here


def test_models_without_attention_are_named():
    config = transformers.MambaConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, state_size=4)
    mamba = transformers.MambaForCausalLM(config)
    for model in (nn.Linear(2, 2), mamba):
        with pytest.raises(ValueError, match=f"{type(model).__name__} gives no attention weights"):
            attention.collect(model, word_tokenizer(), ["the cat"])
    assert not mamba.config.output_attentions and mamba.training
    with pytest.raises(ValueError, match=r"\('the cat', 'the dog'\) is a pair, and GPT2LMHeadModel no encoder-decoder"):
        attention.collect(gpt2(), word_tokenizer(), ["the cat", ("the cat", "the dog")])


def test_tokens_are_readable_in_any_script():
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    of_bytes = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = attention.token_texts(of_bytes, of_bytes("a 日é")["input_ids"])
    assert tokens == ["a", " ", "日 1/3", "日 2/3", "日 3/3", "é 1/2", "é 2/2"]


def example_of(source, target=None, heads=1, seed=0):
    target = target or source
    weights = np.random.RandomState(seed).dirichlet(np.full(len(source), 0.3), (heads, len(target))).astype(np.float32)
    return attention.Example(source, target, [weights], ["layer 1"], (True,) if target is source else ())


def test_rollout_multiplies_through_the_layers_and_adds_what_passes_by():
    layers = [example_of(list("abcd"), heads=2, seed=seed).weights[0] for seed in range(3)]
    example = attention.Example(list("abcd"), list("abcd"), layers, list("123"), (True, True, False))
    first, second = (0.5 * heads.mean(0) + 0.5 * np.eye(4) for heads in layers[:2])
    assert np.allclose(attention.rollout(example), layers[2].mean(0) @ second @ first, atol=1e-6)
    assert np.allclose(attention.mean(example), np.stack(layers).mean((0, 1)))
    with pytest.raises(ValueError, match="cross-attention"):
        attention.rollout(example_of(["a"], ["b"]))


def cells(picture, axes, rows, columns):
    """The colours in the middle of the cells of a panel: (rows, columns, 3)."""
    box, (height, width, _) = axes.get_position(), picture.shape
    x = [int(width * (box.x0 + box.width * (i + 0.5) / columns)) for i in range(columns)]
    y = [int(height * (1 - box.y1 + box.height * (i + 0.5) / rows)) for i in range(rows)]
    return picture[y][:, x]


@pytest.mark.parametrize("tokens, heads", [(5, 6), (60, 1)])
def test_a_pictures_cells_have_the_colours_of_the_weights(tokens, heads):
    example = example_of([f"word{i}" for i in range(tokens)], heads=heads)
    example.weights[0][:, 0, 1:] = 0  # masked
    example.weights[0][:, 0, 0] = 1
    figure = attention.heatmap(example, example.weights[0])
    picture, panels = Image.open(io.BytesIO(attention.png(figure))), figure.axes[:-1]
    picture = np.asarray(picture.convert("RGB")).astype(int)
    assert len(panels) == heads
    for axes, weights in zip(panels, example.weights[0]):
        expected = attention.COLOURS(weights)[..., :3] * 255
        expected[weights == 0] = 0.9 * 255
        assert np.abs(cells(picture, axes, tokens, tokens) - expected).max() <= 3
    bar = cells(picture, figure.axes[-1], 64, 1)[:, 0]  # from 1 down to 0
    assert np.abs(bar - attention.COLOURS(np.linspace(1, 0, 65)[:-1] - 1 / 128)[:, :3] * 255).max() < 12

    box, (height, width, _) = panels[0].get_position(), picture.shape
    left, top, cell = int(box.x0 * width), int((1 - box.y1) * height), box.width * width / tokens
    dark = picture.sum(-1) < 300  # letters
    for i in range(tokens):  # a label beside each row and above each column, tall enough to be read
        near, far = int(i * cell), int((i + 1) * cell)
        assert min(dark[top + near : top + far, :left].sum(), dark[:top, left + near : left + far].sum()) > 20
    assert cell >= 15.9


def test_every_script_has_glyphs_or_numbers():
    assert attention.label("日本") == "U+65E5 U+672C" or attention.font_family("日")
    assert attention.label("\U000f0000") == "U+F0000"  # nobody's
    for token, label in {"שלום": "שלום", "мир": "мир", "\n": "\\n", " ": "␣", "a\u200b": "aU+200B"}.items():
        assert attention.label(token) == label
    assert len(attention.label("x" * 100)) == attention.LABEL
    example = example_of(["שלום", "مرحبا", "日", "$x$", "\n", "\U000f0000", "\\$_{", "\ud800"])
    attention.heatmap(example, example.weights[0]).savefig(io.BytesIO(), format="pdf")
    assert len(attention.outline("$x$", 1).codes) > len(attention.outline("x", 1).codes)  # no formula


def test_html_is_self_contained_and_safe_and_has_all_weights():
    nasty = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a & \"b\" 'c'", "\u2028", "日"]
    examples = [*attention.collect(gpt2(), word_tokenizer(), TEXTS[:2]), example_of(nasty, heads=2)]
    page, again = attention.html(examples)._repr_html_(), attention.html(examples).data
    assert re.search(r'id="[\w-]+"', page)[0] not in again  # twice in a notebook
    assert set(re.findall(r"https?://[^\"\s]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not fetched
    picture = re.search(r'<img alt="[\w ]+" src="data:image/png;base64,([\w+/=]+)">', page)  # where no script may run
    assert base64.b64decode(picture[1]) == attention.png(attention.heatmap(examples[0], attention.mean(examples[0])))
    code = re.sub("const data = .*", "", page.replace(picture[0], ""))
    assert not re.search(r"\b(src|href)=|import |require|fetch\(|innerHTML|document\.write", code)
    assert len(re.findall("<script", page)) == len(re.findall("</script", page)) == 1 and "<img" not in code

    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    for shown, example in zip(data["examples"], examples, strict=True):
        views = dict(zip(example.layers, example.weights))
        if len(views) > 1:
            views |= {"all layers": attention.mean(example)[None], "rollout": attention.rollout(example)[None]}
        assert shown["source"] == example.source and [layer["name"] for layer in shown["layers"]] == list(views)
        for layer, weights in zip(shown["layers"], views.values()):
            values = np.frombuffer(base64.b64decode(layer["weights"]), "<u2").reshape(weights.shape)
            assert layer["heads"] == len(weights) and np.allclose(values / 65535, weights, atol=2e-5)
            assert ((values == 0) == (weights == 0)).all()


DOM = """
class Element {
  attributes = {}; children = []; listeners = {};
  constructor(tag, namespaceURI) { Object.assign(this, {tag, namespaceURI}); }
  setAttribute(name, value) { this.attributes[name] = this[name] = String(value); }
  appendChild(child) { if (this.children.push(child) === 1) this.value = child.value; }
  set textContent(text) { this.children = []; this.text = text; }
  addEventListener(name, run) { this.listeners[name] = run; }
  all(tag) { return this.children.flatMap(child => [...(child.tag === tag ? [child] : []), ...child.all(tag)]); }
}
const root = new Element("div");
globalThis.document = {getElementById: () => root, createElement: tag => new Element(tag, "html"),
                       createElementNS: (space, tag) => new Element(tag, space)};
SCRIPT
const [example, layer, head] = root.all("select"), log = [];
const pick = (select, value) => { select.value = String(value); select.listeners.change(); };
const look = i => {
  root.all("rect")[i].listeners.pointerenter();
  const fills = root.all("rect").map(rect => rect.attributes.fill);
  const [labels, layers, heads] = [root.all("text"), layer.children, head.children].map(all => all.map(each => each.text));
  log.push({said: root.all("div")[1].text, fills, labels, layers, heads});
};
look(4);
pick(layer, 1); pick(head, 3); look(4);
pick(example, 1); look(3);
console.log(JSON.stringify(log));
"""


def test_html_shows_what_is_picked_and_pointed_at():
    """In Node.js over the few methods of a DOM that the page uses: it is no browser, but all of the script runs."""
    node = shutil.which("node") or pytest.skip("no Node.js here")
    [example] = attention.collect(gpt2(), word_tokenizer(), ["the cat sat"])
    other = example_of(["<b>", " ", "averyverylongtokenindeed"], heads=2)
    page = attention.html([example, other]).data
    script = DOM.replace("SCRIPT", re.search(r"<script>(.*)</script>", page, re.S)[1])
    result = subprocess.run([node, "-"], input=script, capture_output=True, text=True, timeout=60)
    assert not result.stderr
    first, second, third = json.loads(result.stdout)
    colours = json.loads(re.search(r"const data = (.*);\n", page)[1])["colours"]
    for shown, weights, said in (
        (first, example.weights[0].mean(0), "“cat” looks at “the”: {:.4f}"),
        (second, example.weights[1][2], "“cat” looks at “the”: {:.4f}"),
        (third, other.weights[0].mean(0), "“␣” looks at “<b>”: {:.4f}"),
    ):
        fills = ["#e6e6e6" if weight == 0 else colours[min(255, int(weight * 256))] for weight in weights.ravel()]
        assert np.mean([*map(str.__eq__, shown["fills"], fills)]) > 0.9  # but for a weight between two colours
        assert shown["said"] == said.format(weights[1, 0])
    assert first["labels"] == example.source * 2 and third["labels"][:3] == ["<b>", "␣", "averyverylongto…"]
    assert first["layers"][:3] == example.layers and first["heads"] == ["mean", "1", "2", "3", "4"]


def trained(*callbacks):
    model, tokenizer = gpt2(), word_tokenizer()
    ids = tokenizer([LONG] * 4, return_tensors="pt")["input_ids"]
    batches = DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)
    TrainLoop(model, batches, optimizer=torch.optim.SGD(model.parameters(), 0.1)).fit(2, callbacks)
    return model


def test_heatmaps_of_every_text_in_the_runs_folder_and_training_is_the_same(embedded, bucket, capsys):
    storage.create_bucket(bucket)
    url = experiment.Run(f"s3://{bucket}/runs").url
    model = trained(attention.Heatmaps(f"{url}/attention", word_tokenizer(), TEXTS))
    assert model.training and all(torch.equal(*pair) for pair in zip(model.parameters(), trained().parameters()))
    names = [f"epoch_{epoch:03}/{i:05}.png" for epoch in (1, 2) for i in range(len(TEXTS))]
    assert storage.list_files(f"{url}/attention") == names
    other_process = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=False))
    attention.Heatmaps(url, word_tokenizer(), TEXTS).after_epoch(other_process)  # draws nothing
    examples = attention.collect(model, word_tokenizer(), TEXTS)
    assert "heatmap 5/5" in capsys.readouterr().out  # progress, in the bar of the training
    for i, example in enumerate(examples):  # each picture is of its text
        picture = attention.png(attention.heatmap(example, attention.mean(example)))
        assert storage.read(f"{url}/attention/epoch_002/{i:05}.png") == picture
    attention.save(examples, f"{url}/after", lambda example: example.weights[0])  # after the fact
    assert "5/5" in capsys.readouterr().out
    assert storage.list_files(f"{url}/after") == [f"{i:05}.png" for i in range(5)]
    with pytest.raises(storage.StorageError, match="bucket"):
        attention.save(examples[:1], f"s3://{bucket}-2/after")  # which is not there
