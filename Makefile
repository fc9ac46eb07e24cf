# The commands of the README. Each sets up .venv in the checkout first; nothing outside the checkout is touched, except that
# `make test` adds Debian packages for its S3 server when it may (root, on Debian).
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
IMAGE ?= personmae
ENGINE ?= $(if $(shell command -v buildah),buildah,docker)
IMAGE_FLAGS ?=
RUN := runs/quickstart
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install quickstart test checkov image image-test lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## set up .venv and install everything into it

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "Python 3.11, 3.12 or 3.13 is required; $(PYTHON) is $$($(PYTHON) --version 2>&1): give another with 'make PYTHON=python3.12 ...'"; exit 78; }
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV) || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv"; exit 78; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: $(INSTALLED) ## the main job on synthetic people, under 10 minutes on 2 CPU cores; interrupt and repeat it at will
	$(BIN)/personmae synth $(RUN)/data
	$(BIN)/personmae shards write $(RUN)/data/pool $(RUN)/shards --shard-mb 8 --if-missing
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/deepspeed --num_gpus 1 --log_level warning launcher/pretrain.py --config configs/quickstart.yaml
	$(BIN)/personmae evaluate histogram market1501 $(RUN)/data/market1501 --out $(RUN)/histogram
	$(BIN)/personmae finetune configs/quickstart_random.yaml
	$(BIN)/personmae finetune configs/quickstart_personmae.yaml
	$(BIN)/personmae report $(RUN)

test: $(INSTALLED) $(VENV)/checkov/bin/checkov ## all tests that this machine can run
	@tests/integration/install_ceph.sh
	@tests/integration/install_prometheus.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs # most of them wait: for processes to start, for signals, for time-outs

checkov: $(VENV)/checkov/bin/checkov ## the manifests' linter, in an environment of its own: its pins do not go with ours

$(VENV)/checkov/bin/checkov: | $(INSTALLED)
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)/checkov && $(VENV)/checkov/bin/pip install --quiet checkov

image: ## build the container image with buildah or docker
	$(ENGINE) build --tag $(IMAGE) --build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) $(IMAGE_FLAGS) .

image-test: $(INSTALLED) ## build the image from a base made on the spot and run it; needs root, buildah, mmdebstrap, 30 GB
	PERSONMAE_IMAGE_TEST=1 $(BIN)/python -m pytest tests/image -s -rs

lint: $(INSTALLED) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and all runs
	rm -rf $(VENV) runs
