"""What a model looks at: attention weights with their tokens, and heatmaps of them, as pictures and as HTML."""

import base64
import functools
import io
import json
import math
import secrets
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
import tokenizers
import torch
from IPython.display import HTML
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from helpers import storage
from helpers.chapters import convert
from helpers.storage import THREADS, progress
from helpers.training import Callback

COLOURS = matplotlib.colormaps["viridis"].with_extremes(bad="0.9")  # the colour-blind, too; grey: exactly 0, masked
BATCH = 32  # texts of one length together
LABEL = 16  # characters of a token that are shown


@dataclass
class Example:
    """The attention of one text: `weights` has an array (heads, target, source) for each layer, whose rows sum to 1.

    Where all layers have as many heads, np.stack(weights) is (layers, heads, target, source).
    source, target: the tokens looked at, and those that look; in cross-attention a target token is the one written
    there. layers: names. residuals: of self-attention, whether a layer's input is added to its output.
    """

    source: list
    target: list
    weights: list
    layers: list
    residuals: tuple = ()


# ------------------------------------------------------------------------------------------------------- collect


def collect(model, tokenizer, texts):
    """A list of `Example`: what a model looks at in each text, without padding, as float32 on the CPU.

    model: one of transformers, of which an encoder-decoder gives its cross-attention and any other its self-attention,
    with its tokenizer; or a ConveRT, which has its own. A text is a string, cut to what the model can take; for an
    encoder-decoder also a pair (source, target), where otherwise the target is what the model writes, greedily.
    The model is as before afterwards, in training mode and with fast attention (which gives no weights) where it was.
    Raises ValueError for a model that gives no attention, and for a text without tokens or a pair where none can be.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    own = isinstance(model, convert.ConveRT)
    if not own and not hasattr(model, "set_attn_implementation"):
        raise _no_attention(model)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return _collect_convert(model, texts) if own else _collect_transformers(model, tokenizer, texts)
    finally:
        model.train(training)


def _no_attention(model):
    return ValueError(f"{type(model).__name__} gives no attention weights: collect takes a model of transformers that "
                      "does, or a ConveRT.")


def _collect_transformers(model, tokenizer, texts):
    cross = model.config.is_encoder_decoder
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**6)
    ids = functools.partial(tokenizer, truncation=True, max_length=limit, padding=False)
    with _eager(model):
        rows = []
        for i, text in enumerate(texts):
            source, *target = [text] if isinstance(text, str) else text
            if target and not cross:
                raise ValueError(f"Text {i} is a pair, and {type(model).__name__} no encoder-decoder: give a string.")
            row = [ids(source)["input_ids"]]
            if target:
                row += [ids(text_target=target[0])["input_ids"]]
            elif cross and row[0]:
                row += [model.generate(torch.tensor(row, device=model.device), do_sample=False)[0, 1:].tolist()]
            rows.append(row)
        tokens = [[_tokens(tokenizer, part) for part in row] for row in rows]

        def read(source, target=None):
            labels = {"labels": target} if cross else {}  # of which the model makes what goes in
            outputs = model(input_ids=source, **labels, output_attentions=True, return_dict=True)
            found = getattr(outputs, "cross_attentions" if cross else "attentions", None)
            if not found or any(layer is None for layer in found):
                raise _no_attention(model)
            return found

        return _read_all(texts, rows, tokens, read, model.device, residual=None if cross else True)


@contextmanager
def _eager(model):
    """The model with attention that is computed step by step, as long as this lasts."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "set_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]  # the outermost one first
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _tokens(tokenizer, ids):
    """The text of each token; of the bytes of a character that was taken apart, the character and which part it is."""
    tokens, parts = [], []
    for i, token in enumerate(ids):
        parts.append(token)
        text = tokenizer.decode(parts, clean_up_tokenization_spaces=False)
        if "\ufffd" not in text or len(parts) == 4 or i == len(ids) - 1:  # no character has more than four bytes
            if tokenizer.convert_ids_to_tokens(parts[0]).startswith(("▁", "Ġ")) and not text.startswith(" "):
                text = f" {text}"  # some decoders drop the first one
            tokens += [text + f" {part + 1}/{len(parts)}" * (len(parts) > 1) for part in range(len(parts))]
            parts = []
    return tokens


