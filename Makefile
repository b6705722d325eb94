# `make lego-mobile` runs all stages, from images to the report. A stage whose inputs and settings have
# not changed is not run again; an interrupted stage continues.
#
#   make lego-mobile                                  without data/ it uses the embedded scene
#   make lego-mobile DATA=path/to/nerf_synthetic/lego
#   make lego-mobile PRESET=small BUDGET_MS=8 TARGET=phone
#   make lego-mobile GPUS=4                           uses four GPUs to render, train and prune
#   make data        downloads the example scenes (Lego, fern) for `make lego-mobile fern-mobile`
#   make bench       measures the exported graphs of a run: RUN=runs/lego TARGET=phone
#   make test        runs the tests; `make test-phone` those on an emulated phone, with the real adb
#   make test-lens   runs the lens tests, which need node; RUN=runs/lego also compares that run's lens
#   make results     writes docs/results.md and README's table from the records in docs/records
#   make bench-gpu   measures this machine's GPU: peak rates, kernels, throughputs (DATA=scene, JSON=file)
#   make doctor      checks the hardware and software of this machine

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
PHONE := $(VENV)/.phone
LENS := tests/lens/node_modules

.PHONY: help setup data test test-phone test-lens check bench bench-gpu results doctor clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev]'
	touch $@

# Quotes a value for the shell.
quoted = '$(subst ','\'',$(1))'
stage = $(NELF) $(1) --run $(call quoted,$(RUNS)/$*)
processes = $(VENV)/bin/python -m pipeline.processes $(GPUS)
stage-on-gpus = $(if $(filter 1,$(GPUS)),$(stage),$(subst $(NELF),$(processes),$(stage)))
preset = --preset $(PRESET)
target = --target $(TARGET)
budget = $(if $(BUDGET_MS),--budget-ms $(BUDGET_MS))

%-mobile: $(SETUP)
	$(call stage,scene) $(preset) $(if $(DATA),--data $(call quoted,$(DATA)))
	$(call stage,teacher) $(preset)
	$(call stage-on-gpus,pseudo) $(preset)
	$(call stage-on-gpus,student) $(preset)
	$(call stage-on-gpus,prune) $(preset) $(target) $(budget)
	$(call stage,export)
	$(call stage,lens)
	$(call stage,bench) $(preset) $(target)
	$(call stage,report)

data: $(SETUP)
	$(NELF) data --folder data

bench-gpu: $(SETUP)
	$(VENV)/bin/python -m tools.bench_gpu $(if $(DATA),--data $(call quoted,$(DATA))) $(if $(JSON),--json $(call quoted,$(JSON)))

results: $(SETUP)
	$(VENV)/bin/python -m tools.results

bench: $(SETUP)
	$(NELF) bench --run $(call quoted,$(or $(RUN),$(RUNS)/lego)) --target $(TARGET)

doctor: $(SETUP)
	$(NELF) doctor

# Where torch brings no Triton of its own, the kernels are tested through Triton's interpreter.
$(TRITON): $(SETUP)
	-$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(VENV)/bin/python -m pip install \
	  --quiet --disable-pip-version-check --no-deps triton==3.6.0
	touch $@

test: $(TRITON)
	$(VENV)/bin/python -m pytest

# An emulated phone, made of Debian's packages in a folder of its own, inside namespaces of its own.
$(PHONE)/.ready: $(SETUP) tests/phone/packages.py $(wildcard device/runner/*)
	$(VENV)/bin/python tests/phone/packages.py $(PHONE)
	touch $@

test-phone: $(PHONE)/.ready
	$(VENV)/bin/python tests/phone/namespace.py $(PHONE) -m pytest tests/phone

# TypeScript for the types of a lens's scripts, ONNX Runtime for the images of its models.
$(LENS)/.ready: tests/lens/package.json tests/lens/package-lock.json
	npm --prefix tests/lens ci --ignore-scripts --no-audit --no-fund
	touch $@

test-lens: $(SETUP) $(LENS)/.ready
	NELF_TEST_LENS=1 NELF_LENS_RUN='$(RUN)' $(VENV)/bin/python -m pytest -rP tests/export/test_lens_*.py

check: $(TRITON)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) $(LENS) build *.egg-info
