"""The runner, on tiny notebooks with real kernels; most tests look at one run of four that go different ways."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from html import escape
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from unittest.mock import Mock

import nbformat
import psutil
import pytest
from bs4 import BeautifulSoup
from jupyter_core.utils import ensure_event_loop
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers import run, storage

SECRET = 'wJalr/XUtnFEMI+K7MDENG\\bPxRfiCY"EXAMPLE'  # with characters that JSON and addresses write differently
SHOW = "from IPython.display import JSON, Image, display\n"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
ROWS = [{"name": "<i>", "model_bytes": 3054499}, {"name": "b", "model_bytes": 10}]
RESULTS = {"val_loss": 0.123456, "model_bytes": 3054499, "loop_seconds": 65.0, "tag": "<i>", "rows": ROWS}
METADATA = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def write(folder: Path, name: str, *cells: str) -> Path:
    """A notebook of code cells; '# ' begins a Markdown cell, and a cell of assignments named so is tagged."""
    made = [new_markdown_cell(cell) if cell.startswith("# ") else new_code_cell(cell.strip()) for cell in cells]
    for cell in made:
        if cell.source.startswith("#parameters"):
            cell.metadata.tags = ["parameters"]
    folder.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=made, metadata=METADATA), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory, embedded_env):
    """One run of four notebooks, on a machine where Jupyter knows another kernel by the name of python3."""
    folder = tmp_path_factory.mktemp("run")
    notebooks = folder / "notebooks"
    write(
        notebooks,
        "01_good.ipynb",
        "# A *good* <one> & `more`",
        "#parameters\nepochs = 1  # passes\nname = 'a'",
        "import os, sys\nprint(os.getcwd(), sys.executable, os.environ['AWS_ENDPOINT_URL'], sep='\\n')",
        SHOW + f"import base64\npixel = base64.b64decode('{PIXEL}')",
        "for end in (b'first', b'middle', b'final'):\n    display(Image(data=pixel + end))",
        "display(JSON({'not': 'the last'}))",
        f"display(JSON({{'epochs': epochs, 'kind': type(epochs).__name__, 'model': 's3://a/b'}} | {RESULTS}))",
        "print('the end')",
    )
    secret = "import os\nfrom urllib.parse import quote\nsecret = os.environ['WANDB_API_KEY']"
    fails = "x = 1\n'<u>'\n" + "x += 1\n" * 9 + "raise ValueError('\\x1b[31m<b>red</b>\\x1b[0m\\nand ' + secret)"
    write(notebooks, "02_fails.ipynb", "# Fails", "#parameters\nepochs = 1", secret, fails)
    write(notebooks, "03_dies.ipynb", "# Dies", "import os, signal", "os.kill(os.getpid(), signal.SIGKILL)")
    shows = "print(secret, 'http://host/?x=' + quote(secret, safe=''))"
    links = "[first](01_good.ipynb) [the source](../helpers/x.py)"
    text = f"# It:\n\n## A *part* of it\n\n$$\\frac{{1}}{{2}}$$\n\n{links}"
    write(notebooks, "04_leaks.ipynb", "# Leaks", secret, shows, text)
    other = folder / "other" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Other", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "helpers", "run", "-p", "epochs", "3"]
    env = {**os.environ, **embedded_env, "WANDB_API_KEY": SECRET, "JUPYTER_PATH": str(folder / "other")}
    process = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    output = (folder / "runs" / "latest").resolve()
    page = soup(output / "index.html")
    cards = {card.select_one(".file").get_text().split()[0]: card for card in page.select("article")}
    return SimpleNamespace(process=process, folder=folder, output=output, page=page, cards=cards)


def soup(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def texts(parts):
    return [part.get_text() for part in parts]


def outputs_of(path: Path) -> str:
    """All that the cells printed or showed as text."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for cell in cells for o in cell.outputs)


