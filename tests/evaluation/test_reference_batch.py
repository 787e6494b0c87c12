"""Reference batches of published evaluations, as the reference of generated images."""

import json

import numpy as np
import pytest
import torch
from cli_runner import fails, svqvae
from features import Features, pixels

from svqvae_hf.evaluation.generated import compare_generated
from svqvae_hf.evaluation.reference_batch import ReferenceBatch


@pytest.fixture
def images(photo):
    return [photo.crop((9 * i, 5 * i, 9 * i + 48, 5 * i + 48)) for i in range(10)]


def features(images):
    return torch.cat([Features()(pixels(image)) for image in images]).numpy()


def write_batch(path, images, **changes):
    """A file as guided-diffusion publishes them, with the statistics of all images and the first eight images."""
    values = features(images)
    arrays = {
        "arr_0": np.stack([np.asarray(image) for image in images[:8]]),
        "mu": values.mean(0),
        "sigma": np.cov(values, rowvar=False),
        "mu_s": np.zeros(3),
        "sigma_s": np.zeros((3, 3)),
    }
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return path


def test_images_and_statistics_are_read(images, tmp_path):
    batch = ReferenceBatch(write_batch(tmp_path / "batch.npz", images))
    assert (len(batch), batch.side) == (8, 48)
    for image, expected in zip(batch, images[:8], strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    np.testing.assert_array_equal(batch.statistics.mean, features(images).mean(0))


def test_the_distance_is_to_the_statistics_of_the_whole_set(images, tmp_path):
    batch = ReferenceBatch(write_batch(tmp_path / "batch.npz", images))
    # The darker images are far from the set, so that rounding, which differs between processors, does not count.
    generated = [image.point(lambda value: round(0.8 * value)) for image in images]
    networks = {"name": Features()}
    (whole,) = compare_generated(generated, images, networks).rows
    (row,) = compare_generated(generated, batch, networks, statistics={"name": batch.statistics}).rows
    (part,) = compare_generated(generated, batch, networks).rows
    assert row["frechet_distance"] == pytest.approx(whole["frechet_distance"], rel=1e-6)
    assert part["frechet_distance"] != pytest.approx(whole["frechet_distance"], rel=1e-2)
    assert (row["precision"], row["recall"]) == (part["precision"], part["recall"])


def test_statistics_of_another_network_are_refused(images, tmp_path):
    other = write_batch(tmp_path / "batch.npz", images, mu=np.zeros(5), sigma=np.eye(5))
    batch = ReferenceBatch(other)
    with pytest.raises(ValueError, match="features with 6 dimensions, got 5. Compute them with the same network"):
        compare_generated(images, batch, {"name": Features()}, statistics={"name": batch.statistics})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": None}, "must be a reference batch with the arrays mu, sigma and arr_0"),
        ({"arr_0": None}, "must be a reference batch with the arrays mu, sigma and arr_0"),
        ({"sigma": np.zeros((6, 5))}, r"sigma must be the covariance of mu, got \(6, 5\) and \(6,\)"),
        ({"arr_0": np.zeros((8, 4, 5, 3), np.uint8)}, r"square images in uint8, got uint8 of shape \(8, 4, 5, 3\)"),
        ({"arr_0": np.zeros((8, 4, 4, 3))}, "square images in uint8, got float64"),
        ({"mu": np.array([None])}, "Object arrays cannot be loaded"),
    ],
)
def test_other_files_are_refused(images, tmp_path, changes, message):
    path = write_batch(tmp_path / "batch.npz", images, **changes)
    with pytest.raises(ValueError, match=message):
        ReferenceBatch(path)


def test_damaged_files_are_refused(images, tmp_path):
    path = write_batch(tmp_path / "batch.npz", images)
    content = path.read_bytes()
    for damaged in (b"", b"Dear diary", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="must be a reference batch"):
            ReferenceBatch(path)


@pytest.mark.slow
def test_command(images, tmp_path, capsys):
    generated = tmp_path / "generated"
    generated.mkdir()
    for index, image in enumerate(images):
        image.resize((60, 60)).save(generated / f"{index}.png")
    path = write_batch(tmp_path / "batch.npz", images)
    argv = ["evaluate", path, "--generated", generated, "--output", tmp_path / "out"]
    assert svqvae(*argv) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["resolution"] == 48  # of the reference batch
    assert report["settings"]["images"] == 8
    capsys.readouterr()
    error = fails(capsys, *argv, "--overwrite", "--resolution", "32")
    assert "--resolution is not for a reference batch. Leave it out." in error
    path.write_bytes(b"")
    assert "must be a reference batch" in fails(capsys, *argv, "--overwrite")
