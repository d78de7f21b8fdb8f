# Two commands for a fresh clone: `make demo` and `make test`. Needs only Python 3.10+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
IN ?=
PIP := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt

.PHONY: demo test lint types clean
.DELETE_ON_ERROR:

# The demo needs the upscaler and one photograph; the tests need everything.
$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/uv
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/uv
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/demo.stamp

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

demo: $(VENV)/demo.stamp
	$(BIN)/python -m linearsr.demo --output demo $(if $(IN),--input "$(IN)")

# Ray starts many processes: without compiled modules each of them would compile torch anew.
test: $(VENV)/dev.stamp lint types
	env -u PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX=$(CURDIR)/$(VENV)/pycache \
		$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo
