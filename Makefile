# Each target alone sets up a fresh machine: virtual environment, pinned packages, run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Of 23,000 modules pip would compile all, a third of its time; those that are imported compile themselves.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
export OMP_NUM_THREADS ?= 1
SUDO ?= $(if $(filter 0,$(shell id -u)),,sudo)
# Nothing here phones home.
export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true
# The tests start many processes, which would each compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: pretrain fashion fashion-data pretrain-s3 cluster test test-fast test-slow lint ui clean

pretrain: $(VENV)/run.stamp
	$(BIN)/python -m pipeline.pretrain digits

# LipNeXt on Fashion-MNIST, about ten minutes on two cores.
fashion: $(VENV)/run.stamp fashion-data
	$(BIN)/python -m pipeline.pretrain fashion-mnist

# The images are a package of the system. Elsewhere: data_shards.write fashion-mnist --source DIR.
fashion-data:
	@test -d /usr/share/datasets/fashion-mnist || $(SUDO) apt-get install --yes dataset-fashion-mnist

# `pretrain` from object storage: a local S3-compatible server, ended with the run.
pretrain-s3: $(VENV)/test.stamp
	$(BIN)/python -m tests.pretrain_s3 digits

# A Ray cluster of this machine, until Ctrl-C: on the loopback device (the RAY_ENABLE... switch: without
# it Ray takes the outward address), and for those alone who have the token in ~/.ray/auth_token.
# RAY_JOB_STOP_WAIT_TIME_S: seconds that `ray job stop` leaves a run to keep a checkpoint, 3 by default.
cluster: $(VENV)/run.stamp
	umask 077 && mkdir -p ~/.ray && $(BIN)/ray get-auth-token --generate > /dev/null
	chmod -f go= ~/.ray ~/.ray/auth_token || true
	env -u RAY_ADDRESS RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_JOB_STOP_WAIT_TIME_S=120 \
	$(BIN)/ray start --head --block --node-ip-address 127.0.0.1 --num-cpus 5 $(RAY_FLAGS)

ui: $(VENV)/run.stamp
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db --host 127.0.0.1 --port 5000

test: $(VENV)/test.stamp lint
	$(BIN)/python -m pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

# The quick part: one process each, no Ray, no servers, no training of several ranks, no fake
# GPUs; of each parametrised test two cases, others each time (CASES=1000: all). Lint is apart.
CASES ?= 2
test-fast: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m "not (slow or gpu or distributed or ray or integration)" \
	--ignore tests/end_to_end --ignore tests/fake_gpu --cases $(CASES) -n 2 --dist loadfile

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
	$(INSTALL) -e .
	touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[test]"
	touch $@ $(VENV)/run.stamp

clean:
	rm -rf $(VENV) build *.egg-info
