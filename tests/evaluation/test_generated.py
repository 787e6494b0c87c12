"""Generated images against an image set: each value against its definition."""

import json

import numpy as np
import pytest
import torch
from cli_runner import svqvae
from conftest import make_tiny
from features import Features, pixels
from scipy.linalg import sqrtm

from svqvae_hf.evaluation.generated import NEIGHBOURS, TokenizerFeatures, compare_generated


@pytest.fixture
def images(photo):
    return [photo.crop((9 * i, 5 * i, 9 * i + 48, 5 * i + 48)) for i in range(10)]


def features(network, images):
    with torch.inference_mode():
        return torch.cat([network(pixels(image)) for image in images]).double().numpy()


def test_latents_give_no_precision(images):
    report = compare_generated(images, images, {"name": TokenizerFeatures(make_tiny())})
    assert (report.rows[0]["precision"], report.rows[0]["recall"]) == (None, None)
    assert report.rows[0]["frechet_distance"] == pytest.approx(0, abs=1e-3)
    assert report.notes[0].startswith("Precision and recall are left out for latents of the tokenizer")


def test_values_are_those_of_the_definitions(images):
    network = Features()
    generated = [image.rotate(180) for image in images[:6]]
    report = compare_generated(generated, images, {"name": network})
    (row,) = report.rows
    assert report.settings == {"resolution": 48, "generated_images": 6, "images": 10}
    assert report.notes[0].startswith("The Fréchet distance of 6 and 10 images is too high to be compared")
    fake, real = features(network, generated), features(network, images)
    covariances = np.cov(fake, rowvar=False), np.cov(real, rowvar=False)
    distance = np.square(fake.mean(0) - real.mean(0)).sum()
    distance += np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert row["frechet_distance"] == pytest.approx(distance, rel=1e-3)

    def covered(points, others):
        radii = np.sort(np.linalg.norm(others[:, None] - others, axis=-1), axis=1)[:, NEIGHBOURS]
        return (np.linalg.norm(points[:, None] - others, axis=-1) <= radii).any(1).mean()

    assert row["precision"] == pytest.approx(covered(fake, real))
    assert row["recall"] == pytest.approx(covered(real, fake))


@pytest.mark.slow
def test_command(images, tmp_path, capsys):
    for folder in ("generated", "photos"):
        (tmp_path / folder).mkdir()
        for index, image in enumerate(images):
            image.save(tmp_path / folder / f"{index}.png")
    out = tmp_path / "out"
    assert svqvae("evaluate", tmp_path / "photos", "--generated", tmp_path / "generated", "--output", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md"]
    report = json.loads((out / "report.json").read_text())
    assert [row["title"] for row in report["rows"]] == ["latents of the tokenizer"]
    assert report["settings"]["generated"] == str(tmp_path / "generated")
    assert report["settings"]["generated_images"] == len(images)
    table = [line for line in (out / "report.md").read_text().splitlines() if line.startswith("|")]
    assert "\n".join(table) in capsys.readouterr().out
