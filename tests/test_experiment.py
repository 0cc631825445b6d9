"""Runs, comparisons and models in a local folder, in memory, on S3 and on Google Cloud Storage; what is left when the
writing process is killed."""

import ast
import base64
import csv
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import safetensors.torch
import torch
from bs4 import BeautifulSoup
from IPython.core.interactiveshell import InteractiveShell
from servers import gcs
from servers.embedded import connected
from servers.fault_proxy import fault_proxy
from torch import nn

from helpers import experiment, storage

SECRET = "AWS_SECRET_ACCESS_KEY"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def s3(tmp_path_factory):
    """A connected server with a bucket."""
    with connected(storage.serve(tmp_path_factory.mktemp("served"))):
        storage.create_bucket("experiments")
        yield


@pytest.fixture(params=["local", "memory", "s3", "gs"])
def everywhere(request, tmp_path):
    """A place for runs and models that is not there yet, of each kind."""
    if request.param == "gs":
        request.getfixturevalue("google")
    places = {"local": tmp_path, "memory": "memory:/", "s3": "s3://experiments", "gs": "gs://experiments"}
    return f"{places[request.param]}/{request.node.originalname}"


FORKS = """
import boto3, botocore, functools, json, os, runpy, s3fs, sys, torch, traceback
from helpers import experiment
botocore.session.create_loader = functools.cache(botocore.loaders.create_loader)
boto3.client("s3", "us-east-1")
for line in sys.stdin:
    pid = os.fork()
    if pid:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    print(os.getpid(), flush=True)
    try:
        exec(json.loads(line))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
"""


@pytest.fixture(scope="module")
def forks(s3):
    """fork(code) runs code in a fork of a process that has imported helpers.experiment alone; returns its pid. What
    it prints is a line of the pipe `forks.stdout`, and so, when it has ended, is its exit status."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", FORKS], **pipes) as process:

        def fork(code):
            print(json.dumps(code), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        fork.stdout = process.stdout
        yield fork


@pytest.fixture
def url(request):
    return f"memory://{request.node.originalname}"


@pytest.fixture(scope="module")
def google(tmp_path_factory):
    """An emulator of Google Cloud Storage with the bucket experiments, which gs:// URLs lead to."""
    if gcs.missing():
        pytest.skip(f"not installed here: {', '.join(gcs.missing())}")
    with gcs.gcs(tmp_path_factory.mktemp("gcs"), "experiments"):
        yield


def linear(seed, size=4):
    torch.manual_seed(seed)
    return nn.Linear(size, 3)


def same(weights, model):
    state = model.state_dict()
    equal = lambda one, other: one.dtype == other.dtype and torch.equal(one, other)
    return weights.keys() == state.keys() and all(equal(weights[name], state[name]) for name in state)


def figure():
    drawn = matplotlib.figure.Figure(figsize=(2, 1))
    drawn.subplots().plot([1, 2], [3, 4])
    return drawn


