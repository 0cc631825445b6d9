"""One run = one folder at any fsspec URL (s3://, gs://, local): what went in, what came out, and the model."""

import base64
import csv
import functools
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path

import jinja2
import psutil
import safetensors.torch
import torch

from helpers import storage
from helpers.storage import THREADS, NotFound, StorageError, redact, run_in_first_process

TEMPLATES = jinja2.Environment(loader=jinja2.PackageLoader("helpers", "."), autoescape=True, trim_blocks=True)
LEASE = 60  # seconds: a process that has not renewed its lease on a run for so long is taken for dead


def _load(url):
    with storage.translate_errors(url):  # also for JSON that is damaged
        return json.loads(storage.read(url))


def to_safetensors(tensors):
    """{name: tensor} as the bytes of a safetensors file."""
    own = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return safetensors.torch.save(own)  # which refuses tensors that share memory


def save_model(model, url, **config):
    """Save weights (of a model or a state_dict) as safetensors and a config as model.json; returns both names.

    model.json names the weights by their checksum and is written last: a reader finds the old model or the new one.
    """
    url = str(url).rstrip("/")
    weights = to_safetensors(model if isinstance(model, dict) else model.state_dict())
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


def _redacted(text):
    return redact(text)[0].encode()


def _code():
    """The source that has run: a notebook's executed cells, or the script."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell:  # in any kernel: JupyterLab, papermill, VS Code
        return "\n\n".join(f"# In [{i}]\n{cell}" for i, cell in enumerate(shell.user_ns["In"]) if cell.strip())
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    return script.read_text(encoding="utf-8", errors="replace") if script.is_file() else ""


def _environment():
    """What the code runs on: Python, platform, device, packages, and the current folder's git commit, if it has one."""
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    commit, command = "", "git describe --always --dirty --abbrev=40 --exclude=*".split()
    with suppress(OSError, subprocess.SubprocessError):  # without git
        commit = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "packages": list_packages(),
        "git_commit": commit.removesuffix("-dirty") or None,
        "git_dirty": "-dirty" in commit if commit else None,
    }


@functools.cache
def list_packages():
    """{name: version} of all that is installed: read once in a process, for it takes an eighth of a second."""
    return dict(sorted((package.name, package.version) for package in distributions()))


class Run:
    """A run's folder, `url`/{UTC time}: hyperparameters.json, environment.json, code.py (what ran), history.csv,
    plots/, model/, metrics.json, and report.html, a page about all of it.

    `finish` writes manifest.json, the list of them, last: a folder without it was cut off, and the next run with the
    same hyperparameters and the same code up to here continues it, unless the process that writes it is alive: it
    keeps a lease.json there as long as it writes. Of the other files only the manifest holds times.
    """

    def __init__(self, url, **hyperparameters):
        self.started, self.lock = datetime.now(timezone.utc), threading.Lock()
        self.finished = self.lost = False  # the lease, to another process
        files = {"code.py": _code(), "hyperparameters.json": json.dumps(hyperparameters, indent=1)}
        self.url = _choose(str(url).rstrip("/"), self.started.strftime("%Y-%m-%dT%H-%M-%S.%f"), files)
        _write_lease(self.url)
        if storage.is_first_process():
            threading.Thread(target=_renew_lease, args=(weakref.ref(self),), daemon=True).start()
        self._write("environment.json", json.dumps(_environment(), indent=1))
        for name, text in files.items():
            self._write(name, text)

    def _write(self, name, data):
        """Bytes, or text, of which secrets are left out."""
        if self.lost:
            raise StorageError(f"{self.url} was taken over by another process while this one stood still.")
        storage.write(f"{self.url}/{name}", _redacted(data) if isinstance(data, str) else data)

    def save_history(self, history, name="history"):
        """Rows ({column: value}) as {name}.csv."""
        text = io.StringIO(newline="")
        rows = csv.DictWriter(text, list(dict.fromkeys(name for row in history for name in row)))
        rows.writeheader()
        rows.writerows(history)
        self._write(f"{name}.csv", text.getvalue())

    def save_figure(self, name, figure):
        """A matplotlib figure as plots/{name}.png."""
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
        self._write(f"plots/{name}.png", image.getvalue())

    def save_model(self, model, **config):
        """Weights and config under model/; see the function `save_model`."""
        save_model(model, f"{self.url}/model", **config)

    def finish(self, results):
        """Results as metrics.json, report.html, then the manifest, the list of all files: the run is complete."""
        if not storage.is_first_process():
            return
        self._write("code.py", _code())
        self._write("metrics.json", json.dumps(results, indent=1))
        self._write("report.html", _render_report(self.url))
        files = [name for name in storage.list_files(self.url) if name != "lease.json"]
        times = {"started": self.started.isoformat(), "finished": datetime.now(timezone.utc).isoformat()}
        self._write("manifest.json", json.dumps(times | {"files": files}, indent=1))
        with self.lock, suppress(NotFound):  # finished before
            self.finished = True
            storage.delete(f"{self.url}/lease.json")


@run_in_first_process
def _choose(url, new, files):
    """The URL of the newest run with the same files that was cut off and is not being written, or of a new one."""
    names = storage.list_files(url)
    for run in sorted({name.split("/")[0] for name in names}, reverse=True):
        same = lambda name: f"{run}/{name}" in names and storage.read(f"{url}/{run}/{name}") == _redacted(files[name])
        if f"{run}/manifest.json" not in names and all(map(same, files)) and _claim(f"{url}/{run}"):
            rows = storage.read(f"{url}/{run}/history.csv").splitlines()[1:] if f"{run}/history.csv" in names else []
            print(f"continuing run {url}/{run}, from epoch {len(rows) + 1}")
            return f"{url}/{run}"
    print(f"starting run {url}/{new}")
    return f"{url}/{new}"


