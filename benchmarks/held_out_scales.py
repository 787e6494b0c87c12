"""How well next-scale pipelines predict new photographs: `python benchmarks/held_out_scales.py PHOTOS PIPELINE ...`.

Each row names a scale. The photograph gives the ids of the scales up to it, and the pipeline samples the finer ones.
Losses are cross entropies of the photograph's own ids: of this scale after the photograph's scales before, and of the
last scale after the scales so far. PSNR and SSIM compare the sampled image with the photograph. Ids of the last scale
do not depend on what was resized to the scales, so the last four columns of different pipelines can be compared.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measuring import Row, describe_machine, make_parser, report
from PIL import Image

from svqvae_hf import SVQVAEImageProcessor, SVQVAENextScalePipeline
from svqvae_hf.evaluation.metrics import psnr, ssim
from svqvae_hf.models.image_processing_svqvae import load_image
from svqvae_hf.pipelines.schedules import describe
from svqvae_hf.token_sets.crops import make_crops

THIS, LAST = "loss of this scale, nats per id", "loss of the last scale, nats per id"


class Prediction(NamedTuple):
    """An image `(1, 3, height, width)` in [0, 1], and the ids and logits of each scale."""

    image: torch.Tensor
    ids: list[torch.Tensor]
    logits: list[torch.Tensor]


def predict(pipeline: SVQVAENextScalePipeline, photo: Image.Image, image_scale: float, **sampling: Any) -> Prediction:
    """Samples an image whose scales up to `image_scale` are the photograph's."""
    ids: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    hook = pipeline.transformer.register_forward_hook(lambda *call: logits.append(call[-1].logits))
    (image,) = pipeline(
        image=photo,
        image_scale=image_scale,
        output_type="pt",
        return_dict=False,
        callback_on_step_end=lambda *step: ids.append(step[-1]["ids"]),
        **sampling,
    )
    hook.remove()
    return Prediction(image, ids, logits)


def measure(pipeline: SVQVAENextScalePipeline, photo: Image.Image, temperature: float) -> torch.Tensor:
    """Figures of a photograph `(scales, 4)`: both losses, PSNR and SSIM."""
    longest = max(pipeline.trained_schedule[-1])
    own = predict(pipeline, photo, 1)
    pixels = SVQVAEImageProcessor(pixel_range=(0, 1))(photo)["pixel_values"].to(own.image)
    rows = []
    for step, size in enumerate(pipeline.trained_schedule):
        generator = torch.Generator().manual_seed(0)
        found = predict(pipeline, photo, max(size) / longest, temperature=temperature, generator=generator)
        losses = [
            F.cross_entropy(logits[0], ids.flatten())
            for logits, ids in ((own.logits[step], own.ids[step]), (found.logits[-1], own.ids[-1]))
        ]
        quality = [metric(found.image, pixels, data_range=1.0)[0] for metric in (psnr, ssim)]
        rows.append(torch.stack([*losses, *quality]))
    return torch.stack(rows).cpu()


def main() -> None:
    """Reads the arguments, measures each pipeline and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("photos", type=Path, help="folder of photographs, whose centre squares are taken")
    parser.add_argument("pipelines", nargs="+", help="folders of pipelines")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1; 0 takes the most likely ids")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    rows: list[Row] = []
    for folder in options.pipelines:
        pipeline = SVQVAENextScalePipeline.from_pretrained(folder).to(options.device)
        pipeline.set_progress_bar_config(disable=True)
        side = pipeline.trained_schedule[-1][0] * pipeline.vqvae.f
        photos = [make_crops(load_image(path), "centre", side)[0] for path in sorted(options.photos.iterdir())]
        means = torch.stack([measure(pipeline, photo, options.temperature) for photo in photos]).mean(0).tolist()
        rows += [
            {
                "scales from": pipeline.config["scale_from"],
                "photographs": len(photos),
                "scale": describe([size]),
                **dict(zip((THIS, LAST, "PSNR, dB", "SSIM"), figures, strict=True)),
            }
            for size, figures in zip(pipeline.trained_schedule, means, strict=True)
        ]
    report(options, machine, {"Held-out photographs": rows})


if __name__ == "__main__":
    main()