def test_a_run_leaves_all_its_files_and_a_manifest_that_lists_them(everywhere):
    url, asked = everywhere, {"epochs": 2, "rate": 0.1, "sizes": [1, 2], "note": "é", "nothing": None}
    run = experiment.Run(url, **asked)
    run.save_history([{"epoch": 1, "loss": 0.5}])
    run.save_history([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "größe, neu": 'a "b"'}])
    run.save_figure("curves", figure())
    others = "model/model-of/model-1.safetensors", "model/notes.txt"
    for other in others:
        storage.write(f"{run.url}/{other}", b"mine")
    for seed in 0, 1, 1:  # of which the last is left, and what is not a model
        run.save_model(linear(seed), classes=["a", "b", "c"][: seed + 2])
    run.save_predictions(torch.arange(6.0).reshape(3, 2).T, np.array([1, 0]))
    run.finish({"accuracy": 0.75, "model": "there"})
    folder, of = run.url.rsplit("/", 1)
    assert folder == url
    read = lambda name: storage.read(f"{run.url}/{name}")
    weights = "model/" + json.loads(read("model/model.json"))["weights"]
    manifest = json.loads(read("manifest.json"))
    started, finished = (datetime.fromisoformat(manifest[name]) for name in ("started", "finished"))
    assert started == datetime.strptime(f"{of}+0000", "%Y-%m-%dT%H-%M-%S.%f%z") < finished
    names = "code.py environment.json history.csv hyperparameters.json metrics.json model/model.json plots/curves.png"
    assert manifest["files"] == sorted([*names.split(), *others, weights, "predictions.safetensors", "report.html"])
    assert storage.list_files(url) == sorted(f"{of}/{name}" for name in [*manifest["files"], "manifest.json"])
    assert json.loads(read("hyperparameters.json")) == asked
    assert json.loads(read("metrics.json")) == {"accuracy": 0.75, "model": "there"}
    assert list(csv.DictReader(io.StringIO(read("history.csv").decode(), newline=""))) == [
        {"epoch": "1", "loss": "0.5", "größe, neu": ""},
        {"epoch": "2", "loss": "0.25", "größe, neu": 'a "b"'},
    ]
    assert read("plots/curves.png").startswith(b"\x89PNG\r\n")
    loaded, config = experiment.load_model(f"{run.url}/model")
    assert same(loaded, linear(1)) and config == {"classes": ["a", "b", "c"]}
    predictions = safetensors.torch.load(read("predictions.safetensors"))
    assert predictions["outputs"].tolist() == [[0, 2, 4], [1, 3, 5]] and predictions["targets"].tolist() == [1, 0]


def test_only_a_cut_off_run_with_the_same_hyperparameters_and_code_is_taken_up_again(url):
    first, asked = experiment.Run(url, a=1, b=(2, 3)), {"a": 1, "b": (2, 3)}
    first.save_figure("early", figure())
    other = experiment.Run(url, a=1, b=(2, 4))
    again = experiment.Run(f"{url}/", **asked)
    assert again.url == first.url != other.url
    again.finish({})
    assert "plots/early.png" in json.loads(storage.read(f"{again.url}/manifest.json"))["files"]
    new = experiment.Run(url, **asked)
    assert new.url not in (first.url, other.url) and new.url > first.url
    storage.write(f"{new.url}/code.py", b"edited since")
    assert experiment.Run(url, **asked).url > new.url


ANOTHER_TERMINAL = """
run = experiment.Run({url!r}, epochs=3)
run.save_history([{{"epoch": 1}}, {{"epoch": 2}}])
print("saved", flush=True)
sys.stdin.readline()  # until it is killed
"""


def test_a_run_that_is_alive_is_left_alone_and_a_killed_one_is_continued(tmp_path, monkeypatch, capsys, forks):
    monkeypatch.setattr(experiment, "_code", lambda: "")  # as there, which is no script either
    url = f"{tmp_path}/runs"
    other = forks(ANOTHER_TERMINAL.format(url=url))
    one = forks.stdout.readline().removeprefix("starting run ").strip()
    assert forks.stdout.readline() == "saved\n"
    two = experiment.Run(url, epochs=3)
    assert two.url != one and capsys.readouterr().out == f"starting run {two.url}\n"
    two.finish({})
    os.kill(other, signal.SIGKILL)
    assert int(forks.stdout.readline()) == -signal.SIGKILL
    assert "lease.json" not in storage.list_files(two.url) and "lease.json" in storage.list_files(one)
    assert experiment.Run(url, epochs=3).url == one
    assert capsys.readouterr().out == f"continuing run {one}, from epoch 3\n"


def lease(run, renewed=1.0):
    """Another machine's, of a run like those below."""
    written = json.dumps({"host": "elsewhere", "pid": os.getpid(), "renewed": renewed}).encode()
    storage.write(f"{run}/lease.json", written)


def test_the_run_of_another_machine_is_continued_only_when_its_lease_is_not_renewed(monkeypatch, capsys):
    for url, alive in ("memory://dead", False), ("memory://alive", True):
        lease(run := experiment.Run(url, a=1).url)
        monkeypatch.setattr(experiment, "LEASE", 0.4)
        if alive:
            threading.Timer(0.1, lease, [run, 2.0]).start()
        assert (experiment.Run(url, a=1).url != run) == alive
        assert "see whether elsewhere still writes" in capsys.readouterr().out
        monkeypatch.undo()


