"""Causal language models of transformers that read and write images."""
