"""Runs the command line as `python -m svqvae_cli`."""

import sys

from svqvae_cli import main

sys.exit(main())
