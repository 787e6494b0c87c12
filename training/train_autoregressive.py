"""Trains a LlamaGen model on the ids of a token set, and saves an `SVQVAEAutoregressivePipeline`.

With --caption_column it trains a model for captions, and with --lora_rank it saves an adapter of peft.

accelerate launch training/train_autoregressive.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --token_set TOKENS --output_dir OUT
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, T5EncoderModel

from svqvae_hf import SVQVAE, LlamaGenConfig
from svqvae_hf.hub.model_cards import table_rows
from svqvae_hf.hub.repositories import from_hub, is_hub_id, public_name
from svqvae_hf.pipelines.captions import encode_captions
from svqvae_hf.pipelines.pipeline_autoregressive import SVQVAEAutoregressivePipeline
from svqvae_hf.pipelines.text_encoders import load_text_encoder
from svqvae_hf.trainer.configs import check_keys
from svqvae_hf.trainer.data.token_sequences import SequenceLoader, TokenBatch, TokenSource
from svqvae_hf.trainer.optimization import make_optimizer
from svqvae_hf.trainer.options import option
from svqvae_hf.trainer.pipeline_run import (
    TokenOptions,
    load_frozen_vqvae,
    log_samples,
    open_token_sets,
    pipeline_card,
    sample_call,
    validate_tokens,
)
from svqvae_hf.trainer.run import Run, run_script

PIXEL_RANGE = (0.0, 1.0)  # of the pipeline
IGNORED = -100  # target that the loss skips
OLD_KEYS = ("rope_scaling", "rope_theta", "torch_dtype")  # of configs of transformers 4
SCRIPT = "training/train_autoregressive.py"


@dataclass
class AutoregressiveOptions(TokenOptions):
    """Options of training a language model on ids."""

    model_config_name_or_path: str | None = option(  # type: ignore[assignment]
        None, "Config of a new model, of type llamagen: a config.json, its folder or Hub id."
    )
    pretrained_model_name_or_path: str | None = option(
        None, "Pipeline whose language model is trained further, instead of a new one: folder or Hub id."
    )
    lora_rank: int = option(0, "Rank of LoRA on all linear layers but the head; 0 trains all weights.")
    text_encoder_name_or_path: str | None = option(
        None, "T5 encoder of the captions, with its tokenizer: folder or Hub id. By default the pretrained pipeline's."
    )

    def __post_init__(self) -> None:
        """Checks the options of captions and of fine-tuning as well."""
        super().__post_init__()
        self.check_one_of("model_config_name_or_path", "pretrained_model_name_or_path")
        self.check_not_negative("lora_rank")
        if self.lora_rank and self.pretrained_model_name_or_path is None:
            raise ValueError("`--lora_rank` needs `--pretrained_model_name_or_path`. Name the pipeline to adapt.")
        if self.text_encoder_name_or_path is not None and self.caption_column is None:
            raise ValueError(
                "`--text_encoder_name_or_path` needs `--caption_column`. Name the column of the captions."
            )


def train(run: Run[AutoregressiveOptions]) -> None:
    """Trains a language model, from the start or from a checkpoint, and saves its pipeline, or its LoRA adapter."""
    options, accelerator = run.options, run.accelerator

    # Tokens and model
    vqvae = load_frozen_vqvae(options, PIXEL_RANGE).to(accelerator.device)
    source, held_out = open_token_sets(options, vqvae)
    layout = source.layout
    process = accelerator.process_index, accelerator.num_processes
    loader = SequenceLoader(source, options.train_batch_size, options.num_batches, options.seed, *process)
    pipeline = make_pipeline(options, vqvae, source)
    language_model = pipeline.language_model.to(accelerator.device).train()
    if options.lora_rank:
        add_lora(options, language_model)
    if options.caption_column is not None:
        pipeline.text_encoder.requires_grad_(False).to(accelerator.device)

    # Optimizer
    optimizer, lr_scheduler = make_optimizer(language_model, options, options.learning_rate, options.max_train_steps)
    model, optimizer = accelerator.prepare(language_model, optimizer)
    run.start(language_model, loader, lr_scheduler)

    def predict(batch: TokenBatch, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and accuracy of a batch, with a random caption of each row, or its first one without a generator."""
        sequences = batch.sequences.to(accelerator.device)  # all of one length, so there is no padding
        features = {}
        if batch.captions is not None:
            features = encode(pipeline, batch.draw_captions(generator))
        logits = model(input_ids=sequences[:, :-1], use_cache=False, **features).logits
        return next_code_loss(logits, sequences[:, 1:], layout.codebook_size)

    def validate(steps_done: int) -> None:
        validate_tokens(run, held_out, partial(predict, generator=None), steps_done)
        log_samples(run, pipeline, sample_call(options, source, partial(encode, pipeline)), steps_done)

    for step, batches in run.steps():
        for batch in batches:
            with accelerator.accumulate(model):
                generator = run.batch_generator()
                dropped = torch.rand(len(batch.sequences), generator=generator) < options.label_dropout
                batch.sequences[dropped, 0] = layout.unconditional_token  # drops its caption as well
                loss, accuracy = predict(batch, generator)
                accelerator.backward(loss)
                numbers = {"loss": loss, "accuracy": accuracy}
                if accelerator.sync_gradients:  # after the last batch of a step
                    numbers |= run.update_weights(model, optimizer, lr_scheduler)
                run.add(numbers, sequences=len(batch.sequences), tokens=batch.sequences[:, 1:].numel())

        run.report(step, validate)

    validate(options.max_train_steps)
    state_dict = run.final_weights(model)
    if accelerator.is_main_process:
        result = make_pipeline(options, vqvae, source)
        adapter = add_lora(options, result.language_model) if options.lora_rank else None
        result.language_model.load_state_dict(state_dict)
        if adapter is None:
            card = pipeline_card(run, result, SCRIPT, *result.describe(), source.class_names)
            run.publish(result.save_pretrained, card)
        else:
            save = partial(adapter.save_pretrained, save_embedding_layers=False)
            run.publish(save, make_adapter_card(run, result))


