"""Run the notebooks in order, each with papermill, and show what came out on one page.

    python -m helpers run                       every notebook of notebooks/
    python -m helpers run 02 03 -p epochs 3     some of them, with another value for a parameter
    python -m helpers run 02 -p epochs 3,6 -p batch_size 32,64 --sweep      once for each combination

Executed notebooks, their HTML and an index.html go to runs/{date_time}/, or to the folder or URL of --output. A
notebook that fails does not stop the next one. Exit code: 0 when all succeeded, 1 when one failed, 2 for a notebook or
parameter that does not exist, 130 when interrupted.
"""

import argparse
import functools
import importlib.metadata
import itertools
import logging
import os
import platform
import re
import signal
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import bleach
import jinja2
import nbformat
import papermill
from bleach.css_sanitizer import CSSSanitizer
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from papermill.cli import _resolve_type as parse_value

from helpers import storage


class RunError(Exception):
    """Why a notebook failed on several processes, in one sentence that names the process."""


@dataclass
class Outcome:
    """How one notebook went; `status` is "ok", "FAILED", or "interrupted" for the one Ctrl-C stopped."""

    notebook: str  # a path or URL
    parameters: dict = field(default_factory=dict)
    name: str = ""  # of its file in the output
    previous: str = ""  # the names of the runs before and after this one
    next: str = ""
    status: str = "interrupted"
    seconds: float = 0.0
    error: str = ""  # cell 7 (In [5]): ErrorName: message
    source: str = ""  # the first lines of that cell
    report: bool = False  # whether there is a {name}_report.html, the page of its experiment.Run
    title: str = ""  # empty without an HTML page to link to
    results: dict = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)  # data: URLs of the first and the last figure


class OwnKernel(AsyncKernelManager):
    """Kernels of the Python that runs this, whatever "python3" kernelspecs Jupyter knows on this machine.

    They listen at sockets in a folder of their own: a port that was free when Jupyter chose it may be taken, by any
    connection to S3, when the kernel binds it.
    """

    def _transport_default(self):
        return "tcp" if os.name == "nt" else "ipc"

    def _ip_default(self):
        self.folder = tempfile.TemporaryDirectory()
        return f"{self.folder.name}/kernel" if self.transport == "ipc" else "127.0.0.1"

    def _kernel_spec_manager_default(self):
        return KernelSpecManager(kernel_dirs=[])  # no folders to search: ipykernel's own spec is left, sys.executable


def run_papermill(notebook, target, parameters, kernel=OwnKernel):
    """Execute a notebook in a kernel of this Python, with a bar in a terminal; without `target` nothing is kept."""
    papermill.execute_notebook(
        notebook,
        target,
        parameters,
        kernel_name="python3",
        language="python",
        kernel_manager_class=kernel,
        extra_arguments=["--log-level=CRITICAL"],  # else kernels write into the progress bar
        cwd=storage.REPOSITORY / "notebooks" if "://" in str(notebook) else Path(notebook).resolve().parent,
        iopub_timeout=60,  # seconds a busy machine may take to deliver a cell's last output; the default is 4
        coalesce_streams=True,  # of a library's progress bar, keep the last state
        progress_bar=target and {"desc": Path(notebook).stem, "leave": False, "disable": None},
    )  # None: in a terminal


def run_notebooks(notebooks, parameters, output, execute=run_papermill, sweep=False):
    """Execute notebooks one after the other into `output`, a folder or URL, with an index.html of how they went.

    parameters: {name: value}, each passed to the notebooks that have it; ValueError for one that no notebook has.
    output: None keeps nothing (all machines but the first). execute: like run_papermill, how one notebook is executed.
    sweep: the values are lists; run each combination of those a notebook has. Returns the Outcomes.
    """
    storage.connect()  # once: the kernels inherit the environment, so all notebooks see the same S3
    planned = plan_runs([str(notebook) for notebook in notebooks], parameters, sweep)
    if output and "://" not in str(output):
        Path(output).mkdir(parents=True, exist_ok=True)
        if Path(output).parent.name == "runs":
            with suppress(OSError):  # a convenience, and not every system has links
                latest = Path(output).with_name("latest")
                latest.unlink(missing_ok=True)
                latest.symlink_to(Path(output).name)
    started, interrupt = time.monotonic(), None
    for done, outcome in enumerate(planned, 1):
        interrupt = run_notebook(outcome, output, execute)
        if output:
            storage.write(f"{output}/index.html", render_index(planned[:done], len(planned)).encode())
        if interrupt:
            break
    good = sum(outcome.status == "ok" for outcome in planned)
    print(f"{good} of {len(planned)} notebooks succeeded, in {format_duration(time.monotonic() - started)}")
    print(f"Results: {output}/index.html" if output else "Results are on the first machine.", flush=True)
    if interrupt:
        raise interrupt
    return planned


