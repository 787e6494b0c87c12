"""Options of `train.py`."""

import math
from dataclasses import dataclass
from typing import ClassVar

from svqvae_hf.trainer.losses.adversarial import MIN_SIDE
from svqvae_hf.trainer.losses.weights import LossWeight, LossWeights
from svqvae_hf.trainer.options import ImageOptions, changeable, option, switches


@dataclass
class TrainOptions(ImageOptions):
    """Options of training an SVQVAE.

    Raises:
        ValueError: If a value is out of its range, or two options contradict each other.
    """

    needs_whole_weights: ClassVar[tuple[str, ...]] = (
        *("kmeans_steps", "codebook_decay", "dead_code_reset_steps", "use_ema", "adversarial_weight", "train decoder"),
        "optimizer soap",
    )

    # Model
    model_config_name_or_path: str | None = option(None, "Config of a new model: a config.json, its folder or Hub id.")
    start: str = option(
        "random",
        "Weights of a new model: random, or the linear autoencoder of some crops, which learns far faster.",
        ("random", "linear"),
    )
    pretrained_model_name_or_path: str | None = option(None, "Model to start from instead: folder or Hub id.")
    train: str = option(
        "all", "Part to train: everything, or only the decoder, which keeps all ids.", ("all", "decoder")
    )
    freeze_codebook: bool = option(False, "Keep the codes as they are.")

    # Data
    crop_sizes: list[int] = changeable(
        [], "Smaller crop sides, which alternate with --resolution at equal pixels per step."
    )
    full_crops_from: int = changeable(
        0, "Step from which all crops have side --resolution; the crops before have only the smaller --crop_sizes."
    )
    synthetic_fraction: float = changeable(
        0.0, "Fraction of the crops replaced by flat colours, gradients and edges, which photographs hold too few of."
    )

    # Objective: each loss has a weight and a first step.
    scales: list[float] = changeable([], "Scales of each step, instead of random ones; 1 must be among them.")
    scale_probabilities: list[float] = changeable(
        [], "Probability of each of --scales: a step then trains one of them, drawn at random, instead of all."
    )
    num_scales: int = changeable(3, "Scales of a step: the full one and random smaller ones.")
    token_budget: float | None = changeable(
        None, "Maximum number of tokens of all scales, in units of the full scale's tokens; no limit by default."
    )
    scale_target: str = changeable(
        "resized",
        "Target of a scale: the image resized to it by area, or the full image, with the output upsampled.",
        ("resized", "upsampled"),
    )
    l2_weight: float = changeable(1.0, "Weight of the squared error.")
    l2_start: int = changeable(0, "First step of the squared error.")
    l1_weight: float = changeable(0.0, "Weight of the absolute error.")
    l1_start: int = changeable(0, "First step of the absolute error.")
    lpips_weight: float = changeable(0.0, "Weight of LPIPS.")
    lpips_start: int = changeable(0, "First step of LPIPS.")
    lpips_net: str = changeable("vgg", "Network of LPIPS.", ("vgg", "alex", "squeeze"))
    lpips_weights: str | None = changeable(
        None, "File of torchvision's weights of that network; downloaded by default."
    )
    adversarial_weight: float = changeable(0.0, "Weight of the hinge loss against the discriminator.", unless=switches)
    adversarial_start: int = changeable(20_000, "First step of this loss and of the discriminator.")
    adversarial_adaptive: bool = changeable(False, "Multiply it by the ratio of gradients at the last layer (VQGAN).")
    lecam_weight: float = changeable(0.0, "Weight of LeCAM regularisation of the discriminator.")
    vq_weight: float = changeable(1.0, "Weight of the loss that moves codes to latents.")
    vq_start: int = changeable(0, "First step of this loss.")
    commitment_weight: float = changeable(
        1.0, "Weight of the commitment loss, which the model's commit_loss_beta scales."
    )
    commitment_start: int = changeable(0, "First step of the commitment loss.")
    entropy_weight: float = changeable(0.0, "Weight of the entropy loss, which holds latents x codes in memory.")
    entropy_start: int = changeable(0, "First step of the entropy loss.")
    spread_weight: float = changeable(0.0, "Weight of the loss that spreads latents over the sphere.")
    spread_start: int = changeable(0, "First step of this loss.")

    # Codebook
    kmeans_steps: list[int] = changeable(
        [],
        "Steps at which k-means of latents sets the codebook; a new model does not quantise before the first.",
        unless=lambda old, new: min(old, default=0) != min(new, default=0),
    )
    kmeans_batches: int = changeable(64, "Batches of each process whose latents k-means uses.")
    codebook_decay: float = changeable(
        0.0,
        "Decay of the moving average of latents that moves the codes; 0: the gradient of the codebook loss does.",
        unless=switches,
    )
    dead_code_reset_steps: int = changeable(0, "Steps between replacements of dead codes by random latents; 0: never.")

    # Optimisation
    discriminator_learning_rate: float = changeable(1e-4, "Peak learning rate of the discriminator.")
    gradient_checkpointing: bool = changeable(False, "Recompute activations in the backward pass to save memory.")
    torch_compile: bool = changeable(False, "Compile the residual blocks.")

    # Validation
    validation_data_dir: str | None = changeable(None, "Folder of images that are not trained on.")
    validation_scales: list[float] = changeable([0.25, 0.5, 1.0], "Scales of a validation.")
    validation_floor: bool = changeable(
        False,
        "Log the PSNR of k-means of blocks at the model's bits, fitted on some crops: a model should be above it.",
    )
    num_validation_images: int = changeable(
        16, "Maximum number of images of a validation; each gives its centre crop."
    )

    def __post_init__(self) -> None:
        """Checks the options, except against data and model."""
        super().__post_init__()
        self.check_one_of("model_config_name_or_path", "pretrained_model_name_or_path")
        self.check_positive("num_scales", "token_budget", "kmeans_batches", "num_validation_images")
        self.check_positive("discriminator_learning_rate")
        self.check_not_negative("lecam_weight", "dead_code_reset_steps", "full_crops_from")
        self.check_fractions("synthetic_fraction", "codebook_decay")
        self._check_loss_weights()
        self._check_scales_and_crops()
        self._check_scale_probabilities()
        self._check_codebook()
        if self.validation_floor and self.validation_data_dir is None:
            raise ValueError(
                "`--validation_floor` is measured on validation images, so it needs `--validation_data_dir`."
            )

    @property
    def loss_weights(self) -> LossWeights:
        """Weights of the losses, with their first steps."""
        return LossWeights(
            l2=LossWeight(self.l2_weight, self.l2_start),
            l1=LossWeight(self.l1_weight, self.l1_start),
            lpips=LossWeight(self.lpips_weight, self.lpips_start),
            adversarial=LossWeight(self.adversarial_weight, self.adversarial_start),
            vq=LossWeight(self.vq_weight, self.vq_start),
            commitment=LossWeight(self.commitment_weight, self.commitment_start),
            entropy=LossWeight(self.entropy_weight, self.entropy_start),
            spread=LossWeight(self.spread_weight, self.spread_start),
        )

    @property
    def initial_model(self) -> str:
        """Source of the model: the pretrained one, or the config of a new one."""
        return self.pretrained_model_name_or_path or self.model_config_name_or_path or ""

    @property
    def quantize_from(self) -> int:
        """First step that quantises: before its first k-means, a new model's codebook is random."""
        return 0 if self.pretrained_model_name_or_path is not None else min(self.kmeans_steps, default=0)

    @property
    def never_reached(self) -> list[str]:
        """Flags of options whose steps lie beyond the end of the run, as when a recipe is tried for a few steps."""
        late = {
            name: [step for step in steps if step >= self.max_train_steps]
            for name, steps in (("kmeans_steps", self.kmeans_steps), ("full_crops_from", [self.full_crops_from]))
        }
        return [f"--{name} {' '.join(map(str, steps))}" for name, steps in late.items() if steps]

    def _check_loss_weights(self) -> None:
        weights = self.loss_weights
        for name, loss in weights._asdict().items():
            self.check_not_negative(f"{name}_weight", f"{name}_start")
            if loss.weight and loss.first_step >= self.max_train_steps:
                raise ValueError(
                    f"`--{name}_start` must be less than `--max_train_steps` = {self.max_train_steps}, but is "
                    f"{loss.first_step}. Lower it, or leave `--{name}_weight` at 0."
                )
        if not (weights.l2.at(0) or weights.l1.at(0)):
            raise ValueError("One of `--l2_weight` and `--l1_weight` must be more than 0 and start at step 0.")

    def _check_scales_and_crops(self) -> None:
        for side in self.crop_sizes:
            if side < 1 or self.resolution % side:
                raise ValueError(
                    f"`--crop_sizes` must divide `--resolution` = {self.resolution}, but {side} does not."
                )
        if self.full_crops_from and not all(side < self.resolution for side in self.crop_sizes or [self.resolution]):
            raise ValueError(
                "`--full_crops_from` needs smaller `--crop_sizes` for the steps before. Give at least one."
            )
        for name, scales in (("scales", self.scales), ("validation_scales", self.validation_scales)):
            if not all(scale > 0 for scale in scales):
                raise ValueError(f"`--{name}` must be more than 0, but are {scales}.")
        smallest = min([self.resolution, *self.crop_sizes])
        if self.scale_probabilities:
            smallest = int(smallest * min(self.scales, default=1))
        if self.adversarial_weight and smallest < MIN_SIDE:
            raise ValueError(
                f"The discriminator needs images of at least {MIN_SIDE} pixels a side, but one has {smallest}."
            )
        if self.scales and 1 not in self.scales:
            raise ValueError(f"`--scales` must contain 1, but are {self.scales}.")
        if self.scales and self.token_budget is not None:
            raise ValueError("`--token_budget` drops random scales, but `--scales` fixes them. Leave one out.")
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(
                f"`--token_budget` must be at least 1, the tokens of the full scale, but is {self.token_budget}."
            )

    def _check_scale_probabilities(self) -> None:
        probabilities = self.scale_probabilities
        if not probabilities:
            return
        if len(probabilities) != len(self.scales):
            raise ValueError(
                f"`--scale_probabilities` must have one value for each of `--scales`, {len(self.scales)}, but has "
                f"{len(probabilities)}."
            )
        if not all(0 <= each <= 1 for each in probabilities):
            raise ValueError(f"`--scale_probabilities` must lie in [0, 1], but are {probabilities}.")
        if not math.isclose(sum(probabilities), 1):
            raise ValueError(f"`--scale_probabilities` must sum to 1, but their sum is {sum(probabilities):.4g}.")

    def _check_codebook(self) -> None:
        first = min(self.kmeans_steps, default=1)
        if not 0 < first < self.max_train_steps:
            raise ValueError(
                f"The first of `--kmeans_steps` must lie between 0 and `--max_train_steps` = {self.max_train_steps}, "
                f"but is {first}."
            )
        for name in ("kmeans_steps", "codebook_decay", "dead_code_reset_steps"):
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
            raise ValueError("`--train decoder` keeps a model's ids, so it needs `--pretrained_model_name_or_path`.")
        if self.train == "decoder" and self.validation_data_dir is None:
            raise ValueError(
                "`--train decoder` compares ids before and after training, so it needs `--validation_data_dir`."
            )
