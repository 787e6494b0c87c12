"""Adapters of the tokenizers of other libraries to one protocol."""
