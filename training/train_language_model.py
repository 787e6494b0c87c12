"""Trains a causal language model on token sets: LlamaGen by classes or captions, or an extended model by chats.

accelerate launch training/train_language_model.py --model_name_or_path LM --token_set TOKENS --output_dir OUT \
    --max_steps N
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from language_trainer import CheckpointOnSignal, LanguageModelTrainer, ModalityLoss
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset, default_collate
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedModel,
    TrainingArguments,
)

from svqvae_hf import SVQVAE, LlamaGenConfig, LlamaGenForCausalLM, SVQVAEAutoregressivePipeline, SVQVAEProcessor
from svqvae_hf.hub.model_cards import table_rows
from svqvae_hf.hub.repositories import from_hub, public_name
from svqvae_hf.models.image_vocabulary import CONFIG_KEY, ImageVocabulary
from svqvae_hf.pipelines.captions import encode_captions
from svqvae_hf.pipelines.text_encoders import load_text_encoder
from svqvae_hf.trainer.checkpoints import NAME, RUN_STATE, check_files, find_checkpoint
from svqvae_hf.trainer.configs import check_keys
from svqvae_hf.trainer.data.token_sequences import TokenSource
from svqvae_hf.trainer.examples import ChatExamples, LlamaGenExamples, Mix, check_rows, read_texts
from svqvae_hf.trainer.interruption import Interruption
from svqvae_hf.trainer.optimization import MAX_PRECONDITION_DIM
from svqvae_hf.trainer.options import FRACTION, OPTIMIZERS, option, public_values, raise_faults, read_options, wrong
from svqvae_hf.trainer.pipeline_run import generator_card, open_token_sets
from svqvae_hf.trainer.publishing import Result, find_sources, provenance, refuse_finished
from svqvae_hf.trainer.scripts import one_line_errors

SCRIPT = "training/train_language_model.py"
FRACTIONS = ("caption_fraction", "condition_dropout", "first_caption_fraction", "scheduled_sampling", "text_fraction")


@dataclass
class LanguageModelOptions:
    """Options of the data and the model. All options of `transformers.TrainingArguments` can be given as well."""

    model_name_or_path: str | None = option(None, "Model of `svqvae extend-lm` to train on chats: folder or Hub id.")
    pipeline_name_or_path: str | None = option(None, "Pipeline of LlamaGen to train further: folder or Hub id.")
    model_config_name_or_path: str | None = option(None, "Config of a new LlamaGen: a config.json, its folder or id.")
    vqvae_name_or_path: str | None = option(None, "SVQVAE of a new LlamaGen: folder or Hub id.")
    text_encoder_name_or_path: str | None = option(None, "T5 encoder of the captions of a new LlamaGen.")
    token_set: str | None = option(None, "Token set of `svqvae tokenize`: folder, URL or Hub id.")
    validation_token_set: str | None = option(None, "The same, for --eval_strategy; processes may repeat some rows.")
    label_column: str | None = option(None, "Column of the classes, for LlamaGen.")
    caption_column: str | None = option(None, "Column of captions, texts or lists; chats learn to write the first.")
    condition_dropout: float = option(0.1, "Fraction of images trained without class or caption, for guidance.")
    first_caption_fraction: float = option(0.0, "Fraction of images drawn from the first caption, not from any.")
    caption_fraction: float = option(0.5, "Fraction of chats from image to caption; the others go the other way.")
    scheduled_sampling: float = option(0.0, "Largest fraction of ids that the model reads as it draws them; slower.")
    text_files: list[str] = option([], "JSON Lines files: `text`, with <|image|> for each of `images`, rows of ids.")
    text_fraction: float = option(0.0, "Fraction of examples from the text files; the others are chats.")
    packing: bool = option(True, "Pack each batch of chats into one sequence; --no_packing pads, for the CPU.")
    completion_only_loss: bool = option(True, "Learn only answers; --no_completion_only_loss learns prompts, too.")
    attn_implementation: str | None = option(None, "Attention of transformers; `eager` is fast for short examples.")
    optimizer: str = option("adamw", "SOAP takes longer per step than AdamW, but learns more in it.", OPTIMIZERS)
    lora_rank: int = option(0, "Rank of LoRA on all linear layers, with the rows of image tokens; 0 trains all.")
    license: str | None = option(None, "Licence for the card, by its id on the Hub; by default, from sources' cards.")

    def __post_init__(self) -> None:
        """Raises all faults at once."""
        raise_faults(self.faults())

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the options, except for data and model."""
        yield from wrong(self, FRACTION, *FRACTIONS)
        sources = self.model_name_or_path, self.pipeline_name_or_path, self.model_config_name_or_path
        if sum(source is not None for source in sources) != 1:
            yield "Pass one of `--model_name_or_path`, `--pipeline_name_or_path` and `--model_config_name_or_path`."
        is_new = self.model_config_name_or_path is not None
        if is_new and (self.vqvae_name_or_path is None or self.lora_rank):
            yield "A new LlamaGen needs `--vqvae_name_or_path`, and `--lora_rank` must be left out."
        if not is_new and (self.vqvae_name_or_path or self.text_encoder_name_or_path):
            yield "`--vqvae_name_or_path` and `--text_encoder_name_or_path` are for a new LlamaGen. Leave them out."
        if self.model_name_or_path is None and (self.text_files or self.text_fraction):
            yield "`--text_files` and `--text_fraction` are for `--model_name_or_path`. Leave them out."
        needs = {"token_set": self.text_fraction < 1, "text_files": self.text_fraction > 0}
        for name, needed in needs.items():
            if needed != bool(getattr(self, name)):
                must = "must" if needed else "must not"
                yield f"`--{name}` {must} be given with `--text_fraction` {self.text_fraction:g}. Change one of them."


