"""The next-scale pipeline, against the original code and by its properties."""

import json

import numpy as np
import pytest
import torch
from conftest import make_tiny
from generators import NAMES, TRAINED, make_next_scale
from next_scale_golden import GOLDEN, OUTPUTS, Golden, make_transformer
from PIL import Image

from svqvae_hf import NextScaleTransformer, SVQVAEAutoregressivePipeline, SVQVAENextScalePipeline
from svqvae_hf.models.checks import SCALE_SOURCES


@pytest.fixture
def pipeline():
    return make_next_scale()


@pytest.fixture(params=SCALE_SOURCES)
def editor(request):
    """A pipeline for scales of each source."""
    return make_next_scale(scale_from=request.param)


@pytest.fixture(scope="module")
def golden_pipeline():
    vqvae = make_tiny(codebook_size=160, codebook_embed_dim=32)
    vqvae.quantize.embedding.weight.data = OUTPUTS["codebook"].clone()
    pipeline = SVQVAENextScalePipeline(
        vqvae, NextScaleTransformer.from_single_file(GOLDEN), schedule=[1, 16], scale_from="latents"
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def collect(pipeline, *args, **kwargs) -> list[torch.Tensor]:
    """Ids of all scales."""
    grids = []
    pipeline(*args, **kwargs, output_type="latent", callback_on_step_end=lambda *call: grids.append(call[-1]["ids"]))
    return grids


# Scales that FlexVAR takes greedily by its own table of sides, and the larger ones than in training.
RUNS = [
    ("trained", "greedy_llamagen_cfg1", {"guidance_mode": "constant", "top_k": 1}),
    ("trained", "greedy_llamagen_cfg2", {"guidance_scale": 2, "guidance_mode": "constant", "top_k": 1}),
    ("trained", "greedy_var_cfg2", {"guidance_scale": 3, "temperature": 0}),
    ("trained", "sampled_llamagen_cfg2", {"guidance_scale": 2, "guidance_mode": "constant"}),
    ("trained", "sampled_var_cfg2", {"guidance_scale": 3}),
    ("longer", "greedy_llamagen_cfg2", {"guidance_scale": 2, "guidance_mode": "constant", "temperature": 0}),
    ("longer", "sampled_var_cfg2_max4", {"guidance_scale": 3, "greedy_scales": [4]}),
    ("larger", "greedy_llamagen_cfg2", {"guidance_scale": 2, "guidance_mode": "constant", "temperature": 0}),
    ("larger", "greedy_var_cfg2", {"guidance_scale": 3, "temperature": 0}),
    ("larger", "sampled_llamagen_cfg2", {"guidance_scale": 2, "guidance_mode": "constant", "greedy_scales": [3]}),
    ("steps11", "greedy_var_cfg2", {"guidance_scale": 3, "temperature": 0}),
    ("steps11", "sampled_var_cfg2", {"guidance_scale": 3, "greedy_scales": [6, 8, 10]}),
    ("beyond32", "greedy_llamagen_cfg2", {"guidance_scale": 2, "guidance_mode": "constant", "temperature": 0}),
]


def test_every_run_of_the_original_is_tested():
    keys = {f"{schedule}.{run}.ids" for schedule, run, _ in RUNS}
    assert keys == {key for key in OUTPUTS if key.endswith("ids") and "teacher_forced" not in key}


@pytest.mark.parametrize(("schedule", "run", "arguments"), RUNS)
def test_ids_are_those_of_the_original(golden_pipeline, monkeypatch, schedule, run, arguments):
    golden = Golden(schedule)
    if run.endswith("max4"):
        monkeypatch.setattr(golden_pipeline, "trained_schedule", [(4, 4)])
    side = golden.sizes[-1][0] * golden_pipeline.vqvae.f
    sampling = {"top_k": 60, "top_p": 0.9, "generator": torch.Generator().manual_seed(0)} | arguments
    ids = collect(golden_pipeline, OUTPUTS["class_labels"].tolist(), side, side, schedule=golden.sizes, **sampling)
    assert all(torch.equal(*pair) for pair in zip(ids, golden.split(run), strict=True))


def test_known_ids_are_the_targets_of_the_original(golden_pipeline, monkeypatch):
    golden, latents = Golden("larger"), OUTPUTS["latents"]
    monkeypatch.setattr(golden_pipeline.vqvae, "_encode", lambda *_: latents)
    image = np.zeros((2, 28, 28, 3), np.uint8)
    ids = collect(golden_pipeline, None, 28, 28, schedule=golden.sizes, image=image, mask_image=np.zeros((28, 28)))
    assert all(torch.equal(*pair) for pair in zip(ids, golden.split("teacher_forced"), strict=True))


def test_saved_and_loaded_pipelines_sample_the_same(tmp_path, caplog):
    pipeline = make_next_scale(class_names=NAMES, schedule=[[1, 1], [2, 1], [4, 3]], scale_from="latents")
    pipeline.save_pretrained(tmp_path)
    expected = collect(pipeline, ["dog", 2], guidance_scale=2, temperature=0)
    loaded = SVQVAENextScalePipeline.from_pretrained(str(tmp_path))
    assert type(loaded.transformer) is NextScaleTransformer
    assert loaded.config["scale_from"] == "latents"
    assert all(map(torch.equal, collect(loaded, [1, "fox"], guidance_scale=2, temperature=0), expected))
    assert not caplog.records
    with pytest.raises(ValueError, match="must be an SVQVAEAutoregressivePipeline, but is SVQVAENextScalePipeline"):
        SVQVAEAutoregressivePipeline.from_pretrained(tmp_path)


def test_a_foreign_codebook_is_one_error(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    other = make_tiny()
    other.quantize.embedding.weight.data.neg_()
    with pytest.raises(ValueError, match="whose ids the pipeline was trained on, with fingerprint"):
        SVQVAENextScalePipeline.from_pretrained(tmp_path, vqvae=other)
    with pytest.raises(ValueError, match="must have the codebook of `vqvae`, 64 x 4, but has 64 x 8"):
        SVQVAENextScalePipeline(make_tiny(codebook_embed_dim=4), make_transformer())


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "must have at least one scale"),
        ([1, []], "must hold sides or pairs"),
        ([1, "4"], "must hold sides or pairs"),
    ],
)
def test_a_broken_schedule_of_training_is_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        SVQVAENextScalePipeline(make_tiny(), make_transformer(), schedule=schedule)


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"height": 15, "width": 13}, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ({"num_inference_steps": 2}, [(1, 1), (4, 4)]),
        ({"height": 4, "width": 64}, [(1, 1), (1, 3), (1, 6), (1, 16)]),
        ({"height": 16, "width": 32}, [(1, 1), (1, 2), (2, 4), (4, 8)]),
        ({"height": 8, "schedule": [1, [2, 3], 4]}, [(1, 1), (2, 3), (2, 4)]),
    ],
)
def test_sizes(pipeline, arguments, sizes):
    found = []
    images = pipeline(
        **arguments, output_type="pt", callback_on_step_end=lambda _pipe, step, size, _: found.append((step, size))
    ).images
    assert found == list(enumerate(sizes))
    assert images.shape == (1, 3, arguments.get("height", 16), arguments.get("width", 16))


