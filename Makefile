# SPDX-License-Identifier: GPL-2.0-or-later
# make demo, make test: each does all its own set-up.  See README.md.

VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMMA := ,
SPACE := $(subst ,, )
NATIVE := $(wildcard migrate/*/native/*.[ch] migrate/*/native/*.py xenbackend/native/*.[ch] xenbackend/native/*.py xenbackend/*/native/*.[ch] xenbackend/*/native/*.py)

.PHONY: all tools gate everything demo test browser check coverage coverage-core coverage-c bench soak chaos many compat lowest packages underload \
	model warnings sanitize races fuzz xenlab xenlab-bench xenlab-xl-bench deb hypervisor-deb lock clean

all: $(STAMP)

# A virtual environment with the locked versions, and this tree in it (native modules compiled).
$(STAMP): requirements.lock pyproject.toml setup.py $(NATIVE)
	@sh .ci/prepare $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

# What a change must pass before it lands; ONLY= and SKIP= name stages, AGAIN=1 leaves out those that
# the last run of the same product has passed.
gate everything: $(STAMP)
	$(BIN)/python -m tests.checks $@ $(ONLY:%=--only %) $(SKIP:%=--skip %) $(AGAIN:%=--again)

# The Debian packages that the checks need, installed one time before the stages run beside each other.
tools: $(STAMP)
	@.ci/prepare $(PYTHON) spin clang libclang-rt-dev libxen-dev
	$(BIN)/python -c 'from tests.xenlab.parts import check_tools; check_tools()'

DEMO_MEMORY ?= 1G
demo: $(STAMP)
	$(BIN)/xen-postcopy loopback --memory $(DEMO_MEMORY) --vcpus 2 --workload random

# Most tests wait for most of their time, so more processes than the machine has cores run them; those
# marked serial follow by themselves.  JUNIT=FOLDER has the JUnit XML written there, here and elsewhere.
TEST_PROCESSES ?= $(shell expr 4 \* $$(nproc) + 1)
test: check
	$(BIN)/python -m pytest -m "not serial" -n $(TEST_PROCESSES) --dist worksteal $(if $(JUNIT),--junitxml="$(JUNIT)/tests.xml")
	$(BIN)/python -m pytest -m serial $(if $(JUNIT),--junitxml="$(JUNIT)/serial.xml")

# Style, spelling and types.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# A report in a real browser, at two widths, in the light, in the dark and on paper.
browser: $(STAMP)
	@.ci/prepare $(PYTHON) chromium
	$(BIN)/python -m pytest tests/browser/report_in_browser.py $(if $(JUNIT),--junitxml="$(JUNIT)/browser.xml")

# Every branch of the sans-IO core is reached by its own examples.  Properties are left out: which
# branches a random search reaches differs from run to run.
CORE := sender/bandwidth.py sender/intake.py migrate/protocol/frames.py migrate/protocol/fields.py migrate/protocol/messages.py \
	migrate/protocol/pfns.py sender/policy.py \
	migrate/protocol/session.py sender/backlog.py sender/estimate.py sender/ownership.py receiver/outstanding.py \
	receiver/ownership.py receiver/readahead.py migrate/fastpath/page_states.py \
	migrate/cli/evacuate/planner.py migrate/cli/evacuate/placement.py
CORE_TESTS := estimate evacuation evacuation_failures fault_path frames messages origins ownership_receiver ownership_sender page_states pfns placement policy read_ahead session
MEASURE = $(BIN)/coverage run --data-file=build/coverage/$@/data -m pytest
MEASURED = $(BIN)/coverage $(1) --data-file=build/coverage/$@/data
coverage-core: $(STAMP)
	@ls $(CORE) > /dev/null
	rm -rf build/coverage/$@
	$(MEASURE) --quiet -m "not hypothesis" $(CORE_TESTS:%=tests/unit/test_%.py)
	$(call MEASURED,combine) --quiet
	$(call MEASURED,report) --include=$(subst $(SPACE),$(COMMA),$(strip $(CORE))) --fail-under=100

# Which product code all tests together reach, daemons and every other process included.  What uses
# a real Xen runs in the lab only, and has a table of its own.  Tests of load, which are marked serial,
# are left out, because measured daemons are too slow for their time limits.
LIBXENCTRL := xenbackend/libxenctrl/*
coverage: $(STAMP)
	rm -rf build/coverage/$@
	$(MEASURE) -m "not serial" -n $(TEST_PROCESSES) --dist worksteal $(if $(JUNIT),--junitxml="$(JUNIT)/tests.xml")
	$(call MEASURED,combine) --quiet
	$(call MEASURED,json) --quiet -o "$(or $(JUNIT),build/coverage/$@)/coverage.json"
	$(call MEASURED,report) --include='$(LIBXENCTRL)'
	$(call MEASURED,report) --omit='*/native/build_*.py,$(LIBXENCTRL)'

# Which lines of the native modules their tests reach.
coverage-c: $(STAMP)
	$(BIN)/python -m tests.native.coverage

# Figures: against plain C programs on this machine, medians, ratios first.
bench: $(STAMP)
	$(BIN)/python -m tests.bench

# Every strategy and workload, many times over, at full size.
SOAK_ROUNDS ?= 20
soak: $(STAMP)
	$(BIN)/python -m tests.campaigns.soak --rounds $(SOAK_ROUNDS)

# Faults of all kinds at random instants, of migrations by the dozen; CHAOS_SEED= plays a trial again.
CHAOS_TRIALS ?= 50
chaos: $(STAMP)
	$(BIN)/python -m tests.campaigns.chaos --trials $(CHAOS_TRIALS) $(if $(CHAOS_SEED),--seed $(CHAOS_SEED))

# A hundred at once and a thousand one after the other, through one pair of daemons.
many: $(STAMP)
	$(BIN)/python -m tests.campaigns.many

# Migrations from an earlier release to this one and back; its tree comes from the history of the repository.
compat: $(STAMP)
	@.ci/prepare $(PYTHON) patch
	$(BIN)/python -m tests.campaigns.compat

# The Debian package: built, installed, used, upgraded and purged on a fresh Debian 12 and a fresh Debian 13.
packages: $(STAMP)
	@.ci/prepare $(PYTHON) debootstrap
	$(BIN)/python -m tests.campaigns.packages

# The unit tests, and a migration, with the lowest version of each dependency.
lowest:
	$(PYTHON) -m tests.campaigns.lowest

# The tests on a busy machine: two copies at once, beside stress-ng.
underload: $(STAMP)
	-@.ci/prepare $(PYTHON) stress-ng
	$(BIN)/python -m tests.campaigns.underload $(if $(JUNIT),--junit "$(JUNIT)") -- -m "not serial" -n 3 --dist worksteal

# A model checker goes through every state of the handover, and of what follows it.
model: $(STAMP)
	@.ci/prepare $(PYTHON) spin
	$(BIN)/python -m tests.campaigns.model.check $(MODEL)

# ---- the C files and what runs in them (docs/testing.md) ----
# Warnings of two compilers, a static analyser.
warnings: $(STAMP)
	@.ci/prepare $(PYTHON) clang libclang-rt-dev libxen-dev
	$(BIN)/python -m tests.native.lint

# AddressSanitizer and UndefinedBehaviorSanitizer; JUNIT= is a folder for a report of the tests.
sanitize: $(STAMP)
	$(BIN)/python -m tests.native.sanitize $(if $(JUNIT),--junitxml="$$(realpath -m "$(JUNIT)")/sanitize.xml")

# ThreadSanitizer.
races: $(STAMP)
	@.ci/prepare $(PYTHON) clang libclang-rt-dev libxen-dev
	$(BIN)/python -m tests.native.races

# What a peer may send and a ring may hold, guided by coverage: of the Python codec and of the C parsers.
FUZZ_SECONDS ?= 60
fuzz: $(STAMP)
	@.ci/prepare $(PYTHON) clang libclang-rt-dev
	$(BIN)/python -m tests.campaigns.fuzz --seconds $(FUZZ_SECONDS)
# ----

# The real Xen, emulated: builds hypervisors and a dom0 the first time (minutes), boots each and runs tests/xenlab/dom0 in it.
xenlab: $(STAMP)
	$(BIN)/python -m tests.xenlab --tests $(if $(JUNIT),--junit "$(JUNIT)") $(XENLAB)

# populate_evicted against one by one, on it.
xenlab-bench: $(STAMP)
	$(BIN)/python -m tests.xenlab --timeout 590 -- python3 -m tests.xenlab.dom0.evict_benchmark

# xl migrate by postcopy against Xen's own, of a guest that writes as fast as it can.
xenlab-xl-bench: $(STAMP)
	$(BIN)/python -m tests.xenlab --memory 4608 --timeout 1500 -- python3 -m tests.xenlab.dom0.xl_benchmark

# A Debian package for the release of this machine, in build/, with the interpreter and the modules of the release.
deb:
	@debian/build

# The hypervisor with memory paging, from the newest source package of this machine's release of Debian, or from
# the version that SOURCE= names.
hypervisor-deb:
	@.ci/prepare $(PYTHON) make flex bison patch dpkg-dev
	$(PYTHON) -m xenbackend.hypervisor.package --out build $(if $(SOURCE),--source $(SOURCE))

lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock && build/lock/bin/python -m pip install --quiet pip-tools
	build/lock/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --upgrade -o requirements.lock requirements.in

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name '*.so' -not -path './$(VENV)/*' -delete
