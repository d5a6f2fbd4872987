# Everything a developer types. Each target makes what it needs; nothing has to be installed by hand but Python 3.11
# with its venv module and make.
#
#   make demo                 a swarm of daemons on this machine averages and survives
#   make test                 the whole test suite
#   make check                format, lint, types, import rules, documentation
#   make PYTHON=/path/to/python3 test

PYTHON ?= $(shell command -v python3.11 || command -v python3)
FUZZ_EXAMPLES ?= 10000
FUZZ_SECONDS ?= 10
SIM_SEEDS ?= 20000
BIN := .venv/bin

# What reads bytes that others wrote: datagrams, frames, messages, payloads, records, certificates, invites, files.
PARSERS := $(addprefix tests/, \
	core/test_admission.py core/test_codecs.py core/test_control.py core/test_identity.py core/test_ids.py \
	core/test_invites.py core/test_layout.py core/test_messages.py core/test_records.py core/test_revocations.py \
	core/test_seal.py core/test_state_file.py core/test_state_messages.py core/test_vocabulary.py core/test_wire.py \
	daemon/test_dht_gate.py daemon/test_dht_limits.py daemon/test_dht_messages.py \
	daemon/test_dht_records.py daemon/test_swarm_store.py)

# Tests whose numbers are larger with MPD_SOAK=1: the full figures of docs/security.md and docs/reliability.md.
SOAKS := $(shell grep -lr SOAK tests --include='test_*.py')

.PHONY: help demo test check format figures bench validate fuzz soak docs clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo     run a small swarm on this machine and watch it average'
	@echo 'make test     run the whole test suite'
	@echo 'make check    format, lint, types, import rules, documentation (changes nothing)'
	@echo 'make format   rewrite the sources in the agreed format'
	@echo 'make docs     build the documentation into build/docs'
	@echo 'make figures  simulate the tables and plots of docs/simulate.md anew'
	@echo 'make bench    measure rounds against other systems'
	@echo 'make validate hold the event model of mpd advise to real daemons'
	@echo 'make fuzz     try FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) inputs per property, search FUZZ_SECONDS=$(FUZZ_SECONDS) per parser'
	@echo 'make soak     simulate SIM_SEEDS=$(SIM_SEEDS) rounds and as many swarms with seeded faults, then every attack in full'
	@echo 'make clean    remove build/, .venv and caches'

# ----------------------------------------------------------------------------------------------- the virtual environment

# Two stamps, so that a second call is instant and a changed pin reinstalls without making the environment anew.
.venv/made:
	@test -n '$(PYTHON)' || { echo 'No python3 found: install Python 3.11, or say make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo '$(PYTHON) is older than 3.11: install Python 3.11, or say make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo '$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv)'; exit 1; }
	@echo 'Making a virtual environment in .venv with $(PYTHON).'
	@$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/installed: .venv/made setup.cfg pyproject.toml constraints.txt requirements-dev.txt
	@echo 'Installing mpd, torch and the development tools into .venv, in the versions of constraints.txt.'
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -r requirements-dev.txt -e '.[torch]'
	@touch $@

# ---------------------------------------------------------------------------------------------------------------- targets

demo: .venv/installed
	@echo 'Starting a swarm of daemons on this machine.'
	@$(BIN)/python docs/examples/demo.py

# Two at a time; tests that share a swarm are in one file and stay together.
test: .venv/installed
	@echo 'Running the test suite.'
	@$(BIN)/pytest -n 2 --dist loadfile

check: .venv/installed build/view
	@echo 'Checking format and lint.'
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@echo 'Checking types.'
	@cd build/view && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p mpd
	@echo 'Checking the import rules.'
	@$(BIN)/pytest -q tests/test_boundaries.py
	@$(MAKE) --no-print-directory docs

# mypy does not follow setup.cfg's package_dir, so it is shown the installed shape: one package, its rooms inside.
.PHONY: build/view
build/view:
	@rm -rf build/view/mpd
	@mkdir -p build/view/mpd
	@ln -s $(CURDIR)/mpd/*.py $(CURDIR)/mpd/py.typed $(CURDIR)/daemon $(CURDIR)/client build/view/mpd/

format: .venv/installed
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format

docs: .venv/installed
	@echo 'Building the documentation into build/docs.'
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -d build/doctrees docs build/docs

figures: .venv/installed
	@echo 'Simulating what docs/simulate.md shows; this takes some minutes.'
	@$(BIN)/python docs/examples/simulate_figures.py

bench: .venv/installed
	@echo 'Measuring; this is only fair on an idle machine.'
	@$(BIN)/python tests/bench/run.py --history docs/benchmarks/history.jsonl

validate: .venv/installed
	@echo 'Comparing predicted and measured seconds; about forty minutes.'
	@$(BIN)/python tests/bench/validate.py

fuzz: .venv/installed
	@echo 'Trying the parsers with $(FUZZ_EXAMPLES) inputs per property.'
	@MPD_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/pytest --hypothesis-profile=fuzz --timeout=0 $(PARSERS)
	@echo 'Searching for $(FUZZ_SECONDS) seconds per parser, guided by the branches that inputs reach.'
	@$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

soak: .venv/installed
	@echo 'Simulating $(SIM_SEEDS) rounds and as many swarms; this takes about half an hour.'
	@MPD_SIM_SEEDS=$(SIM_SEEDS) $(BIN)/pytest --timeout=0 tests/sim
	@echo 'Trying every attack of docs/security.md as often as its table says; this takes about an hour.'
	@MPD_SOAK=1 $(BIN)/pytest --timeout=0 $(SOAKS)

clean:
	@echo 'Removing build/, .venv and caches.'
	@rm -rf build dist .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
