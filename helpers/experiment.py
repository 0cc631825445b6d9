"""One run = one folder at any fsspec URL (s3://, gs://, local): what went in, what came out, and the model."""

import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from html import escape
from importlib.metadata import distributions
from pathlib import Path

import psutil
import safetensors.torch
import torch

from helpers import storage
from helpers.storage import THREADS, NotFound, StorageError, redact, run_in_first_process

LEASE = 60  # seconds: a process that has not renewed its lease on a run for so long is taken for dead


def _load(url):
    with storage.translate_errors(url):  # also for JSON that is damaged
        return json.loads(storage.read(url))


def to_safetensors(tensors):
    """{name: tensor} as the bytes of a safetensors file."""
    return safetensors.torch.save({name: tensor.cpu().clone(memory_format=torch.contiguous_format)  # no shared memory
                                   for name, tensor in tensors.items()})


def save_model(model, url, **config):
    """Save a model's weights (or a state_dict) as safetensors and its config as model.json, straight to a folder's URL.

    model.json names the weights by their checksum and is written last: a reader finds the old model or the new one,
    never half of each. Returns the names of the two objects.
    """
    url = str(url).rstrip("/")
    weights = to_safetensors(model if isinstance(model, Mapping) else model.state_dict())
    name = f"model-{hashlib.sha256(weights).hexdigest()[:16]}.safetensors"
    storage.write(f"{url}/{name}", weights)
    storage.write(f"{url}/model.json", json.dumps({"weights": name, **config}, indent=1).encode())
    for other in storage.list_files(url):
        if re.fullmatch(r"model-\w+\.safetensors", other) and other != name:
            storage.delete(f"{url}/{other}")
    return [name, "model.json"]


def load_model(url):
    """Load what `save_model` saved: ({name: tensor} on the CPU, config). Raises storage.NotFound without a model."""
    url = str(url).rstrip("/")
    config = _load(f"{url}/model.json")
    name = config.pop("weights")
    weights = storage.read(f"{url}/{name}")
    if hashlib.sha256(weights).hexdigest()[:16] not in name:
        raise StorageError(f"{url}/{name} is damaged (its checksum differs): save the model again.")
    return safetensors.torch.load(weights), config


def _code():
    """The source that has run, without secrets: a notebook's executed cells, or the script."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    if shell:  # in any kernel: JupyterLab, papermill, VS Code
        cells = enumerate(shell.user_ns["In"])
        source = "\n\n".join(f"# In [{number}]\n{cell}" for number, cell in cells if cell.strip())
    else:
        source = script.read_text(encoding="utf-8", errors="replace") if script.is_file() else ""
    return redact(source)[0].encode()


def _environment():
    """What the code runs on: Python, platform, packages, and the git commit of the current folder, if there is one."""
    commit = ""
    with suppress(OSError, subprocess.SubprocessError):  # without git
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                                capture_output=True, text=True, timeout=20).stdout.strip()
    return {"python": platform.python_version(), "platform": platform.platform(),
            "packages": dict(sorted((package.name, package.version) for package in distributions())),
            "git_commit": commit.removesuffix("-dirty") or None, "git_dirty": "-dirty" in commit if commit else None}


class Run:
    """A run's folder, `url`/{UTC time}: hyperparameters.json, environment.json, code.py (what ran), history.csv,
    plots/, predictions.safetensors, model/ and metrics.json.

    `finish` writes manifest.json, the list of them, last: a folder without it was cut off, and the next run with the
    same hyperparameters and the same code up to here continues it, unless the process that writes it is alive: it
    keeps a lease.json there as long as it writes. Of the other files only the manifest holds times.
    """

    def __init__(self, url, **hyperparameters):
        self.started, self.lock = datetime.now(timezone.utc), threading.Lock()
        self.finished = self.lost = False  # the lease, to another process
        data, code = json.dumps(hyperparameters, indent=1).encode(), _code()
        self.url = _choose(str(url).rstrip("/"), self.started.strftime("%Y-%m-%dT%H-%M-%S.%f"), json.loads(data), code)
        _write_lease(self.url)
        if storage.is_first_process():
            threading.Thread(target=_renew_lease, args=(weakref.ref(self),), daemon=True).start()
        self._write("environment.json", json.dumps(_environment(), indent=1).encode())
        self._write("code.py", code)
        self._write("hyperparameters.json", data)

    def _write(self, name, data):
        if self.lost:
            raise StorageError(f"{self.url} was taken over by another process while this one stood still.")
        storage.write(f"{self.url}/{name}", data)

    def save_history(self, history, name="history"):
        """Rows ({column: value}) as {name}.csv."""
        text = io.StringIO(newline="")
        rows = csv.DictWriter(text, list(dict.fromkeys(name for row in history for name in row)))
        rows.writeheader()
        rows.writerows(history)
        self._write(f"{name}.csv", text.getvalue().encode())

    def save_figure(self, name, figure):
        """A matplotlib figure as plots/{name}.png."""
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
        self._write(f"plots/{name}.png", image.getvalue())

    def save_model(self, model, **config):
        """Weights and config under model/; see the function `save_model`."""
        save_model(model, f"{self.url}/model", **config)

    def save_predictions(self, outputs, targets):
        """Two tensors or arrays as predictions.safetensors, for `safetensors.torch.load(storage.read(url))`."""
        tensors = {"outputs": torch.as_tensor(outputs), "targets": torch.as_tensor(targets)}
        self._write("predictions.safetensors", to_safetensors(tensors))

    def finish(self, results):
        """Results as metrics.json, then the manifest, the list of all files: from here on the run is complete."""
        self._write("code.py", _code())
        self._write("metrics.json", json.dumps(results, indent=1).encode())
        times = {"started": self.started.isoformat(), "finished": datetime.now(timezone.utc).isoformat()}
        files = [name for name in storage.list_files(self.url) if name != "lease.json"]
        self._write("manifest.json", json.dumps({**times, "files": files}, indent=1).encode())
        with self.lock, suppress(NotFound):  # finished before
            self.finished = True
            storage.delete(f"{self.url}/lease.json")


@run_in_first_process
def _choose(url, new, hyperparameters, code):
    """The URL of the newest run that was cut off and is like this one and not being written, or of a new one."""
    names = storage.list_files(url)
    runs = [name.split("/")[0] for name in names if name.endswith("/hyperparameters.json") and name.count("/") == 1]
    for run in reversed(runs):
        if (f"{run}/manifest.json" not in names and f"{run}/code.py" in names
                and _load(f"{url}/{run}/hyperparameters.json") == hyperparameters
                and storage.read(f"{url}/{run}/code.py") == code and not _is_written(f"{url}/{run}")):
            lines = storage.read(f"{url}/{run}/history.csv").splitlines() if f"{run}/history.csv" in names else [""]
            print(f"continuing run {url}/{run}, from epoch {len(lines)}")
            return f"{url}/{run}"
    print(f"starting run {url}/{new}")
    return f"{url}/{new}"


def _owner():
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _write_lease(run):
    storage.write(f"{run}/lease.json", json.dumps({**_owner(), "renewed": time.time()}).encode())


def _renew_lease(reference):
    """Renew a run's lease until the run is finished, another process's, or nobody's any more."""
    while True:
        time.sleep(LEASE / 4)
        if (run := reference()) is None:
            return
        with run.lock, suppress(Exception):  # the store may answer the next time
            if not run.finished:
                lease = _load(f"{run.url}/lease.json")
                run.lost = lease != lease | _owner()
            if run.finished or run.lost:
                return
            _write_lease(run.url)
        del run  # or it would never be nobody's


