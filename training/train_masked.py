"""Trains a masked image model over SVQVAE's ids (MaskGIT, arXiv 2202.04200), and leaves an `AmusedPipeline`.

accelerate launch training/train_masked.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --text_encoder_name_or_path CLIP --train_data_dir PHOTOS --output_dir OUT
"""

import math
from dataclasses import dataclass

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from svqvae_hf.trainer.data.crops import CropBatch
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.options import ImageOptions, PipelineOptions, option, required
from svqvae_hf.trainer.pipeline_run import PipelineSession
from svqvae_hf.trainer.run import run_script

PIXEL_RANGE = (0.0, 1.0)  # of the pipeline
AESTHETIC_SCORE = 6  # what the pipeline says of each image, beside its size and where it was cropped
NUM_MICRO_CONDITIONS = 5
IGNORED = -100  # by the loss


@dataclass
class MaskedConfig(PipelineOptions, ImageOptions):
    """Options of training a masked image model."""

    text_encoder_name_or_path: str = required(
        "CLIP with its tokenizer, whose text encoder reads captions: folder or Hub id."
    )
    validation_prompts: list[str] = option([""], "Captions of the images of a validation, in turn.")


class MaskedTrainer(PipelineSession):
    """Training of a masked image model: what it holds, and its steps.

    Args:
        config ([`MaskedConfig`]): Options.

    Raises:
        ValueError: If model, captions and images do not fit each other.
    """

    pipeline_tag = "text-to-image"
    call = 'prompt="a caption like those it was trained on"'

    def __init__(self, config: MaskedConfig):
        super().__init__(config, PIXEL_RANGE)
        config.check_sources("text_encoder_name_or_path")
        source, device = config.text_encoder_name_or_path, self.accelerator.device
        self.tokenizer = CLIPTokenizer.from_pretrained(source)
        self.text_encoder = CLIPTextModelWithProjection.from_pretrained(source).to(device).requires_grad_(False)
        self.scheduler = AmusedScheduler(mask_token_id=self.vqvae.config["codebook_size"])
        self.source = ImageSource(config, self.accelerator, PIXEL_RANGE, config.label_column)
        self.loader = self.source.loader(
            [config.resolution], config.max_train_steps * config.gradient_accumulation_steps, config.seed
        )
        network = self.new_network().to(device)
        self.prepare(network, network)
        self.summary = f"Images of {config.resolution} x {config.resolution} pixels by a masked model of SVQVAE's ids."

    def new_network(self) -> UVit2DModel:
        """The transformer that the config describes, for this codebook, these sizes and this text encoder."""
        description = UVit2DModel.load_config(self.config.model_config_name_or_path)
        codebook_size = self.vqvae.config["codebook_size"]
        derived = {
            "codebook_size": codebook_size,
            "vocab_size": codebook_size + 1,  # the mask
            "sample_size": self.latent_side,
            "micro_cond_embed_dim": NUM_MICRO_CONDITIONS * description["micro_cond_encode_dim"],
            "cond_embed_dim": self.text_encoder.config.projection_dim,
            "encoder_hidden_size": self.text_encoder.config.hidden_size,
        }
        return UVit2DModel.from_config({**description, **derived})

    def _captions(self, batch: CropBatch, generator: torch.Generator) -> list[str]:
        """Captions of a batch, or names of its classes, some of them left empty."""
        if self.config.label_column is None:
            return [""] * len(batch.labels)
        feature = self.source.images.features[self.config.label_column]
        named = isinstance(feature, datasets.ClassLabel)
        captions = [feature.int2str(label) if named else label for label in batch.labels]
        for caption in captions:
            if not isinstance(caption, str):
                raise ValueError(f"`--label_column` must hold captions or classes with names, but has {caption!r}.")
        kept = torch.rand(len(captions), generator=generator) >= self.config.label_dropout
        return [caption if keep else "" for caption, keep in zip(captions, kept.tolist(), strict=True)]

    def train_on(self, batch: CropBatch, step: int) -> dict[str, torch.Tensor]:
        """Masks a random share of the ids of the crops, and trains the transformer to find them.

        The loss is the mean over the masked ids of all processes. Accumulated batches count alike, whatever is masked.
        """
        sample, generator = self.source.receive(batch), self.batch_generator()
        texts = self.tokenizer(
            self._captions(batch, generator), return_tensors="pt", padding="max_length", truncation=True
        )
        with torch.no_grad():
            ids = self.vqvae.encode_tokens(sample)  # (batch, h, w)
            text = self.text_encoder(texts.input_ids.to(ids.device), output_hidden_states=True)
        masked = draw_mask(ids.shape, generator).to(ids.device)
        height, width = sample.shape[-2:]
        conditions = torch.tensor([width, height, 0, 0, AESTHETIC_SCORE], device=ids.device, dtype=torch.float32)
        logits = self.model(
            torch.where(masked, self.scheduler.config["mask_token_id"], ids),
            encoder_hidden_states=text.hidden_states[-2],
            pooled_text_emb=text.text_embeds,
            micro_conds=conditions.expand(len(ids), -1),
        )
        targets = ids.masked_fill(~masked, IGNORED)
        loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        loss = loss / self.accelerator.reduce(masked.sum().float(), "mean")  # a process's own count may be another
        self.throughput.add(images=len(sample), megapixels=sample[:, 0].numel() / 1e6)
        return self.descend(loss)

    def make_pipeline(self, network: UVit2DModel) -> AmusedPipeline:
        """The pipeline with this transformer."""
        return AmusedPipeline(
            vqvae=self.vqvae,
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            transformer=network,
            scheduler=self.scheduler,
        )

    def sample(self, pipeline: AmusedPipeline, generator: torch.Generator) -> np.ndarray:
        """Images of the validation prompts."""
        prompts = self.config.validation_prompts
        prompts = [prompts[index % len(prompts)] for index in range(self.config.num_validation_images)]
        return pipeline(prompts, generator=generator, output_type="np").images


def draw_mask(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Masks `(batch, h, w)` at random places: of each image a share cos(pi u / 2), u even in [0, 1), one id at least.

    Args:
        shape (`torch.Size`): `(batch, h, w)`.
        generator (`torch.Generator`): Source of what is random.
    """
    batch, height, width = shape
    shares = torch.cos(math.pi / 2 * torch.rand(batch, 1, generator=generator))
    order = torch.rand(batch, height * width, generator=generator).argsort(dim=1)
    return (order < (shares * height * width).round().clamp(min=1)).view(shape)


if __name__ == "__main__":
    run_script(MaskedTrainer, MaskedConfig)
