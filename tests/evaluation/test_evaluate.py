import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import make_tiny
from features import SSIM, Features, pixels
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from svqvae_hf import SVQVAEImageProcessor
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.evaluation.evaluate import evaluate
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.evaluation.tokenizers.diffusers_models import SVQVAETokenizer
from svqvae_hf.tokens.image_tokens import encode_image
from svqvae_hf.tokens.token_files import token_file_content

SCALES = (1.0, 0.5, 2.0)


@pytest.fixture
def photos(photo):
    """Images of odd sizes."""
    return [photo.crop((100 + 9 * i, 60 + 5 * i, 157 + 20 * i, 95 + 12 * i)) for i in range(4)]


def evaluate_at(scales, model, images, scale_from="image", tile_size=None, **options):
    """Report of one model, a row per scale."""
    tokenizers = [SVQVAETokenizer(f"scale {scale:g}", model, scale, scale_from, tile_size) for scale in scales]
    return evaluate(tokenizers, images, own_size=True, **options)


def reconstruct(model, image, scales, scale_from="image"):
    """Ids and 8-bit reconstructions at each scale, straight from the model."""
    processor = SVQVAEImageProcessor()
    sample = processor(image)["pixel_values"]
    with torch.inference_mode():
        samples = model(sample, scales=scales, scale_from=scale_from).sample
        ids = model.encode_tokens(sample, scales, scale_from)
    return ids, [processor.postprocess(each)[0] for each in samples]


@pytest.mark.slow
@pytest.mark.usefixtures("few_windows")
@pytest.mark.parametrize(("scale_from", "tiled"), [("image", True), ("latents", False)])
def test_values_of_each_image(tiny_model, photos, scale_from, tiled):
    report = evaluate_at(SCALES, tiny_model, photos[:2], scale_from, 32 if tiled else None)
    if tiled:
        tiny_model.enable_tiling(32)
    for image, record in zip(photos[:2], report.images, strict=True):
        ids, reconstructions = reconstruct(tiny_model, image, SCALES, scale_from)
        for scale, values, of_scale, reconstruction in zip(
            SCALES, record["results"], ids, reconstructions, strict=True
        ):
            assert values["tokens"] == of_scale.numel()
            resampling = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
            pair = [np.array(each) for each in (image.resize(reconstruction.size, resampling), reconstruction)]
            assert values["psnr"] == pytest.approx(peak_signal_noise_ratio(*pair, data_range=255), abs=1e-3)
            assert values["ssim"] == pytest.approx(structural_similarity(*pair, **SSIM), abs=1e-4)
        assert record["results"][0]["psnr_full_size"] == record["results"][0]["psnr"]


def test_values_of_the_set(tiny_model, photos):
    report = evaluate_at([0.5], tiny_model, photos)
    ids = torch.cat([reconstruct(tiny_model, image, [0.5])[0][0].flatten() for image in photos])
    (row,) = report.rows
    counts = torch.bincount(ids, minlength=64)
    frequency = counts[counts > 0] / len(ids)
    assert row["usage"] == len(frequency) / 64
    assert row["perplexity"] == pytest.approx(2 ** -(frequency * frequency.log2()).sum().item())
    for key in ("psnr", "ssim", "psnr_full_size"):
        assert row[key] == pytest.approx(np.mean([each["results"][0][key] for each in report.images]))
    area = sum(image.width * image.height for image in photos)
    assert row["bits_per_pixel"] == pytest.approx(len(ids) * 6 / area)
    bits = [8 * len(token_file_content(encode_image(tiny_model, image, 0.5))) for image in photos]
    assert row["bits_per_pixel_stored"] == sum(bits) / area


def features_of(images):
    return Features()(torch.cat([pixels(image) for image in images])).numpy()


@pytest.mark.slow
def test_rfid_is_the_closed_form(tiny_model, photo):
    images = [photo.crop((7 * i, 3 * i, 7 * i + 40, 3 * i + 32)) for i in range(12)]
    (row,) = evaluate_at([1.0], tiny_model, images, inception=Features()).rows
    reconstructions = [reconstruct(tiny_model, image, [1.0])[1][0] for image in images]
    real = features_of(images)
    fake = features_of(reconstructions)
    real_covariance = np.cov(real, rowvar=False)
    fake_covariance = np.cov(fake, rowvar=False)
    distance = np.square(real.mean(0) - fake.mean(0)).sum()
    distance += np.trace(real_covariance + fake_covariance - 2 * sqrtm(real_covariance @ fake_covariance).real)
    assert row["rfid"] == pytest.approx(distance, rel=1e-4)