def _collect_convert(model, texts):
    """The windowed layers, then the pooling, which has heads of its own and adds nothing to what it gets."""
    attentions = [*(block.attention for block in model.blocks), model.reduction]
    found = []

    def keep(weights, *args):
        found.append(weights(*args))
        return found[-1]

    def read(ids):
        found.clear()
        model(ids)
        return found

    ids = model.tokenizer(texts)
    tokens = [[_pieces(model.tokenizer.backend, text)[:len(row)]] for text, row in zip(texts, ids)]
    try:
        for attention in attentions:
            attention.weights = functools.partial(keep, attention.weights)
        examples = _read_all(texts, [[row] for row in ids], tokens, read, model.similarity.device, residual=True)
    finally:
        for attention in attentions:
            vars(attention).pop("weights", None)
    for example in examples:
        example.layers = [f"layer {i + 1}, window {block.attention.window}" for i, block in enumerate(model.blocks)]
        example.layers += ["pooling"]
        example.residuals = (*example.residuals[:-1], False)
    return examples


def _pieces(backend, text):
    if isinstance(backend, tokenizers.Tokenizer):
        return [text[start:end] for start, end in backend.encode(text, add_special_tokens=False).offsets]
    return [piece.replace("▁", " ") for piece in backend.encode(text, out_type=str)]


def _read_all(texts, rows, tokens, read, device, residual):
    """Examples of rows of ids ([source], or [source, target]): those of like lengths together, so without padding."""
    examples, groups = [None] * len(rows), defaultdict(list)
    for i, row in enumerate(rows):
        if not all(row):
            raise ValueError(f"Text {i} has no tokens: {texts[i]!r}")
        groups[tuple(map(len, row))].append(i)
    for group in groups.values():
        for chosen in (group[start:start + BATCH] for start in range(0, len(group), BATCH)):
            found = read(*(torch.tensor(part, device=device) for part in zip(*(rows[i] for i in chosen))))
            layers = [layer.float().cpu().numpy() for layer in found]
            for j, i in enumerate(chosen):
                examples[i] = Example(tokens[i][0], tokens[i][-1], [layer[j] for layer in layers],
                                      [f"layer {number + 1}" for number in range(len(layers))],
                                      (residual,) * len(layers) if residual else ())
    return examples


def mean(example, layer=None):
    """The mean over the heads of a layer, or over all heads of all layers: (target, source)."""
    return np.concatenate(example.weights if layer is None else [example.weights[layer]]).mean(0)


def rollout(example):
    """How much of each source token gets through all layers of self-attention to each target: (target, source).

    Heads are averaged, and where a layer adds its input to its output each token looks at itself for half
    (Abnar & Zuidema 2020, section 3, https://arxiv.org/abs/2005.00928). Raises ValueError for cross-attention.
    """
    if not example.residuals:
        raise ValueError("Rollout is of self-attention, which goes on from layer to layer; this is cross-attention.")
    flow = own = np.eye(len(example.source), dtype=np.float32)
    for heads, residual in zip(example.weights, example.residuals):
        step = heads.mean(0)
        flow = ((step + own) / 2 if residual else step) @ flow
    return flow


# ------------------------------------------------------------------------------------------------------ pictures


