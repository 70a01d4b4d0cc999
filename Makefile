# README's two commands are `make train` and `make test`; each installs first what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/gpu
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt
# The extra `train`, alone: a PyTorch for GPUs brings its Triton, and one for CPUs does without 0.7 GB of it.
TRAIN_NEEDS := torch $(shell sed -n 's/^train = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')
# What is installed is marked by a file; what is for tests goes on from what is for training.
TRAIN := $(VENV)/.train
DEV := $(VENV)/.dev
# Two workers: the kernels' interpreter is Python, and BabyGPT's steps are short.
# Threads that wait sleep: where something else has a core, spinning makes it ten times slower.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: train test test-slow test-all gpu lint format bench wheel clean

train: $(TRAIN)
	OMP_WAIT_POLICY=passive $(BIN)/python -m fused_ce.babygpt train --preset quick --data pydocs --overwrite

test: $(DEV)
	$(PYTEST) -m "not slow"

test-slow: $(DEV)
	$(PYTEST) -m slow

# Every test, once.
test-all: test test-slow

# On a machine with a GPU, with the torch and Triton that it has: tests, times, memory, training.
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.check_types

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV)
	$(BIN)/python -m benchmarks.cpu

# The wheel may only contain fused_ce: `kernels` is the name of another distribution's package.
# It is built from the sdist, as an installer would.
wheel: $(DEV)
	rm -rf dist build
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m tests.check_wheel dist

$(TRAIN): pyproject.toml constraints.txt
	@echo "$(VENV): installing PyTorch and what BabyGPT needs, once; 1.1 GB, or several where" \
		"PyTorch comes with CUDA. pip is quiet for minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) $(TRAIN_NEEDS)
	@$(INSTALL) --no-deps --editable .
	@touch $@

$(DEV): $(TRAIN)
	@echo "$(VENV): installing Triton, transformers, TRL and what else tests need, once; 1.3 GB more." \
		"pip is quiet for minutes."
	@$(INSTALL) --editable ".[train,test,bench,dev,hf,trl]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
