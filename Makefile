# Each target alone sets up a fresh machine: virtual environment, pinned packages, run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# Nothing here phones home, and a local Ray listens on the loopback device only.
export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true

.PHONY: pretrain pretrain-s3 test test-slow lint ui clean

pretrain: $(VENV)/run.stamp
	$(BIN)/python -m pipeline.pretrain digits

# The same from object storage: a local S3-compatible server, ended with the run.
pretrain-s3: $(VENV)/test.stamp
	$(BIN)/python -m tests.pretrain_s3 digits

ui: $(VENV)/run.stamp
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db --host 127.0.0.1 --port 5000

test: $(VENV)/test.stamp lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@ $(VENV)/run.stamp

clean:
	rm -rf $(VENV) build *.egg-info
