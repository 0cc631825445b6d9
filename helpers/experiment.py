"""One run = one folder at any fsspec URL (s3://, gs://, local): what went in, what came out, and the model."""

import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import safetensors.torch
import torch

from helpers import storage
from helpers.storage import THREADS, StorageError, redact

PACKAGES = ("torch", "torchvision", "torchmetrics", "transformers", "tokenizers", "accelerate", "safetensors", "numpy",
            "opencv-python-headless", "fsspec", "s3fs", "gcsfs", "obstore", "boto3", "papermill")  # that change results


def broadcast(value):
    """This value, or the first process's where there are several: a run has one folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState  # here: a run without several processes needs neither
        from accelerate.utils import broadcast_object_list

        PartialState(cpu=not torch.accelerator.is_available())  # joins the others, if nothing has until now
        [value] = broadcast_object_list([value])
    return value


def _load(url):
    with storage.translate_errors(url):  # no JSON is damaged, too
        return json.loads(storage.read(url))


def to_safetensors(tensors, metadata=None):
    """{name: tensor}, and {name: text}, as the bytes of a safetensors file."""
    own = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return safetensors.torch.save(own, metadata)  # which takes no tensors that share memory


def save_model(model, url, **config):
    """Save a model's weights (or a state_dict; safetensors) and config (model.json) under a prefix, straight from memory.

    model.json names the weights by their checksum and is written last: the model there is the old one or the new one,
    never half of each. Returns the names of the two objects.
    """
    url = str(url).rstrip("/")
    weights = to_safetensors(model if isinstance(model, Mapping) else model.state_dict())
    name = f"model-{hashlib.sha256(weights).hexdigest()[:16]}.safetensors"
    storage.write(f"{url}/{name}", weights)
    storage.write(f"{url}/model.json", json.dumps({"weights": name, **config}, indent=1).encode())
    for other in storage.list_files(url):
        if re.fullmatch(r"model-\w+\.safetensors", other) and other != name:
            storage.remove(f"{url}/{other}")
    return [name, "model.json"]


def load_model(url):
    """What `save_model` saved: ({name: tensor} on the CPU, config). Raises storage.NotFound when nothing is there."""
    url = str(url).rstrip("/")
    config = _load(f"{url}/model.json")
    name = config.pop("weights")
    weights = storage.read(f"{url}/{name}")
    if hashlib.sha256(weights).hexdigest()[:16] not in name:
        raise StorageError(f"{url}/{name} is damaged (its checksum differs): save the model again.")
    return safetensors.torch.load(weights), config


def _code():
    """The source that has run: a notebook's executed cells, or the script; without the keys of the environment."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    if shell:  # in any kernel, whoever runs it: JupyterLab, papermill, VS Code
        cells = enumerate(shell.user_ns["In"])
        source = "\n\n".join(f"# In [{number}]\n{cell}" for number, cell in cells if cell.strip())
    else:
        source = script.read_text(encoding="utf-8", errors="replace") if script.is_file() else ""
    return redact(source)[0].encode()


def _environment():
    """What the code ran on: Python, platform, packages, and the git commit of the current folder (None without)."""
    packages, commit = {}, ""
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    with suppress(OSError, subprocess.SubprocessError):  # no git here
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                                capture_output=True, text=True, timeout=20).stdout.strip()
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": packages,
            "git_commit": commit.removesuffix("-dirty") or None, "git_dirty": "-dirty" in commit if commit else None}


class Run:
    """A run's folder, `url`/{UTC time}: hyperparameters.json, environment.json, code.py (what ran), history.csv,
    plots/, predictions.safetensors, model/ and metrics.json.

    `finish` writes manifest.json, the list of them, last: a folder without it was cut off, and the next run with the
    same hyperparameters takes it up again. No file but the manifest holds a time.
    """

    def __init__(self, url, **hyperparameters):
        url, names = str(url).rstrip("/"), storage.list_files(url)
        data = json.dumps(hyperparameters, indent=1).encode()
        runs = [name.split("/")[0] for name in names if name.endswith("/hyperparameters.json") and name.count("/") == 1]
        cut_off = [run for run in runs if f"{run}/manifest.json" not in names
                   and _load(f"{url}/{run}/hyperparameters.json") == json.loads(data)]
        self.started = datetime.now(timezone.utc)
        self.url = broadcast(f"{url}/{cut_off[-1] if cut_off else self.started.strftime('%Y-%m-%dT%H-%M-%S.%f')}")
        self._write("hyperparameters.json", data)
        self._write("environment.json", json.dumps(_environment(), indent=1).encode())
        self._write("code.py", _code())

    def _write(self, name, data):
        storage.write(f"{self.url}/{name}", data)

    def save_history(self, history, name="history"):
        """Rows ({column: value}) to {name}.csv."""
        text = io.StringIO(newline="")
        rows = csv.DictWriter(text, list(dict.fromkeys(name for row in history for name in row)))
        rows.writeheader()
        rows.writerows(history)
        self._write(f"{name}.csv", text.getvalue().encode())

    def save_figure(self, name, figure):
        """A matplotlib figure to plots/{name}.png."""
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
        self._write(f"plots/{name}.png", image.getvalue())

    def save_model(self, model, **config):
        """Weights and config to model/; see `save_model`."""
        save_model(model, f"{self.url}/model", **config)

    def save_predictions(self, outputs, targets):
        """Two tensors or arrays to predictions.safetensors; `safetensors.torch.load(storage.read(…))` brings them back."""
        tensors = {"outputs": torch.as_tensor(outputs), "targets": torch.as_tensor(targets)}
        self._write("predictions.safetensors", to_safetensors(tensors))

    def finish(self, results):
        """Results to metrics.json, then the manifest, the list of all files: from here on the run is whole."""
        self._write("code.py", _code())
        self._write("metrics.json", json.dumps(results, indent=1).encode())
        times = {"started": self.started.isoformat(), "finished": datetime.now(timezone.utc).isoformat()}
        self._write("manifest.json", json.dumps({**times, "files": storage.list_files(self.url)}, indent=1).encode())


