# `make demo` compiles and runs the example model, `make test` runs the tests. Both make `.venv` first, once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2

BIN := .venv/bin
READY := .venv/.ready
OUT := out/tinymoe-2bit
PYTEST := env OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all mutants lint format clean

demo: $(READY)
	rm -rf $(OUT) $(OUT).partial
	$(BIN)/moecc compile examples/tinymoe --passes vsraq,kbvq --bits 2 --calib examples/tinymoe/calib.txt -o $(OUT)
	$(BIN)/moecc eval $(OUT) --reference examples/tinymoe --text examples/tinymoe/valid.txt
	$(BIN)/moecc generate $(OUT) --prompt "def main():"

# Triton's interpreter is chosen for a whole process, so what runs in it is a run of its own.
test: $(READY)
	env -u MOECC_ALL_FAMILIES -u TRITON_INTERPRET $(PYTEST)
	TRITON_INTERPRET=1 env -u MOECC_ALL_FAMILIES $(PYTEST) -m interp tests/test_triton_*.py

test-all: $(READY)
	MOECC_ALL_FAMILIES=1 env -u TRITON_INTERPRET $(PYTEST)
	MOECC_ALL_FAMILIES=1 TRITON_INTERPRET=1 $(PYTEST) -m interp tests/test_triton_*.py

# Does a test notice small changes of FILE? SAMPLE=60 tries so many of them. See docs/testing.md.
mutants: $(READY)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[mutants]'
	$(BIN)/python tests/mutants.py $(FILE) --sample $(or $(SAMPLE),0)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv out build dist

# torch goes first, so that the version that the tests were written with is taken, not the newest that moecc allows. Byte code is
# written for what is imported, when it is: for everything it takes longer than the rest of the installation.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "moecc needs Python 3.11 or newer; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test]'
	touch $@
