# make demo: prepare, train and lip-sync the built-in sample
# make test: the checks to run before a commit
# make test-slow: the slow tests
# make test-mmpose: comparisons with mmpose and mediapipe, in a separate environment
# make bench: benchmarks of training, the cache and inference against targets, about 10 minutes on 2 cores
# make ablations: comparisons of variants of the training recipe, about a day on 2 cores; resumes after an interruption
# make torture: fault injection by kills, full disks and denied writes, about an hour on 2 cores
PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-slow test-mmpose bench ablations torture clean

demo: .venv/installed
	$(BIN)/python datasets_process.py
	$(BIN)/python musetalk_trainer.py
	$(BIN)/jupyter nbconvert --log-level ERROR --to script --stdout demo.ipynb | $(BIN)/python -

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

test-slow: .venv/installed
	$(PYTEST) -m slow

test-mmpose: .venv-mmpose/installed
	.venv-mmpose/bin/python -m pytest -q -p tests.cpu_torchvision tests/test_mmpose.py tests/test_mediapipe_oracle.py

bench: .venv/installed
	$(BIN)/python -m benchmarks

ablations: .venv/installed
	$(BIN)/python -m ablations

torture: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.torture

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt --requirement requirements-dev.txt
	touch $@

.venv-mmpose/installed: requirements.txt requirements-dev.txt requirements-mmpose.txt
	$(PYTHON) -m venv .venv-mmpose
	.venv-mmpose/bin/pip install --quiet --requirement requirements-mmpose.txt
	touch $@

clean:
	rm -rf data/cache checkpoints/demo checkpoints/syncnet_demo log/demo log/syncnet_demo output exported