def make_pipeline(options: AutoregressiveOptions, vqvae: SVQVAE, source: TokenSource) -> SVQVAEAutoregressivePipeline:
    """Pipeline for the sequences of a token set, with a new language model, or with a pretrained one."""
    layout, text = source.layout, {}
    rows, columns = layout.grids[-1]
    if len(layout.scales) > 1 or rows != columns:
        raise ValueError(
            f"A model of LlamaGen reads ids of a square at one scale, but the token set has {layout.grids}. Tokenize "
            "square crops at one scale."
        )
    options.check_sources("pretrained_model_name_or_path", "text_encoder_name_or_path")
    if options.text_encoder_name_or_path is not None:
        text_encoder, tokenizer = load_text_encoder(options.text_encoder_name_or_path)
        text = {"text_encoder": text_encoder, "tokenizer": tokenizer}
    if options.pretrained_model_name_or_path is None:
        language_model = make_language_model(options, source, text.get("text_encoder"))
    else:
        pretrained = SVQVAEAutoregressivePipeline.from_pretrained(
            options.pretrained_model_name_or_path, vqvae=vqvae, **text
        )
        trained, found = (pretrained.grid, pretrained.num_classes), (layout.grids[-1], layout.num_classes)
        if trained != found:
            raise ValueError(
                f"the token set must have the grid and the classes of the pretrained pipeline, {trained}, but has "
                f"{found}. Tokenize images of its size, and name a column with its classes, or captions."
            )
        language_model = pretrained.language_model.float()
        text = {"text_encoder": pretrained.text_encoder, "tokenizer": pretrained.tokenizer}
    if options.caption_column is not None:
        check_captions(language_model, text)
    return SVQVAEAutoregressivePipeline(vqvae, language_model, class_names=source.class_names, **text)


