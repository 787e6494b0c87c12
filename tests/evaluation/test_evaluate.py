import json
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import Features, make_tiny
from context_models import make_context_model
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from svqvae_hf import SVQVAE, SVQVAEImageProcessor
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.evaluation.evaluate import evaluate
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.tokens.image_tokens import encode_image
from svqvae_hf.tokens.token_files import token_file_content

SCALES = (1.0, 0.5, 2.0)


@pytest.fixture
def photos(photo):
    """Images of odd sizes."""
    return [photo.crop((100 + 9 * i, 60 + 5 * i, 157 + 20 * i, 95 + 12 * i)) for i in range(4)]


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
    report = evaluate(tiny_model, photos[2:], scales=SCALES, scale_from=scale_from, tile_size=32 if tiled else None)
    if tiled:
        tiny_model.enable_tiling(32)
    for image, record in zip(photos[2:], report.images, strict=True):
        ids, reconstructions = reconstruct(tiny_model, image, SCALES, scale_from)
        for scale, values, of_scale, reconstruction in zip(
            SCALES, record["results"], ids, reconstructions, strict=True
        ):
            assert (values["scale"], values["ids"]) == (scale, of_scale.numel())
            resampling = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
            pair = [np.array(each) for each in (image.resize(reconstruction.size, resampling), reconstruction)]
            assert values["psnr"] == pytest.approx(peak_signal_noise_ratio(*pair, data_range=255), abs=1e-3)
            expected = structural_similarity(
                *pair, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2
            )
            assert values["ssim"] == pytest.approx(expected, abs=1e-4)
        assert record["results"][0]["psnr_full_size"] == record["results"][0]["psnr"]


def test_values_of_the_set(tiny_model, photos):
    report = evaluate(tiny_model, photos, scales=[0.5])
    outputs = [reconstruct(tiny_model, image, [0.5]) for image in photos]
    ids = torch.cat([ids[0].flatten() for ids, _ in outputs])
    (result,) = report.results
    assert result.counts.tolist() == torch.bincount(ids, minlength=64).tolist()
    frequency = result.counts[result.counts > 0] / len(ids)
    entropy = -(frequency * np.log2(frequency)).sum()
    assert result.values["usage"] == len(frequency) / 64
    assert result.values["entropy"] == pytest.approx(entropy)
    assert result.values["perplexity"] == pytest.approx(2**entropy)
    for key in ("psnr", "ssim", "psnr_full_size"):
        assert result.values[key] == pytest.approx(np.mean([each["results"][0][key] for each in report.images]))
    pixels = sum(image.width * image.height for image in photos)
    assert result.values["bits_per_pixel"] == pytest.approx(len(ids) * 6 / pixels)


@pytest.mark.parametrize("compresses", [True, False])
def test_stored_bits_are_those_of_token_files(tiny_model, photos, compresses):
    context_model = make_context_model(tiny_model.codebook_fingerprint()) if compresses else None
    report = evaluate(tiny_model, photos, scales=[0.5, 1.0], context_model=context_model)
    assert report.settings["compressed"] == compresses
    pixels = sum(image.width * image.height for image in photos)
    for result in report.results:
        files = [token_file_content(encode_image(tiny_model, image, result.scale), context_model) for image in photos]
        assert result.values["bits_per_pixel_stored"] == 8 * sum(map(len, files)) / pixels


@pytest.mark.slow
def test_rfid_is_the_closed_form(tiny_model, photo):
    images = [photo.crop((7 * i, 3 * i, 7 * i + 40, 3 * i + 32)) for i in range(12)]
    (result,) = evaluate(tiny_model, images, scales=[1.0], inception=Features()).results
    pairs = [(image, reconstruct(tiny_model, image, [1.0])[1][0]) for image in images]
    real, fake = (
        Features()(torch.stack([torch.from_numpy(np.array(pair[i])).movedim(-1, 0) for pair in pairs])).numpy()
        for i in (0, 1)
    )
    covariances = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    distance = np.square(real.mean(0) - fake.mean(0)).sum()
    distance += np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert result.values["rfid"] == pytest.approx(distance, rel=1e-4)


