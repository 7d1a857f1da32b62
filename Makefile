# `make` or `make help` lists what there is.

## SHARDS       what to make the dataset from: sample, laion-part-0..99, paths, globs, URLs
SHARDS ?= sample
## OUT          folder of the dataset
OUT ?= out
## CONFIG       TOML file with settings
CONFIG ?=
## ARGS         further arguments, such as "--set filter.min_face_px=96" (for test: to pytest; for bench: cases, see --help)
ARGS ?=
## VARIANT      what to train: ip-adapter, plus, plus-face, full-face, faceid, faceid-portrait, faceid-plus, faceid-plusv2
VARIANT ?= faceid-plusv2
## EXTRA        cpu or gpu; remembered once set up
EXTRA ?= $(patsubst .venv/.setup-%,%,$(firstword $(wildcard .venv/.setup-*) .venv/.setup-cpu))
## TORCH_INDEX  index to take torch and torchvision from, such as one of CPU builds (a default index may hold CUDA builds of gigabytes)
TORCH_INDEX ?=
## PYTHON       Python 3.11 or 3.12 to make .venv with
PYTHON ?= $(shell for python in python3.11 python3.12 python3 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& { echo $$python; break; }; done)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
# else, where it is set, each process compiles thousands of modules of .venv once more: half of what a short command takes
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help setup dataset train plan report verify models test lint bench bench-gpu bench-gpu-wheels docs cluster-demo image clean

PY    := .venv/bin/python
STAMP  = .venv/.setup-$(EXTRA)
JOB    = --shards "$(SHARDS)" --out "$(OUT)" $(if $(CONFIG),--config "$(CONFIG)") $(ARGS)
# both own the folder onnxruntime/, so exactly one of them may stay
ONNXRUNTIME_cpu := onnxruntime
ONNXRUNTIME_gpu := onnxruntime-gpu
ONNXRUNTIME      = $(ONNXRUNTIME_$(EXTRA))

help: ## list the targets and variables
	@printf 'targets, each of which sets up what it needs in .venv first:\n'
	@sed -nE 's/^([a-z-]+):.* ## (.*)/  make \1\t\2/p' Makefile | expand -t 24
	@printf '\nvariables, given as in: make dataset SHARDS=laion-part-0..99 OUT=faces\n'
	@sed -n 's/^## /  /p' Makefile

setup: $(STAMP) ## make .venv and install everything into it [EXTRA= TORCH_INDEX= PYTHON=]

$(STAMP): pyproject.toml constraints.txt docker/torchvision_beside_cpu_torch.py
	@$(if $(ONNXRUNTIME),,echo "EXTRA=$(EXTRA) is not known; choose cpu or gpu." >&2; exit 1)
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		if [ -z "$(PYTHON)" ]; then \
			echo "No Python 3.11 or 3.12 with venv was found; install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
		fi; \
		"$(PYTHON)" -m venv --clear .venv; \
	fi
	@# pip first: unlike uv it knows the local wheels that its own configuration names, and torch is the big one; most of
	@# its modules are never imported, so that to compile them all takes longer than to unpack them
	$(PY) -m pip install --quiet --constraint constraints.txt uv
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps --no-compile $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch torchvision
	@# uv does not read pip's configuration: hand it the main index, where pip has one
	@set -e; index=$$($(PY) -m pip config list | sed -nE "s/^(global|install|:env:)\.index-url='(.*)'$$/\2/p" | tail -n 1); \
	export UV_DEFAULT_INDEX=$${UV_DEFAULT_INDEX:-$$index}; [ -n "$$UV_DEFAULT_INDEX" ] || unset UV_DEFAULT_INDEX; \
	uv="$(PY) -m uv pip"; set -x; \
	$$uv install --quiet --python $(PY) --constraint constraints.txt --editable '.[$(EXTRA),dev,docs]'; \
	$$uv uninstall --quiet --python $(PY) onnxruntime onnxruntime-gpu; \
	$$uv install --quiet --python $(PY) --constraint constraints.txt --no-deps $(ONNXRUNTIME)
	$(PY) docker/torchvision_beside_cpu_torch.py
	@rm -f .venv/.setup-*; touch $@

dataset: $(STAMP) ## metadata to training shards; the bundled sample by default [SHARDS= OUT= CONFIG= ARGS=]
	$(PY) -m pipeline dataset $(JOB)

train: $(STAMP) ## train an adapter from the shards in OUT; a tiny base on a sample's shards [VARIANT= OUT= CONFIG= ARGS=]
	$(PY) -m pipeline.train --from-shards "$(OUT)" --variant "$(VARIANT)" $(if $(CONFIG),--config "$(CONFIG)") $(ARGS)

plan: $(STAMP) ## show what `make dataset` would do, without doing it [SHARDS= OUT= CONFIG= ARGS=]
	$(PY) -m pipeline plan $(JOB)

report: $(STAMP) ## write OUT/report.html from the ledgers and shards in OUT [OUT=]
	$(PY) -m pipeline report "$(OUT)"

verify: $(STAMP) ## check every manifest, hash, count and sample in OUT [OUT=]
	$(PY) -m pipeline verify "$(OUT)"

models: $(STAMP) ## list the model weights, their licences, and which are here
	$(PY) -m pipeline models list

test: $(STAMP) ## run the tests [ARGS=]
	$(PY) -m pytest $(ARGS)

lint: $(STAMP) ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP) ## a table of what it costs against its peers; ARGS=--smoke on tiny inputs, ARGS=--log adds it to docs/LOG.md [ARGS=]
	$(PY) benchmarks $(ARGS)

bench-gpu: $(STAMP) ## the ten-minute proof on this machine's GPU; ARGS=--smoke does it with tiny models [ARGS=]
	$(PY) benchmarks/gpu $(ARGS)

bench-gpu-wheels: $(STAMP) ## gather in build/wheels what a bare machine with a GPU, Python 3.12 and torch lacks for it
	rm -rf build/wheels
	$(PY) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
		--constraint constraints.txt --requirement benchmarks/gpu/wheels.txt --dest build/wheels
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir build/wheels .
	@du -sh build/wheels
	@echo 'there: python -m pip install --no-index --no-deps --target site build/wheels/*.whl; PYTHONPATH=site python benchmarks/gpu'

docs: $(STAMP) ## build the site of docs/ into build/site, and run its notebook: no network
	$(PY) -m zensical build --strict --clean --config-file .zensical.toml
	rm -rf build/notebook; mkdir -p build/notebook; cp docs/notebook.ipynb build/notebook
	OMP_NUM_THREADS=1 .venv/bin/jupyter-execute --inplace build/notebook/notebook.ipynb
	cp build/notebook/notebook.ipynb build/site

cluster-demo: $(STAMP) ## a Ray cluster on this machine, of which a node dies and another joins: same bytes as local [ARGS=]
	$(PY) benchmarks/cluster_demo.py $(ARGS)

image: ## build the Docker image faceshards:cpu or faceshards:gpu [EXTRA= TORCH_INDEX=]
	@command -v docker >/dev/null || { echo "docker is not installed; make image needs it, no other target does." >&2; exit 1; }
	@docker info >/dev/null 2>&1 || { echo "docker is installed, but no engine answers; start it (or set DOCKER_HOST)." >&2; exit 1; }
	docker build --file docker/Dockerfile --target "$(EXTRA)" --build-arg TORCH_INDEX="$(TORCH_INDEX)" --tag "faceshards:$(EXTRA)" .

clean: ## remove .venv, caches and build leftovers; never OUT
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
