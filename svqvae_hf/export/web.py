"""Writes a folder of static files: a page that draws, and turns photographs into ids and back, in the browser."""

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from svqvae_files.json_files import read_json_object
from svqvae_files.outputs import check_new_folder, new_folder
from svqvae_files.version import __version__
from svqvae_hf.export.comparison import compare_graphs
from svqvae_hf.export.drawing_comparison import compare_drawings, load_row_graph
from svqvae_hf.export.drawing_graph import cache_shape, drawing_graph
from svqvae_hf.export.export import plain_copy
from svqvae_hf.export.float16_weights import store_in_float16
from svqvae_hf.export.onnx_graphs import decoder_graph, encoder_graph, load_graph
from svqvae_hf.export.prompts import prompt_template
from svqvae_hf.export.web_runtime import extract_runtime, runtime_archives, tokenizers_license
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.models.image_vocabulary import ImageVocabulary
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.pipelines.image_chats import MAX_REWRITTEN_TOKENS
from svqvae_hf.pipelines.known_objects_file import write_known_objects
from svqvae_hf.tokens.image_tokens import image_tokens

PAGE_FOLDER = Path(__file__).parent / "page"
EXAMPLE = Path(__file__).parent / "photographs" / "osprey.webp"
MAX_BYTES = 10**9  # of all files. A page has 4 GB of memory, for the weights in float32 and all else.
MAX_CHECKED_CAPTIONS = 3


@dataclass(frozen=True)
class DrawingModel:
    """A language model for the page.

    Args:
        model ([`ImageLanguageModel`]): Language model in float32 on the CPU, and its processor.
        name (`str`): Name for the README.
        license (`str`): Licence of its weights.
        examples (`tuple[str, ...]`): Captions that visitors can press.
    """

    model: ImageLanguageModel
    name: str
    license: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class PhotographModel:
    """An image tokenizer for the page.

    Args:
        model ([`SVQVAE`]): Tokenizer of images in red, green and blue.
        name (`str`): Name for the README.
        license (`str`): Licence of its weights.
    """

    model: SVQVAE
    name: str
    license: str


