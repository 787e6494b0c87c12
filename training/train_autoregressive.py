"""Trains a causal language model on the ids of a token set, and saves an `SVQVAEAutoregressivePipeline`.

With --caption_column it trains a LlamaGen for captions, and with --lora_rank it saves an adapter of peft.

accelerate launch training/train_autoregressive.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --token_set TOKENS --output_dir OUT
"""

import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from huggingface_hub import ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, T5EncoderModel

from svqvae_hf import SVQVAE, LlamaGenConfig
from svqvae_hf.hub.model_cards import table_rows
from svqvae_hf.hub.repositories import from_hub, is_hub_id, public_name
from svqvae_hf.pipelines.captions import load_text_encoder
from svqvae_hf.pipelines.pipeline_autoregressive import SVQVAEAutoregressivePipeline
from svqvae_hf.tokens.image_tokens import check_same_codebook
from svqvae_hf.trainer.data.captions import CaptionEncoder, StoredCaptions, store_captions
from svqvae_hf.trainer.data.token_sequences import SequenceLoader, TokenSource
from svqvae_hf.trainer.optimization import make_optimizer
from svqvae_hf.trainer.options import PipelineOptions, changeable, option, read_options, required
from svqvae_hf.trainer.pipeline_run import load_frozen_vqvae, log_samples, pipeline_card
from svqvae_hf.trainer.run import Run, one_line_errors

PIXEL_RANGE = (0.0, 1.0)  # of the pipeline
IGNORED = -100  # target that the loss skips
SCRIPT = "training/train_autoregressive.py"
ADAPTER_CARD = """---
{metadata}
---

# {name}

LoRA adapter for the language model of the pipeline `{base}`.

```python
from peft import PeftModel
from svqvae_hf import SVQVAEAutoregressivePipeline

pipe = SVQVAEAutoregressivePipeline.from_pretrained("{base}")
adapter = PeftModel.from_pretrained(pipe.language_model, "{name}")  # changes the model of the pipeline
images = pipe({call}).images
with adapter.disable_adapter():
    images += pipe({call}).images
```

| | |
|---|---|
{provenance}"""


@dataclass
class AutoregressiveOptions(PipelineOptions):
    """Options of training a language model on ids."""

    token_set: str = required("Token set of `svqvae tokenize`, all rows of one size: folder, URL or Hub id.")
    model_config_name_or_path: str | None = option(  # type: ignore[assignment]
        None, "Config of a new language model: a config.json, its folder or Hub id. LlamaGen's is of type llamagen."
    )
    pretrained_model_name_or_path: str | None = option(
        None, "Pipeline whose language model is trained further, instead of a new one: folder or Hub id."
    )
    lora_rank: int = option(0, "Rank of LoRA on all linear layers but the head; 0 trains all weights.")
    train_batch_size: int = option(8, "Sequences per batch of one process.")
    guidance_scale: float = changeable(1.0, "Guidance scale of the images of a validation.")
    caption_column: str | None = option(
        None,
        "Column of captions, a text or a list of texts per row, of which one is drawn; for models of LlamaGen. "
        "Captions longer than the model reads are cut.",
    )
    text_encoder_name_or_path: str | None = option(
        None, "T5 encoder of the captions, with its tokenizer: folder or Hub id. By default the pretrained pipeline's."
    )
    caption_features: str | None = option(
        None, "Folder to keep the features of all captions in, encoded by the first run; by default at each step."
    )
    validation_prompts: list[str] = changeable(
        [], "Captions of the images of a validation, in turn; by default the first ones of the set."
    )

    def __post_init__(self) -> None:
        """Checks the options of captions and of fine-tuning as well."""
        super().__post_init__()
        self.check_one_of("model_config_name_or_path", "pretrained_model_name_or_path")
        self.check_not_negative("lora_rank")
        if self.lora_rank and self.pretrained_model_name_or_path is None:
            raise ValueError("`--lora_rank` needs `--pretrained_model_name_or_path`. Name the pipeline to adapt.")
        if self.caption_column is not None and self.label_column is not None:
            raise ValueError("Only one of `--caption_column` and `--label_column` can be given. Leave one out.")
        for name in ("text_encoder_name_or_path", "caption_features", "validation_prompts"):
            if getattr(self, name) and self.caption_column is None:
                raise ValueError(f"`--{name}` needs `--caption_column`. Name the column of the captions.")