@dataclass
class Task:
    """A language model and its examples.

    Args:
        model (`PreTrainedModel`): Model to train.
        codes (`range`): Its tokens that are codes.
        examples (`Dataset`): Examples of the run.
        held_out (`Dataset`, *optional*): Examples of a validation.
        collate (`Callable`): Joins examples to a batch.
        save (`Callable`): Adds what belongs to the trained model to its folder, which it returns.
        card (`Callable`): Text of the card, from the result and rows of a table.
        encode (`Callable`, *optional*): Features of captions, as arguments of the model.
    """

    model: PreTrainedModel
    codes: range
    examples: LlamaGenExamples | ChatExamples
    held_out: Dataset | None
    collate: Callable[[Any], Any]
    save: Callable[[Path], Path]
    card: Callable[[Result, dict[str, str]], str]
    encode: Callable[[list[str]], dict[str, torch.Tensor]] | None = None


def main(options: LanguageModelOptions, arguments: TrainingArguments) -> None:
    """Trains a language model and saves it, or its LoRA adapter, in the output folder."""
    if arguments.max_steps < 1:
        raise ValueError(f"`--max_steps` must be at least 1, but is {arguments.max_steps}.")
    output_dir, described = Path(arguments.output_dir), public_values(asdict(options) | arguments.to_dict())
    refuse_finished(output_dir, described)
    for folder in output_dir.glob("checkpoint-*"):
        with suppress(OSError):  # another process was first
            files = {path.name for path in folder.iterdir()}
            if NAME.fullmatch(folder.name) and not files & {"trainer_state.json", RUN_STATE}:  # written last
                shutil.rmtree(aside := output_dir / f"partial-{folder.name}", ignore_errors=True)
                folder.rename(aside)
    checkpoint = find_checkpoint(output_dir, arguments.resume_from_checkpoint, arguments.max_steps)
    if checkpoint is not None:
        check_files(checkpoint)
    push_to_hub, arguments.push_to_hub = arguments.push_to_hub, False  # the Trainer would upload its checkpoints
    arguments.train_sampling_strategy = "sequential"  # examples are in a random order already
    arguments.remove_unused_columns = False
    if arguments.dataloader_num_workers:  # a signal to all processes ends them, and with them the run
        raise ValueError("`--dataloader_num_workers` must be 0, so that a signal can stop the run. Leave it out.")
    arguments.eval_on_start = options.validation_token_set is not None and checkpoint is None
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    torch.manual_seed(arguments.seed)  # for new weights; the Trainer sets it later
    make_task = llamagen_task if options.model_name_or_path is None else chat_task
    task = make_task(options, arguments, arguments.max_steps * batch)
    if checkpoint is not None:
        check_rows(checkpoint, task.examples.digest)
    model = add_lora(task, options.lora_rank) if options.lora_rank else task.model
    model.config.use_cache = False  # a model with a cache would not tell packed examples apart
    trainer = LanguageModelTrainer(
        model,
        arguments,
        train_dataset=task.examples,
        eval_dataset=task.held_out,
        data_collator=task.collate,
        loss=ModalityLoss(task.codes),
        scheduled_sampling=options.scheduled_sampling,
        encode=task.encode,
        optimizer_cls_and_kwargs=soap(arguments) if options.optimizer == "soap" else None,
    )
    is_main = trainer.is_world_process_zero()
    result = Result(arguments, described, find_sources(options), push_to_hub, is_main)
    with Interruption(trainer.accelerator) as interruption:
        callback = CheckpointOnSignal(interruption, task.examples.digest)
        trainer.add_callback(callback)
        trainer.train(checkpoint and str(checkpoint))
    if callback.stopped:
        sys.exit(interruption.exit_code)
    if task.held_out is not None:
        trainer.evaluate()
    model.config.use_cache = True
    trained = output_dir / "trained.partial"
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(trained))  # by all processes, because some engines shard the weights
    if is_main:
        if not [*trained.glob("*.safetensors")]:
            raise ValueError("DeepSpeed has kept the weights in shards. Set zero3_save_16bit_model, and resume.")
        (trained / "training_args.bin").unlink()  # a pickle with paths of this machine
        rows = provenance(SCRIPT, arguments.max_steps, batch, "examples") | trainer.last_numbers()
        saved = name_base(trained, options) if options.lora_rank else task.save(trained)
        result.publish(partial(shutil.copytree, saved, dirs_exist_ok=True), task.card(result, rows))
        shutil.rmtree(trained)


