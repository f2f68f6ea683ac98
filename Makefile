# Every target makes its own .venv and installs what it needs; but gpu and gpu-sanitize use PYTHON as it is, offline.
PYTHON ?= python3
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test quick lint gpu gpu-dry gpu-sanitize

demo: .venv/installed-demo    ## train a small real model: make demo [DUMP=path/to/site.7z]
	.venv/bin/python demo.py $(if $(DUMP),"$(DUMP)")

# what compiles for GPUs keeps two cores busy for minutes: it takes what the other tests leave
test: .venv/installed-test lint    ## lint, then every test
	@log=$$(mktemp); compiled=tests/ops/kernels/test_compiled.py; \
	nice .venv/bin/python -m pytest $$compiled >$$log 2>&1 & gate=$$!; \
	.venv/bin/python -m pytest --ignore $$compiled; rest=$$?; \
	wait $$gate; gate=$$?; cat $$log; rm $$log; exit $$((rest | gate))

QUICK = test_house.py test_docs.py test_cli.py test_help.py test_files.py test_model.py corpus tasks training ops/test_ops.py
quick: .venv/installed-test lint    ## what is worth running after every change: two minutes
	.venv/bin/python -m pytest -m "not slow" $(QUICK:%=tests/%)

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

gpu:    ## tests, kernels and training on one GPU, in under nine minutes; results in $OUT or runs/gpu
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

gpu-dry: .venv/installed-test    ## the same at toy sizes on the CPU, with the kernels in Triton's interpreter
	.venv/bin/python -m benchmarks.gpu --dry --fresh

# without torch's caching each tensor is an allocation of its own, and a step past its end is seen
gpu-sanitize:    ## the kernels' tests under compute-sanitizer
	@command -v compute-sanitizer >/dev/null || \
		{ echo "gpu-sanitize: compute-sanitizer is not on the PATH; it comes with the CUDA toolkit" >&2; exit 2; }
	for tool in memcheck racecheck; do \
		PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(PYTHON) -m pytest tests/gpu -m "not slow" || exit 1; \
	done

.venv/installed-%: setup.cfg pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@
