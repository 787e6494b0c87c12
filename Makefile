PYTHON ?= python3
BIN := .venv/bin

.PHONY: install reconstruct browser test lint

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --editable ".[dev]"
	touch $@

# The bundled photograph by the bundled model: images and a side-by-side picture in outputs/, PSNR on the terminal.
reconstruct: install
	$(BIN)/svqvae reconstruct docs/images/chelsea.png --scales 0.25 0.5 1 --side-by-side --output outputs --overwrite

# Chromium, for the test of the demo's page, from Debian's packages; as root.
browser:
	apt-get update -qq
	apt-get install -qq --yes --no-install-recommends chromium-headless-shell

test: install
	$(BIN)/pytest --numprocesses auto --dist worksteal --durations 15

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