def test_of_two_processes_that_find_a_dead_run_at_the_same_moment_one_continues_it(monkeypatch):
    dead, write_lease = experiment.Run("memory://both", a=1).url, experiment._write_lease
    storage.delete(f"{dead}/lease.json")
    monkeypatch.setattr(experiment, "LEASE", 6)

    def write_and_be_overtaken(run):
        write_lease(run)
        if run == dead:  # the other one saw no lease either
            lease(run)

    monkeypatch.setattr(experiment, "_write_lease", write_and_be_overtaken)
    assert experiment.Run("memory://both", a=1).url != dead
    assert json.loads(storage.read(f"{dead}/lease.json"))["host"] == "elsewhere"


def test_a_process_that_stood_still_for_long_does_not_write_what_another_has_taken_over(monkeypatch):
    monkeypatch.setattr(experiment, "LEASE", 0.2)
    run = experiment.Run("memory://asleep", a=1)
    lease(run.url)
    deadline = time.monotonic() + 20
    while not run.lost and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(storage.StorageError, match="taken over by another process"):
        run.save_history([{"epoch": 1}])
    assert json.loads(storage.read(f"{run.url}/lease.json"))["host"] == "elsewhere"


BY_HAND = """
import os, sys
from helpers.experiment import Run
SECRET = {secret!r}  # as people do
weight, rows = 1.0, []
run = Run("runs/by_hand", lr=0.1, key=SECRET)
for epoch in range(3):
    weight -= 0.1 * weight  # größer wird es nicht
    rows.append({{"epoch": epoch, "loss": weight ** 2, "note": SECRET}})
    run.save_history(rows)
run.finish({{"loss": rows[-1]["loss"], "key": SECRET}})
assert not {{"helpers.training", "accelerate", "transformers"}} & {{*sys.modules}}, "none of that is needed"
"""


def test_a_loop_written_by_hand_needs_three_lines_and_keeps_its_script_without_the_secret(tmp_path, forks):
    script, secret = tmp_path / "train.py", os.environ[SECRET]
    script.write_text(BY_HAND.format(secret=secret), encoding="utf-8")
    forks(f"sys.stdout = sys.stderr; os.chdir({str(tmp_path)!r}); runpy.run_path('train.py', run_name='__main__')")
    assert forks.stdout.readline() == "0\n"
    [run] = (tmp_path / "runs/by_hand").iterdir()
    assert (run / "code.py").read_bytes() == script.read_bytes().replace(secret.encode(), b"***")
    assert len((run / "history.csv").read_text().splitlines()) == 4 and (run / "manifest.json").exists()
    assert json.loads((run / "metrics.json").read_text())["loss"] == pytest.approx(0.9**6)
    files = [path.read_bytes() for path in run.iterdir() if path.is_file()]
    assert len(files) == 7 and not any(secret.encode() in data for data in files)


def git(folder, *arguments):
    settings = ["-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main"]
    return subprocess.check_output(["git", *settings, *arguments], cwd=folder, text=True).strip()


def test_the_environment_names_versions_and_the_commit(tmp_path, monkeypatch):
    def environment():
        return json.loads(storage.read(f"{experiment.Run('memory://environment', a=1).url}/environment.json"))

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    found = [environment()]
    assert found[0]["device"] == "cpu" or torch.accelerator.is_available()
    assert found[0]["python"] == sys.version.split()[0] and sys.platform in found[0]["platform"].lower()
    needed = {name: version(name) for name in ("torch", "torchvision", "transformers", "accelerate", "numpy")}
    assert needed.items() <= found[0]["packages"].items()
    (tmp_path / "file").write_text("one")
    for words in "init", "add .", "commit -m one", "tag v1":
        git(tmp_path, *words.split())
    head = git(tmp_path, "rev-parse", "HEAD")
    found.append(environment())
    (tmp_path / "file").write_text("two")
    found.append(environment())
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    found.append(environment())
    commits = [(each["git_commit"], each["git_dirty"]) for each in found]
    assert commits == [(None, None), (head, False), (head, True), (None, None)]


