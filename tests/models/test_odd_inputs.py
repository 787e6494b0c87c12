"""Inputs at the edges of what the model and its image processor take."""

import pytest
import torch

from svqvae_hf import SVQVAEImageProcessor

pytestmark = pytest.mark.usefixtures("few_windows")
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 4_000), (4_000, 3)])
def test_long_thin_images_are_encoded_and_decoded(tiny_model, no_grad, size):
    height, width = size
    tiny_model.enable_tiling()
    sample = torch.rand(1, 3, height, width)
    ids = tiny_model.encode_tokens(sample)
    assert tuple(ids.shape) == (1, -(-height // 4), -(-width // 4))
    decoded = tiny_model.resize_to_image(tiny_model.decode(ids).sample, size, 1)
    assert decoded.shape == sample.shape
    assert decoded.isfinite().all()


@pytest.mark.parametrize("value", [NAN, -INFINITY])
@pytest.mark.filterwarnings("ignore:`sample` has values far outside")
@pytest.mark.parametrize("tiled", [False, True])
def test_nan_and_infinity_have_no_ids(tiny_model, no_grad, value, tiled):
    if tiled:
        tiny_model.enable_tiling(16, 4)
    sample = torch.rand(1, 3, 40, 40)
    sample[0, 1, 30, 17] = value
    with pytest.raises(ValueError, match="`latents` must be finite, but some are NaN or infinite"):
        tiny_model.encode_tokens(sample)
    assert not tiny_model.encode(sample).latents.isfinite().all()
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        SVQVAEImageProcessor()(sample[0])


def test_nan_is_not_an_image(tiny_model, no_grad):
    latents = torch.full((1, 8, 2, 2), NAN)
    assert tiny_model.decode(latents).sample.isnan().all()
    with pytest.raises(ValueError, match="must not contain NaN"):
        SVQVAEImageProcessor().postprocess(tiny_model.decode(latents).sample)


IMAGE, IDS, LATENTS = torch.rand(2, 3, 8, 12), torch.zeros(2, 2, 3, dtype=torch.int64), torch.rand(2, 8, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model: model(IMAGE[:0]), ValueError, r"no side of 0, got \(0, 3, 8, 12\)"),
        (lambda model: model.encode_tokens(IMAGE[..., :0]), ValueError, r"no side of 0, got \(2, 3, 8, 0\)"),
        (lambda model: model.decode_tokens(IDS[:0]), ValueError, r"not empty, got \(0, 2, 3\)"),
        (lambda model: model.decode(LATENTS[:0]), ValueError, r"no side of 0, got shape \(0, 8, 2, 3\)"),
        (lambda model: model(IMAGE.double()), TypeError, "must be torch.float32 like the model, got torch.float64"),
        (lambda model: model.encode(IMAGE.numpy()), TypeError, "a floating-point tensor .* got ndarray"),
        (lambda model: model.decode_tokens(IDS.bool()), TypeError, "an integer type, got torch.bool"),
        (lambda model: model.decode(IDS.numpy()), TypeError, "must be a tensor .* got ndarray"),
        (lambda _: SVQVAEImageProcessor()(IMAGE.to(torch.float8_e4m3fn)), TypeError, "got torch.float8_e4m3fn"),
    ],
)
def test_wrong_tensors_are_refused(tiny_model, no_grad, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny_model)


def test_memory_layout_does_not_matter(tiny_model, no_grad):
    def scattered(tensor):
        return torch.stack([tensor, tensor + 1], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]

    ids = tiny_model.encode_tokens(IMAGE)
    assert not scattered(IMAGE).is_contiguous()
    assert torch.equal(tiny_model.encode_tokens(scattered(IMAGE)), ids)
    assert torch.equal(tiny_model.encode_tokens(IMAGE.flip(-1).flip(-1)), ids)
    assert torch.equal(tiny_model.decode_tokens(scattered(ids)), tiny_model.decode_tokens(ids))
    assert torch.equal(tiny_model.decode(scattered(LATENTS)).sample, tiny_model.decode(LATENTS).sample)
    expanded = IMAGE[:1, :, :1].expand(2, -1, 8, -1)
    assert torch.equal(tiny_model.encode_tokens(expanded), tiny_model.encode_tokens(expanded.contiguous()))
    assert torch.equal(SVQVAEImageProcessor()(scattered(IMAGE))["pixel_values"], IMAGE)


def test_autocast_takes_other_floating_types(tiny_model, no_grad):
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny_model.encode_tokens(IMAGE.bfloat16()).shape == (2, 2, 3)
