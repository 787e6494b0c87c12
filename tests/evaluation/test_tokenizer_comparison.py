"""Tokenizers of other libraries, measured by one protocol: each figure is equal to a computation by hand."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_runner import fails, svqvae
from conftest import make_tiny
from context_models import make_context_model
from features import SSIM, Features, pixels
from foreign_tokenizers import CASES, make_tokenizer
from safetensors.torch import load_file, save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from svqvae_hf import DEFAULT_MODEL
from svqvae_hf.evaluation.codecs import CODECS, CodecTokenizer, open_image, save_image
from svqvae_hf.evaluation.evaluate import evaluate
from svqvae_hf.evaluation.generated import compare_generated
from svqvae_hf.evaluation.notes import difference_notes
from svqvae_hf.evaluation.report import Report
from svqvae_hf.evaluation.same_bits import compare_with_codecs
from svqvae_hf.evaluation.tokenizers.auto import load_tokenizers, tokenizer_titles
from svqvae_hf.tokens.image_tokens import encode_image
from svqvae_hf.tokens.token_files import token_file_content


@pytest.fixture
def images(photo):
    """Images whose sides are multiples of 4, and are not."""
    return [photo.crop((100, 60, 148, 92)), photo.crop((200, 100, 233, 121))]


@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_computed_by_hand(tmp_path, images, name):
    model = make_tokenizer(name)
    model.save_pretrained(tmp_path / name)
    report = evaluate(load_tokenizers(str(tmp_path / name)), images)
    (row,) = report.rows
    expected, ids = [], []
    for image, record in zip(images, report.images, strict=True):
        (values,) = record["results"]
        sample = pixels(image) / 127.5 - 1
        f = CASES[name].f
        padded = F.pad(sample, (0, -image.width % f, 0, -image.height % f), mode="replicate")
        with torch.no_grad():
            by_hand = CASES[name].by_hand(model, padded)
        assert values["tokens"] == by_hand.tokens == padded[0, 0].numel() // f**2
        assert values["bits"] == pytest.approx(by_hand.bits)
        ids += [] if by_hand.ids is None else by_hand.ids.flatten().tolist()
        cropped = by_hand.sample[0, :, : image.height, : image.width]
        decoded = ((cropped.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).numpy()
        expected.append(peak_signal_noise_ratio(np.array(image), decoded, data_range=255))
        assert values["psnr"] == pytest.approx(expected[-1], abs=1e-2)
        assert values["ssim"] == pytest.approx(structural_similarity(np.array(image), decoded, **SSIM), abs=1e-3)
    assert row["psnr"] == pytest.approx(np.mean(expected), abs=1e-2)
    if ids:
        counts = np.bincount(ids)
        assert len(set(ids)) > 1
        frequency = counts[counts > 0] / len(ids)
        assert row["usage"] == len(set(ids)) / 32
        assert row["perplexity"] == pytest.approx(2 ** -(frequency * np.log2(frequency)).sum())
    else:
        assert row["usage"] is None


def test_missing_weights_are_an_error(tmp_path):
    make_tokenizer("AutoencoderKL").save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    weights = load_file(path)
    del weights["encoder.conv_in.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match="must have all weights of AutoencoderKL, but 1 are .* encoder.conv_in.weight"
    ):
        load_tokenizers(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"_class_name": "AutoencoderOobleck"}', "name one of SVQVAE, VQModel, AutoencoderKL, got AutoencoderOobl"),
        ('{"model_type": ["janus"]}', r"got \['janus'\]"),
        ("[1]", "must hold a JSON object, but holds a list"),
        ("{", "is not a valid JSON file"),
        (None, "has no config.json"),
    ],
)
def test_config_without_a_known_class(tmp_path, content, message):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        load_tokenizers(str(tmp_path))


def test_titles_are_short_but_different(tmp_path, monkeypatch):
    (tmp_path / "near" / "vqvae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    far = str(tmp_path / "far" / "vqvae")
    assert tokenizer_titles([DEFAULT_MODEL, "org/vqvae", "org/pipeline/vqvae"]) == [
        "bundled",
        "org/vqvae",
        "org/pipeline/vqvae",
    ]
    assert tokenizer_titles([far]) == ["vqvae"]
    assert tokenizer_titles([far, "near/vqvae", "org/repo"]) == ["far/vqvae", "near/vqvae", "org/repo"]
    same_name = str(tmp_path / "copies" / "bundled")
    assert tokenizer_titles([DEFAULT_MODEL, same_name]) == ["bundled", "copies/bundled"]


def test_a_folder_without_a_model_is_explained(tmp_path, photo):
    with pytest.raises(ValueError, match="has no config.json.$"):
        load_tokenizers(str(tmp_path))
    photo.crop((0, 0, 9, 9)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no config.json. It holds images. Pass it as --generated"):
        load_tokenizers(str(tmp_path))
    (tmp_path / "vqvae").mkdir()
    (tmp_path / "vqvae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"It is a generator. Pass its tokenizer, `{tmp_path / 'vqvae'}`."):
        load_tokenizers(str(tmp_path))


def test_scales_of_an_svqvae_are_compared_at_the_size_of_the_image(saved_model, images):
    tokenizers = load_tokenizers(saved_model, scales=[1.0, 0.5, 2.0])
    rows, own_rows = (evaluate(tokenizers, images, own_size=own_size).rows for own_size in (False, True))
    for row, own in zip(rows, own_rows, strict=True):
        assert row["psnr"] == pytest.approx(own["psnr_full_size"], abs=1e-4)
        assert (row["tokens"], row["usage"]) == (own["tokens"], own["usage"])
    name = Path(saved_model).name
    assert [row["title"] for row in rows] == [name, f"{name}, scale 0.5", f"{name}, scale 2"]


def test_a_context_model_counts(tmp_path, photo):
    make_tiny().save_pretrained(tmp_path)
    image = photo.crop((100, 60, 164, 108))
    context_model = make_context_model(make_tiny().codebook_fingerprint())
    context_model.save_pretrained(tmp_path)
    (row,) = evaluate(load_tokenizers(str(tmp_path)), [image]).rows
    content = token_file_content(encode_image(make_tiny(), image, 1.0), context_model)
    assert row["bits_per_pixel_stored"] == 8 * len(content) / (64 * 48)


def test_a_note_says_which_stored_bits_are_compressed(tmp_path, photo):
    image = photo.crop((100, 60, 164, 108))
    for name in ("with", "without"):
        make_tiny().save_pretrained(tmp_path / name)
    make_context_model(make_tiny().codebook_fingerprint()).save_pretrained(tmp_path / "with")
    compressed = load_tokenizers(str(tmp_path / "with"))
    plain = load_tokenizers(str(tmp_path / "without"))
    codec = CodecTokenizer("JPEG", 80)
    note = (
        "The stored bits of with are compressed by a context model. The stored bits of without are not, so compare "
        "the bits per pixel instead. training/train_context.py trains a context model."
    )
    assert note in evaluate([*compressed, *plain, codec], [image]).notes
    for alike in ([*compressed, codec], [*plain, codec]):
        notes = " ".join(evaluate(alike, [image]).notes)
        assert "context model" not in notes


def test_a_note_says_how_certain_a_difference_of_psnr_is():
    halved = SimpleNamespace(title="a, scale 0.5", scale=0.5)
    tokenizers = [
        SimpleNamespace(title="a", scale=1.0),
        halved,
        SimpleNamespace(title="b"),
        CodecTokenizer("JPEG", 80),
    ]
    records = []
    for values in ([20.0, 15.0, 21.0, 9.0], [30.0, 15.0, 30.5, 9.0], [math.inf, 15.0, 40.0, 9.0]):
        records.append({"results": [{"psnr": value} for value in values]})
    (note,) = difference_notes(tokenizers, records)
    assert ", mean ± standard error: b minus a +0.75 ± 0.25 dB. A mean" in note
    assert difference_notes(tokenizers, records[:1]) == []
    assert difference_notes([*tokenizers[:2], tokenizers[3]], records) == []


def test_offline_without_a_look_up_of_the_context_model(tmp_path, two_images, monkeypatch, capsys):
    """The model is in the cache, but not whether it has a context model, which is the fault to name."""
    repository = tmp_path / "cache" / "models--org--vq"
    commit = "0123456789" * 4
    make_tiny().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = fails(capsys, "evaluate", two_images, "--model", "org/vq", "--output", tmp_path / "out")
    assert "whether `org/vq` has a context model, `context_model.safetensors`, cannot be looked up" in error
    assert "the Hub cannot be reached" in error
    assert not (tmp_path / "out").exists()
    absent = repository / ".no_exist" / commit / "context_model.safetensors"  # as a look-up with a network leaves it
    absent.parent.mkdir(parents=True)
    absent.touch()
    assert svqvae("evaluate", two_images, "--model", "org/vq", "--output", tmp_path / "out", "--resolution", "32") == 0


def test_a_context_model_of_another_codebook_is_not_counted(tmp_path):
    make_tiny().save_pretrained(tmp_path)
    make_context_model("b" * 64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be for the codebook of its model"):
        load_tokenizers(str(tmp_path))


def test_image_files_of_equal_bits():
    def row(title, bits, stored_bits, psnr):
        return {"title": title, "bits_per_pixel": bits, "bits_per_pixel_stored": stored_bits, "psnr": psnr}

    rows = [
        row("org/model", 0.2, 0.05, 25.0),  # of ids, which a context model compresses
        row("JPEG, large files", 0.5, 0.5, 22.0),  # a model of a strange name
        row("JPEG, quality 5", 0.1, 0.1, 20.0),
        row("JPEG, quality 9", 0.4, 0.4, 26.0),
    ]
    same_bits = compare_with_codecs(rows, [Exact(), Exact(), CodecTokenizer("JPEG", 5), CodecTokenizer("JPEG", 9)])
    report = Report("Evaluation", {}, rows, [], [], [], same_bits)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.table_at_same_bits()]
    assert cells[0] == ["", "bits per pixel", "PSNR, dB", "JPEG, dB"]
    assert cells[2:] == [
        ["org/model, ids", "0.2000", "25.00", "23.00"],
        ["org/model, stored", "0.0500", "25.00", "20.00 at 0.1000"],
        ["JPEG, large files", "0.5000", "22.00", "26.00 at 0.4000"],
    ]
    assert compare_with_codecs(rows[:2], [Exact(), Exact()]) == []


@pytest.mark.parametrize("codec", CODECS)
def test_image_files_count_all_their_bytes(images, codec):
    (row,) = evaluate([CodecTokenizer(codec, 40)], images[:1]).rows
    content = save_image(images[0], codec, 40)
    bits = 8 * len(content) / (images[0].width * images[0].height)
    assert row["bits_per_pixel"] == row["bits_per_pixel_stored"] == bits
    decoded = np.array(open_image(content))
    assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(np.array(images[0]), decoded), abs=1e-3)
    assert [row["tokens"], row["usage"]] == [None, None]


class Exact:
    """Stores every value."""

    title, f, codebook_size = "exact", 8, None

    def encode(self, sample):
        return ((sample + 1) * 127.5).round().byte()

    def decode(self, codes):
        return codes / 127.5 - 1


class TooMany(Exact):
    title, codebook_size = "too many", 4

    def encode(self, sample):
        return torch.full((1, 2, 2), 4)


def test_an_adapter_of_ones_own(images, monkeypatch):
    monkeypatch.undo()  # an infinite PSNR can be plotted
    report = evaluate([Exact()], images, inception=Features())
    assert report.images[1]["results"][0]["bits"] == 40 * 24 * 3 * 8  # of 33 x 21, in multiples of 8
    assert report.rows[0]["psnr"] == math.inf
    assert report.rows[0]["rfid"] == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="`encode` of too many must return ids under 4, got 4"):
        evaluate([TooMany()], images)


class Greedy(Exact):
    title = "greedy"

    def decode(self, codes):
        if codes.shape[-1] > 60:
            raise MemoryError
        return super().decode(codes)


def test_an_image_that_exhausts_the_memory_of_one_is_skipped_for_all(saved_model, photo, images):
    tokenizers = [*load_tokenizers(saved_model), Greedy()]
    expected = evaluate(tokenizers, images, inception=Features())
    too_large = photo.crop((0, 0, 64, 64))
    report = evaluate(tokenizers, [too_large, *images], inception=Features())
    (skipped,) = report.skipped
    assert skipped["index"] == 0
    assert skipped["reason"].startswith("out of memory.")
    for row, expected_row in zip(report.rows, expected.rows, strict=True):
        assert row == pytest.approx(expected_row)


def test_wrong_options(images):
    with pytest.raises(ValueError, match=r"one or more with different titles, got \['exact', 'exact'\]"):
        evaluate([Exact(), Exact()], images)
    for resolution in (0, 100_000):
        message = re.escape(f"`resolution` must be in [1, 8192], got {resolution}.")
        with pytest.raises(ValueError, match=message):
            evaluate([Exact()], images, resolution=resolution)
        with pytest.raises(ValueError, match=message):
            compare_generated(images, images, {"name": Features()}, resolution=resolution)


def test_several_models_make_one_table(tmp_path, two_images, saved_model, capsys):
    make_tokenizer("AutoencoderKL").save_pretrained(tmp_path / "AutoencoderKL")
    out = tmp_path / "out"
    (two_images / "c.png").write_bytes(b"")
    argv = ["evaluate", two_images, "--model", saved_model, "--output", out, "--scales", "1", "0.5"]
    argv += ["--beside", tmp_path / "AutoencoderKL", "--codecs", "webp"]
    assert svqvae(*argv, "--resolution", "32") == 1  # one is skipped
    report = json.loads((out / "report.json").read_text())
    name = Path(saved_model).name
    titles = [name, f"{name}, scale 0.5", "AutoencoderKL"]
    titles += [f"WebP, quality {quality}" for quality in (1, 5, 10, 20, 40, 75)]
    assert [row["title"] for row in report["rows"]] == titles
    assert [row["bits_per_pixel"] for row in report["rows"][:3]] == pytest.approx([6 / 16, 6 / 64, 16 * 4 / 4])
    assert {(image["width"], image["height"]) for image in report["images"]} == {(32, 32)}
    lines = (out / "report.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 5 + 2 + len(titles)  # models beside image files come before the table of all
    rates = [float(line.split("|")[4]) for line in table[2 + 5 + 2 :]]
    assert rates == sorted(rates)
    headings = ["Image files at the same bits per pixel", "All measurements, by stored bits per pixel"]
    assert [line[3:] for line in lines if line.startswith("## ")][:2] == headings
    printed = capsys.readouterr().out
    assert [line.rstrip(":") for line in printed.splitlines() if line.rstrip(":") in headings] == headings
    assert [line for line in printed.splitlines() if line.startswith("|")] == table
    assert "Only the first" not in printed


def test_two_models_are_compared_without_image_files(tmp_path, two_images, saved_model, capsys):
    make_tokenizer("VQModel").save_pretrained(tmp_path / "vq")
    argv = ["evaluate", two_images, "--model", saved_model, "--beside", tmp_path / "vq", "--output", tmp_path / "out"]
    assert svqvae(*argv, "--scales", "1", "--max-images", "1") == 0
    printed = capsys.readouterr().out
    assert "WebP" not in printed
    assert "Pass --codecs jpeg webp avif" in printed
    assert "Only the first 1 images were read (--max-images): in a folder, the first by name." in printed


def test_one_model_of_another_class_is_compared(tmp_path, two_images, capsys):
    make_tokenizer("VQModel").save_pretrained(tmp_path / "vq")
    argv = ["evaluate", two_images, "--model", tmp_path / "vq", "--output", tmp_path / "out"]
    assert "--scales is for SVQVAEs. Leave it out." in fails(capsys, *argv, "--scales", "0.5")
    assert svqvae(*argv) == 0
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["rows"]) == 1
