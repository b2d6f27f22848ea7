# The commands of this project, each in one place: CONTRIBUTING.md names them, and the workflows call them.
# `.ci/run` runs the same lines with releases pinned; tests/test_kit.py compares them.
.DEFAULT_GOAL := help
.PHONY: help setup format lint types test slow gate docs bench gpu rehearse check clean

help:  ## print this list
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "make %-9s %s\n", $$1, $$2 }'

setup:  ## install the project for its developers, and the hooks of git
	pip install -e ".[dev,docs]"
	pre-commit install

format:  ## mend what ruff can mend
	ruff check --fix .
	ruff format .

lint:  ## ruff, as CI runs it
	ruff check .
	ruff format --check .

types:  ## mypy, strict
	mypy

test:  ## the tests: CPU operators and interpreted kernels, or compiled kernels where there is a GPU
	pytest -n auto

slow:  ## the tests that take minutes, or 9.3 GB of memory
	pytest -m slow

gate:  ## compile the kernels for four GPUs, hold their bounds and the recorded figures; no GPU needed
	mkdir -p build
	python -m benchmarks.static_profile --check --json build/profile.json
	python -m benchmarks.regression --check --profile build/profile.json

docs:  ## build the site; a warning is an error
	mkdocs build --strict

bench:  ## time and memory beside eager PyTorch and others (extra `bench`)
	fused-kd bench

gpu:  ## on a machine with a GPU: prove the results right and measure; writes gpu.json
	python -m benchmarks.gpu --json gpu.json

rehearse:  ## all stages of `make gpu` without a GPU
	python -m benchmarks.gpu --rehearse

check: lint types test gate  ## what a pull request needs

clean:  ## remove what these commands leave in the checkout
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage .coverage.*