def make_language_model(
    options: AutoregressiveOptions, source: TokenSource, text_encoder: T5EncoderModel | None
) -> PreTrainedModel:
    """Model of the config, for the codes, the classes or captions, and the grid of the token set."""
    layout, name = source.layout, str(options.model_config_name_or_path)
    config = from_hub(AutoConfig.from_pretrained, name)
    if any(Path(name).glob("*.safetensors")):
        raise ValueError(
            f"`--model_config_name_or_path` must be the config of a new model, but `{name}` holds weights, which "
            "would be dropped. Name its config.json, or add image tokens to the model with `svqvae extend-lm`."
        )
    check_keys(name, config.to_dict(), [*type(config)().to_dict(), *OLD_KEYS])
    if not isinstance(config, LlamaGenConfig):
        raise ValueError(
            f"`--model_config_name_or_path` must be a config of type llamagen, but `{name}` is of type "
            f"{config.model_type}. To train another language model, add image tokens with `svqvae extend-lm`."
        )
    config = LlamaGenConfig(
        **config.to_diff_dict()
        | {
            "vocab_size": 0,  # computed
            "codebook_size": layout.codebook_size,
            "num_classes": layout.num_classes,
            "grid_size": layout.grids[-1][0],
            "num_condition_tokens": 1 if text_encoder is None else config.num_condition_tokens,
            "caption_dim": None if text_encoder is None else text_encoder.config.d_model,
            "codebook_fingerprint": source.settings.codebook_fingerprint,
        }
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def check_captions(language_model: PreTrainedModel, text: dict[str, Any]) -> None:
    """Raises unless there is a text encoder, and a model that reads captions."""
    if text.get("text_encoder") is None:
        raise ValueError("`--caption_column` needs a text encoder. Name one by `--text_encoder_name_or_path`.")
    if getattr(language_model.config, "caption_dim", None) is None:
        raise ValueError(
            f"`--caption_column` needs a language model of LlamaGen for captions, but {type(language_model).__name__} "
            "takes none. Use a config of type llamagen, or a pipeline for captions."
        )


def add_lora(options: AutoregressiveOptions, language_model: PreTrainedModel) -> PeftModel:
    """Freezes a model and adds LoRA to its linear layers, in place."""
    config = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_rank, target_modules="all-linear")
    adapter = get_peft_model(language_model, config)
    config.base_model_name_or_path = public_name(str(options.pretrained_model_name_or_path))
    return adapter


def encode(pipeline: SVQVAEAutoregressivePipeline, captions: list[str]) -> dict[str, torch.Tensor]:
    """Features of captions, as arguments of the language model. Longer captions are cut, as LlamaGen does."""
    length = pipeline.language_model.config.num_condition_tokens
    features, mask = encode_captions(pipeline.text_encoder, pipeline.tokenizer, captions, length, truncate=True)
    return {"prompt_embeds": features, "prompt_attention_mask": mask}


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


def make_adapter_card(run: Run[AutoregressiveOptions], pipeline: SVQVAEAutoregressivePipeline) -> str:
    """Card of a LoRA adapter."""
    options = run.options
    base = str(options.pretrained_model_name_or_path)
    name = public_name(base)
    metadata = ModelCardData(
        license=options.license or "unknown",
        library_name="peft",
        tags=["svqvae", "lora"],
        base_model=name if is_hub_id(base) else None,
    )
    rows = {"adapts": f"`{name}`", "LoRA rank": options.lora_rank} | run.provenance(SCRIPT, "images")
    card = ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("adapter_card.md")),
        name=run.name,
        base=name,
        call=pipeline.describe()[1],
        provenance=table_rows(rows.items()),
    )
    return f"{card}\n"


if __name__ == "__main__":
    run_script(train, AutoregressiveOptions)
