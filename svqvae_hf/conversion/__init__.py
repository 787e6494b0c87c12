"""Models in other forms: Hub repositories of original checkpoints, and exported graphs. Imports any room below."""
