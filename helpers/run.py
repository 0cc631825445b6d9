"""Run the notebooks in order, each with papermill, and show what came out on one page.

    python -m helpers.run                       every notebook of notebooks/
    python -m helpers.run 02 03 -p epochs 3     some of them, with another value for a parameter

Executed notebooks, their HTML and an index.html go to runs/{date_time}/. A notebook that fails does not stop the
next one. Exit code: 0 when all ran, 1 when one failed, 2 for a pick or parameter that is not there, 130 after Ctrl-C.
"""

import argparse
import contextlib
import json
import signal
import tempfile
import threading
import functools
import importlib.metadata
import logging
import os
import platform
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import jinja2
import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode

from helpers import storage

BAR = {"bar_format": "{desc} |{bar}| {n}/{total} cells, {elapsed}", "dynamic_ncols": True, "leave": False,
       "disable": None}  # None: no bar where there is no terminal


@dataclass
class Outcome:
    """How one notebook went; `status` is "ok", "FAILED", or "interrupted" for the one Ctrl-C stopped."""

    notebook: Path
    status: str = "interrupted"
    seconds: float = 0.0
    error: str = ""  # cell 7 (In [5]): ErrorName: message
    source: str = ""  # the first lines of that cell
    title: str = ""
    results: dict = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)  # data: addresses of the first and the last figure
    rendered: bool = False  # is there an HTML page to link to?


class OwnKernel(AsyncKernelManager):
    """Kernels of this very Python, whatever "python3" kernelspecs Jupyter knows on this machine."""

    def _kernel_spec_manager_default(self):
        return KernelSpecManager(kernel_dirs=[])  # with nowhere to search, ipykernel's own spec is left: sys.executable


def run_notebooks(notebooks: Sequence[Path], parameters: dict, output: Path) -> list[Outcome]:
    """Execute the notebooks one after the other into the folder `output`, where index.html tells how they went."""
    passed = select_parameters(notebooks, parameters)
    storage.connect()  # once: the kernels inherit the environment, so all notebooks see the same S3
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # a convenience, and not every system has links
        latest = output.with_name("latest")
        latest.unlink(missing_ok=True)
        latest.symlink_to(output.name, target_is_directory=True)
    outcomes, page, started = [], output / "index.html", time.monotonic()
    try:
        for notebook in notebooks:
            outcomes.append(Outcome(notebook))
            try:
                execute(outcomes[-1], passed[notebook], output)
            finally:  # after Ctrl-C too
                page.write_text(index(outcomes, len(notebooks)), encoding="utf-8")
    finally:
        good = sum(outcome.status == "ok" for outcome in outcomes)
        print(f"{good} of {len(notebooks)} notebooks ran well, in {duration(time.monotonic() - started)}")
        print(f"Results: {os.path.relpath(page)}", flush=True)
    return outcomes


def select_parameters(notebooks: Sequence[Path], parameters: dict) -> dict[Path, dict]:
    """For each notebook, those of the given parameters that it has; one that no notebook has is an error."""
    known = {notebook: papermill.inspect_notebook(notebook) if parameters else {} for notebook in notebooks}
    names = set().union(*known.values())
    if unknown := set(parameters) - names:
        there = ", ".join(sorted(names)) or "none"
        raise ValueError(f"no parameter {', '.join(sorted(unknown))} in these notebooks; there are: {there}")
    return {notebook: {k: v for k, v in parameters.items() if k in known[notebook]} for notebook in notebooks}


def execute(outcome: Outcome, parameters: dict, output: Path) -> None:
    """Run one notebook into `output` and note in `outcome` how it went. Only Ctrl-C comes out as an exception."""
    notebook, target, started = outcome.notebook.resolve(), output / outcome.notebook.name, time.monotonic()
    if not sys.stderr.isatty():  # there is no bar then, so say what runs
        print(f"{notebook.stem} ...", flush=True)
    error = None
    try:
        run_papermill(notebook, target, parameters)
        outcome.status = "ok"
    except Exception as exception:  # an error in a cell, a dead kernel, a file that is no notebook
        outcome.status, error = "FAILED", exception
    except KeyboardInterrupt as exception:
        error = exception
        raise
    finally:
        outcome.seconds = time.monotonic() - started
        publish(outcome, target, error)
        print(f"{outcome.status:6} {notebook.name}, {outcome.error or duration(outcome.seconds)}")
        if outcome.source:
            print(textwrap.indent(outcome.source, "       | ", lambda line: True))
        sys.stdout.flush()


