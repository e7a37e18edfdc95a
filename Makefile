# make demo: from tiles to a trained teacher.  make test: the test suite.  Both set up what they need.
PYTHON ?= python3
PIP_FLAGS ?=
PY := .venv/bin/python
ENV := .venv/complete
DEMO := demo

.PHONY: env test lint demo soak slurm-matrix lock image-lock image-resolve image-test container-e2e clean

env: $(ENV)

$(ENV): docker/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: pathfm needs Python 3.11 to 3.13, '$(PYTHON)' is another; try 'make $(MAKECMDGOALS) PYTHON=python3.12'"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r docker/cpu.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(PIP_FLAGS) --editable .
	@touch $@

test: $(ENV)
	$(PY) -m pytest $(ARGS)

lint: $(ENV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

demo: $(ENV)
	@$(PY) -m pathfm demo-tiles $(DEMO)
	@$(PY) -m pathfm pack $(DEMO)/tiles --name pretrain --output $(DEMO)/data
	@$(PY) launchers/pretrain.py --config demo --cluster local

soak: $(ENV)
	$(PY) -m pytest -m slow $(ARGS)

slurm-matrix: $(ENV)
	@mkdir -p build
	$(PY) benchmarks/slurm_matrix.py > build/slurm_matrix.md; status=$$?; cat build/slurm_matrix.md; exit $$status

lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet $(PIP_FLAGS) "torch==2.13.0" "setuptools>=77" && build/lock/bin/pip install --quiet $(PIP_FLAGS) -e ".[dev]"
	{ head -n 1 docker/cpu.lock; build/lock/bin/pip list --format=freeze --exclude-editable | grep -v -E '^(pip|wheel)==' | sed 's/+cpu$$//'; } > build/cpu.lock
	mv build/cpu.lock docker/cpu.lock

RESOLVER := build/resolver/bin/python

build/resolver/complete:
	$(PYTHON) -m venv build/resolver
	$(RESOLVER) -m pip install --quiet --disable-pip-version-check --upgrade $(PIP_FLAGS) "pip>=25" uv
	@touch $@

image-lock: build/resolver/complete
	$(RESOLVER) docker/resolve.py make

image-resolve: build/resolver/complete
	$(RESOLVER) docker/resolve.py check

image-test:
	docker/image_test.sh $(ARGS)

# The proof on two nodes: a Slurm job in an Apptainer image, in a root of Debian sid. Needs root; what is made stays in E2E.
E2E := build/container_e2e
E2E_ARCHIVE := $(E2E)/pathfm-cpu.oci.tar

container-e2e: $(E2E_ARCHIVE)
	docker/sid_root.sh $(E2E) --bind $(E2E_ARCHIVE):/images/cpu.tar:ro /opt/host/bin/python /pathfm/benchmarks/container_e2e.py \
	  --archive /images/cpu.tar --images images $(ARGS) > build/container_e2e.md; status=$$?; cat build/container_e2e.md; exit $$status

# in a mount namespace, because a buildah that is killed leaves its mounts
$(E2E_ARCHIVE): Dockerfile docker/image.lock docker/torch-cpu.lock
	PATHFM_IMAGES=$(abspath $(E2E))/layers unshare --mount --propagation=private docker/image_test.sh --archive $@

clean:
	rm -rf .venv build demo *.egg-info
