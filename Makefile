# `make train` and `make test` need Python 3.11 or 3.12 and set everything up in .venv.

# The first Python that runs (a shim may not), is new enough for us and old enough for dm_control.
FITS := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c "$(FITS)" 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin

.PHONY: train test smoke lint clean

train: .venv/train
	$(BIN)/python agents/sac_dmc.py --env-id cartpole-swingup --total-timesteps 250000

test: .venv/test
	$(BIN)/python -m pytest tests --numprocesses auto --dist loadfile

smoke: .venv/test
	$(BIN)/python -m pytest tests/smoke

lint: .venv/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv

.venv/train: requirements.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 with venv found; name one: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/test: .venv/train tests/requirements.txt
	$(BIN)/python -m pip install --quiet --requirement tests/requirements.txt
	touch $@
