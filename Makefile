# Everything from nothing: a virtual environment in .venv, pinned requirements, the extension, then the work.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test trust sanitize sanitize-cpu versions lint format bench docs clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/snnkern doctor
	$(BIN)/python examples/swap.py
	$(BIN)/snnkern compare digits-sdt digits-tet seeds=2 --out runs/digits
	$(BIN)/snnkern plot runs/digits

# Two processes; threads that wait must sleep, or they take the cores from the other process.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 -p no:benchmark

# Where the kernels of GPUs run on a CPU: Triton's in its interpreter, CUDA's in an emulator of the machine code.
OPS := test_lif test_autograd test_split test_ttm test_bn_lif test_pack
ON_TRITON := $(patsubst %,tests/%.py,test_triton $(OPS))
ON_CUDA := -k "cuda or emulator" $(patsubst %,tests/%.py,test_cuda test_emulator $(OPS) test_recurrent test_properties)

test: .venv/installed
	$(PYTEST) --counts runs/trust/brief.json
	TRITON_INTERPRET=1 $(PYTEST) $(ON_TRITON)
	SNNKERN_EMULATE=1 $(PYTEST) $(ON_CUDA)

# What docs/promises.md rests on, for hours: random tests at length, every float32, kills, full disks, damage, and every
# case of what `make test` takes a part of.
TRUST := SNNKERN_THOROUGH=1 $(PYTEST) --counts runs/trust
trust: .venv/installed
	$(TRUST)/cpu.json
	TRITON_INTERPRET=1 $(TRUST)/triton.json $(ON_TRITON) tests/test_properties.py
	SNNKERN_EMULATE=1 $(TRUST)/cuda.json $(ON_CUDA)
	$(BIN)/python -m experiments.promises

# On a machine with an NVIDIA GPU. PYTHON here is one that has snnkern and pytest.
sanitize:
	for tool in memcheck racecheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest -q -x \
	    tests/test_lif.py tests/test_bn_lif.py tests/test_split.py tests/test_pack.py tests/test_neurons.py \
	    tests/test_recurrent.py tests/test_ttm.py \
	    -k "(cuda or triton) and (odd_sizes or segments or shapes or bits_and_back or views or every_neuron \
	    or every_layer or parts_of_time or pieces_of_time)" || exit 1; \
	done

# The extension with GCC's AddressSanitizer and UndefinedBehaviorSanitizer under the CPU tests, in every instruction set
# that this processor has; the threads under ThreadSanitizer. The build takes a quarter of an hour on two cores. Left
# out: compilers that are started, and a test that waits for an address to come back, which AddressSanitizer delays.
SANITIZED := $(CURDIR)/build/sanitized
sanitize-cpu: .venv/installed
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r snnkern $(SANITIZED) && rm -f $(SANITIZED)/snnkern/_C*
	PATH="$(CURDIR)/$(BIN):$$PATH" && cmake -S . -B build/sanitizer -G Ninja -DSNN_SANITIZE=ON \
	  -DCMAKE_CXX_COMPILER=$(CXX) -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(SANITIZED)/snnkern && cmake --build build/sanitizer
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" SNNKERN_SANITIZED=1 \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONSAFEPATH=1 PYTHONPATH=$(SANITIZED):$(CURDIR) \
	  $(PYTEST) -k "not compile and not dead_spikes" tests/test_cpu.py tests/test_memory.py tests/test_hostile.py \
	  tests/test_lif.py tests/test_bn_lif.py tests/test_recurrent.py tests/test_neurons.py tests/test_linear.py \
	  tests/test_split.py tests/test_pack.py tests/test_ttm.py tests/test_surrogate.py
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -pthread -DSNN_ISA=baseline -Icsrc tests/threads.cpp \
	  csrc/cpu/threads.cpp csrc/cpu/ttm.cpp -o build/threads
	build/threads

# One wheel on several Pythons, PyTorches and NumPys: 20 GB in build/versions. ARGS="3.13 2.6.0" chooses.
versions: .venv/installed
	rm -f build/versions/*.whl
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel --no-build-isolation --no-deps -w build/versions .
	$(BIN)/python tests/versions.py $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

# make bench ARGS=--quick: about a minute; into runs/bench.
bench: .venv/installed
	$(BIN)/python -m benchmarks.run $(ARGS)

# The site, into build/docs; needs no network but for the installation.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

.venv/docs: .venv/installed requirements-docs.txt
	$(PIP) install -r requirements-docs.txt
	touch $@

.venv/requirements: requirements-dev.txt requirements-peers.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -r requirements-dev.txt
	$(PIP) install --no-deps -r requirements-peers.txt
	touch $@

.venv/installed: .venv/requirements setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info snnkern/_C*.so
