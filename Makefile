# On a fresh machine with Python 3.11: `make demo` (the main job) and `make test`; each makes .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.dynkp-installed

# Nothing is downloaded and nothing is reported while a target runs.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: install machine demo test lint docs bench min-versions
.DEFAULT_GOAL := install

install: $(STAMP)

# torch first, at the pinned version: an open range may pull gigabytes of another build. DeepSpeed's build asks for torch.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation deepspeed ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,docs]'
	touch $@

demo: install
	$(BIN)/python examples/train.py

# What no Python package brings: the browser of the tests' pages, the compiler of DeepSpeed's operations.
machine:
	@if ! command -v chromium >/dev/null || ! command -v g++ >/dev/null; then \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends chromium g++ >/dev/null; } \
	  || echo "Install chromium and g++: the tests need them."; fi

test: install machine
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/mkdocs build --strict --quiet

bench: install
	$(BIN)/dynkp bench

# The lowest versions that setup.cfg allows, in an environment of its own (build/min-versions); takes about half an hour.
min-versions: machine
	$(PYTHON) scripts/min_versions.py $(ARGS)
