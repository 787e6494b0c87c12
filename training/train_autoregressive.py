"""Trains a causal language model on the ids of a token set, and saves an `SVQVAEAutoregressivePipeline`.

accelerate launch training/train_autoregressive.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --token_set TOKENS --output_dir OUT
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from svqvae_hf import SVQVAE
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.pipelines.pipeline_autoregressive import SVQVAEAutoregressivePipeline
from svqvae_hf.pipelines.sequences import SequenceLayout
from svqvae_hf.tokens.image_tokens import check_same_codebook
from svqvae_hf.trainer.data.token_sequences import SequenceLoader, TokenSource
from svqvae_hf.trainer.optimization import make_optimizer
from svqvae_hf.trainer.options import PipelineOptions, changeable, option, read_options, required
from svqvae_hf.trainer.pipeline_run import load_frozen_vqvae, log_samples, pipeline_card
from svqvae_hf.trainer.run import Run, one_line_errors

PIXEL_RANGE = (0.0, 1.0)  # of the pipeline
IGNORED = -100  # target that the loss skips


@dataclass
class AutoregressiveOptions(PipelineOptions):
    """Options of training a language model on ids."""

    token_set: str = required("Token set of `svqvae tokenize`, all rows of one size: folder or Hub id.")
    train_batch_size: int = option(8, "Sequences per batch of one process.")
    guidance_scale: float = changeable(1.0, "Guidance scale of the images of a validation.")


def main(options: AutoregressiveOptions) -> None:
    """Trains a language model, and saves its pipeline with a card in the output folder."""
    with Run(options) as run:
        train(run)


def train(run: Run[AutoregressiveOptions]) -> None:
    """Trains the model, from the start or from the checkpoint of the run."""
    options, accelerator = run.options, run.accelerator

    # Tokens and model
    vqvae = load_frozen_vqvae(options, PIXEL_RANGE).to(accelerator.device)
    source = TokenSource(options.token_set, options.label_column)
    check_same_codebook(vqvae, source.settings)
    layout = source.layout
    process = accelerator.process_index, accelerator.num_processes
    loader = SequenceLoader(source, options.train_batch_size, options.num_batches, options.seed, *process)
    language_model = make_language_model(options, layout).to(accelerator.device)

    # Optimizer
    optimizer, lr_scheduler = make_optimizer(language_model, options, options.learning_rate, options.max_train_steps)
    model, optimizer = accelerator.prepare(language_model, optimizer)
    run.start(language_model, loader, lr_scheduler)

    for step, batches in run.steps():
        for batch in batches:
            with accelerator.accumulate(model):
                dropped = torch.rand(len(batch.rows), generator=run.batch_generator()) < options.label_dropout
                batch.sequences[dropped, 0] = layout.unconditional_token
                sequences = batch.sequences.to(accelerator.device)  # all of one length, so there is no padding
                logits = model(input_ids=sequences[:, :-1], use_cache=False).logits
                loss, accuracy = next_code_loss(logits, sequences[:, 1:], layout.codebook_size)
                accelerator.backward(loss)
                numbers = {"loss": loss, "accuracy": accuracy}
                if accelerator.sync_gradients:  # after the last batch of a step
                    numbers |= run.update_weights(model, optimizer, lr_scheduler)
                run.add(numbers, sequences=len(sequences), tokens=sequences[:, 1:].numel())

        if run.logs_after(step):
            run.log_training(step)
        if run.validates_after(step):
            validate(run, make_pipeline(vqvae, language_model, source), step + 1)

    validate(run, make_pipeline(vqvae, language_model, source), options.max_train_steps)
    state_dict = run.final_weights(model)
    if accelerator.is_main_process:
        result = make_language_model(options, layout)
        result.load_state_dict(state_dict)
        pipeline = make_pipeline(vqvae, result.eval(), source)
        run.publish(pipeline.save_pretrained, make_card(run, pipeline))
    accelerator.end_training()


def make_language_model(options: AutoregressiveOptions, layout: SequenceLayout) -> PreTrainedModel:
    """Language model of the config, with the vocabulary and the length of the sequences."""
    config = from_hub(AutoConfig.from_pretrained, options.model_config_name_or_path)
    config.vocab_size = layout.vocab_size
    config.max_position_embeddings = layout.length
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def next_code_loss(
    logits: torch.Tensor, targets: torch.Tensor, codebook_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and accuracy of the next code. Positions where a separator comes next do not count.

    Args:
        logits (`torch.Tensor` of shape `(batch, length, vocab_size)`): Output of the language model.
        targets (`torch.Tensor` of shape `(batch, length)`): Next tokens.
        codebook_size (`int`): Number of codes, which are the first tokens of the vocabulary.
    """
    logits = logits[..., :codebook_size].float()
    is_code = targets < codebook_size
    loss = F.cross_entropy(logits.transpose(1, 2), targets.masked_fill(~is_code, IGNORED), ignore_index=IGNORED)
    return loss, (logits.argmax(-1) == targets)[is_code].float().mean()


def make_pipeline(vqvae: SVQVAE, language_model: PreTrainedModel, source: TokenSource) -> SVQVAEAutoregressivePipeline:
    """Pipeline with this language model, for the sequences and classes of a token set."""
    layout = source.layout
    return SVQVAEAutoregressivePipeline(
        vqvae,
        language_model,
        num_classes=layout.num_classes,
        height=layout.height,
        width=layout.width,
        scales=list(layout.scales),
        scale_from=layout.scale_from,
        class_names=source.class_names,
    )


def validate(run: Run[AutoregressiveOptions], pipeline: SVQVAEAutoregressivePipeline, steps_done: int) -> None:
    """Samples images with fixed noise, of each class in turn. All processes sample; the main process logs them."""
    options, num_classes = run.options, pipeline.config["num_classes"]
    if not options.num_validation_images:
        return
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(options.seed)
    with run.evaluating():
        if num_classes:
            labels = [index % num_classes for index in range(options.num_validation_images)]
            scale = options.guidance_scale
            images = pipeline(labels, guidance_scale=scale, generator=generator, output_type="np")[0]
        else:
            count = options.num_validation_images
            images = pipeline(num_images_per_prompt=count, generator=generator, output_type="np")[0]
    log_samples(run, images, steps_done)


def make_card(run: Run[AutoregressiveOptions], pipeline: SVQVAEAutoregressivePipeline) -> str:
    """Card of the pipeline."""
    summary, call = pipeline.describe()
    return pipeline_card(run, pipeline, script="training/train_autoregressive.py", summary=summary, call=call)


if __name__ == "__main__":
    with one_line_errors():
        main(read_options(AutoregressiveOptions, sys.argv[1:]))
