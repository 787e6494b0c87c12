"""Encodes and decodes TIFF images larger than memory, from file to file."""
