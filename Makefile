# The whole way is one command: `make lego-mobile`. Each line of the chain below is a stage; a stage
# whose inputs and settings have not changed is not run again, an interrupted one goes on.
#
#   make lego-mobile                                  the embedded scene when data/ holds no Lego
#   make lego-mobile DATA=path/to/nerf_synthetic/lego
#   make lego-mobile PRESET=small BUDGET_MS=8 TARGET=phone
#   make data        download the example scenes (Lego, fern), then `make lego-mobile fern-mobile`

PYTHON ?= python3
PRESET ?= auto
TARGET ?= auto
BUDGET_MS ?=
RUNS ?= runs

VENV := .venv
NELF := $(VENV)/bin/nelf
SETUP := $(VENV)/.ready

.PHONY: help setup data test check bench doctor clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//; 1,/^$$/p' Makefile

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev]'
	touch $@

# Where a scene's pictures are: DATA, else data/ from `make data`, else the embedded scene.
scene-data = $(or $(DATA),$(firstword $(wildcard data/nerf_synthetic/$* data/nerf_llff_data/$*)),bricks)
stage = $(NELF) $(1) --run $(RUNS)/$* --preset $(PRESET)
target = --target $(TARGET)
budget = $(if $(BUDGET_MS),--budget-ms $(BUDGET_MS))

%-mobile: $(SETUP)
	$(call stage,scene) --data '$(scene-data)'
	$(call stage,teacher)
	$(call stage,pseudo)
	$(call stage,student)
	$(call stage,prune) $(target) $(budget)
	$(call stage,export)
	$(call stage,lens)
	$(call stage,bench) $(target)
	$(call stage,report)

data: $(SETUP)
	$(NELF) data --folder data

doctor: $(SETUP)
	$(NELF) doctor

test: $(SETUP)
	$(VENV)/bin/python -m pytest

check: $(SETUP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info