def test_a_run_in_a_notebook_keeps_the_cells_that_ran_and_no_output(capsys):
    """With magics, a secret that is shown, and a cell that never ran; first cut off, then again from its start."""
    cells = [
        "import os\nfrom helpers import experiment",
        "rate = 0.5",
        f"print(os.environ[{SECRET!r}], 'shown')",
        "%time 1 + 1",
        "run = experiment.Run('memory://notebook', rate=rate)",
        "2 * 'größe'",
        "run.finish({'rate': rate})",
        "'too late'",
    ]
    for count in 6, 8:
        shell = InteractiveShell.instance()
        try:
            for cell in cells[:count]:
                assert shell.run_cell(cell, store_history=True).success
        finally:
            shell.clear_instance()
    assert os.environ[SECRET] in capsys.readouterr().out
    (code,) = (name for name in storage.list_files("memory://notebook") if name.endswith("/code.py"))
    code = storage.read(f"memory://notebook/{code}").decode()
    ast.parse(code)  # magics included
    places = [code.index(part) for part in ("# In [1]\nimport os\n", "# In [2]\nrate = 0.5", *cells[4:7])]
    assert places == sorted(places) and "too late" not in code and os.environ[SECRET] not in code


def past_run(url, name, hyperparameters, metrics=None):
    """A run of that name as `Run` leaves it; without metrics one that was cut off."""
    storage.write(f"{url}/{name}/hyperparameters.json", json.dumps(hyperparameters).encode())
    if metrics is not None:
        storage.write(f"{url}/{name}/metrics.json", json.dumps(metrics).encode())
        storage.write(f"{url}/{name}/manifest.json", b"{}")


def test_runs_of_several_projects_are_compared_and_not_those_within_a_run():
    real, url = experiment.Run("memory://projects/train", epochs=3), "memory://projects"
    [row] = experiment.compare(url, "accuracy").rows  # which does not fail before the first run is finished
    assert (row["finished"], row["metrics"]) == (False, {})
    experiment.Run(f"{real.url}/sweep", epochs=4).finish({"accuracy": 1})
    real.finish({"epochs": 2, "accuracy": 0.5})
    past_run(url, "other/2020-01-01", {}, {"epochs": 9})
    comparison = experiment.compare(url)
    assert comparison.metric == "accuracy"  # which tells more than the first, the epochs
    first, second = comparison.rows
    assert first["hyperparameters"] == {"epochs": 3} and first["metrics"] == {"epochs": 2, "accuracy": 0.5}
    assert first["run"] == real.url.removeprefix(f"{url}/") and first["finished"] and first["newest"] and first["best"]
    assert (second["run"], second["best"], second["metrics"]) == ("other/2020-01-01", False, {"epochs": 9})


def test_the_best_run_is_that_of_the_largest_metric_or_of_the_smallest_loss():
    url, names = "memory://best", ["accuracy", "val_loss", "top_1_Error", "perplexity"]
    for day, value in enumerate([0.5, float("nan"), 0.75, 0.25, float("inf"), True, "high", None], 1):
        past_run(url, f"2026-01-0{day}", {"day": day}, dict.fromkeys(names, value))
    compared = [experiment.compare(url, name) for name in names]
    best = [row["run"][-1] for each in compared for row in each.rows if row["best"]]
    assert best == ["3", "4", "4", "4"]
    with pytest.raises(ValueError, match="memory://best has a metric 'acuracy'; there are: accuracy, val_loss"):
        experiment.compare(url, "acuracy")
    assert "0 runs at memory://no/runs" in experiment.compare("memory://no/runs")._repr_html_()
    with pytest.raises(storage.StorageError, match="no-such-bucket"):
        experiment.compare("s3://no-such-bucket/runs")


def table(page):
    """The texts of the cells, line by line."""
    return [[cell.get_text().strip() for cell in row.select("th, td")] for row in page.select("tr")]


SCRIPT = "<script>alert('a')</script>"


