# On a fresh machine with Python 3.11+ and nothing else:  make quickstart   make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

.PHONY: quickstart test lint book bench-peers bench gpu install install-test clean help

help:
	@echo "make quickstart   set up and run the offline tour (three to nine minutes on two cores)"
	@echo "make test         set up and run the whole suite"
	@echo "make book         build the book as a site, in site/ (every example runs)"
	@echo "make lint         formatter, linter, type checker"
	@echo "make gpu          on a CUDA machine: every family's laws, attention kernels, speed (eight minutes)"
	@echo "make bench        the benchmarks against the peers (long; wants a quiet machine)"

# Stamps hold what was installed: a changed constraint or dependency installs again. --no-compile: Python compiles what it
# imports, and pip would compile 20,000 files, one after another.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("LLM Quest needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[test,dev,tensorboard,serve,book]'
	touch $@

install: $(VENV)/.base
install-test: $(VENV)/.test

quickstart: install
	$(BIN)/quest quickstart

test: install-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(CORES) --dist worksteal

book: install-test
	$(BIN)/python -m book

lint: install-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# litgpt pins older dependencies than transformers: it is put beside the environment, without them.
bench-peers: install-test
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .bench --constraint constraints.txt \
		litgpt lightning lightning-utilities torchmetrics jsonargparse pytorch-lightning docstring_parser typeshed_client

bench: bench-peers
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.loading
	$(BIN)/python -m benchmarks.kill9

gpu: install-test
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf $(VENV) .bench build *.egg-info .pytest_cache .mypy_cache .ruff_cache
