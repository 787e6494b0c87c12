from cli_runner import fails, svqvae, visible
from PIL import Image
from tiny_language_models import extended

from svqvae_hf.language.image_language_model import ImageLanguageModel


def test_a_text_for_each_image_in_the_folders_of_the_images(two_images, tmp_path, capsys):
    (two_images / "c").mkdir()
    (two_images / "a.png").rename(two_images / "c" / "a.png")
    (two_images / "broken.png").write_bytes(b"hello")
    out, options = tmp_path / "out", ["--model", extended("qwen"), "--max-tokens", 4, "--prompt", "?"]
    assert svqvae("caption", two_images, "--output", out, *options) == 1
    printed = capsys.readouterr().out
    model = ImageLanguageModel.from_pretrained(extended("qwen"))
    for name in ("b.jpg", "c/a.png"):
        (text,) = model.caption([Image.open(two_images / name)], "?", 4)
        assert (out / name).with_suffix(".txt").read_text() == f"{text}\n"
        assert f"{name}: {text}\n" in printed
    assert svqvae("caption", two_images, "--output", out, *options) == 1
    assert "resumed: 2 of 3 were there" in capsys.readouterr().out
    (out / "b.txt").write_text("by hand")
    error = fails(capsys, "caption", two_images, "--output", out, *options)
    assert f"`{out}/b.txt` has changed since it was written" in error
    (out / "b.txt").unlink()
    assert svqvae("caption", two_images, "--output", out, *options) == 1
    assert "resumed: 1 of 3 were there" in capsys.readouterr().out


def test_control_characters_of_names_are_not_printed(photo, tmp_path, capsys):
    photo.crop((0, 0, 16, 16)).save(tmp_path / "\x1b[31m.png")
    words = ["--output", tmp_path / "out", "--model", extended("qwen"), "--max-tokens", 2]
    assert svqvae("caption", tmp_path / "\x1b[31m.png", *words) == 0
    assert capsys.readouterr().out.startswith("\\x1b[31m.png: ")


def test_generate_draws_with_a_language_model(tmp_path, capsys):
    out, model = tmp_path / "out", extended("qwen")
    arguments = ["--prompt", "a cat", "a key", "--grid", "2x3", "--num-images", 2, "--guidance-scale", 2]
    assert svqvae("generate", "--model", model, *arguments, "--output", out) == 0
    files = {f"prompt_{row}_{index}.png" for row in range(2) for index in range(2)}
    assert {*visible(out)} == files
    with Image.open(out / "prompt_1_1.png") as image:
        assert image.size == (12, 8)
    assert svqvae("generate", "--model", model, "--num-images", 2, "--output", tmp_path / "plain") == 0
    assert "image_1.png" in visible(tmp_path / "plain")
    capsys.readouterr()
    for option, message in [
        (["--steps", "5"], "`, whose class is ImageLanguageModel. Leave it out"),
        (["--class", "1"], "--class does not apply to `"),
        (["--top-p", "2"], "`top_p` must be above 0 and at most 1, got 2.0"),
        (["--grid", "9x9"], "`grid` must be one of the rows x columns of codes that the model knows"),
    ]:
        assert message in fails(capsys, "generate", "--model", model, *option, "--output", tmp_path / "wrong")
