"""The page of `svqvae export --web` in headless Chromium, with the bundled models. Screenshots go to outputs."""

import http.server
import threading
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, SCREENSHOTS, Lazy, skip_or_fail
from PIL import Image

import svqvae_cli
from svqvae_hf import DEFAULT_GENERATOR, DEFAULT_MODEL, SVQVAE, decode_image, encode_image, load_tokens
from svqvae_hf.language.image_language_model import ImageLanguageModel

web = Lazy("svqvae_hf.export.web")
web_runtime = Lazy("svqvae_hf.export.web_runtime")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:the model cannot draw")]

RUNTIME = ROOT / "outputs" / "web_runtime"  # archives of npm, kept for the next run
NUM_CAPTIONS = 20
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
PATIENCE = 120_000  # milliseconds: the machine may be busy


@pytest.fixture(scope="module")
def runtime():
    """Folder with the archives of the page's runtime."""
    try:
        web_runtime.check_archives(RUNTIME)
    except ValueError:
        RUNTIME.mkdir(parents=True, exist_ok=True)
        try:
            web_runtime.download_archives(RUNTIME)
        except OSError as error:
            skip_or_fail(str(error))
    return RUNTIME


@pytest.fixture(scope="module")
def language_model():
    return ImageLanguageModel.from_pretrained(DEFAULT_GENERATOR, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return SVQVAE.from_pretrained(DEFAULT_MODEL).eval()


@pytest.fixture(scope="module")
def folder(browser, runtime, language_model, tokenizer, tmp_path_factory):
    """Folder of the page. Its graphs are checked on fewer images here, because the tests look at photographs."""
    folder = tmp_path_factory.mktemp("web") / "page"
    drawing = web.DrawingModel(language_model, "scenes", "cc-by-sa-4.0", ("a tiny fox",))
    photographs = web.PhotographModel(tokenizer, "bundled", "cc-by-sa-4.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svqvae_hf.export.comparison.PHOTOGRAPH_GRIDS", [(20, 31)])
        patch.setattr("svqvae_hf.export.comparison.NOISE_GRIDS", [(1, 1, 1), (2, 1, 3), (1, 16, 16)])
        patch.setattr("svqvae_hf.export.comparison.COLOURS", ["teal"])
        written = web.export_page(folder, drawing, photographs, runtime)
    assert written.startswith("checked  0 of 288 ids of 2 drawings differ from the model's; ")
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without logging, but for the paths in `server.missing`."""

    def do_GET(self):
        if self.path in self.server.missing:
            self.send_error(404)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(folder):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        server.missing = set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def size():
    return SIZES["desktop"]


@pytest.fixture
def page(browser, server, size):
    """The page, which must ask no other server for anything and raise no error."""
    address = f"http://127.0.0.1:{server.server_port}/"
    page = browser.new_page(viewport=size)
    page.set_default_timeout(PATIENCE)
    urls = []
    errors = []
    page.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator("#photographs").wait_for()
    yield page
    page.close()
    assert [url for url in urls if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def set_slider(page, selector, value):
    page.locator(selector).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", str(value)
    )


def draw(page, caption):
    """Draws a caption, and returns the note of the result."""
    page.locator("#caption").fill(caption)
    page.locator("#caption").press("Enter")
    note = page.locator("#drawing-result .note")
    note.filter(has_text="Drawn in").wait_for()
    return note.inner_text()


def download_tokens(page, section, folder):
    """Path of the token file that the page saves."""
    with page.expect_download() as download:
        page.locator(f"{section} .save").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def drawn_ids(page, caption, folder):
    """Ids `(rows, columns)` of a drawing by the page."""
    draw(page, caption)
    return load_tokens(download_tokens(page, "#drawing", folder)).ids[0]


@pytest.fixture(scope="module")
def captions():
    lines = (ROOT / "benchmarks" / "scene_prompts.tsv").read_text().splitlines()
    prompts = [line.split("\t")[0] for line in lines]
    return prompts[:NUM_CAPTIONS]


def library_ids(language_model, captions, **sampling):
    """Ids `(captions, rows, columns)` that the library draws."""
    drawn = {}
    language_model.draw(captions, callback_on_step_end=lambda *arguments: drawn.update(arguments[-1]), **sampling)
    return drawn["ids"]


def uniform_numbers(seed, count):
    """Numbers of the page's generator mulberry32."""
    steps = np.arange(1, count + 1, dtype=np.uint64)
    state = (np.uint64(seed) + steps * np.uint64(0x6D2B79F5)).astype(np.uint32)
    value = (state ^ (state >> 15)) * (state | 1)
    value ^= value + (value ^ (value >> 7)) * (value | 61)
    return ((value ^ (value >> 14)).astype(np.float64) + 0.5) / 2**32


def test_likeliest_ids_are_the_librarys(page, language_model, captions, tmp_path):
    set_slider(page, "#temperature", 0)
    expected = library_ids(language_model, captions, temperature=0)
    for caption, ids in zip(captions, expected, strict=True):
        assert torch.equal(drawn_ids(page, caption, tmp_path), ids), caption


def test_sampled_ids_are_the_librarys_with_the_same_noise(page, language_model, captions, tmp_path, monkeypatch):
    vocabulary = language_model.processor.vocabulary
    rows, columns = vocabulary.grids[0]
    shape = (rows * columns, vocabulary.codebook_size)
    noise = []
    for seed in range(len(captions)):
        exponential = -np.log(uniform_numbers(seed, shape[0] * shape[1]))
        noise.append(torch.from_numpy(exponential.reshape(shape)).float())
    steps = iter(torch.stack(noise, dim=1))  # (captions, codes) per step
    monkeypatch.setattr("svqvae_hf.pipelines.sampling._exponential", lambda *_: next(steps))
    expected = library_ids(language_model, captions, temperature=1.0)
    page.locator("#settings summary").click()
    set_slider(page, "#temperature", 1)
    for seed, (caption, ids) in enumerate(zip(captions, expected, strict=True)):
        page.locator("#seed").fill(str(seed))
        assert torch.equal(drawn_ids(page, caption, tmp_path), ids), caption


@pytest.fixture
def photographs(photo, tmp_path):
    """Files of four photographs, in several formats and modes."""
    photo.save(tmp_path / "chelsea.png")
    photo.crop((150, 70, 311, 190)).save(tmp_path / "crop.jpg", quality=95, subsampling=0)
    package = ROOT / "svqvae_hf" / "export" / "photographs"
    for name in ("osprey", "wren"):
        with Image.open(package / f"{name}.webp") as image:
            image.convert("RGB").crop((200, 80, 437, 240)).save(tmp_path / f"{name}.png")
    return [tmp_path / name for name in ("chelsea.png", "crop.jpg", "osprey.png", "wren.png")]


def open_photograph(page, path):
    page.locator("#photograph").set_input_files(path)
    page.locator("#photograph-result .note", has_text=f"{path.name}: slide over").wait_for()


def figures(page):
    names = page.locator("#photograph-result dt").all_inner_texts()
    values = page.locator("#photograph-result dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


def psnr(image, other):
    error = np.square(np.asarray(image, float) - np.asarray(other, float)).mean()
    return 10 * np.log10(255**2 / error)


def test_photographs_have_the_librarys_ids_and_psnr(page, tokenizer, photographs, tmp_path, monkeypatch):
    changed = 0
    total = 0
    for path in photographs:
        with Image.open(path) as file:
            image = file.convert("RGB")
        expected = encode_image(tokenizer, image)
        open_photograph(page, path)
        saved = download_tokens(page, "#photographs", tmp_path)
        tokens = load_tokens(saved)
        assert tokens.to_record() == expected.to_record()
        changed += int((tokens.ids[0] != expected.ids[0]).sum())
        total += expected.ids[0].numel()
        (decoded,) = decode_image(tokenizer, tokens)
        assert abs(float(figures(page)["PSNR"].removesuffix(" dB")) - psnr(image, decoded)) <= 0.0101
        assert figures(page)["bits per pixel"] == f"{expected.bits_per_pixel(0):.3f}"
    assert changed <= total / 1000, f"{changed} of {total} ids differ"

    argv = ["decode", str(saved), "--output", str(tmp_path / "decoded")]
    assert svqvae_cli.main(argv) == 0
    with Image.open(next((tmp_path / "decoded").glob("*.png"))) as file:
        np.testing.assert_array_equal(np.asarray(file), np.asarray(decoded))


def test_grid_of_ids_by_pointer_and_keyboard(page, photographs, tmp_path):
    open_photograph(page, photographs[1])
    (ids,) = load_tokens(download_tokens(page, "#photographs", tmp_path)).ids
    cells = page.locator("#photographs .cells")
    box = cells.bounding_box()
    side = box["width"] / ids.shape[1]
    cells.click(position={"x": 3.5 * side, "y": 2.5 * side})
    for column in (3, 2):
        page.locator("#photographs .place", has_text=f"row 3, column {column + 1}").wait_for()
        uses = int((ids == ids[2, column]).sum())
        assert page.locator("#photographs .id").inner_text() == f"id {ids[2, column]}"
        assert page.locator("#photographs .uses").inner_text() == f"in {uses} of {ids.numel()} cells"
        cells.press("ArrowLeft")


def wait_for_wrong(page, section, text):
    page.locator(f"{section} .note.wrong", has_text=text).wait_for()


def test_wrong_inputs_get_one_sentence(page, server, language_model, photographs, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("this is not a picture")
    page.locator("#photograph").set_input_files(tmp_path / "text.png")
    wait_for_wrong(page, "#photograph-result", "“text.png” is not a picture that this browser can read.")

    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    page.locator("#photograph").set_input_files(tmp_path / "huge.png")
    wait_for_wrong(page, "#photograph-result", "“huge.png” has 100 megapixels, but at most 50 fit")

    monkeypatch.setattr(server, "missing", {"/photographs/decoder.onnx"})
    page.locator("#photograph").set_input_files(photographs[1])
    wait_for_wrong(page, "#photograph-result", "The file “photographs/decoder.onnx” could not be loaded.")
    monkeypatch.setattr(server, "missing", set())
    open_photograph(page, photographs[1])
    page.locator("#photograph").set_input_files(tmp_path / "text.png")
    wait_for_wrong(page, "#photograph-result", "“text.png” is not a picture that this browser can read.")
    for result in (".compared", ".figures", ".ids"):  # of the photograph before
        assert page.locator(f"#photographs {result}").is_hidden()

    page.locator("#caption").fill(" ")
    page.locator("#caption").press("Enter")
    wait_for_wrong(page, "#drawing-result", "Type what to draw")
    page.locator("#settings summary").click()
    page.locator("#seed").fill("-1")
    page.locator("#settings summary").click()  # the sentence also appears while the field is hidden
    page.locator("#caption").press("Enter")
    wait_for_wrong(page, "#drawing-result", "The seed must be a whole number from 0 to 4,294,967,295.")
    page.evaluate("document.getElementById('seed').value = '0'")
    page.locator("#caption").fill("?!")
    page.locator("#caption").press("Enter")
    wait_for_wrong(page, "#drawing-result", "Type what to draw")


def test_the_note_says_how_the_model_understood_the_prompt(page, language_model):
    prompt = "please draw a nice fox on pink"
    (caption,) = language_model.rewrite([prompt])
    assert f"The model understood: “{caption}”." in draw(page, prompt)


def test_things_that_it_cannot_draw_are_the_librarys(page, language_model):
    for caption in ("a toaster for my fox", "red like the moon, two kangaroos and a bearded dragon"):
        note = draw(page, caption)
        things = language_model.known_objects.unknown(caption)
        assert things
        for thing in things:
            assert f"“{thing}”" in note


@pytest.mark.parametrize("size", [SIZES["phone"]])
def test_on_a_phone(page, size, photographs, language_model):
    draw(page, "a tiny fox")
    open_photograph(page, photographs[0])
    page.screenshot(path=SCREENSHOTS / "web_phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    known_objects = language_model.known_objects
    assert page.locator("#objects").text_content() == f"{', '.join(known_objects.objects)}."
    assert page.locator("#grounds").text_content() == f"Backgrounds: {', '.join(known_objects.grounds)}."


def test_one_button_shows_the_focus(page):
    page.locator("#caption").focus()
    while page.evaluate("document.activeElement.id") != "photograph":
        page.keyboard.press("Tab")
    outlined = page.locator("#drop").evaluate(
        "drop => [...drop.querySelectorAll('button, .button')]"
        ".filter(button => getComputedStyle(button).outlineStyle !== 'none').map(button => button.textContent)"
    )
    assert outlined == ["Choose a photograph"]
