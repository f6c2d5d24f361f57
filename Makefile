# Everything starts here. Each target makes what it needs by itself, on a fresh Debian machine too.
.PHONY: help demo test test-long soak bench lint clean
.DEFAULT_GOAL := help

PYTHON_BIN := .venv/bin/python
TEST_JOBS ?= 2

help:
	@echo 'make demo       a real disk image there and back again (raw, qcow2, zlib, zstd), in under 90 s'
	@echo 'make test       lint, then the test suite          (TEST_JOBS=2)'
	@echo 'make test-long  the whole suite with its long runs'
	@echo 'make soak       a day of broken images, then a day of everything else (SOAK=24h)'
	@echo 'make bench      enban and its peers side by side   (BENCH_PAIRS=7, BENCH_ARGS="--only convert")'
	@echo 'make lint       ruff, mypy --strict, the direction of imports'
	@echo 'make clean      remove everything made by the above'

demo:
	@scripts/setup
	@scripts/peers mkfs.ext4
	@$(PYTHON_BIN) scripts/demo.py

test: lint
	@scripts/peers
	@$(PYTHON_BIN) -m pytest -n $(TEST_JOBS)

test-long: lint
	@scripts/peers
	@$(PYTHON_BIN) -m pytest -n $(TEST_JOBS) -m 'long or not long'

SOAK ?= 24h

soak:
	@scripts/setup dev
	@.venv/bin/enban torture fuzz --time $(SOAK) --corpus fuzz/corpus
	@.venv/bin/enban torture --time $(SOAK)

bench:
	@scripts/setup dev
	@scripts/peers qemu-img
	@$(PYTHON_BIN) -m bench $(BENCH_ARGS)

lint:
	@scripts/setup dev
	@scripts/lint

clean:
	rm -rf .venv build dist demo bench/out .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
