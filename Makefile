# make demo    train, load, sample and inspect on a real ComfyUI     make ui    leave that server on, for a browser
# make test    every test       make lint    ruff and mypy           make bench figures of docs/benchmarks/
# make evidence   the experiments of docs/evidence/ at a reduced size: checks what they claim

SHELL := /bin/bash
BASE := $(firstword $(wildcard $(shell command -v python3.11) $(shell command -v python3.12) $(shell command -v python3)))
VENV := .venv/bin/python
HOST := $(or $(COMFYUI_PYTHON),$(VENV))

unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-dev demo ui test lint format bench evidence clean

setup:
	@$(BASE) dev/host.py

setup-dev:
	@COMFYUI_PYTHON= $(BASE) dev/host.py --dev

demo: setup
	@$(HOST) -m dev.demo

ui: setup
	@$(HOST) -m dev.ui

test: setup-dev
	@COMFYUI_PYTHON= $(VENV) -m pytest $(ARGS)

lint: setup-dev
	@$(VENV) -m ruff check .
	@mkdir -p .host/typing && ln -sfn ../.. .host/typing/pack  # the pack's relative imports need a package around it
	@MYPYPATH=.host/typing $(VENV) -m mypy -p pack.lora2 -p pack.nodes
	@$(VENV) -m mypy dev benchmarks

format: setup-dev
	@$(VENV) -m ruff check --fix .

bench: setup-dev
	@$(VENV) -m benchmarks.speed $(ARGS)

evidence: setup-dev
	@OMP_WAIT_POLICY=PASSIVE $(VENV) -m benchmarks.evidence --check $(ARGS)

clean:
	rm -rf .venv .host .pytest_cache .ruff_cache .mypy_cache
