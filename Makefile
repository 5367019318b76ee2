# Everything a contributor types.  Each target sets up .venv by itself, once.
#
#   make demo                              run the example model, dense and sparse
#   make test                              run the tests
#   make test TORCH="torch==2.11.0"        the same with another torch
#   make test PYTEST_ARGS="-k canonicalize -n 0"
#   make lint                              check style, types, layers, documents
#   make format                            fix what can be fixed automatically
#   make docs                              regenerate the generated documents
#   make bench BENCH_ARGS="--tokens 1"     run `bench ffn`
#   make clean                             remove .venv

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
SETUP = @$(PYTHON) tools/setup_env.py --venv $(VENV) --torch '$(TORCH)' --extras

.PHONY: help demo test lint format docs bench clean

help:
	@sed -n 's/^#   //p' Makefile

demo:
	$(SETUP) ''
	@PYTHONWARNINGS='ignore:Failed to initialize NumPy' $(BIN)/python examples/quickstart.py

test:
	$(SETUP) test
	@$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint:
	$(SETUP) test,lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	$(BIN)/python tools/check_sizes.py
	$(BIN)/python tools/generate_docs.py --check

format:
	$(SETUP) test,lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs:
	$(SETUP) ''
	$(BIN)/python tools/generate_docs.py

bench:
	$(SETUP) bench
	$(BIN)/python -m inductor_sparse bench ffn $(BENCH_ARGS)

clean:
	rm -rf $(VENV)