def _write_lease(run):
    lease = {"host": socket.gethostname(), "pid": os.getpid(), "renewed": time.time()}
    storage.write(f"{run}/lease.json", json.dumps(lease).encode())


def _read_lease(run):
    """Who writes a run, as it was written last; None when nobody does."""
    with suppress(NotFound):
        return _load(f"{run}/lease.json")


def _is_mine(lease):
    return (lease["host"], lease["pid"]) == (socket.gethostname(), os.getpid())


def _renew_lease(reference):
    """Renew a run's lease until the run is finished, another process's, or nobody's any more."""
    while (run := reference()) and not (run.finished or run.lost):
        with run.lock, suppress(Exception):  # the store may answer the next time; a finished run has no lease
            run.lost = not _is_mine(_load(f"{run.url}/lease.json"))
            if not run.lost:
                _write_lease(run.url)
        del run  # or it would never be nobody's
        time.sleep(LEASE / 4)


def _claim(run):
    """Whether this process may write a run: no other does, and of several that claim it now this is the last one."""
    lease = _read_lease(run)
    if lease and _is_mine(lease):
        return True
    if lease and lease["host"] != socket.gethostname():
        print(f"waiting {LEASE} s to see whether {lease['host']} still writes {run}")
        time.sleep(LEASE)
        if _read_lease(run) not in (lease, None):
            return False
    elif lease and psutil.pid_exists(lease["pid"]):
        return False
    _write_lease(run)
    time.sleep(LEASE / 60)  # whoever saw the run without an owner, too, has written its lease by then
    return _is_mine(_read_lease(run))


def smaller_is_better(metric):
    """Whether smaller values of a metric of this name are better."""
    return any(word in metric.lower() for word in ("loss", "error", "perplexity", "mse", "mae", "bits"))


def compare(url, metric=None):
    """The runs of a project, a folder of runs: a `Comparison`, in Jupyter a table.

    The best run is that of the best `metric`, by default the first accuracy, loss or the like of the newest results.
    """
    url, names = str(url).rstrip("/"), {*storage.list_files(url)}
    found = (name.removesuffix("/hyperparameters.json") for name in names if name.endswith("/hyperparameters.json"))
    runs = sorted((run for run in found if "/" not in run), reverse=True)  # not those within a run
    with ThreadPoolExecutor(THREADS) as pool:
        asked = list(pool.map(lambda run: _load(f"{url}/{run}/hyperparameters.json"), runs))
        ended = pool.map(lambda run: _load(f"{url}/{run}/metrics.json") if f"{run}/metrics.json" in names else {}, runs)
    differ = [name for name in _columns(asked) if len({repr(values.get(name, ...)) for values in asked}) > 1]
    rows = []
    for run, values, results in zip(runs, asked, ended):
        numbers = {name: x for name, x in results.items() if type(x) in (int, float) and math.isfinite(x)}
        chosen = {name: values[name] for name in differ if name in values}
        row = {"run": run, "hyperparameters": chosen, "metrics": numbers, "best": False}
        rows.append(row | {"finished": f"{run}/manifest.json" in names, "newest": run == runs[0]})
    metrics = _columns(row["metrics"] for row in rows)
    if metric and metric not in metrics:
        raise ValueError(f"No run at {url} has a metric {metric!r}; there are: {', '.join(metrics) or 'none'}.")
    scores = [name for name in metrics if smaller_is_better(name) or re.search("acc|bleu|f1|mrr|recall|rouge", name)]
    return Comparison(url, rows, metric or (scores + metrics + [""])[0])


def _columns(rows):
    return list(dict.fromkeys(name for row in rows for name in row))


class Comparison:
    """Runs, the newest first, in `rows`: dicts of run (name), finished, newest, best, what differs, numeric metrics."""

    def __init__(self, url, rows, metric):
        self.url, self.rows, self.metric = url, rows, metric
        for row in self.rank(metric)[:1]:
            row["best"] = True

    def rank(self, metric):
        """The rows that have this metric, the best first."""
        rows = [row for row in self.rows if metric in row["metrics"]]
        return sorted(rows, key=lambda row: row["metrics"][metric], reverse=not smaller_is_better(metric))

    def _repr_html_(self):
        names = {part: _columns(row[part] for row in self.rows) for part in ("hyperparameters", "metrics")}
        template = TEMPLATES.get_template("runs.html.j2")
        return template.render(comparison=self, names=names, smaller=smaller_is_better(self.metric))


def _render_report(run):
    """The page about a run: what went in and came out, plots, and what differs from the best run."""
    folder, _, name = run.rpartition("/")
    names = storage.list_files(run)
    values = {each: _load(f"{run}/{each}.json") for each in ("hyperparameters", "metrics", "environment")}
    plots = [each for each in names if each.startswith("plots/")]
    plots = {plot[6:-4]: base64.b64encode(storage.read(f"{run}/{plot}")).decode() for plot in plots}
    values |= dict(url=run, name=name, plots=plots, comparison=Comparison(folder, [], ""))
    with suppress(StorageError):  # one of the other runs may be damaged
        values["comparison"] = compare(folder)
    return TEMPLATES.get_template("report.html.j2").render(values)
