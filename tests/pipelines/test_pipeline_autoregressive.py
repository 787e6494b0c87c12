"""The autoregressive pipeline with small random language models of several families."""

import json
import math
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny
from diffusers import DiffusionPipeline
from hub_server import run_python, serve_hub
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import svqvae_hf
from svqvae_cli import main
from svqvae_hf import SVQVAEAutoregressivePipeline, SVQVAEImageProcessor
from svqvae_hf.pipelines.pipeline_autoregressive import _draw
from svqvae_hf.pipelines.sequences import LayoutLogitsProcessor, SequenceLayout

SCALES = (0.25, 0.5, 1.0)
LAYOUT = SequenceLayout(64, 4, 32, 16, SCALES, 3)
ONE_SCALE = SequenceLayout(64, 4, 32, 16, (1.0,), 3)
FAMILIES = [LlamaForCausalLM, GPT2LMHeadModel, Qwen2ForCausalLM, Qwen3ForCausalLM]

# Loads the saved pipeline by folder and by Hub id, with each of the two classes, and stores what they sample.
RELOAD = """
import pickle, sys, torch
from diffusers import DiffusionPipeline
import svqvae_hf

folder, out = sys.argv[1:]
svqvae_hf.SVQVAEAutoregressivePipeline.from_pretrained(folder).push_to_hub("org/dreams")
images = [
    cls.from_pretrained(source)([0, 2], generator=torch.Generator().manual_seed(0), output_type="np").images
    for cls in (DiffusionPipeline, svqvae_hf.SVQVAEAutoregressivePipeline)
    for source in (folder, "org/dreams")
]
open(out, "wb").write(pickle.dumps(images))
"""


