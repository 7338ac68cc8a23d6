# make run                      QKD on the embedded stream, from nothing to a report
# make run EXP=imagenet_r METHOD=ease SEED="1993 1994 1995" ARGS="--set train.epochs=5"
# make compare METHODS="qkd ease" SEEDS="1993 1994 1995" JOBS=2   one table; METHODS empty = all
# make test                     the default suite
# make test-slow                what takes minutes; TESTS=tests/nn for a part
# make test-optimised           a short suite as users compile: with XLA's optimisations, which the others leave out
# make test-floor               a short suite with the oldest supported versions, in .venv-floor
# make test-newest              the same with the newest Python here and its newest versions, in .venv-newest
# make test-wheel               builds the wheel and runs it in an empty folder and environment
# make bench                    side by side with PyTorch, PennyLane and others; prints ratios
#                               SUBJECTS="gate inference" runs only those
# make bench-smoke              the same, tiny: to see that every benchmark runs; writes nothing
# make project NAME=drifting_2d  an experiment beside the library, its pictures and its table
# make fuzz                     reads files that are changed at random; INPUTS=1000000 FUZZ_SEED=1
# make faults                   kills runs at random moments and compares what they become; KILLS=100 FAULTS_SEED=0
# make mutants                  plants mistakes in the code, one at a time, and runs the tests: hours;
#                               MODULES="nn/losses protocol/metrics" MUTANTS=20 MUTANTS_SEED=0
# make docs                     the site of docs/, in build/docs; a broken link or anchor is an error
# make lint                     ruff, check and format; make format repairs what it can
# make lock                     the developers' versions anew, in requirements-lock.txt
#                               make test CONSTRAINT=requirements-lock.txt installs them
# make clean                    removes environments, wheels and the site
# make run, compare and project install what a run needs, as requirements.txt does; all else is in the
# extras of pyproject.toml

EXP ?= renditions
METHOD ?= qkd
SEED ?= 1993
SUBJECTS ?=
INPUTS ?= 100000
FUZZ_SEED ?= 0
MODULES ?=
MUTANTS ?= 20
MUTANTS_SEED ?= 0
KILLS ?= 100
FAULTS_SEED ?= 0
METHODS ?=
SEEDS ?= 1993 1994 1995
JOBS ?= 1
ARGS ?=
NAME ?= drifting_2d
VENV ?= .venv
PYTHON ?= python3
TESTS ?= tests
# The first of some interpreters that is there and can make environments; pyenv's need not be on the path.
pythons = $(foreach version,$(1),python$(version) $(wildcard $(HOME)/.pyenv/versions/$(version).*/bin/python))
first_of = $(shell for python in $(call pythons,$(1)) $(PYTHON); do \
  $$python -c "import ensurepip" 2>/dev/null && echo $$python && break; done)
# Colab's Python, where it is there.
FLOOR_PYTHON ?= $(shell python3.13 -c "import ensurepip" 2>/dev/null && echo python3.13 || echo $(PYTHON))
NEWEST_PYTHON ?= $(call first_of,3.13 3.12)
# A file of versions that nothing may differ from; empty = the newest.
CONSTRAINT ?=

# Experiments whose data is built once by tensorflow-datasets, which needs TensorFlow for that.
TFDS_EXPERIMENTS := cifar100 cub200 imagenet_r imagenet_a ag_news
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(if $(CONSTRAINT),--constraint $(CONSTRAINT))

.PHONY: run compare project test test-slow test-optimised test-floor test-newest test-wheel bench bench-smoke fuzz mutants faults lint format lock clean browser docs
.DELETE_ON_ERROR:

run: $(VENV)/.installed $(if $(filter $(EXP),$(TFDS_EXPERIMENTS)),prepare-$(EXP))
	$(BIN)/python -m qkd_jax run $(EXP) --method $(METHOD) --seed "$(SEED)" $(ARGS)

compare: $(VENV)/.installed $(if $(filter $(EXP),$(TFDS_EXPERIMENTS)),prepare-$(EXP))
	$(BIN)/python -m qkd_jax compare $(EXP) --methods "$(METHODS)" --seeds "$(SEEDS)" --jobs $(JOBS) $(ARGS)

# What a project needs beside the library is the extra of its name.
project: $(VENV)/.installed $(patsubst %,$(VENV)/.installed-%,$(filter nanoparticles,$(NAME)))
	$(BIN)/python -m projects.$(NAME) $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

# What takes minutes and is left out of the default suite.
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(TESTS)

test-optimised: $(VENV)/.installed-dev
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n 2 --dist worksteal -m "floor and not slow" $(TESTS)

test-floor:
	$(call short_suite,$(VENV)-floor,$(FLOOR_PYTHON),requirements-floor.txt)

test-newest:
	$(call short_suite,$(VENV)-newest,$(NEWEST_PYTHON),)

# $(1) environment, $(2) its Python, $(3) its versions
define short_suite
	@$(MAKE) --no-print-directory VENV=$(1) PYTHON=$(2) CONSTRAINT=$(3) $(1)/.installed-dev
	$(1)/bin/python -m pytest -n 2 --dist worksteal -m "floor and not slow" $(TESTS)
endef

# CONSTRAINT and PYTHON choose the versions. The folder it runs in is empty, and the environment has
# nothing but the wheel.
test-wheel: $(VENV)/.installed-dev
	rm -rf dist $(VENV)-wheel
	$(BIN)/python -m hatchling build -t wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet $(if $(CONSTRAINT),--constraint $(CONSTRAINT)) dist/*.whl
	folder=$$(mktemp -d) && commands=$(abspath $(VENV)-wheel/bin) && cd $$folder && \
	  $$commands/qkd-jax run smoke && $$commands/qkd-jax list && rm -r $$folder

bench: install-bench
	$(VENV)-bench/bin/python -m benchmarks $(SUBJECTS)

bench-smoke: install-bench
	$(VENV)-bench/bin/python -m benchmarks --smoke $(SUBJECTS)

.PHONY: install-bench
install-bench:
	@$(MAKE) --no-print-directory VENV=$(VENV)-bench $(VENV)-bench/.installed-bench

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.fuzz --inputs $(INPUTS) --seed $(FUZZ_SEED) $(ARGS)

mutants: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.mutants --mutants $(MUTANTS) --seed $(MUTANTS_SEED) $(MODULES) $(ARGS)

faults: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.faults --kills $(KILLS) --seed $(FAULTS_SEED) $(ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs
	@echo "open build/docs/index.html"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Hashes would forbid the editable installation beside them; hosts are everybody's own.
lock: $(VENV)/.installed-dev
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra docs --universal --python-version 3.11 --upgrade \
	  --no-emit-index-url --no-annotate --custom-compile-command "make lock" \
	  --output-file requirements-lock.txt --quiet

# The pages of reports are tested in a real browser; without one those tests are skipped.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { apt-get update -qq && apt-get install -qq -y chromium >/dev/null; } || \
	  echo "no Chromium on the path, and none could be installed: tests in a browser will be skipped"

.PHONY: prepare-%
prepare-%: $(VENV)/.installed-tfds
	$(BIN)/python -m qkd_jax data prepare $*

$(VENV)/.installed: pyproject.toml $(CONSTRAINT)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "qkd_jax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Use make PYTHON=python3.12"; exit 1; }
	@echo "installing into $(VENV) (about a minute, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@$(PIP) --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) $(addprefix $(VENV)-,bench floor newest wheel) build dist