def run_papermill(notebook: Path | str, target: Path | str | None, parameters: dict, bar: bool = True) -> None:
    """Execute a notebook in a kernel of this Python, with a bar in a terminal. `target` None: it is not kept."""
    papermill.execute_notebook(
        notebook,
        target,
        parameters,
        kernel_name="python3",
        language="python",
        kernel_manager_class=OwnKernel,
        extra_arguments=["--log-level=CRITICAL"],  # else kernels talk across the progress bar
        cwd=storage.REPOSITORY / "notebooks" if "://" in str(notebook) else Path(notebook).resolve().parent,
        iopub_timeout=60,  # seconds a busy machine may take to deliver a cell's last output; the default is 4
        coalesce_streams=True,  # of a cell's progress bar, keep the last state
        progress_bar=BAR | {"desc": Path(notebook).stem} if bar else False,
    )


def publish(outcome: Outcome, target: Path, error: BaseException | None) -> None:
    """Clean the executed notebook of secrets, read from it what the index shows, and render it as HTML."""
    page, leaked = target.with_suffix(".html"), scrub(target)
    try:
        executed = nbformat.read(target, as_version=4)
        if error:
            outcome.error, outcome.source = describe(error, executed)
        outcome.title, outcome.figures = title(executed), figures(executed)
        with contextlib.suppress(ValueError):  # one that shows no results is fine here
            outcome.results = read_results(executed)
        resources = {"metadata": {"name": target.stem, "path": str(outcome.notebook.parent)}}
        page.write_text(exporter().from_notebook_node(executed, resources)[0], encoding="utf-8")
        leaked |= scrub(page)
        outcome.rendered = True
    except Exception as exception:  # papermill wrote nothing, or what it wrote cannot be shown
        outcome.status, outcome.error = "FAILED", outcome.error or describe(error or exception)[0]
    if leaked:
        outcome.status = "FAILED"
        messages = [f"the notebook showed {', '.join(sorted(leaked))}, replaced by ***", outcome.error]
        outcome.error = "; ".join(filter(None, messages))


def describe(error: BaseException, executed: NotebookNode | None = None) -> tuple[str, str]:
    """An error in one line, with the cell it came from, and the first lines of that cell."""
    name, message = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    if name == "DeadKernelError":
        message += " (killed from outside, often for lack of memory)"
    message = textwrap.shorten(storage.redact(strip_ansi(message))[0], 300, placeholder=" ...")
    line = f"{name}: {message}" if message else name
    cells = executed.cells if executed else []  # without what papermill itself put in, where it matters:
    cells = [cell for cell in cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])]
    begun = [i for i, cell in enumerate(cells) if cell.metadata.get("papermill", {}).get("start_time")]
    if not begun:  # not even the kernel came up
        return line, ""
    place = getattr(error, "cell_index", begun[-1])
    injected = sum("injected-parameters" in cell.metadata.get("tags", []) for cell in cells[: place + 1])
    source = cells[place].source.splitlines()
    prompt = cells[place].get("execution_count") or " "
    return f"cell {place + 1 - injected} (In [{prompt}]): {line}", "\n".join(source[:6] + ["..."] * (len(source) > 6))


def scrub(path: Path) -> set[str]:
    """Clean a file, if it is there; the names of the secrets that were in it."""
    text, leaked = storage.redact(path.read_text(encoding="utf-8")) if path.exists() else ("", set())
    if leaked:
        path.write_text(text, encoding="utf-8")
    return leaked


def read_results(notebook: NotebookNode | Path | str) -> dict:
    """The `results` of an executed notebook: what its last code cell with JSON output showed."""
    executed = notebook if isinstance(notebook, NotebookNode) else nbformat.read(notebook, as_version=4)
    shown = [data["application/json"] for data in outputs(executed) if "application/json" in data]
    if not shown or not isinstance(shown[-1], dict):
        name = "this notebook" if executed is notebook else notebook
        raise ValueError(f"{name} shows no results: let its last code cell end with display(JSON(results))")
    return dict(shown[-1])