def make_language_model(cls=LlamaForCausalLM, layout=LAYOUT, **config):
    """Builds one whose next token depends much on the tokens before."""
    torch.manual_seed(0)
    common = {
        "vocab_size": layout.vocab_size,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if cls is GPT2LMHeadModel:
        sizes = {"n_positions": layout.length, "n_embd": 32, "n_layer": 2, "n_head": 2}
        return cls(GPT2Config(**(common | sizes | config))).eval()
    sizes = {
        "max_position_embeddings": layout.length,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    family = {LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config, Qwen3ForCausalLM: Qwen3Config}[cls]
    return cls(family(**(common | sizes | config))).eval()


def make_pipeline(cls=LlamaForCausalLM, layout=LAYOUT, **config):
    pipeline = SVQVAEAutoregressivePipeline(
        make_tiny(),
        make_language_model(cls, layout, **config),
        num_classes=layout.num_classes,
        height=layout.height,
        width=layout.width,
        scales=layout.scales,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample_ids(pipeline, *args, **call):
    """Ids at all scales."""
    return pipeline(*args, **call, scales=list(pipeline.layout.scales), output_type="latent").images


def check_greedy(pipeline, ids, labels, guidance_scale=1.0, given=(0, 0, 0)):
    """Each token below the rows given is the most likely one, by one pass of the language model without a cache."""
    layout = pipeline.layout
    conditional = layout.encode(ids, labels)
    unconditional = layout.encode(ids)
    logits, free = (pipeline.language_model(each, use_cache=False).logits for each in (conditional, unconditional))
    guided = free + guidance_scale * (logits - free)
    for span, (_, columns), rows in zip(layout.spans, layout.grids, given, strict=False):
        positions = slice(span.start + rows * columns, span.stop)
        best = guided[:, positions.start - 1 : positions.stop - 1, : layout.codebook_size].argmax(-1)
        assert torch.equal(conditional[:, positions], best)


@pytest.fixture
def pipeline():
    return make_pipeline()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    make_pipeline().save_pretrained(folder)
    return folder


# Sampling


@pytest.mark.parametrize("cls", FAMILIES)
def test_greedy_ids_are_those_of_generate_without_a_cache(cls):
    pipeline = make_pipeline(cls)
    ids = sample_ids(pipeline, [0, 1, 2], temperature=0)
    sequences = pipeline.language_model.generate(
        LAYOUT.codebook_size + torch.arange(3)[:, None],
        logits_processor=[LayoutLogitsProcessor(LAYOUT)],
        max_new_tokens=LAYOUT.length - 1,
        do_sample=False,
        use_cache=False,
    )
    assert all(map(torch.equal, ids, LAYOUT.decode(sequences)[0]))
    assert len(ids[-1].unique()) > 16
    check_greedy(pipeline, ids, torch.arange(3))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_cache_changes_nothing(pipeline, monkeypatch, guidance_scale):
    call = {"class_labels": [0, 1], "guidance_scale": guidance_scale, "top_k": 20, "temperature": 1.5}
    cached = sample_ids(pipeline, **call, generator=seeded())
    forward, read, lengths = pipeline.language_model.forward, [], []

    def forward_all(input_ids, use_cache, **cache):
        read[:] = [torch.cat([*(read if cache else []), input_ids], dim=1)]
        lengths.append(input_ids.shape[1])
        output = forward(read[0], use_cache=False)
        output["past_key_values"] = "all read"
        return output

    monkeypatch.setattr(pipeline.language_model, "forward", forward_all)
    assert all(map(torch.equal, cached, sample_ids(pipeline, **call, generator=seeded())))
    assert sorted(lengths)[-3:] == [1, 2, 2]  # a separator is read with the id before it, anything else alone


def test_guidance_mixes_conditional_and_unconditional_logits(pipeline):
    ids = sample_ids(pipeline, [0, 1, 2], temperature=0, guidance_scale=3.0)
    check_greedy(pipeline, ids, torch.arange(3), guidance_scale=3.0)
    plain = sample_ids(pipeline, [0, 1, 2], temperature=0)
    assert not torch.equal(ids[-1], plain[-1])


def test_guidance_of_1_is_no_guidance(pipeline):
    batches = []
    hook = pipeline.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    plain, one, near = (
        sample_ids(pipeline, [0, 1], generator=seeded(), **call)
        for call in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 1 + 1e-7})
    )
    hook.remove()
    assert all(map(torch.equal, plain, one))
    assert all(map(torch.equal, plain, near))  # by way of both branches
    tokens = sum(rows * columns for rows, columns in LAYOUT.grids)
    assert batches == [2] * (2 * tokens) + [4] * tokens


def test_a_thousand_samples_of_an_untrained_model_all_decode(pipeline):
    ids, half, whole = pipeline(num_images_per_prompt=1000, scales=SCALES, generator=seeded(), output_type="pt").images
    assert ids.shape == (1000, 3, 8, 4)
    assert half.shape == (1000, 3, 16, 8)
    assert whole.shape == (1000, 3, 32, 16)
    assert torch.isfinite(whole).all()


def test_draws_follow_the_probabilities():
    scores = torch.tensor([2.0, 1.0, -torch.inf, 0.0, -1.0])
    draws = _draw(scores.expand(100_000, -1), seeded())
    shares = torch.bincount(draws, minlength=5) / len(draws)
    torch.testing.assert_close(shares, scores.softmax(0), atol=0.006, rtol=0)
    assert shares[2] == 0


def test_seeds(pipeline):
    ids = sample_ids(pipeline, [0, 1, 2], generator=seeded())
    assert all(map(torch.equal, ids, sample_ids(pipeline, [0, 1, 2], generator=seeded())))
    assert not torch.equal(ids[-1], sample_ids(pipeline, [0, 1, 2], generator=seeded(1))[-1])
    batch = sample_ids(pipeline, [0, 1, 2], generator=[seeded(5), seeded(6), seeded(7)])
    alone = sample_ids(pipeline, 1, generator=[seeded(6)])
    assert all(torch.equal(each[1:2], one) for each, one in zip(batch, alone, strict=True))


def test_temperature_top_k_and_top_p(pipeline):
    greedy = sample_ids(pipeline, [0, 1], temperature=0)
    for call in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert all(map(torch.equal, greedy, sample_ids(pipeline, [0, 1], generator=seeded(), **call)))
    ids = sample_ids(pipeline, [0, 1], top_k=3, temperature=100.0, generator=seeded())
    sequences = LAYOUT.encode(ids, torch.tensor([0, 1]))
    logits = pipeline.language_model(sequences).logits[:, :-1, :64]
    chosen = sequences[:, 1:].clamp(max=63)
    ranks = (logits > logits.gather(-1, chosen[..., None])).sum(-1)
    is_id = sequences[:, 1:] < 64
    assert ranks[is_id].max() == 2  # of 0, 1, 2: at this temperature all of them are drawn
    assert len(ranks[is_id].unique()) == 3


def test_labels_and_images_for_each(pipeline):
    ids = sample_ids(pipeline, [2, 0], num_images_per_prompt=2, temperature=0)
    for grid, of_2, of_0, of_none in zip(
        ids,
        sample_ids(pipeline, 2, temperature=0),
        sample_ids(pipeline, torch.tensor(0), temperature=0),
        sample_ids(pipeline, temperature=0),
        strict=True,
    ):
        assert torch.equal(grid, torch.cat([of_2, of_2, of_0, of_0]))
        assert not torch.equal(of_0, of_none)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipeline, dtype):
    pipeline.language_model.to(dtype)
    images = pipeline([0, 1], generator=seeded(), guidance_scale=2.0, top_k=10, output_type="np").images
    assert images.shape == (2, 32, 16, 3)
    again = pipeline([0, 1], generator=seeded(), guidance_scale=2.0, top_k=10, output_type="np").images
    assert np.array_equal(images, again)


