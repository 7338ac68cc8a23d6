# make run                      QKD on the embedded stream, from nothing to a report
# make run EXP=imagenet_r METHOD=ease SEED="1993 1994 1995" ARGS="--set train.epochs=5"
# make compare METHODS="qkd ease" SEEDS="1993 1994 1995" JOBS=2   one table; METHODS empty = all
# make test                     the default suite
# make bench                    side by side with PyTorch, PennyLane and others; prints ratios
#                               SUBJECTS="gate inference" runs only those
# make lint

EXP ?= renditions
METHOD ?= qkd
SEED ?= 1993
SUBJECTS ?=
METHODS ?=
SEEDS ?= 1993 1994 1995
JOBS ?= 1
ARGS ?=
VENV ?= .venv
PYTHON ?= python3
TESTS ?= tests

# Experiments whose data is built once by tensorflow-datasets, which needs TensorFlow for that.
TFDS_EXPERIMENTS := cifar100 cub200 imagenet_r imagenet_a
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: run compare test bench lint format clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed $(if $(filter $(EXP),$(TFDS_EXPERIMENTS)),prepare-$(EXP))
	$(BIN)/python -m qkd_jax run $(EXP) --method $(METHOD) --seed "$(SEED)" $(ARGS)

compare: $(VENV)/.installed $(if $(filter $(EXP),$(TFDS_EXPERIMENTS)),prepare-$(EXP))
	$(BIN)/python -m qkd_jax compare $(EXP) --methods "$(METHODS)" --seeds "$(SEEDS)" --jobs $(JOBS) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 $(TESTS)

bench:
	@$(MAKE) --no-print-directory VENV=$(VENV)-bench $(VENV)-bench/.installed-bench
	$(VENV)-bench/bin/python -m benchmarks $(SUBJECTS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: prepare-%
prepare-%: $(VENV)/.installed-tfds
	$(BIN)/python -m qkd_jax data prepare $*

$(VENV)/.installed: requirements.txt pyproject.toml
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
	rm -rf $(VENV) $(VENV)-bench