def test_the_table_shows_what_differs_what_came_out_and_which_is_best_and_leads_to_the_reports(url):
    past_run(url, "2026-01-02", {"lr": 0.1, "model": "cnn", "seed": 0}, {"accuracy": 0.5, "val_loss": 3, "run": "x"})
    past_run(url, "2026-01-03", {"lr": 0.001, "model": "cnn", "seed": 0}, {"accuracy": 0.75, "val_loss": 2.5})
    past_run(url, "2026-01-01", {"lr": 1, "model": "mlp", "seed": 0, "depth": None}, {"accuracy": 0.25, "val_loss": 1})
    past_run(url, "2026-01-04", {"lr": 1e-5, "model": "cnn", "seed": 0})
    past_run(url, "2025-01-01", {"lr": 1e-5, "model": SCRIPT, "a & b": "<b>"}, {"<i>": 1})
    page = BeautifulSoup(experiment.compare(url, "val_loss")._repr_html_(), "html.parser")
    assert table(page) == [
        [f"5 runs at {url}", "", "lr", "model", "seed", "depth", "a & b", "accuracy", "val_loss ↓", "<i>"],
        ["2026-01-04", "newest, cut off", "1e-05", "cnn", "0", "", "", "", "", ""],
        ["2026-01-03", "", "0.001", "cnn", "0", "", "", "0.75", "2.5", ""],
        ["2026-01-02", "", "0.1", "cnn", "0", "", "", "0.5", "3", ""],
        ["2026-01-01", "★ best", "1", "mlp", "0", "None", "", "0.25", "1", ""],
        ["2025-01-01", "", "1e-05", SCRIPT, "", "", "<b>", "", "", "1"],
    ]
    assert {tag.name for tag in page.find_all(True)} == {"table", "tr", "th", "td", "a"}
    assert page.a.attrs == {"href": f"{url}/2026-01-03/report.html"}  # of the finished ones