def _is_written(run):
    """Whether another process is alive that writes this run: one whose lease is renewed."""
    if "lease.json" not in storage.list_files(run):
        return False
    lease = _load(f"{run}/lease.json")
    if lease["host"] == socket.gethostname() and (lease["pid"] == os.getpid() or not psutil.pid_exists(lease["pid"])):
        return False
    print(f"waiting up to {LEASE} s to see whether {lease['host']} still writes {run}")
    for _ in range(20):
        time.sleep(LEASE / 20)
        if "lease.json" not in storage.list_files(run) or _load(f"{run}/lease.json") != lease:
            return True
    return False


def smaller_is_better(metric):
    """Whether smaller values of a metric of this name are better."""
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
        asked = list(pool.map(lambda run: _load(f"{url}/{run}/hyperparameters.json"), runs))
        results = dict(zip(finished, pool.map(lambda run: _load(f"{url}/{run}/metrics.json"), finished)))
    differ = [name for name in _columns(asked)
              if len({json.dumps(values[name]) if name in values else "" for values in asked}) > 1]
    rows = [{"run": run, "finished": run in results, "newest": run == runs[0], "best": False,
             "hyperparameters": {name: values[name] for name in differ if name in values},
             "metrics": {name: value for name, value in results.get(run, {}).items()
                         if type(value) in (int, float) and math.isfinite(value)}} for run, values in zip(runs, asked)]
    metrics = _columns(row["metrics"] for row in rows)
    if metric and metrics and metric not in metrics:
        raise ValueError(f"No run at {url} has a metric {metric!r}; there are: {', '.join(metrics)}.")
    return Comparison(url, rows, metric or next(iter(metrics), ""))


def _columns(rows):
    return list(dict.fromkeys(name for row in rows for name in row))


class Comparison:
    """Runs side by side, the newest first: `rows` are dicts of run (its name), finished, newest, best, the
    hyperparameters that differ between the runs, and the metrics that are numbers.
    """

    def __init__(self, url, rows, metric):
        self.url, self.rows, self.metric = url, rows, metric
        for row in self._rank(metric)[:1]:
            row["best"] = True

    def _rank(self, metric):
        """The rows that have this metric, the best first."""
        rows = [row for row in self.rows if metric in row["metrics"]]
        return sorted(rows, key=lambda row: row["metrics"][metric], reverse=not smaller_is_better(metric))

    def plot(self, hyperparameter, metric=None):
        """A figure of a metric over a hyperparameter that differs between the runs, the best run a star."""
        from matplotlib import pyplot  # here: it takes a second

        metric = metric or self.metric
        rows = [row for row in self._rank(metric) if hyperparameter in row["hyperparameters"]]
        if not rows:
            names = _columns(row[part] for row in self.rows for part in ("hyperparameters", "metrics"))
            raise ValueError(f"No run at {self.url} has both {hyperparameter!r} and {metric!r}; "
                             f"there are: {', '.join(names)}.")
        x, y = zip(*((row["hyperparameters"][hyperparameter], row["metrics"][metric]) for row in rows))
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
        arrow = {self.metric: " ↓" if smaller_is_better(self.metric) else " ↑"}
        names = {part: _columns(row[part] for row in self.rows) for part in ("hyperparameters", "metrics")}
        lines = [["th", f"{len(self.rows)} runs at {self.url}", "", *names["hyperparameters"],
                  *(name + arrow.get(name, "") for name in names["metrics"])]]
        for row in self.rows:
            marks = {"★ best": row["best"], "newest": row["newest"], "cut off": not row["finished"]}
            values = [row[part].get(name, "") for part in names for name in names[part]]
            lines.append(["td", row["run"], ", ".join(name for name in marks if marks[name]),
                          *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)])
        return "".join(["<table>", *("<tr>" + "".join(f"<{tag}>{escape(text)}" for text in texts)
                                     for tag, *texts in lines), "</table>"])