def main(options: AutoregressiveOptions) -> None:
    """Trains a language model, and saves its pipeline, or its LoRA adapter, with a card in the output folder."""
    with Run(options) as run:
        train(run)


def train(run: Run[AutoregressiveOptions]) -> None:
    """Trains the model, from the start or from the checkpoint of the run."""
    options, accelerator = run.options, run.accelerator

    # Tokens and model
    vqvae = load_frozen_vqvae(options, PIXEL_RANGE).to(accelerator.device)
    source = TokenSource(options.token_set, options.label_column, options.caption_column)
    check_same_codebook(vqvae, source.settings)
    layout = source.layout
    process = accelerator.process_index, accelerator.num_processes
    loader = SequenceLoader(source, options.train_batch_size, options.num_batches, options.seed, *process)
    pipeline = make_pipeline(options, vqvae, source)
    language_model = pipeline.language_model.to(accelerator.device).train()
    if options.lora_rank:
        add_lora(options, language_model)
    captions = None if options.caption_column is None else read_captions(run, pipeline, source)

    # Optimizer
    optimizer, lr_scheduler = make_optimizer(language_model, options, options.learning_rate, options.max_train_steps)
    model, optimizer = accelerator.prepare(language_model, optimizer)
    run.start(language_model, loader, lr_scheduler)

    for step, batches in run.steps():
        for batch in batches:
            with accelerator.accumulate(model):
                generator = run.batch_generator()
                dropped = torch.rand(len(batch.rows), generator=generator) < options.label_dropout
                batch.sequences[dropped, 0] = layout.unconditional_token  # drops its caption as well
                sequences = batch.sequences.to(accelerator.device)  # all of one length, so there is no padding
                features = {} if captions is None else captions.draw(batch, generator)
                features = {name: each.to(accelerator.device) for name, each in features.items()}
                logits = model(input_ids=sequences[:, :-1], use_cache=False, **features).logits
                loss, accuracy = next_code_loss(logits, sequences[:, 1:], layout.codebook_size)
                accelerator.backward(loss)
                numbers = {"loss": loss, "accuracy": accuracy}
                if accelerator.sync_gradients:  # after the last batch of a step
                    numbers |= run.update_weights(model, optimizer, lr_scheduler)
                run.add(numbers, sequences=len(sequences), tokens=sequences[:, 1:].numel())

        if run.logs_after(step):
            run.log_training(step)
        if run.validates_after(step):
            validate(run, pipeline, source, step + 1)

    validate(run, pipeline, source, options.max_train_steps)
    state_dict = run.final_weights(model)
    if accelerator.is_main_process:
        result = make_pipeline(options, vqvae, source)
        adapter = add_lora(options, result.language_model) if options.lora_rank else None
        result.language_model.load_state_dict(state_dict)
        if adapter is None:
            run.publish(result.save_pretrained, make_card(run, result))
        else:
            save = partial(adapter.save_pretrained, save_embedding_layers=False)
            run.publish(save, make_adapter_card(run, result))
    accelerator.end_training()


def make_pipeline(options: AutoregressiveOptions, vqvae: SVQVAE, source: TokenSource) -> SVQVAEAutoregressivePipeline:
    """Pipeline for the sequences of a token set, with a new language model, or with a pretrained one."""
    layout, text = source.layout, {}
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
        trained = pretrained.layout
        if trained.scales == (1.0,):  # nothing was resized
            trained = dataclasses.replace(trained, scale_from=layout.scale_from)
        if trained != layout:
            raise ValueError(
                f"the token set must have the sequences of the pretrained pipeline, {trained}, but has "
                f"{layout}. Tokenize images at its size and scales, and name a column with its classes, or captions."
            )
        language_model = pretrained.language_model.float()
        text = {"text_encoder": pretrained.text_encoder, "tokenizer": pretrained.tokenizer}
    if options.caption_column is not None:
        check_captions(language_model, text)
    return SVQVAEAutoregressivePipeline(
        vqvae,
        language_model,
        num_classes=layout.num_classes,
        height=layout.height,
        width=layout.width,
        scales=list(layout.scales),
        scale_from=layout.scale_from,
        class_names=source.class_names,
        **text,
    )


