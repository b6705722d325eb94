# The whole way is one command: `make lego-mobile`. Each line of the chain below is a stage; a stage
# whose inputs and settings have not changed is not run again, an interrupted one goes on.
#
#   make lego-mobile                                  the embedded scene when data/ holds no Lego
#   make lego-mobile DATA=path/to/nerf_synthetic/lego
#   make lego-mobile PRESET=small BUDGET_MS=8 TARGET=phone
#   make lego-mobile GPUS=4                           renders and trains on four GPUs of this machine
#   make data        download the example scenes (Lego, fern), then `make lego-mobile fern-mobile`
#   make bench-gpu   this machine's GPU: its ceilings, kernels, throughputs (DATA=scene, JSON=file)

PYTHON ?= python3
PRESET ?= auto
TARGET ?= auto
BUDGET_MS ?=
RUNS ?= runs
GPUS ?= 1

VENV := .venv
NELF := $(VENV)/bin/nelf
SETUP := $(VENV)/.ready
TRITON := $(VENV)/.triton

.PHONY: help setup data test check bench bench-gpu doctor clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev]'
	touch $@

# Where a scene's pictures are: DATA, else data/ from `make data`, else the embedded scene.
scene-data = $(or $(DATA),$(firstword $(wildcard data/nerf_synthetic/$* data/nerf_llff_data/$*)),bricks)
stage = $(NELF) $(1) --run $(RUNS)/$* --preset $(PRESET)
# After `--`, since torchrun would take --run for an option of its own.
torchrun = $(VENV)/bin/torchrun --standalone --nproc-per-node=$(GPUS) -m -- pipeline.cli
stage-on-gpus = $(if $(filter 1,$(GPUS)),$(stage),$(subst $(NELF),$(torchrun),$(stage)))
target = --target $(TARGET)
budget = $(if $(BUDGET_MS),--budget-ms $(BUDGET_MS))

%-mobile: $(SETUP)
	$(call stage,scene) --data '$(scene-data)'
	$(call stage,teacher)
	$(call stage-on-gpus,pseudo)
	$(call stage-on-gpus,student)
	$(call stage,prune) $(target) $(budget)
	$(call stage,export)
	$(call stage,lens)
	$(call stage,bench) $(target)
	$(call stage,report)

data: $(SETUP)
	$(NELF) data --folder data

bench-gpu: $(SETUP)
	$(NELF) bench-gpu $(if $(DATA),--data '$(DATA)') $(if $(JSON),--json '$(JSON)')

doctor: $(SETUP)
	$(NELF) doctor

# Where torch brings no Triton of its own, the kernels are tested through Triton's interpreter.
$(TRITON): $(SETUP)
	-$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(VENV)/bin/python -m pip install \
	  --quiet --disable-pip-version-check --no-deps triton==3.6.0
	touch $@

test: $(TRITON)
	$(VENV)/bin/python -m pytest

check: $(TRITON)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info
