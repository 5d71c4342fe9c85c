# Two commands matter: `make demo` and `make test`. Both set everything up by themselves.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PEERS := .venv-bench/.installed

.PHONY: help demo test lint bench clean

help:
	@echo "make demo    simulate, record, attack, and write a report (about three minutes)"
	@echo "make test    run all tests"
	@echo "make lint    check style, types and import contracts"
	@echo "make bench   measure speed and memory, beside peers where there are any"
	@echo "make clean   remove caches and build outputs (the environments stay)"

demo: $(INSTALLED)
	$(BIN)/fl-privacy demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) $(PEERS)
	@set -e; for file in tests/benchmarks/bench_*.py; do \
		echo "== $$file"; PYTHONPATH=.:.venv-bench $(BIN)/python "$$file"; \
	done

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# Made when missing, renewed when pyproject.toml changes.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("fl-privacy needs Python 3.11 or later, $(PYTHON) is " \
		+ sys.version.split()[0] + "; say: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@

# Peers that we measure ourselves against use our torch, so their dependencies stay out.
$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --upgrade --no-deps --target .venv-bench \
		breaching==0.1.2 hydra-core==1.3.* omegaconf==2.* antlr4-python3-runtime==4.9.*
	@touch $@
