import json
import shutil

import numpy as np
import pytest
import torch
from cli_runner import names
from conftest import Lazy, make_tiny
from tiny_language_models import extended

import svqvae_cli
from svqvae_hf import DEFAULT_GENERATOR, DEFAULT_MODEL, ImageTokens
from svqvae_hf.language.image_language_model import ImageLanguageModel

web = Lazy("svqvae_hf.export.web")
web_runtime = Lazy("svqvae_hf.export.web_runtime")
float16_weights = Lazy("svqvae_hf.export.float16_weights")
prompts = Lazy("svqvae_hf.export.prompts")
drawing_comparison = Lazy("svqvae_hf.export.drawing_comparison")
drawing_graph = Lazy("svqvae_hf.export.drawing_graph")


@pytest.fixture(scope="module")
def language_model():
    return ImageLanguageModel.from_pretrained(DEFAULT_GENERATOR, dtype="float32")


def graph_of(values):
    """A graph that returns a weight."""
    onnx = web.onnx
    weight = onnx.numpy_helper.from_array(values, "weight")
    output = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, values.shape)
    node = onnx.helper.make_node("Identity", ["weight"], ["output"])
    graph = onnx.helper.make_graph([node], "graph", [], [output], [weight])
    opset = onnx.helper.make_opsetid("", 18)  # the default may be newer than what onnxruntime reads
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)


@pytest.mark.parametrize(("factor", "is_stored_in_float16"), [(1, True), (1.0001, False), (1e6, False)])
def test_only_weights_that_stay_equal_are_stored_in_float16(factor, is_stored_in_float16):
    values = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float16).astype(np.float32)
    values *= np.float32(factor)
    graph = graph_of(values)
    float16_weights.store_in_float16(graph)
    (stored,) = graph.graph.initializer
    assert (stored.data_type == web.onnx.TensorProto.FLOAT16) == is_stored_in_float16
    session = web.onnxruntime.InferenceSession(graph.SerializeToString())
    (output,) = session.run(None, {})
    np.testing.assert_array_equal(output, values)


def test_prompts_are_those_of_draw(language_model):
    template = prompts.prompt_template(language_model, (12, 12))
    begin_image = language_model.processor.begin_image((12, 12))
    for caption in ("a tiny fox", "please draw two airplanes!"):
        for written in ("", "a small fox on white"):
            expected = language_model._ask([caption], [written + begin_image])["input_ids"][0].tolist()
            assert template.tokens(language_model.tokenizer, caption, written) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", ["qwen", "neox"])
def test_graph_draws_the_ids_of_language_models_of_other_kinds(family, tmp_path):
    model = ImageLanguageModel.from_pretrained(extended(family), dtype="float32")
    with torch.no_grad():
        graph = drawing_graph.drawing_graph(model.language_model, model.processor.vocabulary)
    web.onnx.save(graph, tmp_path / "row.onnx")
    draw_row = drawing_comparison.load_row_graph(tmp_path / "row.onnx")
    captions = [None, "a", "a longer caption"]
    checked = drawing_comparison.compare_drawings(model, draw_row, model.vqvae.decode_tokens, captions)
    assert checked.startswith("0 of ")

    def draw_other_ids(inputs):
        *others, ids, text_tokens = draw_row(inputs)
        return [*others, ids ^ 1, text_tokens]

    with pytest.raises(ValueError, match=r"the drawing graph: at most 1 in 100 ids may differ from the model's, but"):
        drawing_comparison.compare_drawings(model, draw_other_ids, model.vqvae.decode_tokens, captions)

    model.language_model.generation_config.generation_kwargs = {"rewrite_captions": True}
    checked = drawing_comparison.compare_drawings(model, draw_row, model.vqvae.decode_tokens, captions)
    assert checked.startswith("0 of ")

    def write_other_text(inputs):
        *others, text_tokens = draw_row(inputs)
        return [*others, text_tokens ^ 1]

    with pytest.raises(ValueError, match=r"the drawing graph: it must rewrite 'a' as the model does, "):
        drawing_comparison.compare_drawings(model, write_other_text, model.vqvae.decode_tokens, captions)


def test_tokenizer_keeps_all_but_the_codes(language_model, tmp_path):
    vocabulary = language_model.processor.vocabulary
    web.write_tokenizer(language_model.tokenizer, vocabulary, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {token["id"] for token in content["added_tokens"]}
    assert added.isdisjoint(range(vocabulary.first_token, vocabulary.begin))
    assert {vocabulary.begin, vocabulary.no_condition, vocabulary.first_size} <= added


def test_token_record_is_that_of_a_token_file():
    model = make_tiny()
    text = web.token_record(model).replace("WIDTH", "17").replace("HEIGHT", "9")
    ids = torch.zeros((-(-9 // model.f), -(-17 // model.f)), dtype=torch.int64)
    tokens = ImageTokens.from_record(json.loads(text), ids=[ids])
    assert (tokens.height, tokens.width, tokens.scales) == (9, 17, (1.0,))
    assert json.dumps(tokens.to_record()) == text


def test_other_archives_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must have the file `onnxruntime-web-.*\.tgz`, but has not\. `npm pack "):
        web_runtime.check_archives(tmp_path)
    for package in web_runtime.PACKAGES:
        (tmp_path / package.archive).write_bytes(b"another version")
    with pytest.raises(ValueError, match=r"must be onnxruntime-web@.* as it was published, but its SHA-512 differs"):
        web_runtime.check_archives(tmp_path)


def test_without_npm_the_error_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OSError, match=r"npm must be installed .* run `npm pack onnxruntime-web@.* with --runtime"):
        web_runtime.download_archives(tmp_path)


def test_wrong_models_leave_no_folder(tmp_path, language_model, monkeypatch):
    monkeypatch.setattr("svqvae_hf.export.web_runtime.check_archives", lambda folder: None)
    monkeypatch.setattr("svqvae_hf.export.web.extract_runtime", lambda archives, folder: folder.mkdir())
    grey = web.PhotographModel(make_tiny(in_channels=1, out_channels=1), "grey", "mit")
    with pytest.raises(ValueError, match=r"so the tokenizer must have 3 channels, got \(1, 1\)"):
        web.export_page(tmp_path / "page", photographs=grey, runtime=tmp_path)
    with pytest.raises(ValueError, match="must have a language model or a tokenizer, got neither"):
        web.export_page(tmp_path / "page")
    assert names(tmp_path) == []


def test_too_large_a_page_is_refused():
    with pytest.raises(ValueError, match="at most 1,000 MB to fit the memory of a browser, but would have 1,200 MB"):
        web.check_size(1_200_000_000)


def test_command_refuses_wrong_arguments(tmp_path, capsys):
    out = str(tmp_path / "page")
    wrong = {
        ("bundled", "scenes"): "MODEL must be one tokenizer without --web, got 2.",
        ("bundled", "--runtime", "."): "--runtime applies to --web alone.",
        ("bundled", DEFAULT_MODEL, "--web"): "MODEL must be at most one tokenizer, got ",
        ("bundled", "--web", "--runtime", str(tmp_path)): "must have the file `onnxruntime-web-",
    }
    for arguments, message in wrong.items():
        assert svqvae_cli.main(["export", *arguments, "--output", out]) == 2
        assert message in capsys.readouterr().err
    assert names(tmp_path) == []
