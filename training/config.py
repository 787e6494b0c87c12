"""The options of `train.py`, from flags or from a YAML file."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from discriminator import MIN_SIDE
from transformers import HfArgumentParser

PARTS = ("l2", "l1", "lpips", "adversarial", "vq", "commitment", "entropy", "spread")  # of the objective
POSITIVE = (
    *("resolution", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "kmeans_batches"),
    *("num_scales", "checkpointing_steps", "checkpoints_total_limit", "logging_steps", "validation_steps"),
    *("num_validation_images", "shuffle_buffer", "learning_rate", "discriminator_learning_rate", "token_budget"),
    "max_grad_norm",
)
SCHEDULES = ("cosine", "cosine_with_restarts", "linear", "polynomial", "constant", "constant_with_warmup")
NOT_NEGATIVE = (
    *(f"{part}_{end}" for part in PARTS for end in ("weight", "start")),
    *("lecam_weight", "revival_steps", "max_skipped_steps", "dataloader_num_workers"),
    *("lr_warmup_steps", "adam_weight_decay", "seed"),
)


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A command-line option: its default, its help and, where it has them, its choices."""
    metadata = {"help": text} | ({"choices": list(choices)} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Options, named as in diffusers' example scripts.

    Raises:
        ValueError: If a value is out of its range, or two do not fit each other.
    """

    output_dir: str = field(metadata={"help": "Folder for checkpoints and, at the end, the trained model."})

    # Model
    model_config_name_or_path: str | None = option(None, "Config of a new model: a config.json, its folder or Hub id.")
    pretrained_model_name_or_path: str | None = option(None, "Model to start from instead: folder or Hub id.")
    train: str = option(
        "all", "What is trained: everything, or the decoder alone, which keeps all ids.", ("all", "decoder")
    )
    freeze_codebook: bool = option(False, "Keep the codes as they are.")

    # Data
    dataset_name: str | None = option(None, "Image set on the Hub, a local one, or a format such as webdataset.")
    dataset_config_name: str | None = option(None, "Configuration of the image set.")
    data_files: list[str] = option([], "Files of the image set, or globs of them: tar or Parquet shards.")
    train_data_dir: str | None = option(None, "Folder of images, instead of --dataset_name.")
    split: str = option("train", "Split of the image set.")
    streaming: bool = option(False, "Read the image set as a stream, without a copy on disk.")
    shuffle_buffer: int = option(1000, "Images of a stream that are shuffled at a time.")
    image_column: str = option("image", "Column of the image set that holds the images.")
    max_unreadable_share: float = option(0.1, "Share of images that may be unreadable before the run stops.")
    resolution: int = option(256, "Side of the largest crops, in pixels; stored as sample_size.")
    crop_sizes: list[int] = option([], "Smaller crop sides that take turns with --resolution, at equal pixels a step.")
    center_crop: bool = option(False, "Cut crops from the centre, not at random places.")
    random_flip: bool = option(True, "Flip half of the crops.")
    resize_range: list[float] = option([1.0, 1.0], "Range of the random factor that resizes an image before its crop.")
    dataloader_num_workers: int = option(2, "Processes that cut crops.")

    # Objective: each part has its weight and the step from which it counts.
    scales: list[float] = option([], "Scales of each step, instead of random ones; 1 must be among them.")
    num_scales: int = option(3, "Scales of a step: the full one and random smaller ones.")
    token_budget: float | None = option(
        None, "Most tokens of all scales, in those of the full one; no limit if not given."
    )
    scale_target: str = option(
        "resized",
        "What a scale is compared with: the image resized to it by area, or the full image, the output upsampled.",
        ("resized", "upsampled"),
    )
    l2_weight: float = option(1.0, "Weight of the squared error.")
    l2_start: int = option(0, "Its first step.")
    l1_weight: float = option(0.0, "Weight of the absolute error.")
    l1_start: int = option(0, "Its first step.")
    lpips_weight: float = option(0.0, "Weight of LPIPS.")
    lpips_start: int = option(0, "Its first step.")
    lpips_net: str = option("vgg", "Network of LPIPS.", ("vgg", "alex", "squeeze"))
    lpips_weights: str | None = option(None, "torchvision's weights of that network, a file; downloaded if not given.")
    adversarial_weight: float = option(0.0, "Weight of the generator's part of the hinge loss.")
    adversarial_start: int = option(20_000, "First step of it and of the discriminator.")
    adversarial_adaptive: bool = option(False, "Scale it by the ratio of gradients at the last layer (VQGAN).")
    lecam_weight: float = option(0.0, "Weight of LeCAM regularisation of the discriminator.")
    vq_weight: float = option(1.0, "Weight of the loss that moves codes to latents.")
    vq_start: int = option(0, "Its first step.")
    commitment_weight: float = option(1.0, "Weight of the model's commitment loss, beside its own commit_loss_beta.")
    commitment_start: int = option(0, "Its first step.")
    entropy_weight: float = option(0.0, "Weight of the entropy loss, which holds latents x codes in memory.")
    entropy_start: int = option(0, "Its first step.")
    spread_weight: float = option(0.0, "Weight of the loss that spreads latents over the sphere.")
    spread_start: int = option(0, "Its first step.")

    # Codebook
    kmeans_steps: list[int] = option(
        [],
        "Steps at which k-means of latents sets the codebook anew; a new model quantises nothing before the first.",
    )
    kmeans_batches: int = option(64, "Batches of each process whose latents k-means sees.")
    revival_steps: int = option(0, "Steps after which codes without use become random latents; 0: never.")

    # Optimisation
    train_batch_size: int = option(8, "Crops of side --resolution in a batch of one process.")
    gradient_accumulation_steps: int = option(1, "Batches whose mean gradient updates the weights.")
    max_train_steps: int = option(100_000, "Updates of the weights.")
    learning_rate: float = option(1e-4, "Peak learning rate.")
    discriminator_learning_rate: float = option(1e-4, "Peak learning rate of the discriminator.")
    lr_scheduler: str = option("cosine", "Learning rate schedule of diffusers.", SCHEDULES)
    lr_warmup_steps: int = option(500, "Steps over which the learning rate rises from 0.")
    adam_beta1: float = option(0.9, "Decay of AdamW's mean of gradients.")
    adam_beta2: float = option(0.95, "Decay of AdamW's mean of squared gradients.")
    adam_weight_decay: float = option(0.05, "AdamW's weight decay, on convolution weights alone.")
    max_grad_norm: float = option(1.0, "Norm to which gradients are clipped.")
    max_skipped_steps: int = option(
        10, "Steps in a row skipped for a gradient that is not finite before the run stops."
    )
    use_ema: bool = option(False, "Keep a moving average of the weights, which is what is saved and validated.")
    ema_decay: float = option(0.999, "Decay of that average.")
    mixed_precision: str | None = option(None, "Instead of accelerate's setting.", ("no", "bf16", "fp16"))
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    torch_compile: bool = option(False, "Compile the residual blocks.")

    # Checkpoints, validation, log
    checkpointing_steps: int = option(1000, "Steps between checkpoints.")
    checkpoints_total_limit: int | None = option(None, "Newest checkpoints to keep; all if not given.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder, or 'latest' in --output_dir if any.")
    validation_data_dir: str | None = option(None, "Folder of images that are not trained on.")
    validation_steps: int = option(1000, "Steps between validations.")
    validation_scales: list[float] = option([0.25, 0.5, 1.0], "Scales of a validation.")
    num_validation_images: int = option(16, "Images of a validation at most: the centre of each.")
    logging_steps: int = option(50, "Steps between log lines.")
    report_to: str | None = option(None, "Tracker: tensorboard, wandb or another of accelerate's; none if not given.")
    push_to_hub: bool = option(False, "Upload the model, with its card, at the end.")
    hub_model_id: str | None = option(None, "Where to: org/name; the name of --output_dir if not given.")
    seed: int = option(0, "Seed of weights, crops, scales and k-means.")

    def __post_init__(self) -> None:
        """Checks what can be checked without data or model."""
        for one, other in (
            ("model_config_name_or_path", "pretrained_model_name_or_path"),
            ("dataset_name", "train_data_dir"),
        ):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise ValueError(f"Exactly one of `--{one}` and `--{other}` must be given.")
        for name in ("dataset_config_name", "data_files"):
            if getattr(self, name) and self.train_data_dir is not None:
                raise ValueError(
                    f"`--{name}` belongs to `--dataset_name`, but `--train_data_dir` is given. Leave one out."
                )
        for name in POSITIVE:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"`--{name}` must be more than 0, but is {getattr(self, name)}.")
        for name in NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"`--{name}` must not be negative, but is {getattr(self, name)}.")
        for name in ("max_unreadable_share", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`--{name}` must lie in [0, 1], but is {getattr(self, name)}.")
        if not any(getattr(self, f"{part}_weight") and not getattr(self, f"{part}_start") for part in ("l2", "l1")):
            raise ValueError("One of `--l2_weight` and `--l1_weight` must be more than 0 and start at step 0.")
        for part in PARTS:
            if getattr(self, f"{part}_weight") and getattr(self, f"{part}_start") >= self.max_train_steps:
                raise ValueError(
                    f"`--{part}_start` must be less than `--max_train_steps` = {self.max_train_steps}, but is "
                    f"{getattr(self, f'{part}_start')}. Lower it, or leave `--{part}_weight` at 0."
                )
        self._check_scales_and_crops()
        self._check_codebook()

    @property
    def quantize_from(self) -> int:
        """The first step that quantises: a new model's codebook means nothing before its first k-means."""
        return 0 if self.pretrained_model_name_or_path is not None else min(self.kmeans_steps, default=0)

    def _check_scales_and_crops(self) -> None:
        for side in self.crop_sizes:
            if side < 1 or self.resolution % side:
                raise ValueError(
                    f"`--crop_sizes` must divide `--resolution` = {self.resolution}, but {side} does not."
                )
        if len(self.resize_range) != 2 or not 0 < self.resize_range[0] <= self.resize_range[1]:
            raise ValueError(
                f"`--resize_range` must be two factors above 0, the smaller first, but is {self.resize_range}."
            )
        for name in ("scales", "validation_scales"):
            if not all(scale > 0 for scale in getattr(self, name)):
                raise ValueError(f"`--{name}` must be more than 0, but are {getattr(self, name)}.")
        smallest = min([self.resolution, *self.crop_sizes])
        if self.adversarial_weight and smallest < MIN_SIDE:
            raise ValueError(
                f"The discriminator needs crop sides of at least {MIN_SIDE} pixels, but one is {smallest}."
            )
        if self.scales and 1 not in self.scales:
            raise ValueError(f"`--scales` must contain 1, but are {self.scales}.")
        if self.scales and self.token_budget is not None:
            raise ValueError("`--token_budget` leaves out random scales, but `--scales` fixes them. Leave one out.")
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(
                f"`--token_budget` must leave room for the full scale, at least 1, but is {self.token_budget}."
            )

    def _check_codebook(self) -> None:
        for step in self.kmeans_steps:
            if not 0 < step < self.max_train_steps:
                raise ValueError(
                    f"`--kmeans_steps` must lie between 0 and `--max_train_steps` = {self.max_train_steps}, but one "
                    f"is {step}."
                )
        for name in ("kmeans_steps", "revival_steps"):
            if getattr(self, name) and (self.freeze_codebook or self.train == "decoder"):
                raise ValueError(
                    f"`--{name}` changes the codebook, but `--freeze_codebook` or `--train decoder` keeps it. Leave "
                    "one out."
                )
        for name in ("entropy_weight", "spread_weight"):
            if getattr(self, name) and self.train == "decoder":
                raise ValueError(
                    f"`--{name}` moves latents or codes, but `--train decoder` keeps them. Leave one out."
                )
        if self.train == "decoder" and self.pretrained_model_name_or_path is None:
            raise ValueError("`--train decoder` needs `--pretrained_model_name_or_path`: it keeps that model's ids.")
        if self.train == "decoder" and self.validation_data_dir is None:
            raise ValueError("`--train decoder` needs `--validation_data_dir`: its ids are compared before and after.")


def read_config(arguments: Sequence[str]) -> TrainConfig:
    """Reads flags, or a YAML file, whose entries flags after it replace.

    Args:
        arguments (`Sequence[str]`): What follows the name of the script: `[config.yaml] [--name value ...]`.

    Raises:
        ValueError: If an option is not known, or the file is no mapping of options.
        SystemExit: If a value is of the wrong type, as argparse does.
    """
    arguments = list(arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments[:1] = _flags(Path(arguments[0]))
    parser = HfArgumentParser(TrainConfig, prog="train.py", allow_abbrev=False)
    (config,) = parser.parse_args_into_dataclasses(arguments)
    return config


def _flags(path: Path) -> list[str]:
    """The entries of a YAML file as flags."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` must be a YAML file, but is not: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"`{path}` must map options to values, but is {type(entries).__name__}.")
    known = {each.name: each.default_factory for each in fields(TrainConfig)}
    unknown = sorted(str(key) for key in entries if key not in known)
    if unknown:
        raise ValueError(f"`{path}` must have only options of train.py, but has {', '.join(unknown)}.")
    flags = []
    for name, value in entries.items():
        empty = value == [] and known[name] is not MISSING and known[name]() == []  # a flag cannot say so
        if value is not None and not empty:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)]
    return flags
