"""Image generation: the order of ids in a sequence, and the pipelines that sample ids."""
