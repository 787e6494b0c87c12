"""Reads image sets, and makes token sets from them."""
