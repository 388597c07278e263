# Two commands: `make serve` and `make test`. Both make their own virtual environment the first time.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?=
ARGS   ?=

.PHONY: serve test check chaos format proto clean

serve: $(VENV)/.installed
	@exec $(BIN)/baton serve $(MODEL) --die-with $$PPID $(ARGS)

test: check
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

# Half an hour or more, on a machine that does nothing else; as root also partitions of the network.
chaos: $(VENV)/.test-installed
	$(BIN)/python -m tests.chaos

check: $(VENV)/.test-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.test-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stubs are committed. An older grpcio-tools is asked for so that they run on protobuf >= 6.31.
proto:
	$(PYTHON) -m venv build/protoc
	build/protoc/bin/pip install --quiet 'grpcio-tools==1.78.*' setuptools
	build/protoc/bin/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. proto/cluster/wire/*.proto

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py $(wildcard engine/native/*.cpp engine/native/*.h) | $(VENV)/bin/python
	@echo 'Installing into $(VENV), this once ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test-installed: pyproject.toml | $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
