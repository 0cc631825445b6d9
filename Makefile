# make setup | run | site | test | test-slow | lab | bench | export | clean      (make run NOTEBOOKS="02 03" ARGS="-p epochs 3")
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup run site test test-slow lab bench export clean lock

setup: $(VENV)/installed

# The locks are complete, so nothing is resolved (--no-deps). uv takes a fifth of pip's time; where it reaches no index, pip
# does it, whose own settings may name a mirror. Neither compiles: compileall does on all cores, and leaves out the packages'
# own tests (a few packages hold files for other versions of Python, hence `|| true`).
INSTALL = $(BIN)/uv pip install --python $(VENV) --no-deps $(1) || \
	$(BIN)/python -m pip install --no-deps --no-compile --progress-bar off $(1)

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version + ": make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-deps --quiet "$$(grep '^uv==' requirements.lock)"
	$(call INSTALL,-r requirements.lock)
	$(BIN)/python -m pip install --no-deps --no-build-isolation --quiet -e .
	$(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib >/dev/null 2>&1 || true
	touch $@

run: setup
	$(BIN)/python -m helpers run $(NOTEBOOKS) $(ARGS)

# The executed notebooks and their index as a folder that asks for nothing outside: what a run writes is that already.
site: setup
	rm -rf site
	$(BIN)/python -m helpers run $(NOTEBOOKS) $(ARGS) --output site

test: setup
	$(BIN)/python -m pytest

# What is large by nature: many objects, long soaks, real photos.
test-slow: setup
	$(BIN)/python -m pytest -m slow

lab: setup
	$(BIN)/jupyter lab notebooks

# helpers/chapters/*.py, from the cells of the notebooks that begin with `#| export`.
export: setup
	$(BIN)/python .ci/export.py

# The numbers of the run just made, where ARGS says, as a table; a command line that was refused (status 2) made none.
TABLE := from helpers import run; from helpers.chapters import bench; given, _ = run.make_parser().parse_known_args(); \
	print(bench.gather(given.output or "runs/latest"))

# mosaicml-streaming asks for numpy < 2.2 and transformers < 5 and works with later ones: without its dependencies, but
# for what it imports.
bench: setup
	$(call INSTALL,-r requirements-bench.lock mosaicml-streaming==0.13.0 brotli==1.2.1 catalogue==2.0.10 cramjam==2.14.0 \
		python-snappy==0.7.3 xxhash==4.1.0 zstd==1.5.7.2)
	$(BIN)/python -m helpers run 01 04 05 08 10 11 -p benchmark True $(ARGS); status=$$?; \
		[ $$status = 2 ] || $(BIN)/python -c '$(TABLE)' $(ARGS); exit $$status

clean:
	rm -rf $(VENV) runs site .s3 .pytest_cache *.egg-info helpers/__pycache__ helpers/chapters/__pycache__ tests/__pycache__

# The command is each lock's first line. What a newcomer does not need, the libraries that are compared and the optional
# tracker, is in a lock of its own: what these add to the first.
LOCK := uv pip compile pyproject.toml --universal --python-version 3.11 --no-annotate --no-header --quiet
SETUP := $(LOCK) --extra dev --extra gcs --extra lora --extra tensorboard --extra test
BENCH := $(LOCK) --constraints requirements.lock --extra bench --extra track
lock: export PATH := $(abspath $(BIN)):$(PATH)
lock: setup
	(echo "# $(SETUP)"; $(SETUP)) > requirements.new && mv requirements.new requirements.lock
	(echo "# $(BENCH)"; $(BENCH) | grep -vxFf requirements.lock) > requirements.new && mv requirements.new requirements-bench.lock
