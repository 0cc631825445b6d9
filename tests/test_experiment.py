"""Runs, comparisons and models in a local folder, in memory, on S3 and on Google Cloud Storage; what is left when the
writing process is killed."""

import ast
import contextlib
import csv
import io
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from datetime import datetime
from importlib.metadata import version

import pytest
import torch
from bs4 import BeautifulSoup
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure
from servers import gcs, wait_until
from servers.embedded import connected
from servers.fault_proxy import fault_proxy
from torch.testing import assert_close

from helpers import experiment, storage

SECRET = "AWS_SECRET_ACCESS_KEY"
SCRIPT = "<script>alert('a')</script>"
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def s3(tmp_path_factory):
    """A connected server with a bucket."""
    with connected(storage.serve(tmp_path_factory.mktemp("served"))):
        storage.create_bucket("experiments")
        yield


@pytest.fixture(params=["local", "memory:/", "s3://experiments", "gs://experiments"])
def everywhere(request, tmp_path):
    """A place for runs that is not there yet, of each kind."""
    place = request.param.replace("local", str(tmp_path))
    with gcs.gcs(tmp_path, "experiments") if place.startswith("gs") else contextlib.nullcontext():
        yield f"{place}/everywhere"


@pytest.fixture
def url(request):
    return f"memory://{request.node.originalname}"


def linear(seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(4, 3)


def test_a_run_leaves_all_its_files_and_a_manifest_that_lists_them(everywhere):
    asked, results = {"sizes": [1, 2], "note": "é", "nothing": None}, {"accuracy": 0.75, "model": "there"}
    run = experiment.Run(everywhere, **asked)
    run.save_history([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "größe, neu": 'a "b"'}])
    run.save_figure("curves", Figure())
    others = "model/model-of/model-1.safetensors", "model/notes.txt"
    for other in others:
        storage.write(f"{run.url}/{other}", b"mine")
    for seed in 0, 1, 1:  # of which the last is left, and what is not a model
        run.save_model(linear(seed), classes=["a", "b", "c"][: seed + 2])
    run.finish(results)
    read = lambda name: storage.read(f"{run.url}/{name}")
    manifest, of = json.loads(read("manifest.json")), run.url.removeprefix(f"{everywhere}/")
    started, finished = (datetime.fromisoformat(manifest[name]) for name in ("started", "finished"))
    assert started == datetime.strptime(f"{of}+0000", "%Y-%m-%dT%H-%M-%S.%f%z") < finished
    names = "code.py environment.json history.csv hyperparameters.json metrics.json model/model.json plots/curves.png"
    weights = "model/" + json.loads(read("model/model.json"))["weights"]
    assert manifest["files"] == sorted([*names.split(), *others, weights, "report.html"])
    assert storage.list_files(everywhere) == sorted(f"{of}/{name}" for name in [*manifest["files"], "manifest.json"])
    assert (json.loads(read("hyperparameters.json")), json.loads(read("metrics.json"))) == (asked, results)
    assert list(csv.DictReader(io.StringIO(read("history.csv").decode(), newline=""))) == [
        {"epoch": "1", "loss": "0.5", "größe, neu": ""},
        {"epoch": "2", "loss": "0.25", "größe, neu": 'a "b"'},
    ]
    assert read("plots/curves.png").startswith(b"\x89PNG\r\n")
    loaded, config = experiment.load_model(f"{run.url}/model")
    assert_close(loaded, linear(1).state_dict(), rtol=0, atol=0)
    assert config == {"classes": ["a", "b", "c"]}
    with pytest.raises(storage.NotFound, match=f"{run.url}/no-object.*check the"):
        read("no-object")


def test_only_a_cut_off_run_with_the_same_hyperparameters_and_code_is_taken_up_again(url):
    first, asked = experiment.Run(url, a=1, b=(2, 3)), {"a": 1, "b": (2, 3)}
    other = experiment.Run(url, a=1, b=(2, 4))
    again = experiment.Run(f"{url}/", **asked)
    assert again.url == first.url != other.url
    again.finish({})
    new = experiment.Run(url, **asked)
    assert new.url > first.url and new.url != other.url
    storage.write(f"{new.url}/code.py", b"edited since")
    assert experiment.Run(url, **asked).url > new.url


