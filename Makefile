# Two commands for a newcomer: `make demo` and `make test`. Both create .venv
# on the first call and reuse it afterwards; PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
WORKDIR ?= runs/demo

.PHONY: help demo test test-slow lint bench clients tpu-aot clean

help:  ## List the commands.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | \
	  awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(BIN)/.installed  ## Pretrain on the packaged audio (CPU, 6 to 9 minutes on two idle cores).
	$(BIN)/python -m audiomosaic_jax.main --config=configs/pretrain.py:demo \
	  --workdir=$(WORKDIR)

test: $(BIN)/.installed-dev  ## Run the test suite.
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

test-slow: $(BIN)/.installed-dev  ## Run the tests that take minutes each.
	$(BIN)/python -m pytest -m slow

lint: $(BIN)/.installed-dev  ## Check format and style.
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

bench: $(BIN)/.installed-bench  ## Time the step, the input, and PyTorch beside.
	$(BIN)/python -m benchmarks.input_pipeline
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.whole_path
	$(BIN)/python -m benchmarks.versus_torch --config.model.encoder.dtype=float32
	$(BIN)/python -m benchmarks.inference --variants=tiny,small --batches=1,8

clients: $(CLIENTS)/.installed  ## Run real benchmark clients on our adapters.
	HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu $(CLIENTS)/bin/python -m pytest \
	  tests/clients -m slow

tpu-aot: $(BIN)/.installed-aot  ## Compile the full step for TPUs, on this CPU.
	$(BIN)/python -m benchmarks.tpu_aot

clean:  ## Remove the environment and everything that runs wrote.
	rm -rf $(VENV) $(CLIENTS) runs

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"Python 3.11 or newer is needed, this is {sys.version}")'
	$(PYTHON) -m venv $(VENV)

$(BIN)/.installed: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(BIN)/.installed-dev: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(BIN)/.installed

$(BIN)/.installed-aot: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,aot]'
	@touch $@ $(BIN)/.installed $(BIN)/.installed-dev

$(BIN)/.installed-bench: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,bench]'
	@touch $@ $(BIN)/.installed $(BIN)/.installed-dev

$(CLIENTS)/.installed: setup.py $(wildcard tests/clients/requirements*.txt)
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --editable '.[dev]' \
	  --requirement tests/clients/requirements.txt
	$(CLIENTS)/bin/python -m pip install --quiet --no-deps \
	  --requirement tests/clients/requirements-no-deps.txt
	@touch $@
