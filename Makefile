# make run                      QKD on the embedded stream, from nothing to a report
# make run EXP=imagenet_r METHOD=ease SEED="1993 1994 1995" ARGS="--set train.epochs=5"
# make compare METHODS="qkd ease" SEEDS="1993 1994 1995" JOBS=2   one table; METHODS empty = all
# make test                     the default suite
# make test-floor               a short suite with the oldest supported versions, in .venv-floor
# make bench                    side by side with PyTorch, PennyLane and others; prints ratios
#                               SUBJECTS="gate inference" runs only those
# make project NAME=drifting_2d  an experiment beside the library, its pictures and its table
# make fuzz                     reads files that are changed at random; INPUTS=1000000 FUZZ_SEED=1
# make lint

EXP ?= renditions
METHOD ?= qkd
SEED ?= 1993
SUBJECTS ?=
INPUTS ?= 100000
FUZZ_SEED ?= 0
METHODS ?=
SEEDS ?= 1993 1994 1995
JOBS ?= 1
ARGS ?=
NAME ?= drifting_2d
VENV ?= .venv
PYTHON ?= python3
TESTS ?= tests
# Colab's Python, where it is there.
FLOOR_PYTHON ?= $(shell python3.13 -c "import ensurepip" 2>/dev/null && echo python3.13 || echo $(PYTHON))
# A file of versions that nothing may differ from; empty = the newest.
CONSTRAINT ?=

# Experiments whose data is built once by tensorflow-datasets, which needs TensorFlow for that.
TFDS_EXPERIMENTS := cifar100 cub200 imagenet_r imagenet_a ag_news
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(if $(CONSTRAINT),--constraint $(CONSTRAINT))

.PHONY: run compare project test test-floor bench fuzz lint format clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed $(if $(filter $(EXP),$(TFDS_EXPERIMENTS)),prepare-$(EXP))
	$(BIN)/python -m qkd_jax run $(EXP) --method $(METHOD) --seed "$(SEED)" $(ARGS)

compare: $(VENV)/.installed $(if $(filter $(EXP),$(TFDS_EXPERIMENTS)),prepare-$(EXP))
	$(BIN)/python -m qkd_jax compare $(EXP) --methods "$(METHODS)" --seeds "$(SEEDS)" --jobs $(JOBS) $(ARGS)

# What a project needs beside the library is the extra of its name.
project: $(VENV)/.installed $(patsubst %,$(VENV)/.installed-%,$(filter nanoparticles,$(NAME)))
	$(BIN)/python -m projects.$(NAME) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

test-floor:
	@$(MAKE) --no-print-directory VENV=$(VENV)-floor PYTHON=$(FLOOR_PYTHON) CONSTRAINT=requirements-floor.txt \
	  $(VENV)-floor/.installed-test
	$(VENV)-floor/bin/python -m pytest -n 2 --dist worksteal -m "floor and not slow" $(TESTS)

bench:
	@$(MAKE) --no-print-directory VENV=$(VENV)-bench $(VENV)-bench/.installed-bench
	$(VENV)-bench/bin/python -m benchmarks $(SUBJECTS)

fuzz: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.fuzz --inputs $(INPUTS) --seed $(FUZZ_SEED) $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: prepare-%
prepare-%: $(VENV)/.installed-tfds
	$(BIN)/python -m qkd_jax data prepare $*

$(VENV)/.installed: requirements.txt pyproject.toml $(CONSTRAINT)
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
	rm -rf $(VENV) $(VENV)-bench $(VENV)-floor
