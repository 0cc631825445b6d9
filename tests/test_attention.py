"""Attention against the models' own softmax computed by hand, and heatmaps read back colour by colour."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.utils.data import DataLoader

from helpers import experiment, run, storage
from helpers.chapters import attention, convert
from helpers.training import TrainLoop

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "<pad> </s> <unk> the cat sat on a mat and dog ran far away".split()
TEXTS = ["the cat sat", "a dog ran far away and the cat sat on the mat", "on a mat", "dog", "a cat ran away"]
LONG = "the cat sat on a mat and the dog ran far away"


def word_tokenizer():
    """One id a word, and an end."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special)


SIZE = dict(vocab_size=len(WORDS), bos_token_id=1, eos_token_id=1, attn_implementation="sdpa")


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
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**shape, **heads, **ends, **SIZE))
    model.generation_config.max_new_tokens = 8
    return model


def conversation_model():
    config = convert.preset("tiny", vocab_size=300, width=32, attention_width=8, windows=(1, 2), feed_forward=32)
    torch.manual_seed(0)
    model = convert.ConveRT(config, convert.train_tokenizer(TEXTS * 3, config))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


def inputs_of(module):
    """A list that gets what goes into a module each time."""
    kept = []
    module.register_forward_hook(lambda _, args, out: kept.append(args))
    return kept


def scores_of(queries, keys, heads):
    """Two of (length, width) -> (heads, queries, keys), before the softmax."""
    queries, keys = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (queries, keys))
    return queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5


@torch.no_grad()
def test_a_causal_language_models_weights_are_the_softmax_of_its_queries_and_keys():
    model = gpt2().eval()
    kept = [inputs_of(block.attn.c_attn) for block in model.transformer.h]
    [example] = attention.collect(model, word_tokenizer(), LONG)  # one text, too
    assert example.source == example.target == [*LONG.split(), "</s>"] and example.residuals == (True,) * 3
    assert np.stack(example.weights).shape == (3, 4, 13, 13) and len(example.layers) == 3
    for layer, block in enumerate(model.transformer.h):
        queries, keys, _ = block.attn.c_attn(kept[layer][-1][0][0]).split(24, -1)
        scores = scores_of(queries, keys, 4).masked_fill(torch.ones(13, 13).triu(1).bool(), -torch.inf)
        assert np.allclose(example.weights[layer], scores.softmax(-1), atol=1e-6)
        assert example.weights[layer].std() > 0.1  # or it could be anything
    [example] = attention.collect(model, word_tokenizer(), f"{LONG} {LONG} {LONG}")
    assert example.source == [*LONG.split() * 2, *LONG.split()[:7], "</s>"]  # cut to what the model can take


@torch.no_grad()
def test_cross_attention_is_the_decoders_over_the_encoders_tokens():
    model, source, target = bart().eval(), "the cat sat on a mat", "a dog ran away"
    layers = [layer.encoder_attn for layer in model.model.decoder.layers]
    queries, keys = ([inputs_of(getattr(layer, name)) for layer in layers] for name in ("q_proj", "k_proj"))
    [example] = attention.collect(model, word_tokenizer(), [(source, target)])
    assert example.source == [*source.split(), "</s>"] and example.target == [*target.split(), "</s>"]
    assert np.stack(example.weights).shape == (2, 3, 5, 7) and example.residuals == ()
    for layer, each in enumerate(layers):
        inputs = (kept[layer][-1][0].reshape(-1, 24) for kept in (queries, keys))
        expected = scores_of(each.q_proj(next(inputs)), each.k_proj(next(inputs)), 3).softmax(-1)
        assert np.allclose(example.weights[layer], expected, atol=1e-6) and example.weights[layer].std() > 0.05

    [spoken] = attention.collect(model, word_tokenizer(), [source])  # without a target: what the model writes
    written = model.generate(word_tokenizer()(source, return_tensors="pt")["input_ids"], do_sample=False)
    assert spoken.target == [WORDS[i] for i in written[0, 1:]] and len(spoken.weights[0][0]) == len(spoken.target)