def test_an_image_depends_on_its_own_generator_only(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)]
    grids = collect(pipeline, [0, 2], num_images_per_prompt=2, guidance_scale=2, generator=generators)
    grids_alone = collect(pipeline, 2, guidance_scale=2, generator=torch.Generator().manual_seed(3))
    for grid, grid_alone in zip(grids, grids_alone, strict=True):  # of each scale, (images, h, w)
        assert grid.shape[0] == 4
        assert torch.equal(grid[2:3], grid_alone)
    assert not torch.equal(grids[-1][2], grids[-1][3])


def test_guidance_of_one_is_no_guidance(pipeline):
    plain = collect(pipeline, 1, temperature=0)
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    assert all(map(torch.equal, collect(pipeline, 1, temperature=0, guidance_scale=1), plain))
    assert set(calls) == {1}
    strong = collect(pipeline, 1, temperature=0, guidance_scale=30)
    assert torch.equal(strong[0], plain[0])  # rising guidance starts at 1
    assert not torch.equal(strong[-1], plain[-1])


def test_ids_of_a_callback_replace_the_sampled_ones(pipeline):
    def replace(_pipe, step, _size, tensors):
        return {"ids": (tensors["ids"] + 1) % 64} if step == 0 else None

    first = collect(pipeline, 1, temperature=0)
    last = pipeline(1, temperature=0, output_type="latent", callback_on_step_end=replace).images
    assert not torch.equal(last, first[-1])
    with pytest.raises(ValueError, match=r"must have shape \(1, 1, 1\) and lie in \[0, 64\), got .* in \[64, 64\]"):
        pipeline(callback_on_step_end=lambda *_: {"ids": torch.full((1, 1, 1), 64)})
    with pytest.raises(ValueError, match=r"must be among \['ids'\], got \['latents'\]"):
        pipeline(callback_on_step_end_tensor_inputs=["latents"])


