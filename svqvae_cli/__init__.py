"""The command `svqvae`, one file per command: its arguments and its body.

It stands beside the package `svqvae_hf`, whose import takes seconds because it imports torch and diffusers. Help and
errors of the command line need neither, so commands import the package inside their bodies.
"""

from svqvae_cli.command_line import main

__all__ = ["main"]