@torch.no_grad()
def test_converts_windows_and_pooling():
    model = conversation_model()
    attentions = [*(block.attention for block in model.blocks), model.reduction]
    kept = [inputs_of(each) for each in attentions]
    [example] = attention.collect(model, None, [LONG])
    assert "".join(example.source).strip() == LONG and example.source == example.target
    assert example.layers == ["layer 1, window 1", "layer 2, window 2", "pooling"]
    assert [len(heads) for heads in example.weights] == [1, 1, 2] and example.residuals == (True, True, False)
    for weights, each, inputs in zip(example.weights, attentions, kept):
        assert np.allclose(weights, each.weights(*inputs[-1])[0], atol=1e-6)  # see test_convert
        assert len(each._forward_hooks) == 1  # the one from here


@pytest.mark.parametrize("make", [gpt2, bart, conversation_model])
def test_a_text_alone_and_among_others_without_padding_and_all_is_as_before(make):
    model, tokenizer = make().train(), word_tokenizer()  # with dropout, which has no place here
    texts = [(text, "a dog ran") for text in TEXTS] if make is bart else TEXTS
    together = attention.collect(model, tokenizer, texts)
    for text, example in zip(texts, together, strict=True):
        [alone] = attention.collect(model, tokenizer, [text])
        assert (alone.source, alone.target) == (example.source, example.target)
        assert "<pad>" not in example.source + example.target
        for one, other in zip(alone.weights, example.weights, strict=True):
            assert one.shape[1:] == (len(example.target), len(example.source)) and np.allclose(one, other, atol=1e-6)
            assert np.allclose(other.sum(-1), 1, atol=1e-5)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(ValueError, match="Text 1 has no tokens"):
        attention.collect(model, tokenizer, ["the", ""])
    assert model.training
    if make is not conversation_model:  # fast attention is back, after an error too
        configs = {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")}
        outputs = model(torch.tensor([[3, 4, 5]]))
        assert configs == {"sdpa"} and not outputs.get("attentions") and not outputs.get("cross_attentions")


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
    assert np.allclose(attention.mean(example, 1), layers[1].mean(0))
    with pytest.raises(ValueError, match="cross-attention"):
        attention.rollout(example_of(["a"], ["b"]))


def drawn(figure):
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return np.asarray(Image.open(image).convert("RGB")).astype(int)


def cells(figure, pixels, axes, rows, columns):
    """The colours in the middle of the cells of a panel: (rows, columns, 3)."""
    box = axes.get_position()
    height, width = pixels.shape[:2]
    x = [int(width * (box.x0 + box.width * (i + 0.5) / columns)) for i in range(columns)]
    y = [int(height * (1 - box.y1 + box.height * (i + 0.5) / rows)) for i in range(rows)]
    return pixels[y][:, x]


@pytest.mark.parametrize("tokens, heads", [(5, 6), (60, 1)])
def test_a_pictures_cells_have_the_colours_of_the_weights(tokens, heads):
    example = example_of([f"word{i}" for i in range(tokens)], heads=heads)
    example.weights[0][:, 0, 1:] = 0  # masked
    example.weights[0][:, 0, 0] = 1
    figure = attention.heatmap(example, example.weights[0])
    pixels, panels = drawn(figure), figure.axes[:-1]
    assert len(panels) == heads
    for axes, weights in zip(panels, example.weights[0]):
        expected = attention.COLOURS(weights)[..., :3] * 255
        expected[weights == 0] = 0.9 * 255
        assert np.abs(cells(figure, pixels, axes, tokens, tokens) - expected).max() <= 3
    bar = cells(figure, pixels, figure.axes[-1], 64, 1)[:, 0]  # from 1 down to 0
    assert np.abs(bar - attention.COLOURS(np.linspace(1, 0, 65)[:-1] - 1 / 128)[:, :3] * 255).max() < 12

    box, (height, width) = panels[0].get_position(), pixels.shape[:2]
    left, top, cell = int(box.x0 * width), int((1 - box.y1) * height), box.width * width / tokens
    dark = pixels.sum(-1) < 300  # letters
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


def page_data(page):
    return json.loads(re.search(r"const data = (.*);\n", page)[1])


def test_html_is_self_contained_and_safe_and_has_all_weights():
    nasty = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a & \"b\" 'c'", "\u2028", "日"]
    examples = [*attention.collect(gpt2(), word_tokenizer(), TEXTS[:2]), example_of(nasty, heads=2)]
    page, again = attention.html(examples)._repr_html_(), attention.html(examples).data
    assert re.search(r'id="[\w-]+"', page)[0] not in again  # twice in a notebook
    assert set(re.findall(r"https?://[^\"\s]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not fetched
    picture = re.search(r'<img alt="[\w ]+" src="data:image/png;base64,([\w+/=]+)">', page)  # where no script may run
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture[1]))).convert("RGB"))
    assert (first == drawn(attention.heatmap(examples[0], attention.mean(examples[0])))).all()
    code = re.sub("const data = .*", "", page.replace(picture[0], ""))
    assert not re.search(r"\b(src|href)=|import |require|fetch\(|innerHTML|document\.write", code)
    assert len(re.findall("<script", page)) == len(re.findall("</script", page)) == 1 and "<img" not in code

    for shown, example in zip(page_data(page)["examples"], examples, strict=True):
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
  constructor(tag, space) {
    Object.assign(this, {tag, namespaceURI: space, attributes: {}, children: [], listeners: {}});
  }
  setAttribute(name, value) { this.attributes[name] = String(value); if (name === "value") this.value = String(value); }
  appendChild(child) {
    this.children.push(child);
    if (this.tag === "select" && this.children.length === 1) this.value = child.value;
  }
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
pick(layer, 1); pick(head, 3); look(5);
pick(example, 1); look(1);
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
    colours = page_data(page)["colours"]

    def same(shown, weights):  # but for a weight between two colours
        fills = ["#e6e6e6" if weight == 0 else colours[min(255, int(weight * 256))] for weight in weights.ravel()]
        return np.mean([one == other for one, other in zip(shown["fills"], fills, strict=True)]) > 0.9

    assert first["said"] == f"“cat” looks at “the”: {example.weights[0].mean(0)[1, 0]:.4f}"
    assert first["labels"] == example.source * 2 and same(first, example.weights[0].mean(0))
    assert first["layers"][:3] == example.layers and first["heads"] == ["mean", "1", "2", "3", "4"]
    assert second["said"] == f"“cat” looks at “cat”: {example.weights[1][2][1, 1]:.4f}"
    assert same(second, example.weights[1][2])
    assert third["labels"][:3] == ["<b>", "␣", "averyverylongto…"] and same(third, other.weights[0].mean(0))
    assert third["said"].startswith("“<b>” looks at “␣”")


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
    examples = attention.collect(model, word_tokenizer(), TEXTS)
    assert "heatmap 5/5" in capsys.readouterr().out  # progress, in the bar of the training
    for i, example in enumerate(examples):  # each picture is of its text
        pixels = np.asarray(Image.open(io.BytesIO(storage.read(f"{url}/attention/epoch_002/{i:05}.png"))))
        figure = attention.heatmap(example, attention.mean(example))
        assert np.abs(pixels[..., :3].astype(int) - drawn(figure)).max() <= 2
    attention.save(examples, f"{url}/after", lambda example: example.weights[0])  # after the fact
    assert "5/5" in capsys.readouterr().out
    assert storage.list_files(f"{url}/after") == [f"{i:05}.png" for i in range(5)]


def test_what_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, storage.StorageError)):
        attention.save([example_of(list("abc"))], tmp_path / "file/in_it")


@pytest.mark.slow
def test_the_page_on_two_processes(embedded, tmp_path, bucket):
    words = f"-m helpers run 06 --processes 2 -o {tmp_path} -p bucket {bucket} -p epochs 2 -p examples 3".split()
    done = subprocess.run([sys.executable, *words], cwd=storage.REPOSITORY, capture_output=True, text=True, timeout=400)
    assert not done.returncode, done.stdout
    results = run.read_results(tmp_path / "06_attention_heatmaps.ipynb")
    assert results["heatmaps"] == 3 + 4 * 2 and 0.3 < results["alignment_accuracy"] <= 1
    assert {"dates.html", "plots/one_date.png"} <= storage.objects(results["run_url"]).keys()
