"""Original checkpoints: their formats, configs and weights. Imports `hub` and `untrusted`, and no model."""