def heatmap(example, weights, titles=None):
    """A figure of weights (target, source), or of several side by side: (n, target, source), such as a layer's heads,
    with titles below them.

    Source above, target at the side; colours from 0 to 1 always, grey where a weight is exactly 0. Characters that no
    installed font has are shown by number (U+65E5). The figure's savefig writes PNG, PDF and SVG.
    """
    panels = np.ma.masked_equal(np.asarray(weights).reshape(-1, len(example.target), len(example.source)), 0)
    count, rows, columns = panels.shape
    titles = titles or [f"head {i + 1}" for i in range(count) if count > 1]
    cell = min(max(5 / max(rows, columns), 0.16), 0.4)  # inches, as all that follows
    size, gap = min(0.72 * cell, 0.14), 0.3  # of letters, between panels
    source, target = ([_outline(_label(token), size) for token in tokens]
                      for tokens in (example.source, example.target))
    left, top = (max(outline.vertices.max(initial=0) for outline in labels) + 0.1 for labels in (target, source))
    wide, high, across = columns * cell + gap, rows * cell + gap, math.ceil(math.sqrt(count))
    width, height = left + across * wide + 0.4, top + math.ceil(count / across) * high + 0.05
    figure, letters = Figure((width, height), dpi=100), []

    def image(values, x, y, across, up):  # x, y: the lower left corner
        axes = figure.add_axes((x / width, y / height, across / width, up / height), frame_on=False)
        axes.set(xticks=[], yticks=[])
        axes.imshow(values, COLOURS, vmin=0, vmax=1, interpolation="nearest", aspect="auto")

    def write(outline, x, y, degrees=0):
        letters.append(outline.transformed(Affine2D().rotate_deg(degrees).translate(x, y)))

    for i, panel in enumerate(panels):
        x, y = left + i % across * wide, height - top - i // across * high - rows * cell
        image(panel, x, y, columns * cell, rows * cell)
        if titles:
            write(_outline(titles[i], size), x, y - 0.05 - size)
        for j, outline in enumerate(source if i < across else ()):
            write(outline, x + (j + 0.5) * cell + 0.3 * size, y + rows * cell + 0.06, 90)
        for j, outline in enumerate(target if i % across == 0 else ()):
            write(outline, x - 0.06 - outline.vertices[:, 0].max(initial=0), y + (rows - j - 0.5) * cell - 0.3 * size)
    x, y, length = width - 0.5, height - top, min(rows * cell, 2)
    image(np.linspace(1, 0, 256)[:, None], x, y - length, 0.12, length)
    for value in (0, 0.5, 1):
        write(_outline(f"{value:g}", size), x + 0.17, y - length * (1 - value) - 0.3 * size)
    all_letters = Path.make_compound_path(*letters)  # one for all: a hundred text artists take 0.3 s
    figure.add_artist(PathPatch(all_letters.transformed(Affine2D().scale(1 / width, 1 / height)), facecolor="black",
                                linewidth=0, transform=figure.transFigure))
    return figure


def _label(token):
    escapes = {"\n": "\\n", "\t": "\\t"}
    shown = "".join(char if char.isprintable() and _family(char) else escapes.get(char, f"U+{ord(char):04X} ")
                    for char in token)
    shown = "␣" * len(shown) if shown.isspace() else shown.rstrip()
    return shown if len(shown) <= LABEL else f"{shown[:LABEL - 1]}…"


@functools.lru_cache(10_000)
def _outline(label, size):
    fonts = dict.fromkeys(filter(None, map(_family, f"a{label}")))  # the usual one first
    return TextPath((0, 0), label.replace("$", r"\$"), size, prop=font_manager.FontProperties(family=list(fonts)))


@functools.cache
def _family(char):
    """The first font that has a character, the usual one or one that is installed; None where there is none."""
    return next((name for name, path in _fonts().items() if ord(char) in _characters(path)), None)


@functools.cache
def _fonts():
    """{family: path}, without those that matplotlib has for formulas."""
    installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist
                 if entry.style == "normal" and str(entry.weight) in ("400", "normal", "regular")
                 and not entry.fname.startswith(matplotlib.get_data_path())}
    return {"DejaVu Sans": font_manager.findfont("DejaVu Sans")} | dict(sorted(installed.items()))


