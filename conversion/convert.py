"""Runs `svqvae convert` in a checkout.

python conversion/convert.py SOURCE --output OUT
"""

import sys

from svqvae_cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
