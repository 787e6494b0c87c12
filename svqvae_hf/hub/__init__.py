"""Repositories on the Hugging Face Hub and the cards in them. Imports no subpackage above it."""
