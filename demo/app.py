"""Runs the page of `svqvae demo` as a Hugging Face Space."""

import sys

from svqvae_cli import main

sys.exit(main(["demo", "--host", "0.0.0.0", "--port", "7860"]))
