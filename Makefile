# Everything a clone needs to be set up, shown, tested and checked. Needed beforehand:
# python3 (3.11 or newer, with venv), make, openssl.

PYTHON ?= python3
python = .venv/bin/python
protos = authservice.proto workerservice.proto
# The modules that run by themselves, with the standard library only.
library = broadcaster cgroups errors forkserver job limits privileges retention spawner worker
protoc = $(python) -m grpc_tools.protoc -I. --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(protos)
# pyproject.toml is the only place that names what we depend on.
requirements = import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(*p$(1), sep="\n")

.PHONY: setup demo serve test check static bench bench-long certs library proto

# Compiled here, as whoever runs the client may not be allowed to write, or told Python not to.
setup: .venv/runtime certs
	@$(python) -m compileall -q $(filter-out test_% testkit.py conftest.py kernel_plugin.py,$(wildcard *.py))

.venv/runtime: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "job-worker needs Python 3.11 or newer; try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(python) -c '$(call requirements,["project"]["dependencies"])' >.venv/runtime.txt
	$(python) -m pip install --quiet --disable-pip-version-check -r .venv/runtime.txt
	@touch $@

.venv/dev: .venv/runtime
	$(python) -c '$(call requirements,["dependency-groups"]["dev"])' >.venv/dev.txt
	$(python) -m pip install --quiet --disable-pip-version-check -r .venv/dev.txt
	@touch $@

# Makes what is missing or has expired, and says nothing if nothing is.
certs:
	@certs/generate.sh

demo: setup
	@scripts/demo.sh

serve: setup
	./server --limits auto

test: setup .venv/dev
	$(python) -m pytest

check: static test

# All of check that runs no test.
static: .venv/dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	@d=$$(mktemp -d) && trap 'rm -rf "$$d"' EXIT && $(call protoc,"$$d") \
	  && for f in "$$d"/*; do diff -u "$${f##*/}" "$$f" || { echo "run: make proto" >&2; exit 1; }; done

# In under five minutes.
bench: setup
	$(python) -m bench

# In a quarter of an hour. Its exit status tells whether something has piled up.
bench-long: setup
	$(python) -m bench.long

# make library DEST=dir: copy the library.
library:
	@mkdir -p '$(DEST)' && cp $(library:=.py) '$(DEST)'

proto: .venv/dev
	$(call protoc,.)
