import shutil

import pytest
import torch
from conftest import make_tiny
from tiny_language_models import FAMILIES, GRIDS, extended, load_extended, make_language_model, save_language_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from svqvae_hf.language.extension import add_image_tokens, extend_language_model
from svqvae_hf.models.image_vocabulary import ImageVocabulary

TEXT = "a pear above a red key on white"


def heads(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_text_logits_and_old_rows_stay_bit_equal(family):
    original = AutoModelForCausalLM.from_pretrained(extended(family).parent / "original").eval()
    model, processor = load_extended(family)
    tokens = torch.tensor([processor.tokenizer(TEXT).input_ids])
    stop = processor.vocabulary.first_token
    with torch.no_grad():
        before, after = original(tokens).logits[..., :stop], model(tokens).logits[..., :stop]
    assert torch.equal(before, after)
    for old, new in zip(heads(original), heads(model), strict=True):
        assert torch.equal(old[:stop], new[:stop])
    assert original.config.tie_word_embeddings == model.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_new_rows_are_a_linear_map_of_the_codes_at_the_scale_of_the_old_rows(family):
    model, processor = load_extended(family)
    vocabulary = processor.vocabulary
    codes = processor.vqvae.quantize.embedding.lookup(torch.arange(vocabulary.codebook_size))
    inputs = torch.cat([codes, torch.ones(len(codes), 1)], dim=1)
    for rows in heads(model):
        rows = rows.detach()
        new = rows[vocabulary.first_token : vocabulary.begin]
        solution = torch.linalg.lstsq(inputs, new).solution
        assert torch.allclose(inputs @ solution, new, atol=1e-5)
        old = rows[: vocabulary.first_token]
        assert new.std().item() == pytest.approx(old.std().item(), rel=0.1)
        assert rows[vocabulary.begin : vocabulary.stop].std().item() == pytest.approx(old.std().item(), rel=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_survive_decoding_and_encoding(family):
    tokenizer = AutoTokenizer.from_pretrained(extended(family))
    vocabulary = ImageVocabulary.from_config(AutoConfig.from_pretrained(extended(family)))
    tokens = [*range(vocabulary.first_token, vocabulary.stop)]
    assert tokenizer.decode(tokens) == "".join(vocabulary.names)
    assert tokenizer("".join(vocabulary.names), add_special_tokens=False).input_ids == tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == ""


def test_padded_rows_are_used_before_rows_are_added():
    original, tokenizer = make_language_model("qwen")
    model, processor = load_extended("qwen")
    assert len(tokenizer) < original.config.vocab_size
    assert processor.vocabulary.first_token == len(tokenizer)
    assert model.config.vocab_size == max(original.config.vocab_size, processor.vocabulary.stop)


def test_a_sharded_checkpoint_in_bfloat16_stays_in_bfloat16(tmp_path, saved_model):
    save_language_model(tmp_path / "lm", "neox", dtype=torch.bfloat16, max_shard_size="50KB")
    assert len([*(tmp_path / "lm").glob("*.safetensors")]) > 1
    vocabulary = extend_language_model(tmp_path / "lm", tmp_path / "out", saved_model, [(2, 2)])
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype="auto")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    for old, new in zip(heads(original), heads(model), strict=True):
        assert torch.equal(old, new[: vocabulary.first_token])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": [(2, 2), (2, 2)]}, "`grids` must be different pairs"),
        ({"grids": [(64, 64)]}, "the largest takes 4099. Pass smaller `--grids`"),
        ({"twice": True}, "must not have image tokens yet"),
        (
            {"rows": 298},
            "has 298 rows for 300 tokens. The first without a row: .+, .+. The class of the token",
        ),
        ({"token": "<|image_00003|>"}, "must take the image tokens as its last ones"),
    ],
)
def test_wrong_language_models_are_explained(change, message):
    model, tokenizer = make_language_model("neox")
    vqvae = make_tiny()
    if "rows" in change:
        model.resize_token_embeddings(change["rows"])
    if "token" in change:
        tokenizer.add_tokens(change["token"])
        model.resize_token_embeddings(len(tokenizer))
    if "twice" in change:
        add_image_tokens(model, tokenizer, vqvae, [(2, 2)])
    with pytest.raises(ValueError, match=message):
        add_image_tokens(model, tokenizer, vqvae, change.get("grids", GRIDS))


def test_nothing_is_left_of_a_failed_extension(tmp_path, saved_model):
    save_language_model(tmp_path / "lm", "neox")
    with pytest.raises(ValueError, match="the largest takes"):
        extend_language_model(tmp_path / "lm", tmp_path / "out", saved_model, [(99, 99)])
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]


def test_a_cut_image_tokenizer_is_named(tmp_path, saved_model):
    save_language_model(tmp_path / "lm", "neox")
    shutil.copytree(saved_model, tmp_path / "vqvae")
    weights = tmp_path / "vqvae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"`{weights}` must be a safetensors file, but is cut"):
        extend_language_model(tmp_path / "lm", tmp_path / "out", tmp_path / "vqvae", [(2, 2)])


def test_a_folder_without_the_words_of_its_tokenizer_is_an_error(tmp_path):
    save_language_model(tmp_path / "lm", "qwen")
    (tmp_path / "lm" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="lm` must hold the words of its tokenizer, but has no .*tokenizer.json"):
        extend_language_model(tmp_path / "lm", tmp_path / "out", extended("qwen") / "vqvae", GRIDS)
