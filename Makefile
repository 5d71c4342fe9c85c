# Two commands matter: `make demo` and `make test`. Both set everything up by themselves.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PEERS := .venv-bench/.installed
DEPLOYED ?= runs/deployed
COMPOSE := docker compose --env-file $(DEPLOYED)/env --file docker/compose.yaml

.PHONY: help demo test lint audit bench soak deploy-local container-engine clean

help:
	@echo "make demo    simulate, record, attack, and write a report (about three minutes)"
	@echo "make test    run all tests"
	@echo "make lint    check style, types and import contracts"
	@echo "make audit   scan dependencies for known vulnerabilities"
	@echo "make bench   measure speed and memory, beside peers where there are any"
	@echo "make soak    thirty deployed rounds with faults, and what was lost (as root)"
	@echo "make deploy-local  two SuperNodes and a SuperLink in containers, on this machine"
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

audit: $(INSTALLED)
	$(BIN)/python .ci/audit.py

bench: $(INSTALLED) $(PEERS)
	@set -e; for file in tests/benchmarks/bench_*.py; do \
		echo "== $$file"; PYTHONPATH=.:.venv-bench $(BIN)/python "$$file"; \
	done

# Half an hour; mounts a small disk of its own, so it needs root.
soak: $(INSTALLED)
	$(BIN)/python tests/benchmarks/soak.py

# docs/deployment.md says what is brought up, and how to use and end it.
deploy-local: container-engine $(INSTALLED)
	@umask 077; mkdir -p $(addprefix $(DEPLOYED)/,state recordings \
		node-0/data node-0/runs node-1/data node-1/runs); \
	[ -f $(DEPLOYED)/env ] || { echo "FL_PRIVACY_FILES=$(abspath $(DEPLOYED))"; \
		echo "FL_PRIVACY_USER=$$(id -u):$$(id -g)"; } > $(DEPLOYED)/env
	@[ -d $(DEPLOYED)/certs ] || $(BIN)/fl-privacy certs $(DEPLOYED)/certs --name superlink
	@$(BIN)/fl-privacy certs $(DEPLOYED)/certs --check --name superlink --nodes 2
	$(COMPOSE) build
	$(COMPOSE) up --detach --wait superlink serverapp
	@set -e; for node in node-0 node-1; do \
		[ -f $(DEPLOYED)/state/$$node ] || { \
			$(COMPOSE) run --rm control supernode register /certs/$$node.pub; \
			touch $(DEPLOYED)/state/$$node; }; \
	done
	$(COMPOSE) up --detach --wait
	@echo "Run: $(COMPOSE) run --rm control run /app --stream --run-config \"out-dir='/runs/first'\""

container-engine:
	@docker compose version > /dev/null 2>&1 && docker info > /dev/null 2>&1 || { \
		echo "make deploy-local needs Docker with its compose plug-in, and its daemon running;" \
		"docker info says why not" >&2; exit 1; }
	@[ "$$(id -u)" -ne 0 ] || { echo "containers run as the user who calls make," \
		"and must not run as root: call make as another user" >&2; exit 1; }

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
