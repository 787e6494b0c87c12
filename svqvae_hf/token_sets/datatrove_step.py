"""A step of datatrove, whose executors run the parts of a token set on one machine, with SLURM or with Ray."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from datatrove.pipeline.base import PipelineStep

from svqvae_hf.data.image_sets import open_images
from svqvae_hf.loaders.pretrained_models import SVQVAE
from svqvae_hf.token_sets.cards import public_names
from svqvae_hf.token_sets.writer import tokenize_set


class TokenizeImages(PipelineStep):
    """Makes the part of a token set that has the number of the task. The pipeline needs no other step.

    Args:
        data (`Sequence[str]`): Image set, as for [`~svqvae_hf.data.image_sets.open_images`].
        out (`str`): Folder of the token set, or its URL for `fsspec`. All tasks must reach it.
        model (`str`): Folder or Hub id of the model.
        device (`str`, *optional*): Device of the model; by default a GPU if there is one.
        dtype (`str`, defaults to `"float32"`): Precision of the weights.
        images (`Mapping[str, Any]`, *optional*): Further options of `open_images`.
        **options: Further options of [`~svqvae_hf.token_sets.writer.tokenize_set`], except `parts` and
            `num_parts`.
    """

    name = "Tokenize images"
    type = "Tokenizer"

    def __init__(
        self,
        data: Sequence[str],
        out: str,
        model: str,
        *,
        device: str | None = None,
        dtype: str = "float32",
        images: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__()
        self.data = data
        self.out = out
        self.model = model
        self.device = device
        self.dtype = dtype
        self.images = dict(images or {})
        self.options = public_names(self.data, model)  # `model_name` and `source_set`, unless `options` has them
        self.options |= options

    def run(self, data: Iterable[Any] | None = None, rank: int = 0, world_size: int = 1) -> None:
        """Makes a part.

        Args:
            data (`Iterable`, *optional*): Documents of the steps before; must be `None`.
            rank (`int`, defaults to 0): Number of the task, and of the part.
            world_size (`int`, defaults to 1): Number of tasks, and of parts.
        """
        if data is not None:
            raise ValueError("`TokenizeImages` must be the first step, because it reads the images itself.")
        device = self.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        with self.track_time():
            model = SVQVAE.from_pretrained(self.model, dtype=getattr(torch, self.dtype)).to(device).eval()
            images = open_images(self.data, **self.images)
            tokenize_set(model, images, self.out, parts=[rank], num_parts=world_size, **self.options)