def test_a_run_that_is_alive_is_left_alone_and_a_killed_one_is_continued(tmp_path, capsys):
    url, saved = f"{tmp_path}/runs", FORK.Event()

    def another_terminal():
        run = experiment.Run(url, epochs=3)
        run.save_history([{"epoch": 1}, {"epoch": 2}])
        saved.set()
        signal.pause()

    other = FORK.Process(target=another_terminal)
    other.start()
    assert saved.wait(60)
    [name] = os.listdir(url)
    two = experiment.Run(url, epochs=3)
    assert two.url != f"{url}/{name}" and capsys.readouterr().out == f"starting run {two.url}\n"
    two.finish({})
    other.kill()
    other.join()
    assert "lease.json" not in storage.list_files(two.url) and "lease.json" in storage.list_files(f"{url}/{name}")
    assert experiment.Run(url, epochs=3).url == f"{url}/{name}"
    assert capsys.readouterr().out == f"continuing run {url}/{name}, from epoch 3\n"


def lease(run, renewed=1.0):
    """Another machine's."""
    storage.write(f"{run}/lease.json", json.dumps({"host": "elsewhere", "pid": 1, "renewed": renewed}).encode())


@pytest.mark.parametrize("alive", [False, True])
def test_the_run_of_another_machine_is_continued_only_when_its_lease_is_not_renewed(alive, monkeypatch, capsys):
    url = f"memory://elsewhere-{alive}"
    lease(run := experiment.Run(url, a=1).url)
    monkeypatch.setattr(experiment, "LEASE", 0.4)
    if alive:
        threading.Timer(0.1, lease, [run, 2.0]).start()
    assert (experiment.Run(url, a=1).url != run) == alive
    assert "see whether elsewhere still writes" in capsys.readouterr().out


def test_of_two_processes_that_find_a_dead_run_at_the_same_moment_one_continues_it(monkeypatch, url):
    dead, write_lease = experiment.Run(url, a=1).url, experiment._write_lease
    storage.delete(f"{dead}/lease.json")

    def write_and_be_overtaken(run):
        write_lease(run)
        if run == dead:  # the other one saw no lease either
            lease(run)

    monkeypatch.setattr(experiment, "LEASE", 6)
    monkeypatch.setattr(experiment, "_write_lease", write_and_be_overtaken)
    assert experiment.Run(url, a=1).url != dead


def test_a_process_that_stood_still_for_long_does_not_write_what_another_has_taken_over(monkeypatch, url):
    monkeypatch.setattr(experiment, "LEASE", 0.2)
    run = experiment.Run(url, a=1)
    lease(run.url)
    wait_until(lambda: run.lost, "what another has written", os.devnull)
    with pytest.raises(storage.StorageError, match="taken over by another process"):
        run.save_history([{"epoch": 1}])
    assert json.loads(storage.read(f"{run.url}/lease.json"))["host"] == "elsewhere"


BY_HAND = """
from helpers.experiment import Run
SECRET = {secret!r}  # as people do
weight, rows = 1.0, []
run = Run("runs", lr=0.1, key=SECRET)
for epoch in range(3):
    weight -= 0.1 * weight  # größer wird es nicht
    rows.append({{"epoch": epoch, "loss": weight ** 2, "note": SECRET}})
    run.save_history(rows)
run.finish({{"loss": rows[-1]["loss"], "key": SECRET}})
"""


def test_a_loop_written_by_hand_needs_three_lines_and_keeps_its_script_without_the_secret(tmp_path, monkeypatch):
    secret = os.environ[SECRET]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(BY_HAND.format(secret=secret), encoding="utf-8")
    runpy.run_path("train.py", run_name="__main__")
    [run] = (tmp_path / "runs").iterdir()
    assert (run / "code.py").read_text("utf-8") == BY_HAND.format(secret="***")
    files = [path.read_bytes() for path in run.iterdir()]
    assert len(files) == 7 and not any(secret.encode() in data for data in files)