def chat_task(options: LanguageModelOptions, arguments: TrainingArguments, count: int) -> Task:
    """Task of a language model with image tokens, which draws and describes images in chats."""
    name = str(options.model_name_or_path)
    config = AutoConfig.from_pretrained(name)
    vocabulary = ImageVocabulary.from_config(config)
    processor = SVQVAEProcessor.from_pretrained(name)
    tokenizer = processor.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype="auto" if options.lora_rank else torch.float32, attn_implementation=options.attn_implementation
    )
    model.config.__dict__.pop("custom_pipelines", None)  # of a repository with code, which the result does not have
    context = getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)
    make = partial(ChatExamples, processor, context, caption_column=options.caption_column or "caption")
    mix, texts = make_mix(options, arguments.seed), read_texts(options.text_files, processor)
    examples, held_out = make(count=count, mix=mix, token_set=options.token_set, texts=texts), None
    if options.validation_token_set is not None:
        mix = replace(mix, condition_dropout=0.0, text_fraction=0.0)
        held_out = make(count=None, mix=mix, token_set=options.validation_token_set)

    def save(trained: Path) -> Path:
        processor.save_pretrained(trained)
        return trained

    codes = range(vocabulary.first_token, vocabulary.begin)
    collate = DataCollatorWithFlattening() if options.packing else DataCollatorForSeq2Seq(tokenizer)
    return Task(model, codes, examples, held_out, collate, save, partial(make_card, options))


def make_mix(options: LanguageModelOptions, seed: int) -> Mix:
    """How rows become examples in training."""
    fractions = {name: getattr(options, name) for name in FRACTIONS if name != "scheduled_sampling"}
    return Mix(**fractions, completion_only_loss=options.completion_only_loss, seed=seed)


def llamagen_task(options: LanguageModelOptions, arguments: TrainingArguments, count: int) -> Task:
    """Task of a LlamaGen for classes or captions, new or of a pipeline."""
    name, parts = options.pipeline_name_or_path, {}
    if name is None:
        vqvae = SVQVAE.from_pretrained(options.vqvae_name_or_path)
        if options.text_encoder_name_or_path is not None:
            encoder, tokenizer = load_text_encoder(options.text_encoder_name_or_path)
            parts = {"text_encoder": encoder, "tokenizer": tokenizer}
        source, held_out = open_token_sets(options, vqvae)
        model = new_llamagen(options, source, parts.get("text_encoder"))
    else:
        pretrained = SVQVAEAutoregressivePipeline.from_pretrained(name)
        vqvae, parts = pretrained.vqvae, {part: getattr(pretrained, part) for part in ("text_encoder", "tokenizer")}
        source, held_out = open_token_sets(options, vqvae, pretrained.config["class_names"])
        model = pretrained.language_model.float()
    check_fit(options, model.config, source)
    vqvae.register_to_config(_name_or_path=public_name(options.vqvae_name_or_path or str(name)))

    def make_pipeline(language_model: PreTrainedModel) -> Any:
        return SVQVAEAutoregressivePipeline(vqvae, language_model, class_names=source.class_names, **parts)

    def save(trained: Path) -> Path:
        make_pipeline(LlamaGenForCausalLM.from_pretrained(trained)).save_pretrained(trained / "pipeline")
        return trained / "pipeline"

    def card(result: Result, rows: dict[str, str]) -> str:
        pipeline = make_pipeline(model)
        return generator_card(options, result, pipeline, rows, *pipeline.describe())

    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        length = model.config.num_condition_tokens
        features = encode_captions(parts["text_encoder"], parts["tokenizer"], captions, length, truncate=True)
        return dict(zip(("prompt_embeds", "prompt_attention_mask"), features, strict=True))

    if options.caption_column is not None:
        parts["text_encoder"].requires_grad_(False).to(arguments.device)
    return Task(
        model,
        range(model.config.codebook_size),
        LlamaGenExamples(source, count, make_mix(options, arguments.seed)),
        None if held_out is None else LlamaGenExamples(held_out, len(held_out.rows), Mix(seed=arguments.seed)),
        default_collate,
        save,
        partial(make_card, options) if options.lora_rank else card,
        encode if options.caption_column is not None else None,
    )


