# Everything lives in .venv, made from a pinned lock on first use.
PYTHON ?= python3
LOCK ?= requirements/cpu.lock
BIN := .venv/bin

.PHONY: quickstart test setup test-slow test-gpu lint clean bench-quickstart bench-verifiers bench-search bench-train bench-week \
	bench-kills bench-learning bench-prm bench-model bench-convert bench-engine bench-gpu

quickstart: setup          ## train a small model to reason, on this machine, in minutes
	$(BIN)/reasoner train configs/quickstart.toml

test: setup                ## the default tests: CPU, no network, a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

setup: .venv/ready         ## make .venv (done by the two targets above when it is missing)

.venv/ready: $(LOCK) pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed, this is ' + sys.version"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -c "import torch" || $(BIN)/python -m pip install --quiet "$$(grep '^torch==' $(LOCK))"  # its CUDA libraries
	$(BIN)/python -c "import torch, vllm, trl, ray"
	touch $@

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

bench-quickstart: setup    ## three seeds and the control
	$(BIN)/python -m benchmarks.quickstart

bench-verifiers: setup
	$(BIN)/python -m benchmarks.verifiers

bench-train: setup         ## against TRL's own trainer, and rollouts ahead of the learner; FULL=1 for more rounds
	$(BIN)/python -m benchmarks.train $(if $(FULL),--full)

bench-week: setup          ## 10,000 steps around a scripted engine: what grows, and what a step costs the driver
	$(BIN)/python -m benchmarks.week

bench-search: setup
	$(BIN)/python -m benchmarks.search

bench-learning: setup      ## FULL=1 for three seeds
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.learning $(if $(FULL),--seeds 3)

bench-prm: setup          ## after `make quickstart`
	$(BIN)/python -m benchmarks.prm runs/quickstart

bench-model: setup
	$(BIN)/python -m benchmarks.model

bench-convert: setup       ## 13 minutes on two quiet cores
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.convert

bench-kills: setup         ## parts of a quickstart run killed at random, twenty times: 15 minutes
	$(BIN)/python -m benchmarks.kills configs/quickstart.toml --kills 20 --pause 4

bench-engine: setup        ## after `make quickstart`: the in-process engines beside vLLM, the learner's head
	$(BIN)/python -m benchmarks.engine

bench-gpu:                 ## needs torch, transformers and nvcc alone
	$(PYTHON) -m benchmarks.gpu

lint: setup
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

clean:
	rm -rf .venv cache runs
