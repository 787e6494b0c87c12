"""The options of `train.py`."""

from dataclasses import dataclass
from typing import ClassVar

from svqvae_hf.trainer.losses.adversarial import MIN_SIDE
from svqvae_hf.trainer.options import ImageOptions, option

PARTS = ("l2", "l1", "lpips", "adversarial", "vq", "commitment", "entropy", "spread")  # of the objective


@dataclass
class TrainConfig(ImageOptions):
    """Options of training an SVQVAE.

    Raises:
        ValueError: If a value is out of its range, or two do not fit each other.
    """

    needs_whole_weights: ClassVar[tuple[str, ...]] = ("kmeans_steps", "revival_steps", "use_ema", "adversarial_weight")

    # Model
    model_config_name_or_path: str | None = option(None, "Config of a new model: a config.json, its folder or Hub id.")
    pretrained_model_name_or_path: str | None = option(None, "Model to start from instead: folder or Hub id.")
    train: str = option(
        "all", "What is trained: everything, or the decoder alone, which keeps all ids.", ("all", "decoder")
    )
    freeze_codebook: bool = option(False, "Keep the codes as they are.")

    # Data
    crop_sizes: list[int] = option([], "Smaller crop sides that take turns with --resolution, at equal pixels a step.")

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
    discriminator_learning_rate: float = option(1e-4, "Peak learning rate of the discriminator.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    torch_compile: bool = option(False, "Compile the residual blocks.")

    # Validation
    validation_data_dir: str | None = option(None, "Folder of images that are not trained on.")
    validation_scales: list[float] = option([0.25, 0.5, 1.0], "Scales of a validation.")
    num_validation_images: int = option(16, "Images of a validation at most: the centre of each.")

    def __post_init__(self) -> None:
        """Checks what can be checked without data or model."""
        super().__post_init__()
        self.check_one_of("model_config_name_or_path", "pretrained_model_name_or_path")
        self.check_positive("num_scales", "token_budget", "kmeans_batches", "num_validation_images")
        self.check_positive("discriminator_learning_rate")
        self.check_not_negative(*(f"{part}_{end}" for part in PARTS for end in ("weight", "start")))
        self.check_not_negative("lecam_weight", "revival_steps")
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

    @property
    def find_unused_parameters(self) -> bool:
        """Codes get no gradient before they are used, nor without their loss."""
        return bool(self.quantize_from or self.vq_start or not self.vq_weight)

    def _check_scales_and_crops(self) -> None:
        for side in self.crop_sizes:
            if side < 1 or self.resolution % side:
                raise ValueError(
                    f"`--crop_sizes` must divide `--resolution` = {self.resolution}, but {side} does not."
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
