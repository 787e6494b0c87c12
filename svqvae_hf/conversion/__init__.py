"""Converts original checkpoints to Hub repositories."""
