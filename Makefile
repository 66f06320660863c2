# minidsv3: `make lab` opens the course, `make test` proves it. Both set up .venv first, if something is missing.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help lab test test-scalar test-gpu course notebooks docs

help:  ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

lab: $(READY)  ## open the course in JupyterLab
	@$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/00_overview.ipynb

test: $(READY)  ## run everything: unit tests, comparisons with peers, every notebook cell against its stored output
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-scalar: $(READY)  ## run the notebooks with torch's scalar code: outputs must not hang on one CPU
	@ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest notebooks

test-gpu: $(READY)  ## compare the kernels with their definitions on an NVIDIA GPU
	@TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu tests

course: $(READY)  ## execute every notebook in a fresh kernel, changing nothing
	@$(BIN)/python tools/notebooks.py --check

notebooks: $(READY)  ## execute every notebook and store its outputs
	@$(BIN)/python tools/notebooks.py

docs: $(READY)  ## write the generated pages of docs/ again
	@$(BIN)/python tools/docs.py

# One pip run with the constraints, so that no dependency is ever resolved without its pin.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \
		'minidsv3 needs Python 3.11 or newer, but $(PYTHON) is %s: try make PYTHON=python3.13' % sys.version.split()[0])"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Setting up .venv: torch and Jupyter take a few minutes the first time."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $(READY)
