"""Simple ways to code an image with as many bits as a model: blocks of pixels, and image files."""