def test_it_samples_in_evaluation_mode():
    pipeline = make_pipeline(attention_dropout=0.5)
    ids = sample_ids(pipeline, [0, 1], temperature=0)
    parts = {"num_classes": 3, "height": 32, "width": 16, "scales": SCALES}
    trained = SVQVAEAutoregressivePipeline(pipeline.vqvae.train(), pipeline.language_model.train(), **parts)
    trained.set_progress_bar_config(disable=True)
    assert all(map(torch.equal, ids, sample_ids(trained, [0, 1], temperature=0)))
    assert all(module.training for module in (*trained.vqvae.modules(), *trained.language_model.modules()))


def test_a_compiled_language_model(tmp_path):
    pipeline = make_pipeline()
    ids = sample_ids(pipeline, [0, 1], generator=seeded())
    pipeline.language_model = torch.compile(pipeline.language_model, backend="eager")
    with torch.compiler.set_stance("force_eager"):  # compiling takes half a minute
        compiled = sample_ids(pipeline, [0, 1], generator=seeded())
    assert all(map(torch.equal, ids, compiled))
    pipeline.save_pretrained(tmp_path)
    loaded = SVQVAEAutoregressivePipeline.from_pretrained(tmp_path)
    assert all(map(torch.equal, ids, sample_ids(loaded, [0, 1], generator=seeded())))


# Images


def test_scales_are_given_in_the_order_asked_and_sampling_ends_with_the_finest(pipeline):
    whole, coarse = pipeline(0, scales=[1.0, 0.25], generator=seeded()).images
    assert [image.size for image in (*whole, *coarse)] == [(16, 32), (4, 8)]
    assert np.array_equal(whole[0], pipeline(0, generator=seeded()).images[0])
    steps = []
    (again,) = pipeline(
        0, scales=[0.25], generator=seeded(), callback_on_step_end=lambda *step: steps.append(step)
    ).images
    assert np.array_equal(again[0], coarse[0])
    assert len(steps) == 2


@pytest.mark.usefixtures("no_grad")
def test_output_types(pipeline):
    call = {"class_labels": [0, 1], "generator": seeded()}
    ids = pipeline(**call, output_type="latent").images
    sample = pipeline.vqvae.decode_tokens(ids)
    torch.testing.assert_close(pipeline(**call | {"generator": seeded()}, output_type="pt").images, sample)
    arrays = pipeline(**call | {"generator": seeded()}, output_type="np").images
    np.testing.assert_allclose(arrays, sample.permute(0, 2, 3, 1), atol=1e-6)
    (pictures,) = pipeline(**call | {"generator": seeded()}, return_dict=False)
    assert all(np.array_equal(image, np.rint(array * 255)) for image, array in zip(pictures, arrays, strict=True))


