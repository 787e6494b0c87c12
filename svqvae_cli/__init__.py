"""The command `svqvae`."""

from svqvae_cli.parser import main

__all__ = ["main"]
