# `make` alone lists the targets. Needed beforehand: python3 (3.11 or newer, with venv), make,
# openssl.

PYTHON ?= python3
python = .venv/bin/python
protos = authservice.proto workerservice.proto
# The modules that run by themselves, with the standard library only.
library = argv broadcaster budget buffers cgroupfs cgroups children descriptors ending environment errands errors estate finding finishedlog forkserver holes inherited inputpipe job jobinput jobstate jobstep jobtable journal keeping lastinggap leader leaders leftovers lifeline limits messages others outputdirectory outputdisk outputerrors outputstate outputtimes parts privileges processes registry removals resuming retention scratch slurm slurmchannel slurminput slurmjob slurmreports slurmworker sources spares spawner starting store successor tails takeover unixsockets watching worker
protoc = $(python) -m grpc_tools.protoc -I. --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(protos)
# pyproject.toml names what we depend on; requirements/ has the hashes of that and of what it needs.
# Only wheels, because a source package runs code of its own while it is installed.
install = $(python) -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all:
lock = .venv/lock/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options
requirements = import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(*p$(1), sep="\n")

PREFIX ?= /opt/job-worker

.PHONY: test-slurm test-systemd install uninstall help setup demo serve test check tools static bench bench-long certs library proto lock extras

help: ## list the targets (what `make` alone does)
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

# An environment whose Python is gone, or has become another version, is made anew.
ifneq ($(wildcard .venv/runtime),)
$(shell $(python) -c 'import pip' 2>/dev/null || rm -f .venv/runtime .venv/dev)
endif

# Where the keys of the CAs are kept elsewhere, as docs/security.md demands, setup makes no certificates.
trial_certs = if [ -e certs/client-ca.pem ] && ! { [ -e certs/client-ca-key.pem ] && [ -e certs/server-ca-key.pem ]; }; \
  then echo "certs/ stays as it is: the keys of its CAs are kept elsewhere" >&2; else certs/generate.sh; fi

# Compiled here, because the user who runs the client may not be allowed to write to this directory.
setup: .venv/runtime ## install the packages the server and the client need; make certificates
	@$(trial_certs)
	@$(python) -m compileall -q $(filter-out test%.py conftest.py %_plugin.py,$(wildcard *.py))

.venv/runtime: requirements/runtime.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "job-worker needs Python 3.11 or newer; try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(install) -r requirements/runtime.txt
	@touch $@

.venv/dev: .venv/runtime requirements/dev.txt
	$(install) -r requirements/dev.txt
	@touch $@

lock: .venv/runtime ## after a change of the packages in pyproject.toml: write their hashes
	$(PYTHON) -m venv .venv/lock && .venv/lock/bin/pip install --quiet pip-tools
	$(python) -c '$(call requirements,["project"]["dependencies"])' >.venv/runtime.in
	$(python) -c '$(call requirements,["dependency-groups"]["dev"])' >.venv/dev.in
	$(lock) --no-annotate -o requirements/runtime.txt .venv/runtime.in
	$(python) -c '$(call requirements,["project"]["optional-dependencies"]["health"])' >.venv/extras.in
	$(python) -c '$(call requirements,["project"]["optional-dependencies"]["reflection"])' >>.venv/extras.in
	$(lock) --no-annotate -c requirements/runtime.txt -o requirements/dev.txt .venv/dev.in
	$(lock) --no-annotate -c requirements/runtime.txt -o requirements/extras.txt .venv/extras.in

extras: .venv/runtime ## install the packages of the services health and reflection (docs/monitoring.md)
	$(install) -r requirements/extras.txt

certs: ## make the certificates that are missing or have expired
	@certs/generate.sh

demo: setup ## start a server, run three jobs on it, stop it
	@scripts/demo.sh

serve: setup ## run a server on 127.0.0.1:50051, with the limits this host can enforce
	./server --limits auto

test: setup .venv/dev ## run all tests; those that need a real cgroup tree boot a kernel of their own
	@scripts/run-tests

test-systemd: setup .venv/dev ## as root: follow docs/deploy.md on a Debian (SUITE=trixie: 13) with systemd in user-mode Linux, in minutes
	JOBWORKER_SYSTEMD=1 $(python) -m pytest -v -o time_limit_s=900 -x test_systemd.py

test-slurm: setup .venv/dev ## as root, with Slurm's packages: the tests of the service over a cluster on this machine
	JOBWORKER_REQUIRE_SLURM=1 $(python) -m pytest --slurm test_service.py test_restart.py \
	  test_survival.py::test_nothing_is_lost_at_random_moments

check: static test ## all that must pass before a change is pushed: static, then test

static: .venv/dev ## ruff, mypy, and whether the generated code belongs to the protos
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	@d=$$(mktemp -d) && trap 'rm -rf "$$d"' EXIT && $(call protoc,"$$d") \
	  && for f in "$$d"/*; do diff -u "$${f##*/}" "$$f" || { echo "run: make proto" >&2; exit 1; }; done

# buf and the packages of Node come with their hashes in package-lock.json, grpcurl in a source
# package whose hash requirements/grpcurl.txt has.
tools: .venv/dev ## install what the tests of clients in other languages need; Node and npm must be there
	npm ci --silent --no-audit --no-fund --ignore-scripts --prefix examples/node
	$(python) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/grpcurl.txt

bench: setup ## measure the service against the floors under it, in some ten minutes
	$(python) -m bench

bench-long: setup ## run 50,000 jobs in 15 minutes; fails if anything has piled up
	$(python) -m bench.long

library: ## copy the library, which needs no package: make library DEST=directory
	@: $${DEST:?is missing: make library DEST=directory}
	@mkdir -p '$(DEST)' && cp $(library:=.py) '$(DEST)'

install: ## as root: install the server, or upgrade it (PREFIX=/opt/job-worker, HOSTS=name: see docs/deploy.md)
	@PYTHON='$(PYTHON)' PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' HOSTS='$(HOSTS)' EXTRAS='$(EXTRAS)' scripts/install.sh install

uninstall: ## as root: remove what install has installed; settings and state stay
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' scripts/install.sh uninstall

proto: .venv/dev ## generate the code that belongs to the protos
	$(call protoc,.)
