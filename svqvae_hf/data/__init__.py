"""Reads image sets."""
