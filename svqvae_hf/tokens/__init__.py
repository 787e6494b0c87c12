"""Encodes one image to tokens and back, and reads and writes token files."""