def plan_runs(notebooks, parameters, sweep=False):
    """The Outcomes to be, with those of the parameters that each notebook has. ValueError for one that none has."""
    known = {notebook: papermill.inspect_notebook(notebook) if parameters else {} for notebook in notebooks}
    there = sorted(set().union(*known.values()))
    if unknown := ", ".join(sorted(set(parameters) - set(there))):
        raise ValueError(f"no parameter {unknown} in these notebooks; there are: {', '.join(there) or 'none'}")
    outcomes = []
    for notebook in notebooks:
        own = {name: value for name, value in parameters.items() if name in known[notebook]}
        choices = list(itertools.product(*own.values())) if sweep else [own.values()]
        for i, values in enumerate(choices, 1):
            name = Path(notebook).stem + (f"-{i:02}" if len(choices) > 1 else "") + ".ipynb"
            outcomes.append(Outcome(notebook, dict(zip(own, values)), name))
    for one, other in itertools.pairwise(outcomes):
        one.next, other.previous = other.name, one.name
    return outcomes


def run_notebook(outcome, output, execute):
    """Execute one notebook and note in `outcome` how it went. Raises nothing; returns the KeyboardInterrupt, if any."""
    target, started, error = output and f"{output}/{outcome.name}", time.monotonic(), None
    if not sys.stderr.isatty():  # there is no bar then, so say what runs
        print(f"{outcome.name.removesuffix('.ipynb')} ...", flush=True)
    try:
        execute(outcome.notebook, target, outcome.parameters)
        outcome.status = "ok"
    except KeyboardInterrupt as exception:
        error = exception
    except Exception as exception:  # an error in a cell, a dead kernel, a file that is not a notebook
        outcome.status, error = "FAILED", exception
    outcome.seconds = time.monotonic() - started
    outcome.error = describe_error(error)[0] if error else ""
    if target:
        publish(outcome, target, error)
    print(f"{outcome.status:6} {outcome.name}, {outcome.error or format_duration(outcome.seconds)}", flush=True)
    if outcome.source:
        print(textwrap.indent(outcome.source, "       | ", lambda line: True), flush=True)
    return error if outcome.status == "interrupted" else None


def publish(outcome, target, error):
    """Remove secrets from the executed notebook, read from it what the index shows, and render it as HTML."""
    try:
        text, leaked = storage.redact(storage.read(target).decode())
        if leaked:
            storage.write(target, text.encode())
        executed = nbformat.reads(text, as_version=4)
        outcome.error, outcome.source = describe_error(error, executed) if error else ("", "")
        with suppress(ValueError):  # a notebook without results is fine here
            outcome.results = read_results(executed)
        kinds = "image/png", "image/jpeg"
        pictures = [(kind, data[kind]) for data in read_outputs(executed) for kind in kinds if kind in data]
        urls = [f"data:{kind};base64,{''.join(picture.split())}" for kind, picture in pictures]
        outcome.figures = urls[:1] + urls[1:][-1:]
        stem = target.removesuffix(".ipynb")
        storage.write(f"{stem}.html", render_page(outcome, executed).encode())
        text = "\n".join(cell.source for cell in executed.cells if cell.cell_type == "markdown")
        heading = re.search(r"(?m)^#+ +(.+)$", text)
        outcome.title = re.sub(r"[`*]", "", heading[1]) if heading else Path(outcome.name).stem
        with suppress(storage.StorageError, KeyError):  # the page about its experiment.Run, beside this one
            url = outcome.results.get("run") or outcome.results["run_url"]
            storage.write(f"{stem}_report.html", storage.read(f"{url}/report.html"))
            outcome.report = True
        if leaked:
            outcome.status, names = "FAILED", ", ".join(sorted(leaked))
            outcome.error = f"the notebook showed {names}, replaced by ***" + (outcome.error and f"; {outcome.error}")
    except Exception as exception:  # papermill wrote nothing, or what it wrote cannot be shown
        outcome.status, outcome.error = "FAILED", outcome.error or describe_error(exception)[0]


def describe_error(error, executed=None):
    """An error in one line, with the cell it came from, and the first lines of that cell."""
    if isinstance(error, RunError):
        return str(error), ""
    name, message = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    if name == "DeadKernelError":
        message += " (killed from outside, often for lack of memory)"
    message = textwrap.shorten(storage.redact(strip_ansi(message))[0], 300, placeholder=" ...")
    line = f"{name}: {message}" if message else name
    begun = [cell for cell in getattr(executed, "cells", []) if cell.metadata.get("papermill", {}).get("start_time")]
    if not begun:  # not even the kernel came up
        return line, ""
    source = begun[-1].source.splitlines()
    shown = source[:6] + ["..."] if len(source) > 6 else source
    return f"In [{begun[-1].get('execution_count') or '*'}]: {line}", "\n".join(shown)


def read_results(notebook):
    """The `results` of an executed notebook (path or node): the last JSON that a code cell of it displayed."""
    executed = notebook if isinstance(notebook, nbformat.NotebookNode) else nbformat.read(notebook, as_version=4)
    shown = [data["application/json"] for data in read_outputs(executed) if "application/json" in data]
    if not shown or not isinstance(shown[-1], dict):
        name = "this notebook" if executed is notebook else notebook
        raise ValueError(f"{name} shows no results: let its last code cell end with display(JSON(results))")
    return dict(shown[-1])


