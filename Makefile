# README's two commands are `make train` and `make test`; each does its own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/gpu
INSTALLED := $(VENV)/.installed

.PHONY: train test gpu lint format bench wheel clean

# Threads that wait sleep: where something else has a core, spinning makes it ten times slower.
train: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/python -m fused_ce.babygpt train --preset quick --data pydocs

# Two workers: the kernels' interpreter is Python, and BabyGPT's steps are short.
test: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

# On a machine with a GPU, with the torch and Triton that it has: tests, times, memory, training.
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.cpu

# The wheel may only contain fused_ce: `kernels` is the name of another distribution's package.
wheel: $(INSTALLED)
	rm -rf dist build
	$(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python -m tests.check_wheel dist

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,test,bench,dev,hf]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
