# Makes the environment in .venv from a fresh checkout, and trains, tests, checks and packages in it.

PYTHON ?= python3
WORKERS ?= 2
FAULTS ?= faults
VENV := .venv
BIN := $(VENV)/bin
# Python compiles each file when it is first imported, which takes less time than to compile all that is installed.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help venv quickstart serve test test-slow test-faults test-wheel check peers release settings docs experiments address clean

help:
	@echo "make quickstart  trains a small model on the built-in corpus, into runs/quickstart"
	@echo "make serve       serves that model, with a page to try it, on http://127.0.0.1:8000"
	@echo "make venv        installs the library, editable, with everything that tests need, into .venv"
	@echo "make test        runs the tests (WORKERS=$(WORKERS) processes)"
	@echo "make test-slow   runs the tests that make test leaves out, which are more cases of the same: some minutes"
	@echo "make test-faults kills trainings, stops them and fills their disks: some minutes"
	@echo "make test-wheel  builds the wheel and uses it outside the repository, with the packages of .venv"
	@echo "make check       ruff and mypy"
	@echo "make peers       installs the libraries that some tests compare with"
	@echo "make release     builds sdist and wheel into dist/, checks them and tries the wheel in a new environment"
	@echo "make settings    writes docs/settings.md from the settings in the library"
	@echo "make docs        builds the documentation site in site/"
	@echo "make experiments runs the experiments of docs/learning.md: some hours, and may be stopped"
	@echo "make address REPOSITORY=OWNER/NAME  puts the address on GitHub into README, notebook and package"
	@echo "make clean       removes .venv, caches and build products; runs/ stays"

# Stamps: each is made again only when what it was made from has changed.
$(VENV)/library.stamp: pyproject.toml
	@echo "Installing flax_transformer and what it needs into $(VENV): some 80 packages, a few minutes the first time ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: name a newer one, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@# An environment of an older Python, which an earlier attempt left, is made anew.
	@$(PYTHON) -m venv $$($(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || echo --clear) $(VENV)
	@$(PIP) --editable ".[plots]"
	@touch $@

$(VENV)/tools.stamp: $(VENV)/library.stamp
	@echo "Installing what tests and checks need ..."
	@$(PIP) --editable ".[test,dev]"
	@touch $@

$(VENV)/peers.stamp: $(VENV)/library.stamp
	@echo "Installing the peers that tests compare with: PyTorch is large ..."
	@$(PIP) --editable ".[peers]"
	@touch $@

$(VENV)/serve.stamp: $(VENV)/library.stamp
	@$(PIP) --editable ".[serve]"
	@touch $@

$(VENV)/docs.stamp: $(VENV)/library.stamp
	@$(PIP) --editable ".[docs]"
	@touch $@

venv: $(VENV)/tools.stamp
	@echo "$(VENV) is ready: . $(BIN)/activate"

quickstart: $(VENV)/library.stamp
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=runs/quickstart

serve: $(VENV)/serve.stamp
	$(BIN)/flax-transformer serve --workdir=runs/quickstart

test: $(VENV)/tools.stamp
	$(BIN)/python -m pytest -m "not slow" --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=10

test-slow: $(VENV)/tools.stamp
	$(BIN)/python -m pytest -m "slow" --numprocesses=$(WORKERS) --dist=loadfile --durations=10

test-faults: $(VENV)/tools.stamp
	$(BIN)/python -m pytest -m "$(FAULTS)" --numprocesses=$(WORKERS) --dist=loadfile --durations=10 tests/faults

test-wheel: $(VENV)/tools.stamp
	$(BIN)/python -m pytest -m wheel tests/wheel

check: $(VENV)/tools.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

peers: $(VENV)/peers.stamp

release: $(VENV)/tools.stamp
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	PYTHON=$(abspath $(BIN)/python) .ci/try_wheel dist/*.whl

settings: $(VENV)/library.stamp
	$(BIN)/python -m flax_transformer train --list_settings=markdown > docs/settings.md.new
	mv docs/settings.md.new docs/settings.md

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

experiments: $(VENV)/library.stamp
	$(BIN)/python -m experiments

address:
	@test -n "$(REPOSITORY)" || { echo "give the repository on GitHub: make address REPOSITORY=OWNER/NAME"; exit 1; }
	perl -0pi -e 's/^`OWNER` stands for.*?\n\n//ms' README.md
	perl -pi -e 's#OWNER/flax_transformer#$(REPOSITORY)#g' README.md pyproject.toml mkdocs.yml colab/*.ipynb

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache build dist site