def test_a_report_shows_a_run_and_what_differs_from_the_best_and_loads_and_runs_nothing(url):
    past_run(url, "2026-01-01", {"lr": 0.1, "note": SCRIPT}, {"accuracy": 0.9})
    past_run(url, "2026-01-02", {"lr": 0.2, "note": SCRIPT}, {"accuracy": 0.8})
    run = experiment.Run(url, lr=0.3, note=SCRIPT, key=os.environ[SECRET])
    run.save_history([{"epoch": n, "train_loss": 3 - n, "val_loss": n or "", "val_best": [n]} for n in (0, 1, 2)])
    run.save_figure(SCRIPT.replace("/", ""), figure())
    run.finish({"accuracy": 0.85, "confusion_matrix": [[17, 4], [0, 29]], "sample": SCRIPT, "times": {"epoch": 2.5}})
    page = BeautifulSoup(html := storage.read(f"{run.url}/report.html").decode(), "html.parser")
    wanted = [["lr", "0.3"], ["note", SCRIPT], ["key", "***"], ["accuracy", "0.85"], ["sample", SCRIPT], ["17", "4"]]
    wanted += [["times", "epoch: 2.5"], ["lr", "0.3", "0.1"], ["accuracy", "0.85", "0.9"], ["torch", version("torch")]]
    assert not [line for line in wanted if line not in table(page)]
    text = page.get_text()
    assert "What differs from the best run" in text and "Beside it the best: 2026-01-01" in text
    train, val = (line["points"].split() for line in page.select("polyline"))  # epoch by epoch, the highest on top
    assert train == ["50.0,10.0", "170.0,55.0", "290.0,100.0"]
    assert [point.split(",")[0] for point in val] == ["170.0", "290.0"]
    [picture] = page.select("img")
    assert base64.b64decode(picture["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert not page.select("script, link, iframe, object, base, a") and "url(" not in html
    assert sys.version.split()[0] in text and "device " in text
    best = experiment.Run(url, lr=0.4)
    storage.write(f"{url}/2026-01-02/metrics.json", b"{no json")  # and a damaged one beside it is no reason to fail
    best.finish({"accuracy": 0.95})
    assert "No other run to compare with" in storage.read(f"{best.url}/report.html").decode()
    with pytest.raises(storage.StorageError, match=f"{url}/2026-01-02/metrics.json"):
        experiment.compare(url)
    past_run(url, "2026-01-02", {"lr": 0.2}, {"accuracy": 0.8})
    best.finish({"accuracy": 0.95})
    page = BeautifulSoup(storage.read(f"{best.url}/report.html"), "html.parser")
    assert "The best run so far" in page.get_text() and ["accuracy", "0.95", "0.9"] in table(page)


def test_what_goes_wrong_at_google_and_a_missing_package_are_sentences(google, monkeypatch):
    with pytest.raises(storage.NotFound, match="gs://experiments/no/object.*check the name"):
        storage.read("gs://experiments/no/object")
    for place in "gs", "s3":
        with pytest.raises(storage.StorageError, match="no-such-bucket"):
            experiment.Run(f"{place}://no-such-bucket/runs", a=1)
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(storage.StorageError, match="abfs://container/run.*[Ii]nstall adlfs"):
        storage.read("abfs://container/run")


class Odd(nn.Module):
    """Weights of many types and memory layouts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.brain = nn.Parameter(torch.randn(5, 3).to(torch.bfloat16))
        self.transposed = nn.Parameter(torch.randn(4, 6).T)
        self.channels_last = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.register_buffer("expanded", torch.randn(3, 1).expand(3, 7))
        self.register_buffer("part", torch.randn(10)[2:5])
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("count", torch.tensor(2**40))
        self.one, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.one.weight


def test_a_model_comes_back_with_every_weight_and_its_config_or_is_damaged(url):
    config = {"architecture": "odd", "classes": ["größe", "b"], "mean": [0.5, 0.25], "nothing": None}
    names = experiment.save_model(Odd(), url, **config)
    loaded, loaded_config = experiment.load_model(url)
    assert same(loaded, Odd()) and loaded_config == config
    assert sorted(names) == storage.list_files(url)
    target = Odd()
    target.expanded = torch.zeros(3, 7)  # PyTorch copies nothing into the other
    nn.init.zeros_(target.one.weight)
    target.load_state_dict(loaded)
    assert same(loaded, target)
    data = storage.read(f"{url}/{names[0]}")
    for damaged in data[:-1] + bytes([data[-1] ^ 1]), b"":
        storage.write(f"{url}/{names[0]}", damaged)
        with pytest.raises(storage.StorageError, match=f"{url}/{names[0]} is damaged.*save the model again"):
            experiment.load_model(url)


def old_or_new(url):
    """The seed of the model that is at the URL, which must be whole."""
    weights, config = experiment.load_model(url)
    assert same(weights, linear(config["seed"]))
    return config["seed"]


def test_a_process_killed_at_any_request_leaves_the_old_or_the_new_model(forks):
    url, found, status, number = "s3://experiments/killed", [], None, 0
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        code = f"os.environ['AWS_ENDPOINT_URL'] = {proxy.url!r}\ntorch.manual_seed(1)\n"
        code += f"experiment.save_model(torch.nn.Linear(4, 3), {url!r}, seed=1)"
        while status != 0:
            experiment.save_model(linear(0), url, seed=0)
            number += 1
            pids, last = queue.SimpleQueue(), proxy.requests + number

            def kill(request):
                if request == last:
                    os.kill(pids.get(timeout=30), signal.SIGKILL)

            proxy.on_request = kill
            pids.put(forks(code))
            status = int(forks.stdout.readline())
            found.append(old_or_new(url))
            assert status in (0, -signal.SIGKILL)
    assert found == sorted(found) and found.count(0) > 1 and found.count(1) > 1  # killed before and after the change
    assert len(storage.list_files(url)) == 2


def test_a_local_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    """What a killed one leaves is asked of a checkpoint."""
    storage.write(f"{tmp_path}/file", b"old")
    with pytest.raises(TypeError):
        storage.write(f"{tmp_path}/file", "no bytes")
    (tmp_path / "folder/inner").mkdir(parents=True)
    with pytest.raises(storage.StorageError, match="folder"):
        storage.write(f"{tmp_path}/folder", b"new")
    assert storage.list_files(tmp_path) == ["file"] and storage.read(f"{tmp_path}/file") == b"old"
