# `make help` lists the targets. VENV and PYTHON may be set: `make test VENV=/path/to/venv PYTHON=python3.12`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
# Implementations of models of which three at once fill 24 GB.
FEW ?= eager-channels-last,inductor-freezing,hasten-inductor-freezing

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format tables bench speed clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[diffusers]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.bench: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[diffusers,bench]'
	@touch $@

demo: $(VENV)/.demo ## set up, then generate pictures with the plain and the optimised model, side by side
	$(BIN)/hasten generate scenes-unet -o $(OUT)/demo

test: $(VENV)/.dev ## set up, then run the tests that need no GPU and no real-size model
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev ## the tests on real-size models: about an hour, 16 GB
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff write what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A work that fails is told and costs the exit code, not the tables of the others.
bench: $(VENV)/.bench ## time layers and models in every implementation, and write the tables of BENCHMARKS.md
	@mkdir -p $(OUT)
	code=0; \
	$(BIN)/hasten bench --set layers --jsonl $(OUT)/bench.jsonl || code=$$?; \
	$(BIN)/hasten bench --set models --jsonl $(OUT)/bench.jsonl || code=$$?; \
	$(BIN)/hasten bench --set large --implementations $(FEW) --jsonl $(OUT)/bench.jsonl || code=$$?; \
	$(BIN)/hasten bench --render $(OUT)/bench.jsonl --into BENCHMARKS.md && exit $$code

speed: $(VENV)/.dev ## plain Inductor and ONNX Runtime against hasten on small models, all in one process
	$(BIN)/python tests/tables/speed.py

tables: $(VENV)/.dev ## print the acceptance tables: counts per model, ONNX node tests, diffusers configurations, operators
	$(BIN)/python tests/tables/counts.py
	$(BIN)/python tests/tables/onnx_node_tests.py
	$(BIN)/python tests/tables/diffusers_configs.py --engine eager
	$(BIN)/python tests/tables/opinfo.py

clean: ## remove what the targets made, the virtual environment excepted
	rm -rf $(OUT) build dist .pytest_cache .mypy_cache .ruff_cache
