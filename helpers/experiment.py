"""One run = one folder at any fsspec URL (s3://, gs://, local): what went in, what came out, and the model."""

import csv
import hashlib
import io
import json
import os
import re
import secrets
from datetime import datetime
from pathlib import Path

import fsspec
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from helpers.storage import StorageError, explained


def write(url, data):
    """Write bytes to any fsspec URL, whole or not at all."""
    with explained(url):
        filesystem, path = fsspec.url_to_fs(url)
        if not isinstance(filesystem, LocalFileSystem):  # an object is there when all of it is
            filesystem.pipe_file(path, data)
            return
        partial = Path(f"{path}.{secrets.token_hex(4)}.part")  # beside it: a rename is at once only there
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read(url):
    """The bytes at any fsspec URL. Raises storage.NotFound when there are none."""
    with explained(url):
        filesystem, path = fsspec.url_to_fs(url)
        return filesystem.cat_file(path)


def files(url):
    """The names of all files under any fsspec URL, relative to it, sorted; none when it is not there."""
    with explained(url):
        filesystem, path = fsspec.url_to_fs(url)
        filesystem.invalidate_cache()
        return sorted(name[len(path) + 1:] for name in filesystem.find(path))


def save_model(model, url, **config):
    """Save a model's weights (safetensors) and config (model.json) under a prefix, straight from memory.

    model.json names the weights by their checksum and is written last: the model there is the old one or the new one,
    never half of each. Returns the names of the two objects.
    """
    url = str(url).rstrip("/")
    tensors = {name: tensor.cpu().clone(memory_format=torch.contiguous_format)  # safetensors takes no shared memory
               for name, tensor in model.state_dict().items()}
    weights = safetensors.torch.save(tensors)
    name = f"model-{hashlib.sha256(weights).hexdigest()[:16]}.safetensors"
    write(f"{url}/{name}", weights)
    write(f"{url}/model.json", json.dumps({"weights": name, **config}, indent=1).encode())
    for other in files(url):
        if re.fullmatch(r"model-\w+\.safetensors", other) and other != name:
            with explained(f"{url}/{other}"):
                filesystem, path = fsspec.url_to_fs(f"{url}/{other}")
                filesystem.rm_file(path)
    return [name, "model.json"]


def load_model(url):
    """What `save_model` saved: ({name: tensor} on the CPU, config). Raises storage.NotFound when nothing is there."""
    url = str(url).rstrip("/")
    config = json.loads(read(f"{url}/model.json"))
    name = config.pop("weights")
    weights = read(f"{url}/{name}")
    if hashlib.sha256(weights).hexdigest()[:16] not in name:
        raise StorageError(f"{url}/{name} is damaged (its checksum differs): save the model again.")
    return safetensors.torch.load(weights), config


class Run:
    """A run's folder, `url`/{timestamp}, holds hyperparameters.json, history.csv, plots/, model/ and metrics.json.

    `finish` writes manifest.json, the list of them, last: a folder without it was cut off, and the next run with the
    same hyperparameters takes it up again.
    """

    def __init__(self, url, **hyperparameters):
        url, names = str(url).rstrip("/"), files(url)
        data = json.dumps(hyperparameters, indent=1).encode()
        runs = [name.split("/")[0] for name in names if name.endswith("/hyperparameters.json") and name.count("/") == 1]
        cut_off = [run for run in runs if f"{run}/manifest.json" not in names
                   and json.loads(read(f"{url}/{run}/hyperparameters.json")) == json.loads(data)]
        self.url = f"{url}/{cut_off[-1] if cut_off else datetime.now().strftime('%Y-%m-%dT%H-%M-%S.%f')}"
        self._write("hyperparameters.json", data)

    def _write(self, name, data):
        write(f"{self.url}/{name}", data)

    def save_history(self, history):
        """Rows ({column: value}) to history.csv."""
        text = io.StringIO(newline="")
        rows = csv.DictWriter(text, list(dict.fromkeys(name for row in history for name in row)))
        rows.writeheader()
        rows.writerows(history)
        self._write("history.csv", text.getvalue().encode())

    def save_figure(self, name, figure):
        """A matplotlib figure to plots/{name}.png."""
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
        self._write(f"plots/{name}.png", image.getvalue())

    def save_model(self, model, **config):
        """Weights and config to model/; see `save_model`."""
        save_model(model, f"{self.url}/model", **config)

    def finish(self, results):
        """Results to metrics.json, then the manifest, the list of all files: from here on the run is whole."""
        self._write("metrics.json", json.dumps(results, indent=1).encode())
        self._write("manifest.json", json.dumps(files(self.url), indent=1).encode())
