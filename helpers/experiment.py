"""One run = one folder at any fsspec URL (s3://, gs://, local): what went in, what came out, and the model."""

import csv
import hashlib
import io
import json
from datetime import datetime

import fsspec
import safetensors.torch

from helpers.storage import StorageError, explained


def write(url, data):
    """Write bytes to any fsspec URL, whole or not at all."""
    with explained(url):
        filesystem, path = fsspec.url_to_fs(url)
        if "file" in filesystem.protocol:  # object stores have no folders to make
            filesystem.makedirs(filesystem._parent(path), exist_ok=True)
        with filesystem.transaction, filesystem.open(path, "wb") as file:
            file.write(data)


def read(url):
    """The bytes at any fsspec URL. Raises storage.NotFound when there are none."""
    with explained(url):
        filesystem, path = fsspec.url_to_fs(url)
        return filesystem.cat_file(path)


def save_model(model, url, **config):
    """Save a model's weights (safetensors) and config (model.json) under a prefix, straight from memory.

    model.json names the weights by their checksum and is written last: the model there is the old one or the new one,
    never half of each. Returns the names of the two objects.
    """
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    name = f"model-{hashlib.sha256(weights).hexdigest()[:16]}.safetensors"
    write(f"{url}/{name}", weights)
    write(f"{url}/model.json", json.dumps({"weights": name, **config}, indent=1).encode())
    with explained(url):
        filesystem, path = fsspec.url_to_fs(url)
        filesystem.invalidate_cache()
        for other in filesystem.glob(f"{path}/model-*.safetensors"):
            if not other.endswith(name):
                filesystem.rm_file(other)
    return [name, "model.json"]


def load_model(url):
    """What `save_model` saved: ({name: tensor} on the CPU, config). Raises storage.NotFound when nothing is there."""
    config = json.loads(read(f"{url}/model.json"))
    name = config.pop("weights")
    weights = read(f"{url}/{name}")
    if hashlib.sha256(weights).hexdigest()[:16] not in name:
        raise StorageError(f"{url}/{name} is damaged (its checksum differs): save the model again.")
    return safetensors.torch.load(weights), config


class Run:
    """A run's folder, `url`/{timestamp}: hyperparameters.json, history.csv, plots/, model/, metrics.json, manifest.json.

    The manifest is written last, by `finish`: a folder without one was cut off, and the next run with the same
    hyperparameters takes it up again.
    """

    def __init__(self, url, **hyperparameters):
        filesystem, path = fsspec.url_to_fs(url)
        filesystem.invalidate_cache()
        names = {name.removeprefix(path).lstrip("/") for name in filesystem.find(path)}
        cut_off = [name.split("/")[0] for name in sorted(names) if name.endswith("/hyperparameters.json")
                   and name.replace("hyperparameters", "manifest") not in names
                   and json.loads(read(f"{url}/{name}")) == hyperparameters]
        self.url = f"{url}/{cut_off[-1] if cut_off else datetime.now().strftime('%Y-%m-%dT%H-%M-%S.%f')}"
        self.files = []
        self._write("hyperparameters.json", json.dumps(hyperparameters, indent=1).encode())

    def _write(self, name, data):
        write(f"{self.url}/{name}", data)
        self.files = sorted({*self.files, name})

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
        self.files += [f"model/{name}" for name in save_model(model, f"{self.url}/model", **config)]

    def finish(self, results):
        """Results to metrics.json, then the manifest: from here on the run is whole."""
        self._write("metrics.json", json.dumps(results, indent=1).encode())
        write(f"{self.url}/manifest.json", json.dumps(self.files, indent=1).encode())