def make_language_model(
    options: AutoregressiveOptions, source: TokenSource, text_encoder: T5EncoderModel | None
) -> PreTrainedModel:
    """Language model of the config, with the vocabulary and the length of the sequences."""
    layout = source.layout
    config = from_hub(AutoConfig.from_pretrained, str(options.model_config_name_or_path))
    if isinstance(config, LlamaGenConfig):
        config = LlamaGenConfig(
            **config.to_diff_dict()
            | {
                "codebook_size": layout.codebook_size,
                "num_classes": layout.num_classes,
                "grid_size": layout.grids[-1][0],
                "num_condition_tokens": 1 if text_encoder is None else config.num_condition_tokens,
                "caption_dim": None if text_encoder is None else text_encoder.config.d_model,
                "codebook_fingerprint": source.settings.codebook_fingerprint,
            }
        )
    else:
        config.vocab_size = layout.vocab_size
        config.max_position_embeddings = layout.length
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
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


def read_captions(
    run: Run[AutoregressiveOptions], pipeline: SVQVAEAutoregressivePipeline, source: TokenSource
) -> CaptionEncoder | StoredCaptions:
    """Features of captions: from the folder for them, which is made first if it is absent, or encoded at each step."""
    pipeline.text_encoder.to(run.accelerator.device)
    length = pipeline.language_model.config.num_condition_tokens
    encoder = CaptionEncoder(pipeline.text_encoder, pipeline.tokenizer, length)
    if run.options.caption_features is None:
        return encoder
    folder = Path(run.options.caption_features)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):  # for hours, which a collective would not wait
            if not folder.exists():
                store_captions(folder, source, encoder)
    return StoredCaptions(folder, source, encoder)


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


def validate(
    run: Run[AutoregressiveOptions], pipeline: SVQVAEAutoregressivePipeline, source: TokenSource, steps_done: int
) -> None:
    """Samples images with fixed noise, of each class or caption in turn. The main process logs them."""
    options, num_classes = run.options, pipeline.config["num_classes"]
    count = options.num_validation_images
    if not count:
        return
    pipeline.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"generator": torch.Generator().manual_seed(options.seed), "output_type": "np"}
    if options.caption_column is not None:
        prompts = options.validation_prompts or source.first_captions(count)
        length = pipeline.language_model.config.num_condition_tokens
        encoder = CaptionEncoder(pipeline.text_encoder, pipeline.tokenizer, length)
        call |= encoder.encode([prompts[index % len(prompts)] for index in range(count)])
    elif num_classes:
        call |= {"class_labels": [index % num_classes for index in range(count)]}
    else:
        call |= {"num_images_per_prompt": count}
    if num_classes:
        call |= {"guidance_scale": options.guidance_scale}
    with run.evaluating():
        images = pipeline(**call)[0]
    log_samples(run, images, steps_done)


def make_card(run: Run[AutoregressiveOptions], pipeline: SVQVAEAutoregressivePipeline) -> str:
    """Card of the pipeline."""
    summary, call = pipeline.describe()
    return pipeline_card(run, pipeline, script=SCRIPT, summary=summary, call=call, pipeline_tag=pipeline.task)


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
    _, call = pipeline.describe()
    rows = {"adapts": f"`{name}`", "LoRA rank": options.lora_rank} | run.provenance(SCRIPT, "images")
    return ADAPTER_CARD.format(
        metadata=metadata.to_yaml(), name=run.name, base=name, call=call, provenance=table_rows(rows.items())
    )


if __name__ == "__main__":
    with one_line_errors():
        main(read_options(AutoregressiveOptions, sys.argv[1:]))