def test_a_callback_ends_the_sampling(pipeline):
    def stop(pipe, step, _size, tensors):
        assert not tensors
        pipe._interrupt = step == 1

    arguments = {"temperature": 0, "callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": []}
    assert pipeline(1, output_type="latent", **arguments).images.shape == (1, 2, 2)
    assert pipeline(1, **arguments).images[0].size == (16, 16)
    assert pipeline(1, output_type="latent").images.shape == (1, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_in_both_types(dtype):
    pipeline = make_next_scale().to(dtype)
    assert pipeline([0, 1], guidance_scale=2, top_k=10, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("sides", [(16, 16), (14, 15)])
def test_known_ids_are_those_of_a_token_set(editor, photo, sides):
    image = photo.crop((100, 100, 100 + sides[1], 100 + sides[0]))
    sample = editor.image_processor(image)["pixel_values"]
    expected = editor.vqvae.encode_tokens(sample, [side / 4 for side in TRAINED], editor.config["scale_from"])
    found = collect(editor, 1, *sides, image=image, mask_image=Image.new("L", image.size))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "{}", '{"_class_name": 3}'])
def test_an_index_that_is_no_object_is_named(pipeline, tmp_path, content):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=f"the index of `{tmp_path}` must"):
        SVQVAENextScalePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [None, [], [None, None, {}], [None, None, {"type_hint": []}], [None, None, {"type_hint": ["a", "b"]}]],
)
def test_a_broken_component_of_a_modular_index_is_named(pipeline, tmp_path, entry):
    pipeline.save_pretrained(tmp_path, standalone=True)
    path = tmp_path / "modular_model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": entry}))
    with pytest.raises(ValueError, match=f"the index of `{tmp_path}` (must say|names an unknown class)"):
        SVQVAENextScalePipeline.from_pretrained(tmp_path)


def test_a_pipeline_saved_without_code_replaces_the_index_of_one_with_code(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, standalone=True)
    pipeline.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.json")} == {"model_index.json"}
    pipeline.save_pretrained(tmp_path, standalone=True)
    assert {path.name for path in tmp_path.glob("*.json")} == {"modular_config.json", "modular_model_index.json"}


