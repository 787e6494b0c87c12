"""Options of training a denoiser of latents."""

from collections.abc import Iterator
from dataclasses import dataclass

from svqvae_hf.trainer.options import POSITIVE, ImageOptions, PipelineOptions, option, range_faults


@dataclass
class DiffusionOptions(PipelineOptions, ImageOptions):
    """Options of training a denoiser."""

    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    num_inference_steps: int = option(50, "Denoising steps of the images of a validation.")
    validation_data_dir: str | None = option(None, "Folder of held-out images, whose mean loss is logged.")
    validation_split: str | None = option(None, "Split of --validation_data_dir, if it has several.")

    def faults(self) -> Iterator[str]:
        """Yields an error message for each fault, also in the options of denoisers."""
        yield from super().faults()
        yield from range_faults(self, POSITIVE, "num_inference_steps")
        if self.validation_split is not None and self.validation_data_dir is None:
            yield "`--validation_split` belongs to `--validation_data_dir`. Give both or neither."