def test_lpips(tiny_model, photos):
    torch.manual_seed(0)
    network = LPIPS("alex")
    report = evaluate(tiny_model, photos[-1:], scales=[1.0, 0.25], lpips=network)
    reconstruction = reconstruct(tiny_model, photos[-1], [1.0])[1][0]
    pair = [torch.from_numpy(np.array(each)).movedim(-1, 0)[None] / 127.5 - 1 for each in (reconstruction, photos[-1])]
    assert report.results[0].values["lpips"] == pytest.approx(network(*pair).item(), rel=1e-4)
    assert report.results[1].values["lpips"] is None
    assert (
        "LPIPS at scale 0.25 was not computed for 1 of 1 images. It needs sides of at least 31 pixels." in report.notes
    )


def test_unreadable_images_are_skipped_and_named(tiny_model, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"Dear diary")
    sources = [photos[0], tmp_path / "broken.png", {"bytes": b"", "path": "x/empty.jpg"}, photos[1]]
    report = evaluate(tiny_model, sources, scales=[1.0])
    assert [(each["index"], each["name"]) for each in report.images] == [(0, "image 0"), (3, "image 3")]
    assert [(each["index"], each["name"]) for each in report.skipped] == [(1, "broken.png"), (2, "empty.jpg")]
    assert "is not a readable image" in report.skipped[0]["reason"]
    with pytest.raises(ValueError, match=r"none of 1 is. The first, `broken.png`: .* is not a readable image"):
        evaluate(tiny_model, sources[1:2])


def test_images_too_large_for_memory_are_skipped_and_add_nothing(tiny_model, photos, monkeypatch):
    options = {"scales": [1.0, 0.5]}
    expected = evaluate(tiny_model, photos[:2], **options, inception=Features())
    decode = SVQVAE.decode

    def exhausted(self, ids, *args, **kwargs):
        if ids.shape[-1] == 25:  # at the second scale
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(self, ids, *args, **kwargs)

    monkeypatch.setattr(SVQVAE, "decode", exhausted)
    report = evaluate(tiny_model, [photos[0].resize((200, 40)), *photos[:2]], **options, inception=Features())
    (skipped,) = report.skipped
    assert (skipped["index"], skipped["name"]) == (0, "image 0")
    assert skipped["reason"].startswith("out of memory. Use smaller scales")
    for found, result in zip(report.results, expected.results, strict=True):
        assert found.values == pytest.approx(result.values)
        assert np.array_equal(found.counts, result.counts)


def test_resolution_resizes_the_shorter_side_and_crops_the_centre(tiny_model, photo):
    report = evaluate(tiny_model, [photo], scales=[1.0], resolution=32)
    (record,) = report.images
    assert (record["width"], record["height"], record["results"][0]["ids"]) == (32, 32, 64)
    assert report.worst[0].size == (32, 32)
    left = (photo.width - photo.height) / 2
    box = (left, 0, left + photo.height, photo.height)
    centre = photo.resize((32, 32), Image.Resampling.BICUBIC, box)
    assert np.abs(np.array(report.worst[0].original, float) - np.array(centre, float)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": [1, 1.0]}, r"must be distinct finite numbers above 0, got \[1, 1.0\]"),
        ({"resolution": 0}, "`resolution` must be at least 1, got 0"),
        ({"scales": [1e5]}, "`image 0`: an image of 5700000 x 3500000 pixels in tiles of 256 pixels would take about"),
    ],
)
def test_options_out_of_range(tiny_model, photos, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model, photos, **options)


def write_outcome(folder: str, path: Path, rank: int, world_size: int, port: int) -> None:
    """Evaluates the images of a folder and writes all values of the report."""
    PartialState._reset_state()  # of the process from which this one was forked
    torch.set_num_threads(1)  # a fork has no threads of its parent
    if world_size > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= address | ranks  # as `accelerate launch` and `torchrun` set them
    state = PartialState(cpu=True)
    report = evaluate(make_tiny(), open_images([folder]), scales=[1.0, 0.5], inception=Features())
    examples = [(each.index, each.psnr) for each in report.worst]
    results = [(each.values, each.counts.tolist()) for each in report.results]
    if state.is_main_process:
        path.write_text(json.dumps([state.num_processes, report.images, report.skipped, examples, results]))
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
    assert two[1:4] == one[1:4]
    for (first, first_counts), (second, second_counts) in zip(one[4], two[4], strict=True):
        assert second_counts == first_counts
        assert second.pop("rfid") == pytest.approx(first.pop("rfid"), rel=1e-5)
        assert second == first