def test_goes_on_after_a_failure_says_what_failed_where_and_shows_no_secret(finished):
    said, page = finished.process, finished.cards["02_fails.ipynb"]
    assert said.returncode == 1, said.stderr
    lines = said.stdout.splitlines()
    assert lines[-2].startswith("1 of 4 notebooks succeeded, in ")
    assert lines[-1] == f"Results: {os.path.join('runs', finished.output.name, 'index.html')}"
    assert "KernelApp" not in said.stderr and "cells," not in said.stderr  # no chatter, no bar
    good, fails, dies, leaks = [line for line in lines if line.startswith(("ok", "FAILED"))]
    assert good.startswith("ok     01_good.ipynb,")
    assert leaks == "FAILED 04_leaks.ipynb, the notebook showed WANDB_API_KEY, replaced by ***"
    error = "In [4]: ValueError: <b>red</b> and ***"  # the injected parameters are In [2], but no cell of the source
    assert fails == f"FAILED 02_fails.ipynb, the notebook showed WANDB_API_KEY, replaced by ***; {error}"
    assert "       | x = 1\n       | '<u>'\n" in said.stdout and "| ...\n" in said.stdout
    assert error in page.select_one(".error").get_text() and not page.select("b, u")
    assert page.select_one("pre").get_text().startswith("x = 1\n'<u>'")
    assert dies.startswith(("FAILED 03_dies.ipynb, In [2]", "FAILED 03_dies.ipynb, In [*]"))
    assert "DeadKernelError: Kernel died" in dies
    written = [path.read_text(encoding="utf-8") for path in finished.output.iterdir()]
    assert "XUtnFEMI" not in "".join([*written, said.stdout, said.stderr])
    assert outputs_of(finished.output / "04_leaks.ipynb") == "*** http://host/?x=***\n"


def test_kernels_are_ours_with_our_s3_and_the_parameters_that_a_notebook_has(finished, embedded_env):
    folder, python, endpoint = outputs_of(finished.output / "01_good.ipynb").splitlines()[:3]
    assert Path(folder) == (finished.folder / "notebooks").resolve()
    assert (python, endpoint) == (sys.executable, embedded_env["AWS_ENDPOINT_URL"])
    cells = [cell for path in finished.output.glob("*.ipynb") for cell in nbformat.read(path, as_version=4).cells]
    injected = [cell.source for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert injected == ["# Parameters\nepochs = 3\n"] * 2


def test_results_are_those_of_the_last_cell_that_shows_json(finished):
    good = nbformat.read(finished.output / "01_good.ipynb", as_version=4)
    assert run.read_results(good) == {"epochs": 3, "kind": "int", "model": "s3://a/b"} | RESULTS
    with pytest.raises(ValueError, match="04_leaks.ipynb shows no results"):
        run.read_results(finished.output / "04_leaks.ipynb")
    good.cells[-2].outputs[0].data["application/json"] = [1, 2]
    with pytest.raises(ValueError, match="this notebook shows no results"):
        run.read_results(good)


def test_index_shows_titles_results_and_figures(finished):
    card = finished.cards["01_good.ipynb"]
    assert list(finished.cards) == ["01_good.ipynb", "02_fails.ipynb", "03_dies.ipynb", "04_leaks.ipynb"]
    assert card.select_one("h2").get_text() == "A good <one> & more" and not card.select("one, i")
    assert texts(finished.page.select(".pill")) == ["ok", "FAILED", "FAILED", "FAILED"]
    cells = [texts(row.select("th, td")) for row in card.select("dd tr")]
    assert cells == [["name", "model bytes"], ["<i>", "3.1 MB"], ["b", "10 Bytes"]]
    shown = [(pair.dt.get_text(), pair.dd.get_text()) for pair in card.select("dl div") if not pair.select("tr")]
    expected = [("epochs", "3"), ("validation loss", "0.123"), ("model bytes", "3.1 MB"), ("loop seconds", "1 min 5 s")]
    assert sorted(shown) == sorted([*expected, ("kind", "int"), ("tag", "<i>"), ("model", "s3://a/bcopy")])
    images = [image["src"].partition("data:image/png;base64,")[2] for image in card.select(".figures img")]
    assert [base64.b64decode(image)[-5:] for image in images] == [b"first", b"final"]
    assert "1 of 4 ok" in finished.page.select_one("header").get_text()


def test_pages_are_whole_need_no_network_lead_on_and_say_what_made_them(finished):
    assert sorted(path.suffix for path in finished.output.iterdir()) == [".html"] * 5 + [".ipynb"] * 4
    pages = {path.stem: soup(path) for path in finished.output.glob("*.html")}
    for name, page in pages.items():
        assert not page.select("[src^=http], link[href], script[src]"), name
        assert name == "index" or not page.select("script"), name
        for link in page.select("a[href]"):
            target, _, anchor = link["href"].partition("#")
            assert (finished.output / target).exists() if target else page.find(id=anchor), link
    assert '"epochs": 3' in pages["01_good"].get_text()
    before, after = (pages["02_fails"].select_one(f"[rel={way}]")["href"] for way in ("prev", "next"))
    assert (before, after) == ("01_good.html", "03_dies.html")
    nav = pages["02_fails"].select_one("nav.contents").get_text()
    assert "epochs = 3" in nav and f"Python {sys.version.split()[0]}" in nav
    page = pages["04_leaks"]
    assert [link["href"] for link in page.select(".contents > a")] == ["#A-part-of-it"]
    assert page.select_one("math mfrac") and page.select_one("main > div a[href='01_good.html']")
    assert "the source" in page.get_text() and not page.select("a[href^='..']")


@pytest.mark.skipif(not which("chromium"), reason="chromium is not installed here, .ci/run does it")
def test_the_index_fits_a_telephone(finished, tmp_path):
    page = (finished.output / "index.html").read_text(encoding="utf-8").replace("s3://a/b", "s3://" + "a" * 90)
    width = "document.title = this.contentDocument.documentElement.scrollWidth"
    frame = '<iframe style="border: 0; width: 400px" srcdoc="{}" onload="{}"></iframe>'
    (tmp_path / "frame.html").write_text(frame.format(escape(page), width))
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    dom = subprocess.run([*words, tmp_path / "frame.html"], capture_output=True, text=True, timeout=60).stdout
    assert "<title>400</title>" in dom


def test_picks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "01_one.ipynb", "02_two.ipynb", "03a_x.ipynb"
    first, second, page = known = [str(write(tmp_path / "notebooks", name)) for name in names]
    write(Path("notebooks"), "draft.ipynb")
    elsewhere, same = (str(write(tmp_path / "elsewhere", name)) for name in ("mine.ipynb", "01_one.ipynb"))
    assert run.pick([]) == known
    assert run.pick(["02", "01"]) == [second, first] and run.pick(["03"]) == run.pick(["03a"]) == [page]
    words = ["02_two", "02_two.ipynb", "notebooks/02_two.ipynb", elsewhere, "s3://b/x.ipynb"]
    assert run.pick(words) == [second, elsewhere, "s3://b/x.ipynb"]
    with pytest.raises(ValueError, match="same name"):
        run.pick(["01", same])
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no notebooks: none in"):
        run.pick([])


def test_what_cannot_run_is_said_in_a_line_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    def refused(*words):
        with pytest.raises(SystemExit) as stopped:
            run.main([*words])
        return stopped.value.code, capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.storage, "connect", lambda: None)
    write(Path("notebooks"), "01_one.ipynb", "#parameters\nbucket = 'b'\nseed = 1", "open('ran', 'w')")
    assert refused("01", "07") == (2, "no notebook 07; there are: 01_one")
    unknown = 2, "no parameter epoch in these notebooks; there are: bucket, seed"
    assert refused("01", "-p", "seed", "2", "-p", "epoch", "3", "--sweep") == unknown
    monkeypatch.setattr(run.storage, "connect", Mock(side_effect=storage.StorageError("error: nothing answers")))
    assert refused() == (1, "nothing answers")
    assert [path.name for path in tmp_path.rglob("*")] == ["notebooks", "01_one.ipynb"]


