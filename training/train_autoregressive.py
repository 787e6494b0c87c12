"""Trains a causal language model on the ids of a token set, and leaves an `SVQVAEAutoregressivePipeline`.

accelerate launch training/train_autoregressive.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --token_set TOKENS --output_dir OUT
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from svqvae_hf.pipelines.pipeline_autoregressive import SVQVAEAutoregressivePipeline
from svqvae_hf.tokens.image_tokens import check_same_codebook
from svqvae_hf.trainer.data.token_sequences import SequenceLoader, TokenSource
from svqvae_hf.trainer.options import PipelineOptions, option, required
from svqvae_hf.trainer.pipeline_run import PipelineSession
from svqvae_hf.trainer.run import run_script

PIXEL_RANGE = (0.0, 1.0)
IGNORED = -100  # by the loss


@dataclass
class AutoregressiveConfig(PipelineOptions):
    """Options of training a language model on ids."""

    token_set: str = required("Token set of `svqvae tokenize`, all of one size: folder, or name on the Hub.")
    train_batch_size: int = option(8, "Sequences in a batch of one process.")
    guidance_scale: float = option(1.0, "Guidance of the images of a validation.")


class AutoregressiveTrainer(PipelineSession):
    """Training of a causal language model: what it holds, and its steps.

    All sequences are of one length, so that batches have no padding.

    Args:
        config ([`AutoregressiveConfig`]): Options.

    Raises:
        ValueError: If model, labels and tokens do not fit each other.
    """

    pipeline_tag = "unconditional-image-generation"

    def __init__(self, config: AutoregressiveConfig):
        super().__init__(config, PIXEL_RANGE)
        accelerator = self.accelerator
        self.source = TokenSource(config.token_set, config.label_column)
        check_same_codebook(self.vqvae, self.source.settings)
        self.layout = layout = self.source.layout
        self.loader = SequenceLoader(
            self.source,
            config.train_batch_size,
            config.max_train_steps * config.gradient_accumulation_steps,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
        network = self.new_network().to(accelerator.device)
        self.prepare(network, network)
        scales = ", ".join(f"{scale:g}" for scale in layout.scales)
        self.summary = (
            f"Images of {layout.width} x {layout.height} pixels (width x height), id by id at scales {scales}, from a "
            "causal language model over the codebook of an SVQVAE."
        )
        self.call = "class_labels=[0]" if layout.num_classes else ""

    def new_network(self) -> PreTrainedModel:
        """The language model that the config describes, for the tokens and the length of the sequences."""
        network_config = AutoConfig.from_pretrained(self.config.model_config_name_or_path)
        network_config.vocab_size = self.layout.vocab_size
        network_config.max_position_embeddings = self.layout.length
        network_config.bos_token_id = network_config.eos_token_id = network_config.pad_token_id = None
        return AutoModelForCausalLM.from_config(network_config, dtype=torch.float32)

    def train_on(self, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        """Trains on the next code at each place where one stands, of some sequences without their class."""
        layout = self.layout
        dropped = torch.rand(len(batch), generator=self.batch_generator()) < self.config.label_dropout
        batch[dropped, 0] = layout.unconditional_token
        sequences = batch.to(self.accelerator.device)
        logits = self.model(input_ids=sequences[:, :-1], use_cache=False).logits[..., : layout.codebook_size].float()
        targets = sequences[:, 1:]
        is_code = targets < layout.codebook_size
        loss = F.cross_entropy(logits.transpose(1, 2), targets.masked_fill(~is_code, IGNORED), ignore_index=IGNORED)
        hits = (logits.argmax(-1) == targets)[is_code]
        self.throughput.add(sequences=len(sequences), tokens=targets.numel())
        return self.descend(loss) | {"accuracy": hits.float().mean()}

    def make_pipeline(self, network: PreTrainedModel) -> SVQVAEAutoregressivePipeline:
        """The pipeline with this language model."""
        layout = self.layout
        return SVQVAEAutoregressivePipeline(
            self.vqvae,
            network,
            num_classes=layout.num_classes,
            height=layout.height,
            width=layout.width,
            scales=list(layout.scales),
        )

    def sample(self, pipeline: SVQVAEAutoregressivePipeline, generator: torch.Generator) -> np.ndarray:
        """Images of each class in turn, or of none."""
        count, num_classes = self.config.num_validation_images, self.layout.num_classes
        if not num_classes:
            return pipeline(num_images_per_prompt=count, generator=generator, output_type="np").images
        labels = [index % num_classes for index in range(count)]
        guidance_scale = self.config.guidance_scale
        return pipeline(labels, guidance_scale=guidance_scale, generator=generator, output_type="np").images


if __name__ == "__main__":
    run_script(AutoregressiveTrainer, AutoregressiveConfig)
