# Everything runs from a virtual environment that these rules make: `make demo` on a fresh machine is enough.
PY ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint format clean

.stamp-venv: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PY) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

demo: .stamp-venv
	$(BIN)/segadapt demo

test: .stamp-venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: .stamp-venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile

lint: .stamp-venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

format: .stamp-venv
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:
	rm -rf .venv .stamp-venv build dist *.egg-info
