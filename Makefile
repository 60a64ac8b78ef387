# make demo    train, load, sample and inspect on a real ComfyUI     make ui    leave that server on, for a browser
# make test    every test       make lint    ruff and mypy           make bench figures of docs/
# make soak    what takes longer: kills at random moments

SHELL := /bin/bash
BASE := $(firstword $(wildcard $(shell command -v python3.11) $(shell command -v python3.12) $(shell command -v python3)))
VENV := .venv/bin/python
HOST := $(or $(COMFYUI_PYTHON),$(VENV))

unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-dev demo ui test soak lint format bench clean

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

soak: setup-dev
	@COMFYUI_PYTHON= $(VENV) -m dev.kills $(ARGS)

bench: setup-dev
	@$(VENV) -m benchmarks.speed $(ARGS)

clean:
	rm -rf .venv .host .pytest_cache .ruff_cache .mypy_cache