def smaller_is_better(metric):
    """Whether a metric of this name is the better the smaller it is."""
    return any(word in metric.lower() for word in ("loss", "error", "perplexity", "mse", "mae"))


def compare(url, metric=None):
    """The runs of a project (a folder of runs), or of a folder of projects: a `Comparison`, in Jupyter a table.

    The best run is that of the best `metric`, by default the first number among the newest results.
    """
    url, names = str(url).rstrip("/"), set(storage.list_files(url))
    runs = [name.rpartition("/")[0] for name in names if name.endswith("/hyperparameters.json")]
    runs.sort(key=lambda run: (run.rpartition("/")[2], run), reverse=True)
    finished = [run for run in runs if f"{run}/manifest.json" in names]

    with ThreadPoolExecutor(THREADS) as pool:
        asked = dict(zip(runs, pool.map(lambda run: _load(f"{url}/{run}/hyperparameters.json"), runs)))
        found = dict(zip(finished, pool.map(lambda run: _load(f"{url}/{run}/metrics.json"), finished)))
    differ = [name for name in dict.fromkeys(name for values in asked.values() for name in values)
              if len({json.dumps(values[name]) if name in values else "" for values in asked.values()}) > 1]
    rows, metrics = [], {}
    for run in runs:
        facts = {"run": run, "finished": run in found, "newest": not rows, "best": False}
        numbers = {f"{name} (result)" if name in (*facts, *differ) else name: value  # one name, one column
                   for name, value in found.get(run, {}).items()
                   if type(value) in (int, float) and math.isfinite(value)}
        rows.append({**facts, **{name: asked[run][name] for name in differ if name in asked[run]}, **numbers, **facts})
        metrics |= dict.fromkeys(numbers)
    if metric and metrics and metric not in metrics:
        raise ValueError(f"No run at {url} has a metric {metric!r}; there are: {', '.join(metrics)}.")
    return Comparison(url, rows, metric or next(iter(metrics), ""))


class Comparison:
    """Runs side by side, the newest first: `rows` are dicts of run (its name), finished, newest, best, the
    hyperparameters that differ between the runs, and the metrics that are numbers.
    """

    def __init__(self, url, rows, metric):
        self.url, self.rows, self.metric = url, rows, metric
        for row in self._ranked(metric)[:1]:
            row["best"] = True

    def _ranked(self, *names):
        """The rows that have all these, the best by the last one first."""
        rows = [row for row in self.rows if all(name in row for name in names)]
        return sorted(rows, key=lambda row: row[names[-1]], reverse=not smaller_is_better(names[-1]))

    def plot(self, hyperparameter, metric=None):
        """A figure of a metric over a hyperparameter that differs between the runs, the best run a star."""
        from matplotlib import pyplot  # here: it takes a second

        metric = metric or self.metric
        if not (rows := self._ranked(hyperparameter, metric)):
            raise ValueError(f"No run at {self.url} has both {hyperparameter!r} and {metric!r}; "
                             f"there are: {', '.join(dict.fromkeys(name for row in self.rows for name in row))}.")
        x, y = [row[hyperparameter] for row in rows], [row[metric] for row in rows]
        figure, axis = pyplot.subplots(figsize=(6, 3.5))
        pyplot.close(figure)  # or Jupyter shows it twice
        if not {*map(type, x)} <= {int, float}:
            x = [str(value) for value in x]
        elif min(x) > 0 and max(x) >= 100 * min(x):  # learning rates
            axis.set_xscale("log")
        axis.scatter(x, y)
        axis.scatter(x[:1], y[:1], s=200, marker="*", color="tab:orange", label="best")
        axis.set(xlabel=hyperparameter, ylabel=metric)
        axis.legend(frameon=False)
        return figure

    def _repr_html_(self):
        shown = [name for name in dict.fromkeys(name for row in self.rows for name in row)
                 if name not in ("run", "finished", "newest", "best")]
        arrow = {self.metric: " ↓" if smaller_is_better(self.metric) else " ↑"}
        html = f"<th>{len(self.rows)} runs at {escape(self.url)}<th>"
        html += "".join(f"<th>{escape(name + arrow.get(name, ''))}" for name in shown)
        for row in self.rows:
            marks = "★ best" * row["best"], "newest" * row["newest"], "cut off" * (not row["finished"])
            values = row["run"], ", ".join(filter(None, marks)), *(row.get(name, "") for name in shown)
            texts = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
            html += f'<tr style="background: {"rgba(60, 160, 90, .25)" if row["best"] else ""}">'  # on white and black
            html += "".join(f"<td>{escape(text)}" for text in texts)
        return f"<table>{html}</table>"
