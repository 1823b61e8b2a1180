PYTHON ?= python3
WORKLOAD ?= fixed
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test lint mutants bench
quickstart: .venv/.installed
	.venv/bin/deepspeed --quiet --num_accelerators 2 launch/train.py

test: .venv/.installed-dev
	.venv/bin/python -m pytest

lint: .venv/.installed-dev
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

mutants: .venv/.installed-dev
	.venv/bin/python tests/mutants.py

bench: .venv/.installed
	.venv/bin/deepspeed --quiet --num_accelerators 2 launch/bench.py $(WORKLOAD)

.venv/.installed: requirements.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/.installed-dev: requirements-dev.txt tests/system_packages.txt .venv/.installed
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	packages=$$(grep -v '^#' tests/system_packages.txt); dpkg -s $$packages > /dev/null 2>&1 \
	|| { test $$(id -u) = 0 && apt-get update -qq && apt-get install -y -qq $$packages > /dev/null; } \
	|| echo "not installed here: $$packages; tests that need one are skipped"
	touch $@
