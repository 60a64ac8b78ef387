# make demo    train, load, sample and inspect on a real ComfyUI     make ui    leave that server on, for a browser
# make test    every test, by two workers; ARGS="tests/unit -k rank": some       make lint    ruff and mypy           make bench figures of docs/benchmarks/
# make test-gpu    the tests that need a GPU
# make test-oldest   the nodes' tests on the oldest ComfyUI that they work with
# make fuzz    read mutated LoRA files for ten minutes, or ARGS="--seconds N"
# make evidence   the experiments of docs/evidence/ at a reduced size: checks what they claim
# make package   the registry's package: checked, zipped into dist/ and listed
# make faults    known faults planted in a copy, each caught by a test; ARGS="--only fsync": some of them
# make soak    kills, cancels and long runs for an hour or more: figures of docs/reliability.md

SHELL := /bin/bash
BASE := $(firstword $(wildcard $(shell command -v python3.11) $(shell command -v python3.12) $(shell command -v python3)))
VENV := .venv/bin/python
HOST := $(or $(COMFYUI_PYTHON),$(VENV))

WORKERS := -n 2 --dist loadgroup --no-loadscope-reorder
OLDEST := comfy/training comfy/load comfy/load_reduced comfy/families comfy/base_models comfy/bad_files comfy/bad_input comfy/failures comfy/progress server/server server/inspect server/cancel

unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-dev demo ui test soak test-gpu test-oldest lint format bench evidence fuzz faults package clean

setup:
	@$(BASE) dev/host.py

setup-dev:
	@COMFYUI_PYTHON= $(BASE) dev/host.py --dev

demo: setup
	@$(HOST) -m dev.demo

ui: setup
	@$(HOST) -m dev.ui

test: setup-dev
	@COMFYUI_PYTHON= $(VENV) -m pytest $(or $(ARGS),$(WORKERS))

soak: setup-dev
	@COMFYUI_PYTHON= $(VENV) -m pytest tests/soak -o "python_files=soak_*.py" -o "pythonpath=tests/soak" -s $(ARGS)
	@COMFYUI_PYTHON= $(VENV) -m dev.kills

test-gpu: setup-dev
	@$(HOST) -m dev.gpu_tests $(ARGS)

lint: setup-dev
	@$(VENV) -m ruff check .
	@$(VENV) -m ruff format --check --quiet .
	@mkdir -p .host/typing && ln -sfn ../.. .host/typing/pack  # the pack's relative imports need a package around it
	@MYPYPATH=.host/typing $(VENV) -m mypy -p pack.lora2 -p pack.nodes
	@$(VENV) -m mypy dev benchmarks

format: setup-dev
	@$(VENV) -m ruff check --fix .
	@$(VENV) -m ruff format .

bench: setup-dev
	@$(VENV) -m benchmarks.speed $(ARGS)

# Left out there: what only the newer host does (loaded weights are inference tensors; which of two faults of a caption it sees).
test-oldest: setup-dev
	@$(BASE) dev/host.py --oldest
	@COMFYUI_PYTHON= COMFYUI_PATH=.host/ComfyUI-0.16.3 $(VENV) -m pytest -p no:cacheprovider \
	  --deselect tests/comfy/test_base_models.py::test_weights_that_training_patches_are_like_those_that_sampling_patches \
	  --deselect "tests/comfy/test_bad_input.py::test_bad_data_is_refused[another text encoder]" \
	  --deselect "tests/comfy/test_bad_input.py::test_bad_data_is_refused[an empty caption of another encoder]" \
	  $(or $(ARGS),$(foreach name,$(OLDEST),tests/$(dir $(name))test_$(notdir $(name)).py))

fuzz: setup-dev
	@$(VENV) -m dev.fuzzing $(ARGS)

faults: setup-dev
	@COMFYUI_PYTHON= $(VENV) -m dev.faults $(ARGS)

evidence: setup-dev
	@OMP_WAIT_POLICY=PASSIVE $(VENV) -m benchmarks.evidence --check $(ARGS)

package: setup-dev
	@$(VENV) -m dev.package

clean:
	rm -rf .venv .host dist .pytest_cache .ruff_cache .mypy_cache
