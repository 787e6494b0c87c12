"""The network that is trained: its forward pass, its start, and its codebook."""
