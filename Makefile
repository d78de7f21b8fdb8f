# Two commands for a fresh clone: `make demo` and `make test`. Needs only Python 3.10+ and make.
PYTHON ?= python3
VENV := .venv
S3 := .venv-s3
BIN := $(VENV)/bin
IN ?=
PIP := $(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt
# PyTorch for CPUs, from PyTorch's own index, takes a fifth of the space that it takes with CUDA.
CPU := $(if $(wildcard /proc/driver/nvidia/version),,--torch-backend=cpu)

# $(call install,EXTRA): if PyTorch's index cannot be reached, the default one has a larger build.
define install
	@echo "Installing linearsr[$(1)] into $(VENV)$(if $(CPU), with PyTorch for CPUs)"
	$(PIP) $(CPU) --editable '.[$(1)]' || { test "$(CPU)" && \
		echo "That failed. Trying the default index, whose PyTorch may be larger." && \
		$(PIP) --editable '.[$(1)]'; }
endef

.PHONY: demo test test-fast pages drills rehearse lint types docs requirements s3 s3-server clean
.DELETE_ON_ERROR:

# The demo needs the upscaler and one photograph; the tests need everything.
$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/uv
	$(call install,demo)
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/uv
	$(call install,dev)
	@touch $@ $(VENV)/demo.stamp

# The S3 server that the tests start: its requirements would bind those of the package.
$(S3)/stamp: constraints-s3.txt | $(BIN)/uv
	test -x $(S3)/bin/python || $(PYTHON) -m venv --without-pip $(S3)
	$(BIN)/uv pip install --quiet --python $(S3)/bin/python --constraint constraints-s3.txt swift
	@touch $@

$(BIN)/uv:
	@echo "Creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

demo: $(VENV)/demo.stamp
	$(BIN)/python -m tools.demo --output demo $(if $(IN),--input "$(IN)")

# Ray starts many processes: without compiled modules each of them would compile torch anew. Tests run
# in two processes, each with one cluster (tests/conftest.py groups them); with more threads the
# processes would wait for each other's cores.
QUICK := env -u PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX=$(CURDIR)/$(VENV)/pycache
PYTEST := $(QUICK) OMP_NUM_THREADS=1 $(BIN)/python -m pytest
TWO := --numprocesses 2 --dist loadgroup

test: $(VENV)/dev.stamp $(S3)/stamp lint types
	$(PYTEST) $(TWO) -m "not thorough" --ignore tests/drills --ignore tests/pages

# Without a cluster and without a browser.
test-fast: $(VENV)/dev.stamp
	$(PYTEST) $(TWO) -m "not cluster and not browser and not slow" \
		--ignore tests/drills --ignore tests/pages

# Clusters of their own, which two cores cannot have beside the others: every command of every page,
# and what breaks a fleet.
pages: $(VENV)/dev.stamp $(S3)/stamp
	$(PYTEST) tests/pages

drills: $(VENV)/dev.stamp $(S3)/stamp
	$(PYTEST) tests/drills
	LINEARSR_TEST_KILLED=4 $(PYTEST) -m thorough --ignore tests/drills --ignore tests/pages

# The whole story on an autoscaling cluster of this machine. On a real one:
# make rehearse STORAGE=s3://bucket/folder
STORAGE ?=
ARGS ?=
rehearse: $(VENV)/dev.stamp $(S3)/stamp
	$(QUICK) $(BIN)/python -m tools.rehearsal $(if $(STORAGE),--storage "$(STORAGE)") \
		$(if $(IN),--photos "$(IN)") $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

# The pages of docs/reference, from docstrings, parsers and configs.
docs: $(VENV)/dev.stamp
	$(BIN)/python -m tools.generate_docs

# The image's requirements with the digests of their files, after a change of constraints.txt.
requirements: $(VENV)/dev.stamp
	echo hatchling | $(BIN)/uv pip compile --quiet pyproject.toml - --extra all \
		--constraint constraints.txt --generate-hashes --no-annotate --no-header --no-emit-index-url \
		--python-version 3.11 --python-platform x86_64-manylinux_2_35 --output-file deploy/requirements.txt

s3-server: $(S3)/stamp

# For who has no bucket: S3 on this machine, until Ctrl-C. Objects stay in .s3.
s3: $(S3)/stamp
	@exec $(S3)/bin/python -m tools.s3_server --folder .s3 --port 9000

clean:
	rm -rf $(VENV) $(S3) .pytest_cache .mypy_cache .ruff_cache demo
