PYTHON ?= python3
BIN := .venv/bin
EXTRA ?= dev
PYTEST := pytest --numprocesses auto --dist worksteal --durations 15

.PHONY: install lock reconstruct generate browser test quick lowest lint damage docs site gpu dist

# Installs the releases in constraints.txt, which CI has tested. `EXTRA=lint` is enough for a typo. `EXTRA=ci` adds an S3
# server and a driver of the browser for a few tests.
install: .venv/installed-$(EXTRA)

.venv/installed-$(EXTRA): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[$(EXTRA)]"
	touch $@

# Writes the newest releases to constraints.txt, for all Pythons that pyproject.toml admits. PyTorch and the packages of
# CUDA that it brings are left out, because each machine has its own build.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet uv
	.venv-lock/bin/uv pip compile pyproject.toml --extra ci --universal --python-version 3.11 --upgrade \
		--no-header --no-annotate --quiet --output-file .venv-lock/releases.txt
	grep -vE "^(torch|torchvision|triton|nvidia-.*|cuda-.*)==" .venv-lock/releases.txt > constraints.txt

# The bundled photograph by the bundled model: images and a side-by-side picture in outputs/chelsea, PSNR on the terminal.
reconstruct: install
	$(BIN)/svqvae reconstruct docs/images/chelsea.png --scales 0.25 0.5 1 --side-by-side --output outputs/chelsea --overwrite

# Scenes of emoji by the bundled language model, in outputs/scenes.
generate: install
	$(BIN)/svqvae generate --prompt "a whale above a guitar on pink" "three foxes on white" --output outputs/scenes --overwrite

# Chromium, for the tests of pages, and npm, which downloads the runtime of `svqvae export --web`; as root.
browser:
	apt-get update -qq
	apt-get install -qq --yes --no-install-recommends chromium-headless-shell
	command -v npm || apt-get install -qq --yes --no-install-recommends npm

test: install
	$(BIN)/$(PYTEST)

quick: install
	$(BIN)/$(PYTEST) -m "not slow"

# The suite with the lowest versions that pyproject.toml admits; 6 GB, because old releases of torch come with CUDA.
# Warnings are no errors there: old releases warn of what newer ones changed.
lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct --editable ".[ci]"
	.venv-lowest/bin/$(PYTEST) -W default

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# All cases of tests/damage, a sample of which is in `make test`. SEED and NUMBER choose some by chance.
damage: install
	$(BIN)/python tests/damage/damage.py $(if $(SEED),--seed $(SEED)) $(if $(NUMBER),--number $(NUMBER))

# The site, in site/.
docs: install
	$(BIN)/mkdocs build --strict

# The site with the page that draws in the browser, in site/draw. Needs npm: `make browser`.
site: install
	rm -rf outputs/draw
	$(BIN)/svqvae export scenes --web --output outputs/draw
	DRAWING_PAGE=outputs/draw $(BIN)/mkdocs build --strict

# The tests, and tables of speed, memory, training steps and generation in outputs/gpu, on a machine with a GPU.
gpu: install
	@PATH="$(BIN):$$PATH" bash benchmarks/gpu.sh

# Wheel and source archive, in dist/.
dist: install
	$(BIN)/hatchling build