@functools.cache
def _characters(path):
    return font_manager.get_font(path).get_charmap()


def save(examples, url, view=mean, format="png"):
    """Heatmaps to {url}/00000.png, … at any fsspec URL, some written while others are drawn. Returns their URLs.

    view: a function of an example that gives the weights to be drawn, such as rollout. format: png, pdf or svg.
    """
    options = {"pil_kwargs": {"compress_level": 1}} if format == "png" else {}  # or packing takes a third of the time

    def write(name, data):
        storage.write(name, data)
        bar.update()

    names, writes = [f"{url}/{i:05}.{format}" for i in range(len(examples))], []
    with progress(len(examples), "drawing", "heatmap") as bar, ThreadPoolExecutor(THREADS) as threads:
        for name, example in zip(names, examples):
            image = io.BytesIO()
            heatmap(example, view(example)).savefig(image, format=format, **options)
            writes.append(threads.submit(write, name, image.getvalue()))
        for each in writes:
            each.result()
    return names


class Heatmaps(Callback):
    """A heatmap of every text, after each epoch, to {url}/epoch_001/00000.png, …, at any fsspec URL; see `save`.

    tokenizer and texts: as for `collect`. view: see `save`. every: "epoch", or "fit" for the last epoch only.
    """

    def __init__(self, url, tokenizer, texts, view=mean, every="epoch"):
        if every not in ("epoch", "fit"):
            raise ValueError(f'every is "epoch" or "fit", not {every!r}.')
        self.url, self.tokenizer, self.texts, self.view, self.every = url, tokenizer, texts, view, every

    def after_epoch(self, loop):
        if self.every == "epoch":
            self._save(loop)

    def after_fit(self, loop):
        if self.every == "fit":
            self._save(loop)

    def _save(self, loop):
        if loop.accelerator.is_main_process:
            save(collect(loop.model, self.tokenizer, self.texts), f"{self.url}/epoch_{len(loop.history):03}", self.view)


# -------------------------------------------------------------------------------------------------- interactive


def html(examples):
    """Examples as HTML in which to pick a layer and a head and to point at a weight: shows in Jupyter and in exported
    HTML, and `.data`, its text, is a page of its own. It fetches nothing, so it works without a network. It takes 2.7
    bytes a weight: 1.4 MB for 60 tokens in 12 layers of 12 heads.
    """
    shown = []
    for example in examples:
        layers = dict(zip(example.layers, example.weights))
        if len(layers) > 1:
            layers["all layers"] = mean(example)[None]
            if example.residuals:
                layers["rollout"] = rollout(example)[None]
        packed = []
        for name, heads in layers.items():  # 0 to 65535, and 0 for exactly 0 only
            values = np.maximum((heads * 65535).round(), heads > 0).astype("<u2")
            packed.append({"name": name, "heads": len(heads), "weights": base64.b64encode(values.tobytes()).decode()})
        shown.append({"source": example.source, "target": example.target, "layers": packed})
    data = json.dumps({"examples": shown, "colours": [matplotlib.colors.to_hex(COLOURS(i)) for i in range(256)]})
    name = f"attention-{secrets.token_hex(8)}"  # unique, however often it is shown on one page
    return HTML(_PAGE.replace("NAME", name).replace("DATA", data.replace("<", "\\u003c")))  # no token ends the script


