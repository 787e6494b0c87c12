"""Parts of training scripts: a script shows its loop, forward pass, loss and update, and takes the rest from here.

`training/train.py` of the repository is such a script. One of your own needs the extra `svqvae-hf[train]`, and may
import any part from its file:

- the run, `run`: accelerator, signals, exact resumption, checkpoints, log, EMA weights and the result;
- options, as dataclasses that are read from flags or YAML: `options`, `train_options`;
- optimizer and schedule: `optimization`; one update of the weights: `weights`;
- the model: `model`, `linear_start`, and its codebook: `codebook`;
- losses: `losses.objective`, or its part `losses.adversarial`;
- data: `data.image_source` or the `data.crop_loader` under it, and `data.token_sequences`;
- what the scripts of generators share: `pipeline_run`;
- numbers and pictures for the log: `tracking`.
"""