def test_a_size_that_needs_as_many_ids_is_cropped(pipeline):
    call = {"scales": (0.5, 1.0), "output_type": "np"}
    half, whole = pipeline(0, **call, generator=seeded()).images
    cropped_half, cropped = pipeline(0, **call, height=30, width=14, generator=seeded()).images
    np.testing.assert_allclose(cropped, whole[:, :30, :14], atol=1e-6)
    np.testing.assert_allclose(cropped_half, half[:, :15, :7], atol=1e-6)


def test_a_vqvae_of_another_range(pipeline):
    images = pipeline(0, generator=seeded(), output_type="np").images
    parts = {"num_classes": 3, "height": 32, "width": 16, "scales": SCALES}
    signed = SVQVAEAutoregressivePipeline(make_tiny(pixel_range=(-1, 1)), pipeline.language_model, **parts)
    np.testing.assert_allclose(signed(0, generator=seeded(), output_type="np").images, images, atol=1e-5)


def test_the_callback_sees_each_row_and_each_whole_scale(pipeline):
    seen = []

    def look(pipe, step, scale, tensors):
        seen.append((step, scale, tensors["ids"], pipe.vqvae.decode_tokens(tensors["ids"])))

    call = {"class_labels": [0, 1], "generator": seeded(), "scales": SCALES}
    images = pipeline(**call, output_type="pt", callback_on_step_end=look).images
    ids = sample_ids(pipeline, [0, 1], generator=seeded())
    assert [step for step, *_ in seen] == list(range(2 + 4 + 8))
    for scale, grid, image in zip(SCALES, ids, images, strict=True):
        of_scale = [(rows, preview) for _, each, rows, preview in seen if each == scale]
        assert len(of_scale) == grid.shape[1]
        assert all(torch.equal(rows, grid[:, :count]) for count, (rows, _) in enumerate(of_scale, start=1))
        torch.testing.assert_close(of_scale[-1][1], image)


# Completing


@pytest.mark.parametrize("layout", [ONE_SCALE, LAYOUT])
def test_top_rows_are_kept_and_the_rest_goes_on_from_them(layout, photo):
    pipeline = make_pipeline(layout=layout)
    top = photo.resize((16, 32)).crop((0, 0, 16, 16))
    sample = SVQVAEImageProcessor()(top)["pixel_values"]
    known = pipeline.vqvae.encode_tokens(sample, layout.scales)
    ids = sample_ids(pipeline, [0, 1], image=top, temperature=0)
    assert all(
        torch.equal(grid[:, : rows.shape[1]], rows.expand(2, -1, -1)) for grid, rows in zip(ids, known, strict=True)
    )
    assert [grid.shape[1:] for grid in ids] == list(layout.grids)
    check_greedy(pipeline, ids, torch.tensor([0, 1]), given=[rows.shape[1] for rows in known])


def test_an_image_for_each_label(pipeline, photo):
    tops = [photo.resize((16, 16)), photo.rotate(180).resize((16, 16))]
    ids = sample_ids(pipeline, [0, 1], image=tops, temperature=0, num_images_per_prompt=2)
    alone = sample_ids(pipeline, 1, image=tops[1], temperature=0)
    assert all(torch.equal(grid[2:], one.expand(2, -1, -1)) for grid, one in zip(ids, alone, strict=True))
    assert len(sample_ids(pipeline, image=tops)[0]) == 2


# Saved pipelines


