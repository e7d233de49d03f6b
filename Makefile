# `make test` and `make demo` first set up what they need in .venv, once; `make PYTHON=python3.12 TORCH=torch==2.11.0 test`
# does so for another Python and torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PY := $(BIN)/python

.PHONY: build test isas amx wheel docs fuzz sanitizers sanitize demo bench lint format clean

# torch comes first and pinned: left to pip, it would be the newest one, with gigabytes of CUDA. No build isolation, so
# that `make build` goes on from the objects of this install.
.venv/installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q $(TORCH) "setuptools>=75" "pybind11>=2.13" ninja
	$(PY) -m pip install -q --no-build-isolation -e ".[dev,demo]"
	touch $@

build: .venv/installed
	$(PY) setup.py -q build_ext --inplace

test: build .venv/peers .venv-wheel/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $$(nproc) --dist loadfile --no-loadscope-reorder

# The promises as on machines that have no more than AVX2, or not even that: a minute.
isas: isa-portable isa-avx2
isa-%: build
	SSLOPS_TEST_ISA=$* OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $$(nproc) \
		-k "cpu-cpu and not opcheck and $(SANITIZABLE)" $(filter-out tests/fuzz,$(SANITIZED))

# bf16 on AMX tiles, which are plain C++ here: half a minute. Needs AVX-512 with bf16; elsewhere it tests nothing new.
EMULATED := build/emulated-amx
amx: build
	SSLOPS_EMULATE_AMX=1 $(PY) setup.py -q build --build-lib $(EMULATED)
	rm -rf $(EMULATED)/tests $(EMULATED)/benchmarks
	cp -r tests benchmarks pyproject.toml $(EMULATED)
	cd $(EMULATED) && $(CURDIR)/$(PY) -c "from sslops import _C; flags = open('/proc/cpuinfo').read(); \
		assert (_C.isa() == 'amx') == ('avx512_bf16' in flags), _C.__file__"
	cd $(EMULATED) && OMP_NUM_THREADS=1 $(CURDIR)/$(PY) -m pytest -q -p no:cacheprovider \
		-k "(amx or dtype1 or bfloat16 or bf16 or autocast) and $(SANITIZABLE)" $(addprefix tests/test_, \
		$(addsuffix .py,nt_xent supcon info_nce clip siglip nearest relic ibot dino))

# The sdist, and wheels for every Python here, or those of PYTHONS, in dist/.
.venv-wheel/installed: packaging/requirements.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -r $<
	touch $@

wheel: .venv-wheel/installed
	.venv-wheel/bin/python packaging/wheels.py $(PYTHONS)

# The site, in build/site: opens from there, or `.venv-docs/bin/mkdocs serve -f docs/mkdocs.yml`. Strict about its links.
.venv-docs/installed: docs/requirements.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -r $<
	touch $@

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict -f docs/mkdocs.yml

# An hour: random calls against float64, wrong ones in a process of their own, memory and bits over thousands of steps.
fuzz: build
	SSLOPS_FUZZ=1000 OMP_NUM_THREADS=1 $(PY) -m pytest -n $$(nproc) tests/fuzz
	$(PY) -m tests.fuzz.leaks
	$(PY) -m tests.fuzz.long_run

# The C++ under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: the build alone takes longer than CI has.
sanitizers: build
	tests/fuzz/sanitized.sh address,undefined python -m pytest -q -p no:cacheprovider $(SANITIZED) -k "$(SANITIZABLE)"
	tests/fuzz/sanitized.sh address,undefined python -m tests.fuzz.hostile
	tests/fuzz/sanitized.sh thread python -m tests.fuzz.races
# the tests of values: not those of compilers, child processes and memory
SANITIZED = $(addprefix tests/,fuzz $(addsuffix .py,$(addprefix test_,nt_xent supcon info_nce clip siglip nearest relic \
	barlow_twins vicreg cross_correlation sigreg sinkhorn dino ibot gather_patches gather_tokens restore_tokens masked_prediction \
	ema_update)))
SANITIZABLE = not compile and not memory and not fullgraph and not export and not hostile and not interpreter

# The libraries that tests and benchmarks compare with, without what they require: lightly would bring Lightning,
# torchvision another torch, and of solo-learn, which wants torch 1.9, single files are used.
.venv/peers: benchmarks/requirements-peers.txt .venv/installed
	$(PY) -m pip install -q --no-deps -r $<
	touch $@

PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"

# Triton kernels under Triton 3.6, the oldest one: every memory access proved in bounds, one kernel in eight compiled.
# torch is .venv's; what is installed beside it comes first.
.venv-sanitize/installed: tests/triton_kernels/requirements-sanitize.txt .venv/installed
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(PY) -c $(PACKAGES) > $$($(@D)/bin/python -c $(PACKAGES))/torch.pth
	$(@D)/bin/python -m pip install -q --no-deps --ignore-installed -r $<
	touch $@

sanitize: build .venv-sanitize/installed
	.venv-sanitize/bin/python -m tests.triton_kernels.sanitize
	.venv-sanitize/bin/python -m tests.triton_kernels.offline sm_90 8

demo: build
	$(PY) examples/pretrain.py

bench: build .venv/peers
	$(PY) -m benchmarks --threads $$(nproc) --seconds 2 --minutes 10

CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.cu*' -o -name '*.h')

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv .venv-sanitize .venv-wheel .venv-docs build dist *.egg-info sslops/_C.*.so
