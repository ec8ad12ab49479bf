# Needs Python 3.11 or later; every target sets up what it needs in .venv.

# The first Python that runs (a shim may not), is new enough and can make environments.
FITS := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c "$(FITS)" 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
# Unlike pip, uv can leave out a dependency of a dependency.
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --override overrides.txt

.PHONY: train test test-all smoke lint clean

train: .venv/train
	$(BIN)/python agents/sac_dmc.py --env-id cartpole-swingup --total-timesteps 250000

test: .venv/test
	$(BIN)/python -m pytest tests --numprocesses auto --dist loadfile

test-all: .venv/test  # the slow ones too
	$(BIN)/python -m pytest tests --numprocesses auto --dist loadfile -m "slow or not slow"

smoke: .venv/test
	$(BIN)/python -m pytest tests/smoke

lint: .venv/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv

.venv/train: requirements.txt overrides.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later with venv found; name one: make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(INSTALL) --requirement requirements.txt
	touch $@

.venv/test: .venv/train tests/requirements.txt benchmark/requirements.txt
	$(INSTALL) --requirement tests/requirements.txt
	touch $@
