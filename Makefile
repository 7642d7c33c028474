# make demo: the whole way on the built-in sample, about 7 minutes on 2 cores
# make test: the checks that CI runs
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/installed
	$(BIN)/python datasets_process.py
	$(BIN)/python musetalk_trainer.py
	$(BIN)/jupyter nbconvert --log-level ERROR --to script --stdout demo.ipynb | $(BIN)/python -

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

clean:
	rm -rf data/sample data/cache checkpoints/demo log/demo output