def export_page(
    out: str | Path,
    drawing: DrawingModel | None = None,
    photographs: PhotographModel | None = None,
    runtime: str | Path | None = None,
) -> str:
    """Writes a folder of static files, and checks its graphs.

    Any web server can serve the folder, or a static Space. Weights are stored in float16 where that changes none, and
    computed with in float32.

    Args:
        out (`str` or `Path`): Folder to create. It may exist if it is empty.
        drawing ([`DrawingModel`], *optional*): Language model that draws.
        photographs ([`PhotographModel`], *optional*): Tokenizer of photographs. The page needs one of the two models.
        runtime (`str` or `Path`, *optional*): Folder with the archives of `web_runtime.PACKAGES`. By default npm
            downloads them.

    Returns:
        `str`: How close the graphs are to the models, and how large the folder is, a line each.

    Raises:
        OSError: `out` cannot be written, or npm does not download the runtime.
        ValueError: There is no model, the folder has files, the runtime is another one, a graph differs from its
            model, or the page would be too large for a browser.
    """
    if drawing is None and photographs is None:
        raise ValueError("the page must have a language model or a tokenizer, got neither.")
    out = check_new_folder(Path(out))
    runtime_folder = None if runtime is None else Path(runtime)
    lines = []
    models: list[DrawingModel | PhotographModel] = []
    settings: dict[str, Any] = {"version": __version__, "drawing": None, "photographs": None}
    with runtime_archives(runtime_folder) as archives, new_folder(out) as folder, torch.no_grad():
        for path in PAGE_FOLDER.iterdir():
            shutil.copy(path, folder)
        extract_runtime(archives, folder / "runtime")
        if drawing is not None:
            models.append(drawing)
            checked = write_drawing_graphs(drawing, folder / "drawing")
            lines.append(f"checked  {checked}")
            settings["drawing"] = drawing_settings(drawing)
        if photographs is not None:
            models.append(photographs)
            checked = write_photograph_graphs(photographs.model, folder / "photographs")
            lines.append(f"checked  {checked}")
            shutil.copy(EXAMPLE, folder)
            settings["photographs"] = decoding_settings(photographs.model)
            settings["photographs"]["example"] = EXAMPLE.name
        settings["models"] = [{"name": model.name, "license": model.license} for model in models]
        (folder / "README.md").write_text(readme(models), encoding="utf-8")
        (folder / "LICENSES.txt").write_text(licenses(models, archives), encoding="utf-8")
        sizes = file_sizes(folder)
        settings["files"] = sizes
        (folder / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        total_bytes = sum(sizes.values())
        check_size(total_bytes)
    lines.append(f"written  {out}: {total_bytes / 1e6:.1f} MB in {len(sizes)} files")
    lines.append(f"try it   python -m http.server --directory {out}")
    return "\n".join(lines)


def write_drawing_graphs(drawing: DrawingModel, folder: Path) -> str:
    """Writes graphs and tokenizer of a language model, and returns how close the graphs are to it."""
    folder.mkdir()
    model = drawing.model
    vocabulary = model.processor.vocabulary
    row_graph = drawing_graph(model.language_model, vocabulary)
    save_stored_in_float16(row_graph, folder / "row.onnx")
    save_stored_in_float16(decoder_graph(plain_copy(model.vqvae)), folder / "decoder.onnx")
    write_tokenizer(model.tokenizer, vocabulary, folder)
    if model.known_objects is not None:
        write_known_objects(model.known_objects, folder)
    captions = [None, *drawing.examples[:MAX_CHECKED_CAPTIONS]]
    draw_row = load_row_graph(folder / "row.onnx")
    decode = load_graph(folder / "decoder.onnx")
    return compare_drawings(model, draw_row, decode, captions)


def write_photograph_graphs(model: SVQVAE, folder: Path) -> str:
    """Writes graphs of a tokenizer, and returns how close they are to it."""
    channels = (model.config["in_channels"], model.config["out_channels"])
    if channels != (3, 3):
        raise ValueError(f"the page shows red, green and blue, so the tokenizer must have 3 channels, got {channels}.")
    folder.mkdir()
    model = plain_copy(model)
    save_stored_in_float16(encoder_graph(model), folder / "encoder.onnx")
    save_stored_in_float16(decoder_graph(model), folder / "decoder.onnx")
    encode = load_graph(folder / "encoder.onnx")
    decode = load_graph(folder / "decoder.onnx")
    return compare_graphs(model, encode, decode)


def save_stored_in_float16(graph: onnx.ModelProto, path: Path) -> None:
    """Writes a graph with its weights in float16."""
    store_in_float16(graph)
    check_size(graph.ByteSize())
    onnx.save(graph, path)


def write_tokenizer(tokenizer: Any, vocabulary: ImageVocabulary, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` without the codes, whose tokens the page knows by number."""
    codes = range(vocabulary.first_token, vocabulary.begin)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        content = read_json_object(Path(saved, "tokenizer.json"))
        config = read_json_object(Path(saved, "tokenizer_config.json"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] not in codes]
    for key in ("added_tokens_decoder", "chat_template", "name_or_path"):  # long, or of this machine
        config.pop(key, None)
    content_text = json.dumps(content, ensure_ascii=False)
    config_text = json.dumps(config, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(content_text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(config_text, encoding="utf-8")


def drawing_settings(drawing: DrawingModel) -> dict[str, Any]:
    """All that the page must know to draw."""
    model = drawing.model
    vocabulary = model.processor.vocabulary
    rows, columns = vocabulary.grids[0]
    sampling = model.sampling
    if sampling["top_p"] != 1:
        raise ValueError(f"the page samples by top k alone, so `top_p` must be 1, got {sampling['top_p']}.")
    template = prompt_template(model, (rows, columns))
    layers, _, _, heads, _, head_dim = cache_shape(model.language_model)
    context = model.language_model.config.get_text_config().max_position_embeddings
    num_read_ids = rows * columns - 1  # the model does not read the last id
    settings = decoding_settings(model.vqvae)
    settings |= listed_objects(model)
    settings |= {
        "rows": rows,
        "columns": columns,
        "guidance": sampling["guidance_scale"],
        "temperature": sampling["temperature"],
        "top_k": sampling["top_k"] or vocabulary.codebook_size,
        "before": template.before,
        "after": template.after,
        "begin_image": template.begin_image,
        "rewrites": model.rewrites,
        "max_rewritten_tokens": MAX_REWRITTEN_TOKENS,
        "begin_token": vocabulary.begin,
        "end_token": model.tokenizer.eos_token_id,
        "add_special_tokens": template.add_special_tokens,
        "no_condition": model.processor.no_condition,
        "pad_token": model.tokenizer.pad_token_id,
        "max_prompt_tokens": context - num_read_ids,
        "layers": layers,
        "heads": heads,
        "head_dim": head_dim,
        "examples": drawing.examples,
    }
    return settings


def listed_objects(model: ImageLanguageModel) -> dict[str, tuple[str, ...]]:
    """Names of the objects and grounds that the model can draw, if it lists them."""
    if model.known_objects is None:
        return {"objects": (), "grounds": ()}
    return {"objects": model.known_objects.objects, "grounds": model.known_objects.grounds}


def decoding_settings(model: SVQVAE) -> dict[str, Any]:
    """All that the page must know about a tokenizer."""
    return {
        "f": model.f,
        "pixel_range": list(model.config["pixel_range"]),
        "codebook_size": model.config["codebook_size"],
        "token_record": token_record(model),
    }


def token_record(model: SVQVAE) -> str:
    """JSON of a token file's metadata, in which the page replaces WIDTH and HEIGHT by the size of a picture.

    The checksum of a token file covers these very characters, so Python writes them.
    """
    one_id = torch.zeros((1, 1), dtype=torch.int64)
    record = image_tokens(model, [one_id], height=model.f, width=model.f, scales=1.0).to_record()
    record["height"] = "HEIGHT"
    record["width"] = "WIDTH"
    text = json.dumps(record)
    return text.replace('"HEIGHT"', "HEIGHT").replace('"WIDTH"', "WIDTH")  # without the quotes


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file, by its path in the folder."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path_in_folder = path.relative_to(folder).as_posix()
            sizes[path_in_folder] = path.stat().st_size
    return sizes


def check_size(total: int) -> None:
    """Raises ValueError for a page that no browser could load."""
    if total > MAX_BYTES:
        raise ValueError(
            f"the page must have at most {MAX_BYTES / 1e6:,.0f} MB to fit the memory of a browser, but would have "
            f"{total / 1e6:,.0f} MB. Export a smaller model."
        )


def readme(models: Iterable[DrawingModel | PhotographModel]) -> str:
    """README of the folder, which is the card of a static Space."""
    text = (Path(__file__).parent / "page_readme.md").read_text(encoding="utf-8")
    rows = [f"| `{model.name}` | {model.license} |" for model in models]
    return text.replace("MODELS", "\n".join(rows))


def licenses(models: Iterable[DrawingModel | PhotographModel], archives: Path) -> str:
    """Licences of all that is in the folder."""
    onnxruntime_folder = Path(onnxruntime.__file__).parent
    onnxruntime_license = (onnxruntime_folder / "LICENSE").read_text(encoding="utf-8")
    notices = (onnxruntime_folder / "ThirdPartyNotices.txt").read_text(encoding="utf-8", errors="replace")
    weights = [f"Weights of {model.name}: {model.license}" for model in models]
    parts = [
        "\n".join(weights),
        "Page (index.html, page.css, page.js, worker.js), tokenizers.min.mjs: Apache License 2.0, below",
        "ONNX Runtime Web (ort.wasm.bundle.min.mjs, ort-wasm-simd-threaded.wasm): MIT License, below",
        tokenizers_license(archives),
        onnxruntime_license,
        f"Third-party software in ONNX Runtime\n\n{notices}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"
