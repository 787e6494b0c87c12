"""Converts original checkpoints to Hub repositories, and models to ONNX or torch graphs. Imports any room below."""