@pytest.mark.parametrize(("mode", "white"), [("F", 1.0), ("I", 65535), ("I;16", 65535), ("La", 255), ("RGBA", 255)])
def test_masks_of_any_mode_are_the_same_mask(editor, photo, mode, white):
    image = photo.resize((16, 16))
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 8))
    deep = Image.new(mode, (16, 16))
    for x in range(8):
        for y in range(8):
            deep.putpixel((x, y), (white,) * len(mode) if mode in ("La", "RGBA") else white)
    call = {"image": image, "temperature": 0}
    for found, expected in zip(
        collect(editor, 1, **call, mask_image=deep), collect(editor, 1, **call, mask_image=mask), strict=True
    ):
        assert torch.equal(found, expected)


def test_one_white_pixel_of_a_large_mask_is_drawn(editor, photo):
    mask = Image.new("L", (512, 512))
    mask.putpixel((300, 100), 255)
    scales = collect(editor, 1, image=photo.resize((512, 512)), mask_image=mask, top_k=1)
    kept = collect(editor, 1, image=photo.resize((512, 512)), mask_image=Image.new("L", (512, 512)))
    changed = [(ids != known)[0] for ids, known in zip(scales, kept, strict=True)]
    for is_changed in changed:
        side = len(is_changed)
        is_changed[100 * side // 512, 300 * side // 512] = False
        assert not is_changed.any()
    (scale,) = editor._encode_images_to_edit(photo.resize((512, 512)), mask, [(4, 4)], 16, 16)
    is_drawn = scale.is_kept.logical_not()
    assert is_drawn.nonzero().tolist() == [[0, 0, 2]]


def test_ids_outside_the_mask_are_kept_at_every_scale(editor, photo):
    images = [photo.crop((x, 100, x + 16, 116)) for x in (100, 200)]
    mask = Image.new("L", (16, 16))
    whole = collect(editor, image=images, mask_image=mask)
    mask.paste(255, (0, 0, 8, 8))
    filled = collect(editor, [0, 1], image=images, mask_image=np.array(mask) > 0, num_images_per_prompt=2)
    for grid, known in zip(filled, whole, strict=True):
        hole = -(-grid.shape[-1] // 2)
        outside = torch.ones(grid.shape[-2:], dtype=torch.bool)
        outside[:hole, :hole] = False
        assert torch.equal(grid[:, outside], known.repeat_interleave(2, 0)[:, outside])
    assert not torch.equal(filled[-1][:, :2, :2], whole[-1].repeat_interleave(2, 0)[:, :2, :2])
    masks = [mask, Image.new("L", (16, 16))]
    one_hole = collect(editor, [0, 1], image=images, mask_image=masks)
    assert all(torch.equal(grid[1], known[1]) for grid, known in zip(one_hole, whole, strict=True))


GREY = Image.new("RGB", (16, 16), "grey")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 3}, r"`class_labels` must be in \[0, 3\), got 3"),
        ({"class_labels": "owl"}, r"numbers in \[0, 3\) or names of classes, \[\], got 'owl'"),
        ({"schedule": [1, 2, 3]}, "must end with 4 x 4"),
        ({"schedule": [1, 4], "num_inference_steps": 2}, "Only one of `schedule` and `num_inference_steps`"),
        ({"num_inference_steps": 5}, r"`num_inference_steps` must be in \[1, 4\]"),
        ({"guidance_mode": "linear"}, "`guidance_mode` must be one of rising, constant, got 'linear'"),
        ({"greedy_scales": [4]}, r"`greedy_scales` must be steps in \[0, 4\) of 1 x 1, .*, got \[4\]"),
        ({"mask_image": GREY}, "`image` and `mask_image` must be passed together"),
        ({"image": GREY, "mask_image": GREY, "width": 8}, r"aspect ratio of the result, 8 x 16 .*, got 16 x 16"),
        ({"image": GREY, "mask_image": Image.new("L", (16, 15))}, "as large as `image`, 16 x 16 .*, got 16 x 15"),
        ({"image": GREY, "mask_image": [Image.new("L", (16, 16))] * 2}, "one mask or one per image, 1, got 2"),
    ],
)
def test_wrong_arguments(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**arguments)
    assert "\n" not in str(error.value)
