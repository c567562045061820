# make demo   set up and run the main job: train, sample, evaluate on real handwritten digits (no GPU needed)
# make test   set up, lint, and run the test suite
# make bench  time the operators and the whole models on this machine
.DELETE_ON_ERROR:
.PHONY: demo test bench lint format clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
DRAW = --seed 0 --num-inference-steps 25 --guidance-scale 1.5
# Threads that wait let others work (genssm/threads.py).
export GOMP_SPINCOUNT ?= 5000
# Two test processes with one thread each: tiny tensors lose more than they gain from threads.
PYTEST_ARGS ?= -n 2

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: genssm needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml setup.py
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[digits]"
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml setup.py
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/python train.py --config configs/zigma/digits.yaml train.output_dir=$(RUN)
	$(BIN)/python sample.py --model $(RUN) --class-labels all --num-images 100 $(DRAW) \
	  --out $(RUN)/images --grid $(RUN)/digits.png --overwrite
	$(BIN)/python -m genssm.metrics.classifier --data digits --out $(RUN)/classifier.safetensors
	$(BIN)/python -m genssm.metrics.fid --samples $(RUN) --num-samples 500 $(DRAW) --reference dataset:digits \
	  --features classifier:$(RUN)/classifier.safetensors --floor --noise-ceiling --report $(RUN)/report.json
	@echo
	@echo "pipeline  $(RUN)/checkpoints/*/pipeline   (from_pretrained loads it)"
	@echo "pictures  $(RUN)/digits.png  $(RUN)/images/"
	@echo "report    $(RUN)/report.json"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.everything

clean:
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