def outputs(notebook: NotebookNode) -> list[dict]:
    """What the code cells showed, in order: for each output its data by mime type."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output.data for cell in cells for output in cell.outputs if "data" in output]


def title(notebook: NotebookNode) -> str:
    """The first heading, without its Markdown marks."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = re.search(r"^#+ +(.+)$", text, re.MULTILINE)
    return re.sub(r"[`*]", "", heading[1]) if heading else ""


def figures(notebook: NotebookNode) -> list[str]:
    """The first and the last figure as data: addresses (one when there is only one)."""
    kinds = ("image/png", "image/jpeg")
    shown = [(kind, data[kind]) for data in outputs(notebook) for kind in kinds if kind in data]
    found = [f"data:{kind};base64,{''.join(pixels.split())}" for kind, pixels in shown]
    return found[:1] + found[1:][-1:]


def duration(seconds: float) -> str:
    """12.3 s, or 4 min 56 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


@functools.cache
def exporter() -> HTMLExporter:
    """nbconvert's "lab" page made to open without a network: no require.js, no widget or diagram scripts.

    MathJax is left, without waiting for it, where a text has a formula; offline one reads the formula's source.
    """
    return HTMLExporter(embed_images=True, raw_template=PAGE)


PAGE = r"""{% extends "index.html.j2" %}
{% block html_head_js_requirejs %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block data_widget_view %}{% endblock %}
{% block footer %}</html>{% endblock %}
{% block html_head_js_mathjax %}
{% if "$" in nb.cells | selectattr("cell_type", "equalto", "markdown") | map(attribute="source") | join %}
<script type="text/x-mathjax-config">
MathJax.Hub.Config({tex2jax: {inlineMath: [["$", "$"], ["\\(", "\\)"]], processEscapes: true}});
</script>
<script async src="{{ resources.mathjax_url }}"></script>
{% endif %}
{% endblock %}
{% block data_text scoped %}
{% set json = output.data["application/json"] %}
{% if json is defined %}<div class="jp-RenderedText"><pre>{{ json | tojson(indent=2) }}</pre></div>
{% else %}{{ super() }}{% endif %}
{% endblock %}
"""


def index(outcomes: list[Outcome], total: int) -> str:
    """The page of a run: a card per notebook."""
    facts = {
        "when": datetime.now().strftime("%A, %d %B %Y, %H:%M"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": getattr(os, "process_cpu_count", os.cpu_count)(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }
    template = Path(__file__).with_name("index.html.j2").read_text(encoding="utf-8")
    return jinja2.Template(template, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(
        outcomes=outcomes, total=total, duration=duration, readable=readable, **facts
    )


def readable(value) -> str:
    """A result for the eye: four digits of a number with a fraction, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


class RunError(Exception):
    """One sentence that says what is wrong, and the way out."""


