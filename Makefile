PYTHON ?= python

.PHONY: dev fmt check types limits aot test test-slow gate bench gpu

dev:            ## editable install with everything the checks and tests need
	$(PYTHON) -m pip install -e ".[test,check]"

fmt:            ## format Python and C++
	ruff format . && ruff check --fix .
	clang-format -i csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh

check: limits   ## lint, format, types, size limits
	ruff check . && ruff format --check .
	clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh
	mypy

limits:
	$(PYTHON) .ci/limits.py

aot:            ## compile every kernel for six architectures and hold it against its budget; needs no GPU
	$(PYTHON) bench/aot_triton.py
	$(PYTHON) bench/aot_native.py

test:
	$(PYTHON) -m pytest

test-slow:
	$(PYTHON) -m pytest -m slow

gate:           ## make gate OP=pixel_loss: the op's tests, then its speed
	$(PYTHON) bench/gate.py $(OP)

gpu:            ## everything a GPU machine has to say, in under ten minutes
	bash bench/gpu_suite.sh