def new_llamagen(options: LanguageModelOptions, source: TokenSource, text_encoder: Any) -> PreTrainedModel:
    """New LlamaGen of a config, for the codes, the classes or captions, and the size of a token set."""
    name = str(options.model_config_name_or_path)
    config = from_hub(AutoConfig.from_pretrained, name)
    if not isinstance(config, LlamaGenConfig):
        raise ValueError(
            f"`--model_config_name_or_path` must be a config of type llamagen, but `{name}` is of type "
            f"{config.model_type}. To train another language model, add image tokens with `svqvae extend-lm`."
        )
    check_keys(name, config.to_dict(), LlamaGenConfig().to_dict())
    derived = {
        "attn_implementation": options.attn_implementation,
        "vocab_size": 0,  # computed
        "codebook_size": source.settings.codebook_size,
        "num_classes": source.num_classes,
        "grid_size": source.grids[-1][0],
        "num_condition_tokens": 1 if text_encoder is None else config.num_condition_tokens,
        "caption_dim": None if text_encoder is None else text_encoder.config.d_model,
        "codebook_fingerprint": source.settings.codebook_fingerprint,
    }
    return AutoModelForCausalLM.from_config(LlamaGenConfig(**config.to_diff_dict() | derived), dtype=torch.float32)


def check_fit(options: LanguageModelOptions, config: LlamaGenConfig, source: TokenSource) -> None:
    """Raises unless a LlamaGen reads the sequences of a token set."""
    reads_captions = config.caption_dim is not None
    if reads_captions != (options.caption_column is not None):
        raise ValueError("`--caption_column` must be given for a LlamaGen with a text encoder, and only for one.")
    if source.grids != [(config.grid_size, config.grid_size)] or source.num_classes != config.num_classes:
        raise ValueError(
            f"The token set must have one scale of {config.grid_size} x {config.grid_size} ids and "
            f"{config.num_classes} classes, but has scales of {source.grids} ids and {source.num_classes} classes. "
            "Tokenize square images at one scale, and name the column of the same classes or captions."
        )


def add_lora(task: Task, rank: int) -> PeftModel:
    """Freezes the model of a task, and adds LoRA to its linear layers and trainable rows for image tokens."""
    model, new = task.model, {}
    if CONFIG_KEY in model.config.to_dict():
        vocabulary = ImageVocabulary.from_config(model.config)
        tables = {id(model.get_input_embeddings().weight): model.get_input_embeddings()}
        tables.setdefault(id(model.get_output_embeddings().weight), model.get_output_embeddings())
        names = [name for name, each in model.named_modules() if any(each is table for table in tables.values())]
        new = {"trainable_token_indices": dict.fromkeys(names, [*range(vocabulary.first_token, vocabulary.stop)])}
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", **new))


def name_base(adapter: Path, options: LanguageModelOptions) -> Path:
    """Names the base model of an adapter without directories of this machine, and returns its folder."""
    name = public_name(str(options.model_name_or_path or options.pipeline_name_or_path))
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": name}
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return adapter


def soap(arguments: TrainingArguments) -> tuple[type, dict[str, Any]]:
    """SOAP with the options of Adam."""
    from pytorch_optimizer.optimizer.soap import SOAP  # takes a second

    betas = arguments.adam_beta1, arguments.adam_beta2
    return SOAP, {"lr": arguments.learning_rate, "betas": betas, "max_precondition_dim": MAX_PRECONDITION_DIM}


def make_card(options: LanguageModelOptions, result: Result, rows: dict[str, str]) -> str:
    """Card of a language model with image tokens, or of a LoRA adapter."""
    base = str(options.model_name_or_path or options.pipeline_name_or_path)
    metadata = ModelCardData(
        license=result.origin.license or "unknown",
        library_name="peft" if options.lora_rank else "transformers",
        tags=["svqvae", "lora"] if options.lora_rank else ["svqvae"],
        base_model=result.origin.base_model,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("language_model_card.md")),
        name=result.name,
        base=public_name(base),
        of_a_pipeline=options.pipeline_name_or_path is not None,
        is_adapter=bool(options.lora_rank),
        provenance=table_rows((rows | result.origin.rows).items()),
    )
    return f"{card}\n"


if __name__ == "__main__":
    with one_line_errors():
        main(*read_options((LanguageModelOptions, TrainingArguments), sys.argv[1:]))
