"""Measures how well a model reconstructs images: metrics, the loop over an image set, and tables."""