def run_on_processes(notebook, parameters=None, processes=None, output=None, nodes=1, node_rank=0, rendezvous=None):
    """Execute a notebook on several processes by torchrun; returns its results (on the first node).

    Each process executes all of it, in a kernel of its own; TrainLoop divides the batches among them, and only the
    first one writes (see storage.write): its executed notebook goes to `output`, anywhere papermill can write.
    processes: on this machine; by default one for each GPU, or one. On several machines the same is started on each,
    with its node_rank, the rendezvous (host:port of the first) and an S3 that all of them reach.
    Raises RunError with the error of the process that failed first, and ValueError for an unknown parameter.
    """
    import torch  # here: the processes, which each start with this module, do without
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if (nodes > 1) != bool(rendezvous) or not 0 <= node_rank < nodes:
        raise RunError("Several nodes take --nodes N, --rendezvous HOST:PORT of the first, and --node-rank below N.")
    if processes is not None and processes < 1:
        raise RunError(f"--processes is 1 or more, not {processes}.")
    select_parameters([notebook], parameters or {})
    processes = processes or torch.cuda.device_count() or 1
    output = str(output or Path("runs", f"{datetime.now():%Y-%m-%d_%H-%M-%S}", Path(str(notebook)).name))
    if "://" not in output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    storage.connect()  # once: the kernels inherit the environment
    cores = getattr(os, "process_cpu_count", os.cpu_count)()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    host, _, port = (rendezvous or "").rpartition(":")
    place = ["--standalone"] if nodes == 1 else [
        f"--nnodes={nodes}", f"--node-rank={node_rank}", f"--master-addr={host}", f"--master-port={port}"]
    logging.disable()  # what went wrong is said here
    with tempfile.TemporaryDirectory() as errors:
        job = json.dumps({"notebook": str(notebook), "output": output, "parameters": parameters or {}, "errors": errors})
        command = [*place, f"--nproc-per-node={processes}", "-m", "helpers.run", "process", job]
        try:
            torchrun.run(torchrun.parse_args(command))
        except ChildFailedError as error:
            said = [path.read_text() for path in sorted(Path(errors).iterdir())]  # the first comes first, but the others
            said.sort(key=lambda text: "closed by peer" in text)  # may notice before it is down
            rank, failure = error.get_first_failure()
            raise RunError(said[0] if said else f"process {rank}: ended by itself, exit code {failure.exitcode} "
                             "(-9: killed, often for lack of memory)") from None
        except SignalException:
            raise KeyboardInterrupt from None
        finally:
            logging.disable(logging.NOTSET)
            if not node_rank:
                with contextlib.suppress(storage.StorageError):  # there is none yet
                    text, leaked = storage.redact(storage.read(output).decode())
                    if leaked:
                        storage.write(output, text.encode())
    if not node_rank:
        print(f"Executed notebook: {output}")
        with contextlib.suppress(ValueError):  # it shows none
            return read_results(nbformat.reads(text, as_version=4))
    return {}


def run_process(notebook, output, parameters, errors):
    """What torchrun starts: one of the processes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(143))  # an exception: papermill then ends its kernel
    logging.disable()
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    rank = int(os.environ["RANK"])
    try:
        run_papermill(notebook, None if rank else output, parameters, bar=not rank)
    except Exception as error:
        place = f"In [{error.exec_count}]: " if hasattr(error, "exec_count") else ""
        Path(errors, str(time.time_ns())).write_text(f"process {rank}: {place}{describe(error)[0]}")
        sys.exit(1)


def end_with_parent(parent):
    """End this process when torchrun has gone without a word."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def pick(picks: Sequence[str]) -> list[Path]:
    """The notebooks meant by numbers, names or paths; all of notebooks/ when nothing is picked."""
    known = sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))
    there = ", ".join(notebook.stem for notebook in known) or f"none in {Path('notebooks').resolve()}"
    chosen = []
    for wanted in picks:
        found = [notebook for notebook in known if wanted in (notebook.name, notebook.stem, notebook.stem[:2])]
        if wanted.endswith(".ipynb") and Path(wanted).is_file():
            found = [Path(wanted)]
        if not found:
            raise ValueError(f"no notebook {wanted}; there are: {there}")
        chosen += found
    if not (chosen := list(dict.fromkeys(path.resolve() for path in chosen or known))):  # each once
        raise ValueError(f"there are no notebooks: {there}")
    if len({notebook.name for notebook in chosen}) < len(chosen):
        raise ValueError("two of these notebooks have the same name, so one would overwrite the other's output")
    return chosen


def typed(value: str) -> bool | int | float | str | None:
    """A value of the command line, read as papermill's own -p reads it."""
    if value in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[value]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.run", description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", help="numbers, names or paths; all of notebooks/ without")
    parser.add_argument("-p", nargs=2, action="append", default=[], dest="parameters", metavar=("NAME", "VALUE"),
                        help="a parameter, for each of these notebooks that has it")
    arguments = parser.parse_intermixed_args(argv)
    for chatty in ("papermill", "traitlets"):  # what they would log, run_notebooks() prints
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    output = Path("runs", f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    try:
        notebooks = pick(arguments.notebooks)
        parameters = {name: typed(value) for name, value in arguments.parameters}
        select_parameters(notebooks, parameters)
    except ValueError as error:
        parser.error(str(error))
    try:
        outcomes = run_notebooks(notebooks, parameters, output)
    except storage.StorageError as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        return 130
    return int(any(outcome.status != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
