"""A run that leaves a pipeline: validation by images that it samples, and the repository that it becomes."""

import math
from abc import abstractmethod
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCardData
from torch import nn
from torchvision.utils import make_grid

from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.trainer.options import PipelineOptions, public_name
from svqvae_hf.trainer.run import Session
from svqvae_hf.trainer.tracking import log_image

CARD = """---
{metadata}
---

# {name}

{summary}

## Use

With the package `svqvae-hf`:

```python
from {module} import {pipeline}

import svqvae_hf  # from here on, pipelines that hold an SVQVAE load

pipeline = {pipeline}.from_pretrained("{repo_id}")
image = pipeline({call}).images[0]
```

## Origin

| | |
|---|---|
{rows}
## Licence

Not stated: ask the authors of the weights before you use or share them.
"""


class PipelineSession(Session):
    """A run that trains a network of a pipeline on what an SVQVAE, which stays as it is, makes of images.

    Args:
        config ([`PipelineOptions`]): Options.
        pixel_range (`tuple[float, float]`): What the pipeline works in, whatever the SVQVAE was trained on.

    Raises:
        ValueError: If there is no such SVQVAE or config.
    """

    pipeline_tag = "unconditional-image-generation"  # of the Hub
    summary: str  # of the pipeline, a sentence for the card
    call: str  # arguments of the card's example

    def __init__(self, config: PipelineOptions, pixel_range: tuple[float, float]):
        super().__init__(config)
        config.check_sources("vqvae_name_or_path", "model_config_name_or_path")
        vqvae = SVQVAE.from_pretrained(config.vqvae_name_or_path, pixel_range=pixel_range, torch_dtype=torch.float32)
        vqvae.register_to_config(_name_or_path=public_name(config.vqvae_name_or_path))
        self.vqvae = vqvae.to(self.accelerator.device).requires_grad_(False)

    @property
    def latent_side(self) -> int:
        """Side of the latents of a crop.

        Raises:
            ValueError: If `--resolution` is no multiple of it.
        """
        if self.config.resolution % self.vqvae.f:
            raise ValueError(
                f"`--resolution` must be a multiple of f = {self.vqvae.f} of the SVQVAE, but is "
                f"{self.config.resolution}."
            )
        return self.config.resolution // self.vqvae.f

    @abstractmethod
    def new_network(self) -> nn.Module:
        """The network to train, with random weights."""

    @abstractmethod
    def make_pipeline(self, network: nn.Module) -> DiffusionPipeline:
        """The pipeline with this network in it."""

    @abstractmethod
    def sample(self, pipeline: DiffusionPipeline, generator: torch.Generator) -> np.ndarray:
        """The images of a validation, `(num_validation_images, height, width, 3)` in [0, 1]."""

    def validate(self, done: int) -> None:
        """Samples images with the same noise each time; every process does, so that none waits, the main one shows."""
        if not self.config.num_validation_images:
            return
        with self.evaluating():
            pipeline = self.make_pipeline(self.network)
            pipeline.set_progress_bar_config(disable=True)
            images = torch.from_numpy(self.sample(pipeline, torch.Generator().manual_seed(self.config.seed)))
        if self.accelerator.is_main_process:
            grid = make_grid(images.permute(0, 3, 1, 2), nrow=math.ceil(len(images) ** 0.5), padding=4, pad_value=1.0)
            pixels = (grid.permute(1, 2, 0) * 255).round().byte().numpy()
            log_image(self.accelerator, pixels, self.output_dir / "samples", done)

    def save(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes the pipeline."""
        network = self.new_network()
        network.load_state_dict(state_dict)
        self.make_pipeline(network.eval()).save_pretrained(folder)

    def card(self, repo_id: str) -> str:
        """The card of the pipeline."""
        config = self.config
        rows = {"SVQVAE": f"`{public_name(config.vqvae_name_or_path)}`"} | self.provenance("images")
        pipeline_class = type(self.make_pipeline(self.network))
        metadata = ModelCardData(
            license="unknown",
            library_name="diffusers",
            pipeline_tag=self.pipeline_tag,
            tags=["svqvae", type(self.network).__name__.lower()],
        )
        return CARD.format(
            metadata=metadata.to_yaml(),
            name=repo_id.rpartition("/")[2],
            repo_id=repo_id,
            summary=self.summary,
            module=pipeline_class.__module__.partition(".")[0],
            pipeline=pipeline_class.__name__,
            call=self.call,
            rows="".join(f"| {name} | {value} |\n" for name, value in rows.items()),
        )
