# `make train` and `make test` need Python 3.11 or 3.12 and set everything up in .venv.

PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
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
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/test: .venv/train tests/requirements.txt
	$(BIN)/python -m pip install --quiet --requirement tests/requirements.txt
	touch $@