_PAGE = r"""<div id="NAME" class="tex2jax_ignore mathjax_ignore" style="font: 13px sans-serif">
To see this, trust the notebook (in JupyterLab: View, Activate Command Palette, Trust Notebook) or run it.</div>
<script>
(() => {
  const data = DATA;
  const root = document.getElementById("NAME"), svgSpace = "http://www.w3.org/2000/svg";
  const add = (parent, tag, values = {}, text = "") => {  // text never becomes markup
    const svg = tag === "svg" || parent.namespaceURI === svgSpace;
    const element = svg ? document.createElementNS(svgSpace, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
    element.textContent = text;
    parent.appendChild(element);
    return element;
  };
  const visible = token => (token.trim() ? token : token.replace(/ /g, "␣")).replace(/\n/g, "\\n");
  const cut = token => [...token].length > 16 ? [...token].slice(0, 15).join("") + "…" : token;
  const long = label => [...label].reduce((sum, char) => sum + (char > "\u2e7f" ? 13 : 7.5), 12);  // in pixels
  const options = (select, names) => {
    select.textContent = "";
    names.forEach((name, value) => add(select, "option", {value}, name));
  };

  root.textContent = "";
  const [bar, said, place] = ["", "min-height: 1.5em; padding-top: 0.5em", "overflow: auto"].map(
    style => add(root, "div", {style}));
  const [example, layer, head] = ["text", "layer", "head"].map(name => add(add(bar, "label", {}, name + " "), "select",
    {"aria-label": name, style: "margin-right: 1em; max-width: 24em"}));
  add(bar, "span", {style: "padding: 0 5em; background: linear-gradient(to right, "
    + data.colours.filter((_, i) => i % 15 === 0) + ")", title: "weights from 0 to 1; grey: exactly 0"});
  let cells = [], weights = [];

  const paint = () => {
    const {target, source, layers} = data.examples[+example.value], {heads, weights: packed} = layers[+layer.value];
    const bytes = Uint8Array.from(atob(packed), c => c.charCodeAt(0)), size = target.length * source.length;
    const all = new Uint16Array(bytes.buffer), chosen = +head.value - 1;  // -1: the mean of all heads
    weights = cells.map((_, i) => {
      let sum = 0;
      for (let h = 0; h < heads; h++) if (chosen < 0 || h === chosen) sum += all[h * size + i];
      return sum / 65535 / (chosen < 0 ? heads : 1);
    });
    cells.forEach((cell, i) => cell.setAttribute("fill", weights[i] === 0 ? "#e6e6e6" :
      data.colours[Math.min(255, Math.floor(weights[i] * 256))]));
  };
  const pickLayer = () => {
    const {heads} = data.examples[+example.value].layers[+layer.value];
    options(head, heads > 1 ? ["mean"].concat(Array.from({length: heads}, (_, i) => `${i + 1}`)) : ["mean"]);
    paint();
  };
  const pickExample = () => {
    const {target, source, layers} = data.examples[+example.value];
    options(layer, layers.map(layer => layer.name));
    const above = source.map(visible).map(cut), beside = target.map(visible).map(cut);
    const side = Math.max(13, Math.min(30, 420 / Math.max(source.length, target.length)));
    const left = Math.max(...beside.map(long)), top = Math.max(...above.map(long));
    place.textContent = "";
    const svg = add(place, "svg", {width: left + side * source.length + 10, height: top + side * target.length + 10,
      "font-size": 12, fill: "currentColor"});
    above.forEach((label, i) => add(svg, "text", {
      transform: `translate(${left + (i + 0.5) * side + 4} ${top - 5}) rotate(-90)`}, label));
    beside.forEach((label, i) => add(svg, "text", {
      x: left - 5, y: top + (i + 0.5) * side + 4, "text-anchor": "end"}, label));
    cells = [];
    target.forEach((to, row) => source.forEach((from, column) => {
      const x = left + column * side, y = top + row * side;
      const cell = add(svg, "rect", {x, y, width: side - 0.5, height: side - 0.5});
      const i = cells.push(cell) - 1;
      cell.addEventListener("pointerenter", () => {
        said.textContent = `“${visible(to)}” looks at “${visible(from)}”: ${weights[i].toFixed(4)}`;
      });
    }));
    pickLayer();
  };
  example.addEventListener("change", pickExample);
  layer.addEventListener("change", pickLayer);
  head.addEventListener("change", paint);
  options(example, data.examples.map(({source}, i) => `${i + 1}: ${source.join("").slice(0, 60)}`));
  pickExample();
})();
</script>"""