def test_an_interrupt_leaves_a_whole_page_and_no_kernel(embedded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    slow = "import os, time\nprint(os.getpid(), file=open('begun', 'w'), flush=True)\ntime.sleep(300)"
    write(Path("notebooks"), "02_slow.ipynb", "# Slow", "print('before', flush=True)", slow, "'after'")
    write(Path("notebooks"), "03_never.ipynb", "# Never", "1")
    Path("notebooks/01_broken.ipynb").write_text("{")
    begun = tmp_path / "notebooks/begun"

    def terminate():
        while not (begun.exists() and begun.read_text().strip()):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)  # which does what Ctrl-C does

    threading.Thread(target=terminate, daemon=True).start()
    assert run.main([]) == 130
    ensure_event_loop().set_exception_handler(lambda *_: None)  # nobody waits for the interrupted cell any more
    printed, output = capsys.readouterr().out, Path("runs/latest")
    assert "interrupted 02_slow.ipynb, In [2]: KeyboardInterrupt\n" in printed
    assert "FAILED 01_broken.ipynb, NotJSONError" in printed and "0 of 3 notebooks succeeded" in printed
    assert not psutil.pid_exists(int(begun.read_text()))
    assert texts(soup(output / "index.html").select(".pill")) == ["FAILED", "interrupted"]
    assert outputs_of(output / "02_slow.ipynb") == "before\n" and (output / "02_slow.html").exists()


