"""Sentences of a report about values that are missing, or mean little because the set or its images are small."""

import math
import statistics
from collections.abc import Sequence

from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.codecs import CodecTokenizer
from svqvae_hf.evaluation.measuring import Records
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.evaluation.report import MANY_IMAGES, METRICS
from svqvae_hf.evaluation.tokenizers.diffusers_models import SVQVAETokenizer
from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer

MIN_IDS_PER_CODE = 10  # with fewer ids, the frequencies of codes say little


def lpips_notes(lpips: LPIPS | None) -> list[str]:
    """Says that LPIPS is missing."""
    if lpips is not None:
        return []
    return ["LPIPS was not computed. Pass --lpips-weights, the weights of its network."]


def rfid_notes(has_network: bool, num_images: int) -> list[str]:
    """Says that rFID is missing, or is of few images."""
    if not has_network:
        return ["rFID was not computed. Pass --inception-weights, the weights of its network."]
    if num_images == 1:
        return ["rFID was not computed: it needs at least two images."]
    if num_images < MANY_IMAGES:
        return [f"rFID of {num_images} images is far too high to be compared with published values."]
    return []


def tokenizer_notes(title: str, results: Records, lpips: LPIPS | None) -> list[str]:
    """Says for how many images a metric of a tokenizer is missing or infinite.

    Args:
        title (`str`): Title of the tokenizer.
        results (`list[dict[str, Any]]`): Its values of each image.
        lpips ([`LPIPS`], *optional*): Network of LPIPS.
    """
    notes = _small_image_notes("ssim", metrics.SSIM_SIDE, title, results)
    if lpips is not None:
        notes += _small_image_notes("lpips", lpips.min_side, title, results)
    return notes + _exact_image_notes(title, results)


def codebook_notes(rows: Records, tokenizers: Sequence[Tokenizer], num_images: int) -> list[str]:
    """Says for which tokenizers the set has few ids per code."""
    titles = []
    for row, tokenizer in zip(rows, tokenizers, strict=True):
        if not tokenizer.codebook_size:
            continue
        num_ids = row["tokens"] * num_images  # `tokens` is the mean per image
        ids_per_code = num_ids / tokenizer.codebook_size
        if ids_per_code < MIN_IDS_PER_CODE:
            titles.append(tokenizer.title)
    if not titles:
        return []
    return [
        f"The set has fewer than {MIN_IDS_PER_CODE} ids per code for {', '.join(titles)}. Codes used and perplexity "
        "would be higher on a larger set."
    ]


def context_model_notes(tokenizers: Sequence[Tokenizer]) -> list[str]:
    """Says which stored ids are compressed by a context model, if some are and some are not."""
    compressed_titles = []
    plain_titles = []
    for tokenizer in tokenizers:
        if not tokenizer.codebook_size:  # its codes are no ids, which alone a context model compresses
            continue
        if isinstance(tokenizer, SVQVAETokenizer) and tokenizer.context_model is not None:
            compressed_titles.append(tokenizer.title)
        else:
            plain_titles.append(tokenizer.title)
    if not compressed_titles or not plain_titles:
        return []
    return [
        f"The stored bits of {'; '.join(compressed_titles)} are compressed by a context model. The stored bits of "
        f"{'; '.join(plain_titles)} are not, so compare the bits per pixel instead. training/train_context.py trains "
        "a context model."
    ]


def difference_notes(tokenizers: Sequence[Tokenizer], records: Records) -> list[str]:
    """Says how far the PSNR of further models is from the first model's at the same scale, and how certain that is.

    Args:
        tokenizers (`Sequence[Tokenizer]`): All tokenizers. Image files are left out.
        records (`list[dict[str, Any]]`): Measured images, with the `results` of each tokenizer.
    """
    first_of_scale: dict[float, int] = {}  # numbers of tokenizers
    texts = []
    for number, tokenizer in enumerate(tokenizers):
        if isinstance(tokenizer, CodecTokenizer):
            continue
        scale = getattr(tokenizer, "scale", 1.0)  # only an SVQVAE has other scales
        first_number = first_of_scale.setdefault(scale, number)
        differences = _psnr_differences(records, number, first_number)
        if number != first_number and len(differences) > 1:
            mean = statistics.mean(differences)
            standard_error = statistics.stdev(differences) / math.sqrt(len(differences))
            first_title = tokenizers[first_number].title
            texts.append(f"{tokenizer.title} minus {first_title} {mean:+.2f} ± {standard_error:.2f} dB")
    if not texts:
        return []
    return [
        "Differences of PSNR on the same images, mean ± standard error: "
        f"{'; '.join(texts)}. A mean below twice its error may be chance."
    ]


def _psnr_differences(records: Records, number: int, first_number: int) -> list[float]:
    """PSNR of a tokenizer minus the PSNR of another one, for each image that neither of them reconstructs exactly."""
    differences = []
    for record in records:
        results = record["results"]
        difference = results[number]["psnr"] - results[first_number]["psnr"]
        if math.isfinite(difference):
            differences.append(difference)
    return differences


def codec_notes(tokenizers: Sequence[Tokenizer], same_bits: Records) -> list[str]:
    """Says that no image files were measured, or how to read the table of models beside image files.

    Args:
        tokenizers (`Sequence[Tokenizer]`): All tokenizers.
        same_bits (`list[dict[str, Any]]`): Rows of this table.
    """
    has_codec = any(isinstance(tokenizer, CodecTokenizer) for tokenizer in tokenizers)
    if not has_codec:
        return ["Image files were not measured. Pass --codecs jpeg webp avif to see how good files of equal size are."]
    if not same_bits:
        return []
    return [
        "In the table of image files, `ids` are not compressed, as a generator predicts them, and `stored` is as "
        "above. The PSNR of image files is interpolated between qualities. A cell such as `27.18 at 0.1650` shows the "
        "smallest or largest files that a codec writes: it writes none of the size of the model's codes."
    ]


def _small_image_notes(metric: str, min_side: int, title: str, results: Records) -> list[str]:
    """Says for how many images a metric is missing, because they are too small."""
    num_without_value = sum(values[metric] is None for values in results)
    if num_without_value == 0:
        return []
    return [
        f"{METRICS[metric].title} of {title} was not computed for {num_without_value} of {len(results)} images. It "
        f"needs sides of at least {min_side} pixels."
    ]


def _exact_image_notes(title: str, results: Records) -> list[str]:
    """Says for how many images the PSNR is infinite."""
    num_exact = sum(values["psnr"] == math.inf for values in results)
    if num_exact == 0:
        return []
    return [
        f"PSNR of {title} is infinite for {num_exact} of {len(results)} images: their reconstruction is exact. "
        "Means exclude them, unless all are exact."
    ]
