# make demo   create .venv, install, train three tiny checkpoints, merge them, and run RL from the result
# make lint   create .venv, install, check style, types and sizes
# make test   create .venv, install, run the tests that every change must pass (12 minutes on two cores)
# make test-long   the others: more layouts, faults, clusters, the studies in short (30 minutes)
# make test-matrix  tests with every release of the engines that is taken, for docs/compatibility.md (hours; it may be stopped)
# ARGS adds Hydra overrides to the demo: make demo ARGS="run.name=demo-1 run.seed=1"
#      and chooses cells of the matrix: make test-matrix ARGS="megatron-core=0.19.2 suite=routing", ARGS=jobs=2 (tests/release_matrix.py)
# PYTHON=python3.12 takes the newest releases of the engines, which want it
PYTHON ?= $(shell command -v python3.11 || command -v python3)
LOCK := requirements/$(shell $(PYTHON) -c 'import sys; print("cpu" if sys.version_info < (3, 12) else "cpu-py312")').lock
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
ARGS ?=

.PHONY: install demo lint docs test test-long test-matrix clean

install: $(VENV)/installed

# torch comes first and with its dependencies, from wherever pip finds it. The rest is exactly the lock: SGLang's
# CUDA-only dependencies are left out of it, so pip must not look for them.
$(VENV)/installed: $(LOCK) pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep ^torch== $(LOCK))
	$(PIP) --no-deps -r $(LOCK)
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements/test.lock
	$(PIP) --no-deps -r requirements/test.lock
	touch $@

$(VENV)/installed-lint: $(VENV)/installed-test requirements/lint.lock
	$(PIP) --no-deps -r requirements/lint.lock
	touch $@

$(VENV)/installed-docs: $(VENV)/installed-lint requirements/docs.lock
	$(PIP) --no-deps -r requirements/docs.lock
	touch $@

# torchrun would set it too, with a warning; and threads of several programs would spin while they wait for each other.
demo test test-long test-matrix: export OMP_NUM_THREADS = 1
demo: install
	$(BIN)/megatron-bai train experiment=demo_pretrained $(ARGS)
	$(BIN)/megatron-bai train experiment=demo_instruct $(ARGS)
	$(BIN)/megatron-bai train experiment=demo_reasoning $(ARGS)
	$(BIN)/megatron-bai merge experiment=demo $(ARGS)
	$(BIN)/megatron-bai torchrun --nproc-per-node 2 train experiment=demo $(ARGS)

# The site of docs/ in build/docs, with what is said of functions: any link that leads nowhere is an error.
docs: $(VENV)/installed-docs
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# .pre-commit-config.yaml runs the same.
lint: $(VENV)/installed-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tools/code_limits.py
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

# Pure code first: its failures end the target within 90 s. Then four workers, as processes wait for one another more than
# they compute. tests/conftest.py says which tests go to one worker, tests/README.md which are in which tier.
test: $(VENV)/installed-test
	$(BIN)/pytest -n 2 -m "not long and not (live or distributed)"
	$(BIN)/pytest -n 4 -m "not long and (live or distributed)"

test-long: $(VENV)/installed-test
	$(BIN)/pytest -n 4 -m long

test-matrix: $(VENV)/installed-test
	$(BIN)/python tests/release_matrix.py $(ARGS)

clean:
	rm -rf $(VENV) runs build dist
