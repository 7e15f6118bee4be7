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

.PHONY: install demo test lint docs bench
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

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install
	$(BIN)/mkdocs build --strict --quiet

bench: install
	$(BIN)/dynkp bench