def test_a_saved_pipeline_is_the_same_with_both_classes(saved, pipeline):
    ids = sample_ids(pipeline, [0, 2], generator=seeded())
    for cls in (SVQVAEAutoregressivePipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(saved)
        assert type(loaded) is SVQVAEAutoregressivePipeline
        assert loaded.layout == pipeline.layout
        assert all(map(torch.equal, ids, sample_ids(loaded, [0, 2], generator=seeded())))
    half = SVQVAEAutoregressivePipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert half.language_model.dtype == half.vqvae.dtype == torch.bfloat16


def test_it_loads_by_folder_and_by_hub_id_in_a_new_process(saved, pipeline, tmp_path):
    with serve_hub(tmp_path) as env:
        run_python(RELOAD, env, saved, tmp_path / "images.pickle")
    expected = pipeline([0, 2], generator=seeded(), output_type="np").images
    images = pickle.loads((tmp_path / "images.pickle").read_bytes())
    assert len(images) == 4
    for each in images:
        np.testing.assert_allclose(each, expected, atol=1e-5)


def test_weights_are_read_strictly_and_from_safetensors_only(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "broken")
    file = tmp_path / "broken" / "language_model" / "model.safetensors"
    weights = load_file(file)
    weights["other"] = weights.pop("model.norm.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape("missing: model.norm.weight; unexpected: other. Restore")):
        SVQVAEAutoregressivePipeline.from_pretrained(tmp_path / "broken")
    file.unlink()
    torch.save(weights, file.with_name("pytorch_model.bin"))
    with pytest.raises(OSError, match="safetensors"):
        SVQVAEAutoregressivePipeline.from_pretrained(tmp_path / "broken")
    shutil.copytree(saved, tmp_path / "pickled")
    file = tmp_path / "pickled" / "vqvae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        SVQVAEAutoregressivePipeline.from_pretrained(tmp_path / "pickled")


def test_another_codebook_is_refused(saved, tmp_path):
    other = make_tiny()
    with torch.no_grad():
        other.decoder.conv_out.weight.mul_(2)
    for cls in (SVQVAEAutoregressivePipeline, DiffusionPipeline):
        assert cls.from_pretrained(saved, vqvae=other).vqvae is other  # its ids are the same
    with torch.no_grad():
        other.quantize.embedding.weight[3] *= -1
    for cls in (SVQVAEAutoregressivePipeline, DiffusionPipeline):
        with pytest.raises(ValueError, match="must have the codebook whose ids .* but has one with .* Use the SVQVAE"):
            cls.from_pretrained(saved, vqvae=other)
    old = shutil.copytree(saved, tmp_path / "old") / "model_index.json"
    index = json.loads(old.read_text())
    assert index.pop("codebook_fingerprint") == make_tiny().codebook_fingerprint()
    old.write_text(json.dumps(index))
    for cls in (SVQVAEAutoregressivePipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(old.parent, vqvae=other)
        assert loaded.config["codebook_fingerprint"] == other.codebook_fingerprint()


def test_weights_of_another_kind_are_neither_read_nor_written(saved, pipeline, tmp_path):
    with pytest.raises(ValueError, match="`use_safetensors` must be True, since .* is False. Leave it out"):
        SVQVAEAutoregressivePipeline.from_pretrained(saved, use_safetensors=False)
    with pytest.raises(ValueError, match="`safe_serialization` must be True, since .* is False. Leave it out"):
        pipeline.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


def test_sizes_are_those_of_the_model_unless_given():
    layout = SequenceLayout(64, 4, 16, 16)
    pipeline = SVQVAEAutoregressivePipeline(make_tiny(sample_size=16), make_language_model(layout=layout))
    assert pipeline.layout == layout
    assert svqvae_hf.SVQVAEAutoregressivePipeline is SVQVAEAutoregressivePipeline


# svqvae generate


@pytest.mark.usefixtures("process")
def test_generate_writes_images_and_a_sheet(saved, pipeline, tmp_path):
    arguments = ["--class", "2", "0", "--num-images", "3", "--scales", "1", "0.5", "--seed", "7", "--top-k", "9"]
    arguments += ["--guidance-scale", "2", "--temperature", "0.9", "--top-p", "0.8", "--output", str(tmp_path)]
    assert main(["generate", str(saved), *arguments]) == 0
    names = {f"class_{label}_{index}_x{scale}.png" for label in (2, 0) for index in range(3) for scale in ("1", "0.5")}
    assert {file.name for file in tmp_path.iterdir()} == names | {"sheet.png"}
    whole, half = pipeline(
        0, scales=[1.0, 0.5], generator=[seeded(7 + 4)], top_k=9, guidance_scale=2.0, temperature=0.9, top_p=0.8
    ).images
    for name, (image,) in {"class_0_1_x1.png": whole, "class_0_1_x0.5.png": half}.items():
        assert np.array_equal(Image.open(tmp_path / name), image)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (3 * 16, 2 * 32)
    assert np.array_equal(sheet.crop((16, 32, 32, 64)), whole[0])


@pytest.mark.usefixtures("process")
def test_generate_without_a_class(saved, tmp_path):
    assert main(["generate", str(saved), "--output", str(tmp_path / "out")]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"image_0_x1.png", "sheet.png"}


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{saved}", "--class", "3"], "`class_labels` must be whole numbers in [0, 3)"),
        (["{saved}", "--scales", "2"], "`scales` must be among [0.25, 0.5, 1.0]"),
        (["{saved}/vqvae"], "no file named model_index.json found"),
        (["{ldm}"], "must be a SVQVAEAutoregressivePipeline, but is a LDMPipeline."),
        (["nobody"], "there is no file or folder `nobody`"),
    ],
)
def test_generate_answers_a_mistake_in_one_line(saved, tmp_path, capsys, arguments, message):
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm" / "model_index.json").write_text('{"_class_name": "LDMPipeline"}')
    folders = {"saved": saved, "ldm": tmp_path / "ldm"}
    out = tmp_path / "out"
    assert main(["generate", *(each.format(**folders) for each in arguments), "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("svqvae: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


# Wrong input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"class_labels": 3},
            "`class_labels` must be whole numbers in [0, 3), the classes that the",
        ),
        ({"class_labels": [0, -1]}, "`class_labels` must be whole numbers in [0, 3)"),
        ({"class_labels": [0.5]}, "`class_labels` must be whole numbers in [0, 3)"),
        ({"class_labels": []}, "`class_labels` must be whole numbers in [0, 3)"),
        ({"class_labels": "cat"}, "the classes that the language model was trained on, but are 'cat'."),
        ({"class_labels": True}, "`class_labels` must be whole numbers in [0, 3)"),
        ({"class_labels": [[0], [1, 2]]}, "`class_labels` must be whole numbers in [0, 3)"),
        ({"class_labels": 2**70}, "`class_labels` must be whole numbers in [0, 3)"),
        ({"class_labels": [None]}, "`class_labels` must be whole numbers in [0, 3)"),
        ({"scales": 0.5}, "`scales` must be among [0.25, 0.5, 1.0], those that the language model was trained on"),
        ({"scales": [[0.5]]}, "`scales` must be among [0.25, 0.5, 1.0], those that the language model was trained on"),
        ({"scales": "0.5"}, "each once, but are '0.5'. Give a list of such."),
        ({"scales": [2.0]}, "`scales` must be among [0.25, 0.5, 1.0], those that the language model was trained on"),
        ({"scales": []}, "`scales` must be among [0.25, 0.5, 1.0]"),
        ({"scales": [1.0, 1.0]}, "`scales` must be among [0.25, 0.5, 1.0]"),
        ({"height": 64}, "`height` and `width` must be 32 and 16, those that the language model was trained on"),
        ({"width": 0}, "`width` must be a whole number of at least 1"),
        ({"guidance_scale": 2.0}, "`guidance_scale` = 2.0 needs `class_labels`"),
        *(
            (
                {"guidance_scale": value, "class_labels": 0},
                f"`guidance_scale` must be in [-1e+06, 1e+06], but is {value!r}",
            )
            for value in (math.nan, math.inf, -math.inf, 1e38, None, "2", True)
        ),
        *(
            ({"temperature": value}, f"`temperature` must be 0 or in [1e-06, 1e+06], but is {value!r}.")
            for value in (-1.0, 1e-40, 1e300, math.nan, math.inf, None, "1", False)
        ),
        ({"top_k": True}, "`top_k` must be a whole number of at least 0, but is True"),
        ({"top_p": None}, "`top_p` must be above 0 and at most 1, but is None"),
        ({"top_p": math.nan}, "`top_p` must be above 0 and at most 1, but is nan"),
        ({"num_images_per_prompt": True}, "`num_images_per_prompt` must be a whole number above 0, but is True"),
        (
            {"generator": 5},
            "`generator` must be a `torch.Generator`, or a list of them, one for each image, but is 5.",
        ),
        ({"generator": [None]}, "`generator` must be a `torch.Generator`, or a list of them"),
        ({"top_k": 0.5}, "`top_k` must be a whole number of at least 0, but is 0.5"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, but is 0.0"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be a whole number above 0, but is 0"),
        ({"output_type": "jpeg"}, "`output_type` must be one of pil, np, pt, latent, but is 'jpeg'"),
        ({"generator": [seeded()] * 2}, "there must be one generator for each of 1 images, but are 2"),
        (
            {"image": torch.rand(3, 16, 20)},
            "`image` must be 16 pixels wide, at most 32 high, and a whole",
        ),
        ({"image": torch.rand(3, 48, 16)}, "But one is 16 x 48 (width x height). Crop it."),
        ({"image": torch.rand(3, 8, 16)}, "But one is 16 x 8 (width x height). Crop it."),
        ({"image": [torch.rand(3, 16, 16), torch.rand(3, 32, 16)]}, "several must have one size. But one is 16 x 32"),
        (
            {"image": [torch.rand(3, 16, 16)] * 3, "class_labels": [0, 1]},
            "there must be one `image`, or one for each of 2 labels, but are 3",
        ),
    ],
)
def test_one_clear_error_for_a_wrong_call(pipeline, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline(**call)


def test_one_clear_error_for_parts_that_do_not_fit():
    parts = {"num_classes": 3, "height": 32, "width": 16, "scales": SCALES}
    other = make_language_model(vocab_size=64)
    with pytest.raises(ValueError, match="must have 70 tokens, 64 codes, 3 classes, one for no class and 2"):
        SVQVAEAutoregressivePipeline(make_tiny(), other, **parts)
    short = make_language_model(max_position_embeddings=44)
    with pytest.raises(ValueError, match="must take 45 tokens, the length of a sequence, but takes 44"):
        SVQVAEAutoregressivePipeline(make_tiny(), short, **parts)
    with pytest.raises(ValueError, match="`scales` must be above 0, finite and rise"):
        SVQVAEAutoregressivePipeline(make_tiny(), other, **parts | {"scales": [1.0, 0.5]})


@pytest.mark.parametrize(
    "call",
    [{}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9}, {"class_labels": 0, "guidance_scale": 2.0}],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_clear_error_for_logits_that_cannot_be_sampled_from(pipeline, call, value):
    with torch.no_grad():
        pipeline.language_model.lm_head.weight[5] = value
    steps = []
    with pytest.raises(
        ValueError, match=r"but those of LlamaForCausalLM in torch.float32 are not\. Load it in another"
    ):
        pipeline(**call, callback_on_step_end=lambda *step: steps.append(step))
    assert not steps


def test_logits_of_tokens_that_are_not_allowed_do_not_matter(pipeline):
    ids = sample_ids(pipeline, generator=seeded())
    with torch.no_grad():
        pipeline.language_model.lm_head.weight[64:] = math.nan
    assert all(map(torch.equal, ids, sample_ids(pipeline, generator=seeded())))


def test_some_logits_of_minus_infinity_are_never_drawn(pipeline):
    forward = pipeline.language_model.forward

    def forward_half(**call):
        output = forward(**call)
        output.logits[..., ::2] = -math.inf
        return output

    pipeline.language_model.forward = forward_half
    assert all((grid % 2).all() for grid in sample_ids(pipeline, num_images_per_prompt=50, generator=seeded()))


def test_one_clear_error_for_a_language_model_without_a_cache(pipeline, monkeypatch):
    forward = pipeline.language_model.forward
    monkeypatch.setattr(
        pipeline.language_model, "forward", lambda input_ids, use_cache: forward(input_ids, use_cache=False)
    )
    with pytest.raises(ValueError, match="must give its keys and values, but LlamaForCausalLM does not"):
        pipeline()


# docs/generation.md


@pytest.mark.usefixtures("no_grad")
def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "generation.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out == "87 16397\n[16, 32, 64]\n"
    assert all(map(torch.equal, names["back"], names["ids"]))
    assert [image.size for image in (*names["images"], names["image"])] == [(64, 64)] * 5
