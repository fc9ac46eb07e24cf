# The commands of the README. Each sets up .venv in the checkout first. Nothing outside the checkout is touched, except that
# `make test-all` adds Debian packages for its servers when it may (root, on Debian).
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
UPGRADE ?=
KUBECONFIG ?=
IMAGE ?= personmae
ENGINE ?= $(if $(shell command -v buildah),buildah,docker)
IMAGE_FLAGS ?=
RUN := runs/quickstart
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CHECKOV := $(VENV)/checkov/bin/checkov
# A worker that has done its share takes over from the other, so that neither is left alone with the last files.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal -rsfE # what failed comes last
UV := $(BIN)/uv --quiet
LOCKED := --constraint requirements.txt --build-constraint requirements.txt
# uv does not see the system's packages, which a venv made with VENV_FLAGS=--system-site-packages is to keep. pip does.
INSTALL := $(if $(VENV_FLAGS),$(BIN)/python -m pip install --quiet,$(UV) pip install --python $(BIN)/python $(LOCKED))
COMPILE = $(UPGRADE) --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --custom-compile-command "make lock"

.PHONY: help install lock quickstart test test-all test-cluster checkov image image-test lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## set up .venv and install everything into it

$(INSTALLED): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "Python 3.11, 3.12 or 3.13 is required; $(PYTHON) is $$($(PYTHON) --version 2>&1): give another with 'make PYTHON=python3.12 ...'"; exit 78; }
	@echo "setting up $(VENV): about 7 GB to download and unpack, a minute on a fast network"
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV) || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv"; exit 78; }
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.txt > $(VENV)/uv.txt
	$(BIN)/python -m pip install --quiet --require-hashes --requirement $(VENV)/uv.txt
	DS_BUILD_OPS=0 $(INSTALL) --editable '.[dev]'
	touch $@

lock: $(INSTALLED) ## write the lock again after a change of pyproject.toml. UPGRADE=--upgrade moves every release in it
	$(UV) pip compile $(COMPILE) --all-extras --output-file requirements.txt pyproject.toml
	echo checkov | $(UV) pip compile $(COMPILE) --output-file tests/k8s/checkov.txt -

quickstart: $(INSTALLED) ## the main job on synthetic people. It says first how long it takes here. Interrupt and repeat it at will
	@$(BIN)/personmae doctor --quickstart
	$(BIN)/personmae synth $(RUN)/data
	$(BIN)/personmae shards write $(RUN)/data/pool $(RUN)/shards --shard-mb 8 --if-missing
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/deepspeed --num_gpus 1 --log_level warning launcher/pretrain.py --config configs/quickstart.yaml
	$(BIN)/personmae evaluate histogram market1501 $(RUN)/data/market1501 --out $(RUN)/histogram
	$(BIN)/personmae evaluate thumbnail+histogram market1501 $(RUN)/data/market1501 --out $(RUN)/thumbnail_histogram
	$(BIN)/personmae finetune configs/quickstart_random.yaml
	$(BIN)/personmae finetune configs/quickstart_personmae.yaml
	$(BIN)/personmae report $(RUN)

test: $(INSTALLED) ## the tests that are not slow. They say what they skip and why
	$(PYTEST) -m "not slow"

test-cluster: $(INSTALLED) ## an operator's whole story on the real cluster of an administrator's KUBECONFIG=FILE
	@test -f "$(KUBECONFIG)" || { echo "a cluster is required: give make test-cluster KUBECONFIG=FILE, an administrator's"; exit 78; }
	PERSONMAE_E2E_KUBECONFIG=$(abspath $(KUBECONFIG)) $(BIN)/python -m pytest -n 0 -rs tests/k8s/test_story.py tests/k8s/test_stand_in.py

test-all: $(INSTALLED) $(CHECKOV) ## these and the slow ones: kills, whole runs and launchers, compilers, rehearsals, real servers
	@tests/integration/install_ceph.sh
	@tests/integration/install_prometheus.sh
	$(PYTEST)

checkov: $(CHECKOV) ## install the linter of manifests, in an environment of its own: its pins do not go with ours

$(CHECKOV): tests/k8s/checkov.txt | $(INSTALLED)
	$(UV) venv --clear --python $(BIN)/python $(VENV)/checkov
	$(UV) pip install --python $(VENV)/checkov/bin/python --require-hashes --requirement tests/k8s/checkov.txt
	touch $@

image: ## build the container image with buildah or docker
	$(ENGINE) build --tag $(IMAGE) --build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) $(IMAGE_FLAGS) .

image-test: $(INSTALLED) ## build the image from a base made on the spot and run it. Needs root, buildah, mmdebstrap, 30 GB
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
