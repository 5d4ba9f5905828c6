# Two commands for a fresh Debian machine: `make quickstart` and `make test`. Both may be interrupted and repeated.

PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/quickstart
SUDO   := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
GPUSIM_TORCH ?= 2.11.0
GPUSIM_TORCHVISION ?= 0.26.0
GPUSIM ?= $(HOME)/.cache/fastrobust/gpusim-torch-$(GPUSIM_TORCH)
FASHION_MNIST := /usr/share/datasets/fashion-mnist

.PHONY: help quickstart test stress lint clean gpu-report gpu-sim

help:
	@echo "make quickstart   install into $(VENV), train a small robust classifier, attack it, make a page: minutes"
	@echo "make test         install what the tests need (3 GB with FFCV, DALI, Chromium), run all: 8 minutes or so"
	@echo "make stress       kill runs, fill disks, damage files: 20 minutes"
	@echo "make gpu-report   on a machine with a GPU: tests and benchmarks, at most 25 minutes"
	@echo "make gpu-sim      on a simulated GPU, once 5.1 GB for torch's CUDA build: what a capture forbids, 3 minutes"
	@echo "make lint         format and check the code"

# Train on Fashion-MNIST, evaluate with PGD, make a page about it, show where the files are. A run that was interrupted goes on.
quickstart: $(VENV)/.core data
	@if [ -f $(RUN)/config.yaml ]; then \
	   $(BIN)/python -m fastrobust.train --resume $(RUN); \
	 else \
	   $(BIN)/python -m fastrobust.train configs/quickstart.yaml output=$(dir $(RUN)) name=$(notdir $(RUN)) data.download=true; \
	 fi
	@$(BIN)/python -m fastrobust report $(RUN) -o $(RUN)/report.html --limit 100

# Everything that can be checked on this machine; what needs a GPU skips where there is none.
test: $(VENV)/.test data compiler loaders browser
	@echo "tests: 8 minutes or so on two idle cores; what was skipped, and why, is said at the end"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	@echo "on the disk: $$(du -sh $(VENV) | cut -f1) in $(VENV); 'make clean' removes it"

# On a machine with a GPU: its tests and benchmarks, at most 25 minutes, results in runs/gpu_report (docs/gpu.md).
gpu-report: $(VENV)/.test
	$(BIN)/python -m benchmarks.gpu_report

# Captures on a simulated GPU (tests/gpusim): torch's CUDA code runs, kernels do nothing, CUDA's rules are enforced. Then our
# Triton kernels with numbers, in Triton's interpreter, which does not take a newer numpy. torch's CUDA build has an environment of its own, outside the project, so that other clones find it. Another version:
# make gpu-sim GPUSIM_TORCH=2.14.1 GPUSIM_TORCHVISION=0.29.1
gpu-sim: $(GPUSIM)/.ready
	@$(GPUSIM)/bin/python tests/gpusim/build.py $(GPUSIM)
	PYTHONPATH=. $(GPUSIM)/gpusim/run $(GPUSIM)/bin/python -m pytest tests/gpusim tests/test_gpu.py
	PYTHONPATH=. $(GPUSIM)/bin/python -m pytest $$(grep -l triton_kernels tests/*/test_*.py)

$(GPUSIM)/.ready:
	@command -v g++ >/dev/null || { echo "gpu-sim needs g++"; exit 1; }
	@echo "installing torch $(GPUSIM_TORCH)'s CUDA build into $(GPUSIM) (once; 5.1 GB on the disk, minutes)"
	@$(PYTHON) -m venv --clear $(GPUSIM)
	@$(GPUSIM)/bin/python -m pip --disable-pip-version-check install -q torch==$(GPUSIM_TORCH) \
	   torchvision==$(GPUSIM_TORCHVISION) pydantic pyyaml rich safetensors tensorboard matplotlib pytest "numpy<2.4"
	@$(GPUSIM)/bin/python -c "import sys, torch; sys.exit(not torch.version.cuda and 'this torch has no CUDA')"
	@touch $@

# Kill runs, fill disks, damage files: the full counts, about 20 minutes. `make test` does a few of each. As root it mounts
# small file systems in memory; without, those parts skip. Then all twelve runs of the paper's miniature; `make test` does four.
stress: $(VENV)/.test
	$(BIN)/python -m tests.stress --json benchmarks/results/stress.json
	FASTROBUST_WHOLE_MINIATURE=1 $(BIN)/python -m pytest tests/benchmarks/test_reproduce.py -k miniature

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

# torch is installed by itself first: the other packages then accept the build that is there.
$(VENV)/.core: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (once; downloads torch)"
	@[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	   { echo "adding python3-venv"; $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q python3-venv && \
	     $(PYTHON) -m venv --clear $(VENV); }
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo "installing pytest, ruff, timm, AutoAttack, ONNX and HiGHS for the tests (once)"
	@$(PIP) -e '.[test,timm,autoattack,export,verify]'
	@touch $@

# torch.compile builds its kernels with g++ and Python's headers; without them its test skips.
.PHONY: compiler
compiler: $(VENV)/.core
	@command -v g++ >/dev/null && $(BIN)/python -c "import sysconfig; open(sysconfig.get_path('include') + '/Python.h')" \
	   2>/dev/null || { echo "installing g++ and python3-dev"; \
	   { $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q g++ python3-dev; } >/dev/null 2>&1; } || \
	   echo "g++ and python3-dev could not be installed"

# What the loaders ffcv and dali need; FFCV itself (built here: it needs OpenCV and turbojpeg), with which tests and benchmarks
# compare. DALI runs without a GPU too. Without them their tests skip. Of
# DALI's builds this is the lighter one: 0.6 GB on the disk, that for CUDA 12 takes 1.0 GB.
.PHONY: loaders
loaders: $(VENV)/.loaders
$(VENV)/.loaders: $(VENV)/.test
	@echo "installing FFCV and DALI (once; about 1.7 GB on the disk)"
	@pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null || \
	   { $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q --no-install-recommends \
	     libopencv-dev libturbojpeg0-dev pkg-config g++ python3-dev; } >/dev/null 2>&1 || \
	   echo "OpenCV and turbojpeg could not be installed"
	@$(PIP) -e '.[ffcv-original]' || echo "FFCV could not be installed: its tests skip"
	@$(PIP) -e '.[ffcv]' || echo "simplejpeg, OpenCV and numba could not be installed: tests of the loader ffcv skip"
	@$(PIP) -e '.[dali-cuda130]' || echo "DALI could not be installed: its tests skip"
	@touch $@

# The report is looked at in Chromium; without it those tests skip.
.PHONY: browser
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { echo "installing chromium"; \
	   { $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q --no-install-recommends chromium; } >/dev/null 2>&1; } || \
	   echo "chromium could not be installed"

# Fashion-MNIST from Debian's package; where that is not to be had, training downloads it.
.PHONY: data
data:
	@[ -d $(FASHION_MNIST) ] || { echo "installing Debian's dataset-fashion-mnist"; \
	   { $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q dataset-fashion-mnist; } >/dev/null 2>&1; } || \
	   echo "dataset-fashion-mnist is not available here; it will be downloaded instead"