def test_the_environment_names_versions_and_the_commit(tmp_path, monkeypatch):
    def environment():
        return json.loads(storage.read(f"{experiment.Run('memory://environment', a=1).url}/environment.json"))

    def git(words):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *words.split()]
        return subprocess.check_output(command, text=True).strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    found = [environment()]
    assert found[0]["device"] == "cpu" or torch.accelerator.is_available()
    assert (found[0]["python"], found[0]["packages"]["torch"]) == (sys.version.split()[0], version("torch"))
    (tmp_path / "file").write_text("one")
    for words in "init -q", "add .", "commit -m one", "tag v1":
        git(words)
    head = git("rev-parse HEAD")
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
        "import os\nfrom helpers import experiment\nrate = 0.5",
        f"print(os.environ[{SECRET!r}], 'shown')",
        "%time 1 + 1",
        "run = experiment.Run('memory://notebook', rate=rate)",
        "2 * 'größe'",
        "run.finish({'rate': rate})",
        "'too late'",
    ]
    for count in 5, 7:
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
    places = [code.index(part) for part in ("# In [1]\nimport os\n", "# In [2]\nprint", *cells[3:6])]
    assert places == sorted(places) and "too late" not in code and os.environ[SECRET] not in code


def past_run(url, name, hyperparameters, metrics=None):
    """A run of that name as `Run` leaves it; without metrics one that was cut off."""
    storage.write(f"{url}/{name}/hyperparameters.json", json.dumps(hyperparameters).encode())
    if metrics is not None:
        storage.write(f"{url}/{name}/metrics.json", json.dumps(metrics).encode())
        storage.write(f"{url}/{name}/manifest.json", b"{}")


def test_the_best_run_is_that_of_the_largest_metric_or_of_the_smallest_loss(url):
    names = ["epochs", "accuracy", "val_loss", "top_1_Error"]
    for day, value in enumerate([0.5, float("nan"), 0.75, 0.25, float("inf"), True, "high"], 1):
        past_run(url, f"2026-01-0{day}", {"day": day}, dict.fromkeys(names, value))
    past_run(url, "2026-01-01/sweep/2026-01-08", {}, {"accuracy": 1})  # within a run
    best = [row["run"][-1] for name in names for row in experiment.compare(url, name).rows if row["best"]]
    assert best == ["3", "3", "4", "4"]
    assert experiment.compare(url).metric == "accuracy"  # which tells more than the first, the epochs
    with pytest.raises(ValueError, match=f"{url} has a metric 'acuracy'; there are: epochs, accuracy, val_loss"):
        experiment.compare(url, "acuracy")


def table(page):
    """The texts of the cells, line by line."""
    return [[cell.get_text().strip() for cell in row.select("th, td")] for row in page.select("tr")]


def test_the_table_shows_what_differs_what_came_out_and_which_is_best_and_leads_to_the_reports(url):
    past_run(url, "2026-01-03", {"lr": 0.001, "model": "cnn", "seed": 0}, {"accuracy": 0.75, "val_loss": 3, "run": "x"})
    past_run(url, "2026-01-01", {"lr": 1, "model": "mlp", "seed": 0, "depth": None}, {"accuracy": 0.25, "val_loss": 1})
    past_run(url, "2026-01-04", {"lr": 1e-5, "model": "cnn", "seed": 0})
    past_run(url, "2025-01-01", {"lr": 1e-5, "model": SCRIPT, "seed": 0, "a & b": "<b>"}, {"<i>": 1})
    page = BeautifulSoup(experiment.compare(url, "val_loss")._repr_html_(), "html.parser")
    assert table(page) == [
        [f"4 runs at {url}", "", "lr", "model", "depth", "a & b", "accuracy", "val_loss ↓", "<i>"],
        ["2026-01-04", "newest, cut off", "1e-05", "cnn", "", "", "", "", ""],
        ["2026-01-03", "", "0.001", "cnn", "", "", "0.75", "3", ""],
        ["2026-01-01", "★ best", "1", "mlp", "None", "", "0.25", "1", ""],
        ["2025-01-01", "", "1e-05", SCRIPT, "", "<b>", "", "", "1"],
    ]
    assert {tag.name for tag in page.find_all(True)} == {"table", "tr", "th", "td", "a"}
    assert page.a.attrs == {"href": f"{url}/2026-01-03/report.html"}  # of the finished ones


