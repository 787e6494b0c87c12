"""Training data: crops of images and sequences of ids, each depending on its seed alone."""
