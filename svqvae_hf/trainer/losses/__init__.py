"""Losses of training an SVQVAE, with their weights and first steps."""
