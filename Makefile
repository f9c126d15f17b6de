# One entry for people and CI: installs into .venv what is missing, then runs. `make` alone lists the targets.

VENV := .venv
STAMP := $(VENV)/.installed
PY := $(VENV)/bin/python
# A Python of your choice: make venv PYTHON=/path/to/python3.12
PYTHON ?=
# Passed to each pip install, for an index of your own: make venv PIP_ARGS='--index-url ...'
PIP_ARGS ?=
# Passed to pytest: make test TEST_ARGS='-k search'
TEST_ARGS ?=
# Processes that tests run in, each with one thread.
TEST_JOBS ?= 2
# The Python half of TensorRT: it does not run without NVIDIA's libraries, but it holds every name and signature.
TENSORRT_BINDINGS := tensorrt-cu12-bindings==10.12.0.36 tensorrt-cu13-bindings==11.4.0.106
CODE := optin_deploy benchmarks
# Real inference servers, and KServe's schema; their packages clash with ours and with each other's.
SERVER_STAMPS := $(patsubst %,.venv-%/.installed,triton mlserver kserve)

SHELL := bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help venv browser servers demo test test-all test-servers docs lint format clean

help: ## list the targets
	@echo "optin-deploy: smaller transformers, measured"
	@while IFS= read -r line; do \
	  if [[ $$line =~ ^([a-z-]+):[^#]*'## '(.*)$$ ]]; then printf '  make %-12s %s\n' "$${BASH_REMATCH[1]}" "$${BASH_REMATCH[2]}"; fi; \
	done < Makefile

venv: $(STAMP) ## install the project and all that tests and demo need into .venv
	@echo "$(VENV) is ready"

browser: ## install Debian's Chromium, in which a test looks at the report page (as root; without it that test is skipped)
	@command -v chromium >/dev/null || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; }

servers: $(SERVER_STAMPS) ## install Triton, MLServer and KServe's schema, each into an environment of its own
	@echo "$(SERVER_STAMPS:/.installed=) are ready"

.venv-%/.installed: tests/servers/%_requirements.txt $(STAMP)
	@echo "==> creating .venv-$*" && $(PY) -m venv --clear .venv-$*
	@set -o pipefail; .venv-$*/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -r $< | $(show)
	@touch $@

demo: $(STAMP) ## prune a real model, measure it against the dense one, print the report
	@$(PY) -m benchmarks.demo

test: $(STAMP) ## run the tests but the slow ones, a file a process, TEST_JOBS at a time
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "not servers and not slow" -n $(TEST_JOBS) --dist loadfile $(TEST_ARGS)

test-all: $(STAMP) ## run the slow tests too: whole examples, the wheel, long pages of the documentation
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "not servers" -n $(TEST_JOBS) --dist loadfile $(TEST_ARGS)

test-servers: $(STAMP) $(SERVER_STAMPS) ## run the tests that start real inference servers
	@$(PY) -m pytest -m servers $(TEST_ARGS)

docs: $(STAMP) ## build the documentation into out/docs; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict --site-dir out/docs

lint: $(STAMP) ## check format, style and types
	@echo "==> ruff format --check" && $(PY) -m ruff format --check .
	@echo "==> ruff check" && $(PY) -m ruff check .
	@echo "==> mypy --strict $(CODE)" && $(PY) -m mypy --strict $(CODE)

format: $(STAMP) ## rewrite the files in the project's format
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) $(SERVER_STAMPS:/.installed=) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find $(CODE) tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One short line for each package; pip's errors go to stderr untouched.
define show
while IFS= read -r line; do case "$$line" in \
  *Downloading*|*"Using cached"*|Processing*|"Installing collected"*) line="$${line#"$${line%%[![:space:]]*}"}"; \
  echo "    $${line:0:110}" ;; esac; done
endef

# The stamp is written last: an install that was cut off is repeated. A usable .venv is kept, a broken one is made anew.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  found=; \
	  for candidate in $(or $(PYTHON),python3 python3.11 python3.12 python3.13); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: no Python >= 3.11 among: $(or $(PYTHON),python3 python3.11 python3.12 python3.13)." >&2; \
	    echo "Install one, or name it: make venv PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  echo "==> creating $(VENV) with $$found ($$("$$found" -V))"; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	@echo "==> installing torch==2.13.0 (exact pin first, so that a later step cannot swap the build)"
	@set -o pipefail; $(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) torch==2.13.0 -c constraints.txt | $(show)
	@echo "==> installing optin-deploy[cpu,images,audio,report,trt-rtx,serve,demo,peers,mlperf,ray,finetune,docs,dev] with the versions of constraints.txt"
	@set -o pipefail; $(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) -e '.[cpu,images,audio,report,trt-rtx,serve,demo,peers,mlperf,ray,finetune,docs,dev]' -c constraints.txt | $(show)
	@$(PY) -m pip check
	@echo "==> fetching the bindings of TensorRT 10 and 11, whose names the tests compare (both cannot be installed at once)"
	@set -o pipefail; for wheel in $(TENSORRT_BINDINGS); do \
	  target=$(VENV)/tensorrt-$$(grep -o '==[0-9]*' <<< "$$wheel" | tr -d =); rm -rf "$$target"; \
	  $(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps --target "$$target" "$$wheel" | $(show); \
	done
	@touch $@