def test_lpips(tiny_model, photos):
    torch.manual_seed(0)
    network = LPIPS("alex")
    report = evaluate_at([1.0, 0.25], tiny_model, photos[-1:], lpips=network)
    reconstruction = reconstruct(tiny_model, photos[-1], [1.0])[1][0]
    pair = [torch.from_numpy(np.array(each)).movedim(-1, 0)[None] / 127.5 - 1 for each in (reconstruction, photos[-1])]
    assert report.rows[0]["lpips"] == pytest.approx(network(*pair).item(), rel=1e-4)
    assert report.rows[1]["lpips"] is None
    note = "LPIPS of scale 0.25 was not computed for 1 of 1 images. It needs sides of at least 31 pixels."
    assert note in report.notes


def test_unreadable_images_are_skipped_and_named(tiny_model, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"Dear diary")
    sources = [photos[0], tmp_path / "broken.png", {"bytes": b"", "path": "x/empty.jpg"}, photos[1]]
    report = evaluate_at([1.0], tiny_model, sources)
    assert [(each["index"], each["name"]) for each in report.images] == [(0, "image 0"), (3, "image 3")]
    assert [(each["index"], each["name"]) for each in report.skipped] == [(1, "broken.png"), (2, "empty.jpg")]
    assert "is not a readable image" in report.skipped[0]["reason"]
    with pytest.raises(ValueError, match=r"none of 1 is. The first, `broken.png`: .* is not a readable image"):
        evaluate_at([1.0], tiny_model, sources[1:2])


def test_a_log_has_a_line_after_each_half_minute_and_after_a_signal(tiny_model, photos, monkeypatch, caplog, capsys):
    caplog.set_level("INFO", "svqvae_hf.evaluation.measuring")
    evaluate_at([1.0], tiny_model, photos)
    assert caplog.messages == []  # it took no half minute
    monkeypatch.setattr("svqvae_hf.evaluation.measuring.SECONDS_PER_LINE", 0.01)
    encode = SVQVAETokenizer.encode
    num_encoded = 0

    def encode_slowly(*args):
        nonlocal num_encoded
        line = f"measured {num_encoded} of 4 images"
        deadline = time.monotonic() + 60
        while line not in caplog.messages:  # comes while this image is measured
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if num_encoded == 2:
            raise KeyboardInterrupt
        num_encoded += 1
        return encode(*args)

    monkeypatch.setattr(SVQVAETokenizer, "encode", encode_slowly)
    with pytest.raises(KeyboardInterrupt):
        evaluate_at([1.0], tiny_model, photos)
    assert caplog.messages[-1] == "interrupted: measured 2 of 4 images, and wrote no report"
    assert capsys.readouterr().err == ""  # a library prints nothing by itself


def test_resolution_resizes_the_shorter_side_and_crops_the_centre(tiny_model, photo):
    (record,) = evaluate_at([1.0], tiny_model, [photo], resolution=32).images
    left = (photo.width - photo.height) / 2
    box = (left, 0, left + photo.height, photo.height)
    centre = evaluate_at([1.0], tiny_model, [photo.resize((32, 32), Image.Resampling.BICUBIC, box)])
    assert (record["width"], record["height"]) == (32, 32)
    assert record["results"][0]["psnr"] == pytest.approx(centre.images[0]["results"][0]["psnr"], abs=0.05)


def test_an_image_that_is_too_large_for_memory_is_skipped(tiny_model, photos):
    with pytest.raises(ValueError, match=r"`image 0`: an image of 5700000 x 3500000 pixels in tiles of 256 pixels"):
        evaluate_at([1e5], tiny_model, photos)


def write_outcome(folder: str, path: Path, rank: int, world_size: int, port: int) -> None:
    """Evaluates the images of a folder and writes all values of the report."""
    PartialState._reset_state()  # of the process from which this one was forked
    torch.set_num_threads(1)  # a fork has no threads of its parent
    if world_size > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= address | ranks  # as `accelerate launch` and `torchrun` set them
    state = PartialState(cpu=True)
    report = evaluate_at([1.0, 0.5], make_tiny(), open_images([folder]), inception=Features())
    if state.is_main_process:
        path.write_text(json.dumps([state.num_processes, report.images, report.skipped, report.rows]))
    state.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_return_the_report_of_one(photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate([*photos, photos[0].resize((33, 20))]):
        image.save(folder / f"{i}.png")
    (folder / "2b.png").write_bytes(b"")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # faster than two imports of the package
    ranks = [(0, 1), (0, 2), (1, 2)]
    arguments = [(str(folder), tmp_path / f"{size}.json", rank, size, port) for rank, size in ranks]
    processes = [context.Process(target=write_outcome, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("1.json", "2.json"))
    assert (one[0], two[0]) == (1, 2)
    assert [each["index"] for each in two[2]] == [3]
    assert two[1:3] == one[1:3]
    for first, second in zip(one[3], two[3], strict=True):
        assert second.pop("rfid") == pytest.approx(first.pop("rfid"), rel=1e-5)
        assert second == first