def test_a_report_shows_a_run_and_what_differs_from_the_best_and_loads_and_runs_nothing(url):
    past_run(url, "2026-01-01", {"lr": 0.1, "note": SCRIPT}, {"accuracy": 0.9})
    run = experiment.Run(url, lr=0.3, note=SCRIPT, key=os.environ[SECRET])
    run.save_figure(SCRIPT.replace("/", ""), Figure())
    run.finish({"accuracy": 0.85, "confusion_matrix": [[17, 4], [0, 29]], "sample": SCRIPT, "times": {"epoch": 2.5}})
    page = BeautifulSoup(html := storage.read(f"{run.url}/report.html").decode(), "html.parser")
    wanted = [["lr", "0.3"], ["note", SCRIPT], ["key", "***"], ["accuracy", "0.85"], ["sample", SCRIPT], ["17", "4"]]
    wanted += [["times", "epoch: 2.5"], ["lr", "0.3", "0.1"], ["accuracy", "0.85", "0.9"], ["torch", version("torch")]]
    assert not [line for line in wanted if line not in table(page)]
    assert "Beside it the best: 2026-01-01" in page.get_text()
    assert page.select("img[src^='data:image/png;base64,iVBOR']") and "url(" not in html
    assert not page.select("script, link, iframe, object, base, a")
    best = experiment.Run(url, lr=0.4)
    best.finish({"accuracy": 0.95})
    page = BeautifulSoup(storage.read(f"{best.url}/report.html"), "html.parser")
    assert "The best run so far" in page.get_text() and ["accuracy", "0.95", "0.9"] in table(page)
    storage.write(f"{url}/2026-01-01/metrics.json", b"{no json")  # beside it that is no reason to fail
    best.finish({"accuracy": 0.95})
    with pytest.raises(storage.StorageError, match=f"{url}/2026-01-01/metrics.json"):
        experiment.compare(url)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(storage.StorageError, match="abfs://container/run.*[Ii]nstall adlfs"):
        storage.read("abfs://container/run")


def test_a_model_comes_back_with_every_weight_and_its_config_or_is_damaged(url):
    weight = torch.randn(4, 6)
    state = {"one": weight, "tied": weight, "transposed": weight.T, "part": weight[2:], "count": torch.tensor(2**40)}
    state |= {"brain": weight.to(torch.bfloat16), "expanded": weight[:, :1].expand(4, 7), "empty": weight[:0]}
    names = experiment.save_model(state, url, classes=["größe", "b"], nothing=None)
    loaded, config = experiment.load_model(url)
    assert_close(loaded, state, rtol=0, atol=0)
    assert config == {"classes": ["größe", "b"], "nothing": None} and sorted(names) == storage.list_files(url)
    data = storage.read(f"{url}/{names[0]}")
    storage.write(f"{url}/{names[0]}", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(storage.StorageError, match=f"{url}/{names[0]} is damaged.*save the model again"):
        experiment.load_model(url)


def save_and_die(url, last):
    """Save a second model there, killed at a request."""

    def die(request):
        if request == last:
            os.kill(os.getpid(), signal.SIGKILL)

    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.on_request = die
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        storage.forget_connection()
        experiment.save_model(linear(1), url, seed=1)


def test_a_process_killed_at_any_request_leaves_the_old_or_the_new_model():
    url, found, status = "s3://experiments/killed", [], None
    while status != 0:
        experiment.save_model(linear(0), url, seed=0)
        process = FORK.Process(target=save_and_die, args=[url, len(found) + 1])
        process.start()
        process.join()
        status = process.exitcode
        assert status in (0, -signal.SIGKILL)
        weights, config = experiment.load_model(url)
        assert_close(weights, linear(config["seed"]).state_dict(), rtol=0, atol=0)
        found.append(config["seed"])
    assert found == sorted(found) and found.count(0) > 1 and found.count(1) > 1  # killed before and after the change
    assert len(storage.list_files(url)) == 2
