import numpy as np
import pytest
from cli_runner import svqvae, visible
from PIL import Image

pytestmark = pytest.mark.usefixtures("few_windows")


def test_images_and_table(two_images, out, saved_model, capsys):
    argv = ["--output", out / "new", "--model", saved_model, "--scales", "0.5", "1", "2"]
    assert svqvae("reconstruct", two_images / "a.png", *argv) == 0
    assert visible(out / "new") == ["a_x0.5.png", "a_x1.png", "a_x2.png"]
    sizes = [Image.open(out / "new" / name).size for name in visible(out / "new")]
    assert sizes == [(28, 18), (57, 35), (114, 70)]
    head, *rows, written = capsys.readouterr().out.splitlines()
    assert written == f"written  {out / 'new'} (images: 3)"
    assert head.split() == ["image", "scale", "size", "tokens", "bits/pixel", "PSNR", "dB", "codes", "used"]
    original, image = (np.asarray(Image.open(path), float) for path in (two_images / "a.png", out / "new/a_x1.png"))
    psnr = 10 * np.log10(255**2 / np.mean((original - image) ** 2))
    name, scale, size, tokens, bits, decibels, used = rows[1].split()
    assert (name, scale, size, tokens) == ("a.png", "1", "57x35", str(15 * 9))
    assert float(bits) == pytest.approx(15 * 9 * 6 / (57 * 35), abs=1e-4)
    assert float(decibels) == pytest.approx(psnr, abs=0.01)
    assert 1 / 64 <= float(used.rstrip("%")) / 100 <= 1
    assert len({len(row) for row in (head, *rows)}) == 1


def test_side_by_side_shows_the_original(two_images, out, saved_model):
    argv = ["--output", out, "--model", saved_model, "--side-by-side"]
    assert svqvae("reconstruct", two_images / "a.png", *argv) == 0
    assert visible(out) == ["a_side_by_side.png", "a_x1.png"]
    sheet = Image.open(out / "a_side_by_side.png")
    shown = sheet.crop((24, 24, 24 + 256, 24 + 157)).resize((57, 35), Image.Resampling.BOX)
    original = np.asarray(Image.open(two_images / "a.png"), float)
    assert np.abs(np.asarray(shown, float) - original).mean() < 8


def test_folders_globs_and_files_name_each_input_once(two_images, out, saved_model, capsys):
    inputs = [two_images, two_images / "*.jpg", two_images / "a.png"]
    assert svqvae("reconstruct", *inputs, "--output", out, "--model", saved_model) == 0
    assert visible(out) == ["a_x1.png", "b_x1.png"]
    _, first, second, total, _ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert total[:4] == ["2", "images", "1", str(int(first[3]) + int(second[3]))]
    bits, pixels = (15 * 9 + 10 * 6) * 6, 57 * 35 + 40 * 24
    assert float(total[4]) == pytest.approx(bits / pixels, abs=1e-4)
    assert float(total[-2]) == pytest.approx((float(first[-2]) + float(second[-2])) / 2, abs=0.01)
    assert float(total[-1].rstrip("%")) >= max(float(row[-1].rstrip("%")) for row in (first, second))


def test_reconstruction_is_encode_then_decode(two_images, out, saved_model):
    model = ["--model", saved_model]
    options = [*model, "--tile-size", "32", "--overlap", "8", "--scales", "1", "0.5", "--scale-from", "latents"]
    assert svqvae("reconstruct", two_images, "--output", out / "images", *options) == 0
    assert svqvae("encode", two_images, "--output", out / "tokens", *options) == 0
    assert svqvae("decode", out / "tokens", "--output", out / "decoded", *model) == 0
    assert visible(out / "decoded") == visible(out / "images") == ["a_x0.5.png", "a_x1.png", "b_x0.5.png", "b_x1.png"]
    for name in visible(out / "images"):
        assert (out / "decoded" / name).read_bytes() == (out / "images" / name).read_bytes()
