# `make demo`, `make bench`, `make bench-peers`, `make scale`, `make gpu`, `make test`, `make lint`: each sets itself up in .venv first, once.

PYTHON ?= python3
VENV ?= .venv
PACKAGES = torch==2.13.0 "numpy>=1.26,<3" "pillow>=11" "safetensors>=0.5,<1" "av>=14"
TOOLS = "pytest>=8,<10" "pytest-xdist>=3.6,<4" "matplotlib>=3.9,<4" "scikit-image>=0.24,<1" \
	"imageio-ffmpeg>=0.6,<1" "stlpips_pytorch==0.0.2" "gguf>=0.13,<1" "ray>=2.40,<3"
PEERS = diffusers==0.42.1 cache-dit==1.5.3 transformers accelerate
LINTERS = "ruff>=0.15,<1" "mypy>=1.19,<3" "comfy-cli>=1.23,<2"

.PHONY: demo bench bench-smoke bench-peers scale gpu calibrate test lint clean

demo: $(VENV)/ready
	$(VENV)/bin/python -m flowcache_core demo --out out/demo

bench: $(VENV)/tools
	$(VENV)/bin/python -m flowcache_core.lab.bench --out out/bench --pictures docs
	$(VENV)/bin/python tests/host/bench_host.py --out out/bench
	$(VENV)/bin/python -m flowcache_core.lab.throughput --out out/bench
	$(VENV)/bin/python -m flowcache_core.lab.table --report out/bench/report.json

bench-smoke: $(VENV)/tools
	$(VENV)/bin/python -m flowcache_core.lab.bench --smoke --out out/bench_smoke
	$(VENV)/bin/python tests/host/bench_host.py --out out/bench_smoke --chunks 2 --pairs 1
	$(VENV)/bin/python -m flowcache_core.lab.throughput --out out/bench_smoke --videos 2 --chunks 1 --pairs 1

bench-peers: $(VENV)/peers
	$(VENV)/bin/python -m flowcache_core.lab.packages --out out/bench

scale: $(VENV)/tools
	$(VENV)/bin/python -m flowcache_core.lab.scale --out out/scale --docs docs

gpu: $(VENV)/tools
	$(VENV)/bin/python -m flowcache_core.lab.gpu --out out/gpu

calibrate: $(VENV)/ready
	$(VENV)/bin/python -m flowcache_core.lab.search

test: $(VENV)/tools
	$(VENV)/bin/python -m pytest --durations 20 --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/comfy --skip-prompt --no-enable-telemetry node validate

clean:
	rm -rf $(VENV) out

$(VENV)/ready: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; give one: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "Python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(VENV)/bin/python -m pip install --quiet $(PACKAGES)
	@touch $@

$(VENV)/tools: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet $(TOOLS)
	@touch $@

$(VENV)/peers: $(VENV)/tools
	$(VENV)/bin/python -m pip install --quiet $(PEERS)
	@touch $@

$(VENV)/lint: $(VENV)/tools
	$(VENV)/bin/python -m pip install --quiet $(LINTERS)
	@touch $@
