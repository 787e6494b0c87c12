"""Options of `train.py`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from svqvae_hf.trainer.losses.adversarial import MIN_SIDE
from svqvae_hf.trainer.options import FRACTION, NOT_NEGATIVE, POSITIVE, ImageOptions, option, range_faults


@dataclass
class TrainOptions(ImageOptions):
    """Options of training an SVQVAE.

    Raises:
        ValueError: If a value is out of its range, or two options contradict each other.
    """

    # Model
    model_config_name_or_path: str | None = option(None, "Config of a new model: a config.json, its folder or Hub id.")
    start: str = option("random", "Weights of a new model; a linear start learns far faster.", ("random", "linear"))
    pretrained_model_name_or_path: str | None = option(None, "Model to start from instead: folder or Hub id.")
    train: str = option("all", "Train everything, or only the decoder, which keeps all ids.", ("all", "decoder"))
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")

    # Data
    crop_sizes: list[int] = option([], "Smaller crop sides beside --resolution, at equal pixels per step.")
    synthetic_fraction: float = option(0.0, "Fraction of the crops replaced by flat colours, gradients and edges.")

    # Objective
    scales: list[float] = option([], "Scales of each step, instead of random ones; 1 must be among them.")
    scale_probabilities: list[float] = option([], "Probability of each of --scales; a step then trains only one.")
    num_scales: int = option(3, "Scales of a step: the full one and random smaller ones.")
    token_budget: float | None = option(
        None, "Most tokens of all scales, relative to the full scale; none by default."
    )
    causal_weight: float = option(0.0, "Weight of the loss of latents that earlier ones do not predict.")
    lpips_weight: float = option(0.0, "Weight of LPIPS.")
    lpips_net: str = option("vgg", "Network of LPIPS.", ("vgg", "alex", "squeeze"))
    lpips_weights: str | None = option(None, "File of torchvision's weights of that network; downloaded by default.")
    adversarial_weight: float = option(0.0, "Weight of the discriminator's loss, relative to the others' gradient.")
    adversarial_start: int = option(20_000, "First step of this loss and of the discriminator.")

    # Codebook
    kmeans_steps: list[int] = option(
        [], "Steps at which k-means sets the codes; a new model quantises from the first."
    )
    kmeans_batches: int = option(64, "Batches of each process whose latents k-means uses.")
    codebook_decay: float = option(
        0.0, "Decay of the mean of latents that moves the codes; 0: gradients move them; 1: they stay."
    )
    dead_code_reset_steps: int = option(0, "Steps between replacements of dead codes by random latents; 0: never.")

    # Validation
    validation_data_dir: list[str] = option([], "Folders of images that are not trained on, measured one by one.")
    validation_split: str | None = option(None, "Split of each --validation_data_dir, if they have several.")
    validation_scales: list[float] = option([0.25, 0.5, 1.0], "Scales of a validation.")
    num_validation_images: int = option(16, "Maximum number of images of each folder; their centres are cropped.")
    load_best_model_at_end: bool = option(
        False,
        "Save the weights with the highest PSNR on the first --validation_data_dir; other folders are only measured.",
    )

    def faults(self) -> Iterator[str]:
        """Yields an error message for each fault, also in the options of an SVQVAE."""
        yield from super().faults()
        yield from self.exactly_one_faults("model_config_name_or_path", "pretrained_model_name_or_path")
        yield from range_faults(self, POSITIVE, "num_scales", "token_budget")
        yield from range_faults(self, POSITIVE, "kmeans_batches", "num_validation_images")
        yield from range_faults(self, NOT_NEGATIVE, "causal_weight", "lpips_weight", "adversarial_weight")
        yield from range_faults(self, NOT_NEGATIVE, "dead_code_reset_steps", "adversarial_start")
        yield from range_faults(self, FRACTION, "synthetic_fraction", "codebook_decay")
        if self.load_best_model_at_end and not self.validation_data_dir:
            yield (
                "`--load_best_model_at_end` needs `--validation_data_dir`. Give it, or pass "
                "`--load_best_model_at_end false`."
            )
        if self.validation_split is not None and not self.validation_data_dir:
            yield "`--validation_split` belongs to `--validation_data_dir`. Give both or neither."
        yield from self._crop_faults()
        yield from self._adversarial_faults()
        yield from self._scale_faults()
        yield from self._kmeans_faults()
        if self.train == "decoder":
            yield from self._decoder_faults()

    @property
    def initial_model(self) -> str:
        """Source of the model: the pretrained one, or the config of a new one."""
        return self.pretrained_model_name_or_path or self.model_config_name_or_path or ""

    @property
    def quantize_from(self) -> int:
        """First step that quantises. A new model waits for its first k-means, because its codes are random before."""
        if self.pretrained_model_name_or_path is not None:
            return 0
        return min(self.kmeans_steps, default=0)

    def _crop_faults(self) -> Iterator[str]:
        """Yields an error message if crops of the smaller sides do not fill crops of the largest."""
        for side in self.crop_sizes:
            divides_resolution = side >= 1 and self.resolution % side == 0
            if not divides_resolution:
                yield f"`--crop_sizes` must divide `--resolution` = {self.resolution}, but are {self.crop_sizes}."
                return

    def _adversarial_faults(self) -> Iterator[str]:
        """Yields an error message for each fault in the options of the discriminator."""
        if not self.adversarial_weight:
            return
        # The discriminator skips scales that are too small for it, but it needs an image in each step. A step has the
        # full scale or, with `--scale_probabilities`, only one scale, which may be the smallest.
        smallest_crop = min([self.resolution, *self.crop_sizes])
        smallest_side = smallest_crop
        if self.scale_probabilities:
            smallest_scale = min(self.scales, default=1)  # relative to the side of the crop
            smallest_side = int(smallest_crop * smallest_scale)
        if smallest_side < MIN_SIDE:
            yield f"The discriminator needs images of at least {MIN_SIDE} pixels, but one has {smallest_side}."
        if self.adversarial_start >= self.max_steps:
            yield (
                f"`--adversarial_start` must be less than `--max_steps` = {self.max_steps}, but is "
                f"{self.adversarial_start}. Lower it, or leave `--adversarial_weight` at 0."
            )

    def _scale_faults(self) -> Iterator[str]:
        """Yields an error message for each fault in the scales."""
        if not self.validation_scales:
            yield "`--validation_scales` must not be empty. Name at least one."
        all_scales = self.scales + self.validation_scales
        are_positive_and_finite = all(0 < scale < math.inf for scale in all_scales)
        if not are_positive_and_finite:
            yield f"`--validation_scales` and `--scales` must be finite and more than 0, got {all_scales}."
        if self.scales and 1 not in self.scales:
            yield f"`--scales` must contain 1, but are {self.scales}."
        if self.token_budget is not None:
            has_fixed_scales = bool(self.scales)
            excludes_full_scale = self.token_budget < 1  # the unit is the number of tokens of the full scale
            if has_fixed_scales or excludes_full_scale:
                yield "`--token_budget` must be at least 1, the full scale, and not be used with `--scales`."
        if self.scale_probabilities and not self._are_probabilities():
            yield (
                f"`--scale_probabilities` must be one fraction for each of `--scales` = {self.scales}, and sum to 1, "
                f"but are {self.scale_probabilities}."
            )

    def _are_probabilities(self) -> bool:
        """Whether there is a probability for each scale, and all of them sum to 1."""
        if len(self.scale_probabilities) != len(self.scales):
            return False
        are_not_negative = min(self.scale_probabilities) >= 0
        sum_to_one = math.isclose(sum(self.scale_probabilities), 1)
        return are_not_negative and sum_to_one

    def _kmeans_faults(self) -> Iterator[str]:
        """Yields an error message if k-means shall run at a step that the run does not have."""
        steps_are_in_run = all(0 < step < self.max_steps for step in self.kmeans_steps)
        if not steps_are_in_run:
            yield f"`--kmeans_steps` must lie between 0 and `--max_steps` = {self.max_steps}, got {self.kmeans_steps}."

    def _decoder_faults(self) -> Iterator[str]:
        """Yields an error message for each option that contradicts `--train decoder`."""
        for name in ("kmeans_steps", "codebook_decay", "dead_code_reset_steps", "causal_weight"):
            if getattr(self, name):
                yield f"`--train decoder` keeps the codes, but `--{name}` moves them."
        if self.pretrained_model_name_or_path is None:
            yield "`--train decoder` keeps a model's ids, so it needs `--pretrained_model_name_or_path`."