def read_outputs(notebook):
    """What the code cells displayed, in order: for each output its data by mime type."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output.data for cell in cells for output in cell.outputs if "data" in output]


def format_duration(seconds):
    """12.3 s, or 4 min 56 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def sanitize(html):
    """HTML that a cell displayed, without scripts: a class or a file may have any name."""
    attributes = {"*": ["class", "id", "style", "colspan"], "a": ["href"], "img": ["src", "alt"]}
    tags = bleach.ALLOWED_TAGS | set("h1 h2 h3 h4 p div span pre br hr img table thead tbody tr th td del".split())
    protocols = {*bleach.ALLOWED_PROTOCOLS, "data"}  # data: pictures
    return bleach.clean(html, tags, attributes, protocols, css_sanitizer=CSSSanitizer(["text-align"]))


EXPORTER = HTMLExporter(
    embed_images=True,
    filters={"sanitize": sanitize},
    raw_template=storage.REPOSITORY.joinpath("helpers/page.html.j2").read_text(encoding="utf-8"),
)


def list_facts():
    """When, where and with which versions this runs."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "obstore", "s3fs")]
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return [f"{datetime.now():%A, %d %B %Y, %H:%M}", machine, f"Python {platform.python_version()}", *versions]


def render_page(outcome, executed):
    """An executed notebook as HTML that asks for nothing outside; links to other notebooks lead to their pages."""
    for cell in executed.cells:
        if cell.cell_type == "markdown":  # $$…$$ as MathML, which browsers show by themselves
            cell.source = re.sub(r"(?s)\$\$(.+?)\$\$", lambda match: f"<p>{convert(match[1])}</p>", cell.source)
    metadata = {"name": Path(outcome.name).stem, "path": outcome.notebook.rpartition("/")[0]}
    resources = {"metadata": metadata, "outcome": outcome, "facts": list_facts()}
    html = re.sub(r'href="(\d\d\w+)\.ipynb"', r'href="\1.html"', EXPORTER.from_notebook_node(executed, resources)[0])
    return storage.redact(re.sub(r'<a href="\.\./[^"]*">(.*?)</a>', r"\1", html))[0]  # the sources are not beside it


def render_index(outcomes, total):
    """The page of a run: a card per notebook."""
    return load_index().render(outcomes=outcomes, total=total, facts=list_facts(), format_duration=format_duration)


@functools.cache
def load_index():
    source = storage.REPOSITORY.joinpath("helpers/index.html.j2").read_text(encoding="utf-8")
    return jinja2.Template(source, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def pick(picks):
    """The notebooks meant by numbers, names, paths or URLs; all of notebooks/ when nothing is picked."""
    known = sorted(Path("notebooks").resolve().glob("[0-9][0-9]*_*.ipynb"))
    there = ", ".join(path.stem for path in known) or f"none in {Path('notebooks').resolve()}"
    if not picks and not known:
        raise ValueError(f"there are no notebooks: {there}")
    chosen = [] if picks else list(map(str, known))
    for wanted in picks:
        if wanted.endswith(".ipynb") and ("://" in wanted or Path(wanted).is_file()):
            matches = [wanted if "://" in wanted else str(Path(wanted).resolve())]
        else:
            matches = [str(p) for p in known if wanted in (p.name, p.stem, p.stem.split("_")[0], p.stem[:2])]
        if not matches:
            raise ValueError(f"no notebook {wanted}; there are: {there}")
        chosen += [path for path in matches if path not in chosen]
    if len({Path(path).name for path in chosen}) < len(chosen):
        raise ValueError("two of these notebooks have the same name, so one would overwrite the other's output")
    return chosen


def make_parser():
    parser = argparse.ArgumentParser(prog="python -m helpers run", description=__doc__.splitlines()[0])
    which = "numbers (04: all pages of that stage, 04a: one), names, paths or s3:// URLs; all of notebooks/ without"
    parser.add_argument("notebooks", nargs="*", help=which)
    given = {"nargs": 2, "action": "append", "default": [], "dest": "parameters", "metavar": ("NAME", "VALUE")}
    parser.add_argument("-p", help="a parameter, for each of these notebooks that has it", **given)
    each = "values with commas between them: run each combination, and compare the results"
    parser.add_argument("--sweep", help=each, action="store_true")
    parser.add_argument("-o", "--output", help="folder or s3:// URL for the results; by default in runs/")
    return parser


def main(argv=None, parser=None, prepare=None):
    """The command line. prepare: a function of the parsed options that returns others for `run_notebooks`."""
    parser = parser or make_parser()
    given = parser.parse_intermixed_args(argv)
    for chatty in ("papermill", "traitlets"):  # what they would log, run_notebooks() prints
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: kernels are ended, results are written
    try:
        parameters = {
            name: [parse_value(one) for one in value.split(",")] if given.sweep else parse_value(value)
            for name, value in given.parameters
        }
        options = dict(output=given.output or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}", sweep=given.sweep)
        outcomes = run_notebooks(pick(given.notebooks), parameters, **options | (prepare(given) if prepare else {}))
    except ValueError as error:
        parser.error(str(error))
    except storage.StorageError as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        return 130
    return int(any(outcome.status != "ok" for outcome in outcomes))