def test_hostile_names_and_widgets_do_nothing_in_the_html():
    hostile = "<img src=x onerror=alert(1)><a href='javascript:alert(3)'>b</a>"
    table = f"| class | images |\n|---|--:|\n| {hostile}<script>alert(2)</script> | **3** |\n\n```python\nprint(1)\n```"
    given = [
        {"text/markdown": table},
        {"text/html": f"<b>{hostile}</b>"},
        {"application/javascript": "alert(4)"},
        {"text/html": f"<script>alert(5)</script>{hostile}"},
        {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "0%"},
    ]
    state = {"state": {"1": {}}, "version_major": 2, "version_minor": 0}
    metadata = {"widgets": {"application/vnd.jupyter.widget-state+json": state}}
    cell = new_code_cell("", outputs=[new_output("display_data", data=data) for data in given])
    html = run.EXPORTER.from_notebook_node(new_notebook(cells=[cell], metadata=metadata))[0]
    page = BeautifulSoup(html, "html.parser")
    assert not page.select("script, [onerror], [href^=javascript]")
    assert page.select_one("td strong").get_text() == "3" and page.select("pre") and page.select("b a")
    assert page.select("td")[1]["style"].replace(" ", "").startswith("text-align:right")
    [frame] = page.select("iframe")  # which may run its own script, and reach nothing outside
    assert "allow-scripts" in frame["sandbox"] and "allow-same-origin" not in frame["sandbox"]


def test_a_sweep_runs_each_combination_and_compares_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.storage, "connect", lambda: monkeypatch.setenv("AWS_ENDPOINT_URL", "http://from.connect"))
    fails = SHOW + "import os\nif rate == 2: raise ValueError('diverged')"
    shows = "display(JSON({'val_loss': rate / 8, 's3': os.environ['AWS_ENDPOINT_URL'], 'run': run}))"
    trains = write(tmp_path, "trains.ipynb", "# Trains", "#parameters\nrate = 1.0\nkind = 'x'\nrun = ''", fails, shows)
    planned = run.plan_runs([str(trains)], {"rate": [1.0, 2], "kind": ["a", "b"]}, sweep=True)
    assert [[*outcome.parameters.values()] for outcome in planned] == [[1.0, "a"], [1.0, "b"], [2, "a"], [2, "b"]]
    storage.write(tmp_path / "mine/report.html", b"all about it")
    words = ["trains.ipynb", "-p", "rate", "1.0,2", "-p", "kind", "a", "-p", "run", f"{tmp_path}/mine", "--sweep"]
    assert run.main(words) == 1
    page = soup(Path("runs/latest/index.html"))
    rows = [texts(row.select("td, th")) for row in page.select(".sweep tr")]
    assert [row[:3] + row[4:] for row in rows] == [
        ["run", "rate", "kind", "validation loss"],
        ["trains-01", "1.0", "a", "0.125"],
        ["trains-02 FAILED", "2", "a", ""],
    ]
    assert len(page.select("article")) == 2 and "http://from.connect" in page.get_text()
    report = page.select_one("article a[href$='_report.html']")["href"]  # of its run, put beside the page
    assert Path("runs/latest", report).read_text() == "all about it"


def test_notebook_from_s3_to_s3_from_any_folder(embedded, tmp_path, monkeypatch, bucket):
    monkeypatch.chdir(tmp_path)
    storage.create_bucket(bucket)
    shows = SHOW + "import os\ndisplay(JSON({'number': number, 'folder': os.getcwd()}))"
    local = write(tmp_path, "01_asks.ipynb", "# Asks", "#parameters\nnumber = 1", shows)
    storage.write(f"s3://{bucket}/in/01_asks.ipynb", local.read_bytes())
    assert run.main([f"s3://{bucket}/in/01_asks.ipynb", "-p", "number", "7", "-o", f"s3://{bucket}/out"]) == 0
    assert sorted(storage.list_files(f"s3://{bucket}/out")) == ["01_asks.html", "01_asks.ipynb", "index.html"]
    executed = nbformat.reads(storage.read(f"s3://{bucket}/out/01_asks.ipynb").decode(), as_version=4)
    assert run.read_results(executed) == {"number": 7, "folder": str(storage.REPOSITORY / "notebooks")}
    assert os.listdir(tmp_path) == ["01_asks.ipynb"]
