"""A language model with image tokens trained on captioned images, in both directions, and on texts."""

import dataclasses
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captioned_tokens import CAPTIONS, captioned_tokens
from cli_runner import svqvae
from conftest import ROOT, make_tiny
from language_checkpoints import OptionsOnResume, delete_partial_checkpoints, set_aside_partial_checkpoints
from language_options import ADAMW_ARGUMENTS, VALIDATION_ARGUMENTS, WITHOUT_EFFECT
from language_trainer import LanguageModelTrainer
from modality_loss import ModalityLoss
from peft import PeftModel
from PIL import Image
from processes import start
from tiny_language_models import FAMILIES, GRIDS, extended, load_extended
from token_set_parts import replace_column
from torch.optim.lr_scheduler import LambdaLR
from train_language_model import LanguageModelOptions, main
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from svqvae_hf.language.extension import extend_language_model
from svqvae_hf.language.grammar import ImageGrammar
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.trainer.examples import IGNORED, ChatExamples, Mix, read_texts
from svqvae_hf.trainer.folder_lock import FolderLock

LEARN = {"learning_rate": 4e-3, "per_device_train_batch_size": 8, "max_steps": 150, "lr_scheduler_type": "cosine"}


@pytest.fixture
def tokens(tmp_path_factory):
    return captioned_tokens(tmp_path_factory.getbasetemp() / "image_text")


@pytest.fixture
def train(tokens, tmp_path):
    """Trains in a folder below `tmp_path`, by default on pairs, and returns the folder."""

    def run(name, model="qwen", resume=None, **changes):
        own = {key: changes.pop(key) for key in list(changes) if key in LanguageModelOptions.__dataclass_fields__}
        own = {"token_set": str(tokens), "condition_dropout": 0.0} | own
        own.setdefault("model_name_or_path", str(extended(model)))
        training = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True} | changes
        arguments = TrainingArguments(str(tmp_path / name), resume_from_checkpoint=resume, **(LEARN | training))
        main(LanguageModelOptions(**own), arguments)
        return tmp_path / name

    return run


def examples(tokens, texts=(), **mix):
    return ChatExamples(load_extended("qwen")[1], 512, 200, Mix(**mix), tokens and str(tokens), "caption", texts)


def learned(example):
    """Prompt and answer of an example, decoded."""
    processor = load_extended("qwen")[1]
    start = example["labels"].count(IGNORED)
    assert example["labels"][start:] == example["input_ids"][start:]
    return [processor.decode(part) for part in (example["input_ids"][:start], example["input_ids"][start:])]


@pytest.mark.slow
def test_pairs_go_in_both_directions_in_the_stated_share(tokens):
    processor = load_extended("qwen")[1]
    chats = examples(tokens, caption_fraction=0.25)
    num_captions = 0
    for index in range(200):
        prompt, answer = learned(chats[index])
        assert prompt.startswith("<|im_start|>user\n")
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert answer.endswith("<|im_end|>\n")
        asks_for_caption = "<|image_begin|>" in prompt
        assert asks_for_caption != ("<|image_begin|>" in answer)
        line = answer.split("\n")[0] if asks_for_caption else prompt.split("\n")[1]
        assert line.split("<")[0] in "".join(CAPTIONS)
        assert processor.no_condition not in prompt + answer
        num_captions += asks_for_caption
    assert num_captions == pytest.approx(50, abs=20)


def test_chats_for_other_trainers_have_the_same_tokens(tokens, tmp_path, monkeypatch):
    out = tmp_path / "chats.jsonl"
    monkeypatch.setattr(sys, "argv", ["", str(extended("qwen")), str(tokens), str(out), "--caption_fraction", "0.5"])
    runpy.run_path(str(ROOT / "examples" / "token_set_as_chats.py"), run_name="__main__")
    made, tokenizer = examples(tokens, caption_fraction=0.5), load_extended("qwen")[1].tokenizer
    chats = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    for index, (chat, row) in enumerate(zip(chats, made.pairs, strict=True)):
        assert chat == made.conversation(row, np.random.default_rng((0, index)))
        assert tokenizer.apply_chat_template(chat)["input_ids"] == made.chat_example(chat)["input_ids"]


def test_captions_of_lists_are_asked_for_in_the_stated_share_and_the_first_is_written(tokens):
    draws = examples(tokens, caption_fraction=0.0, first_caption_fraction=0.5)
    writes = examples(tokens, caption_fraction=1.0, first_caption_fraction=0.5)
    rng = np.random.default_rng(0)
    row = draws.pairs[0] | {"caption": ["a pear", "a cat"]}
    row["ids_1"] = row["ids_0"][:1]
    draws.settings = dataclasses.replace(draws.settings, scales=(1.0, 0.25))
    assert "4x4" in draws.conversation(row, rng)[1]["content"]
    num_first_captions = 0
    for _ in range(200):
        prompt, _ = learned(draws.chat_example(draws.conversation(row, rng)))
        assert "a pear" in prompt or "a cat" in prompt
        num_first_captions += "a pear" in prompt
    assert num_first_captions == pytest.approx(150, abs=20)
    for _ in range(20):
        _, answer = learned(writes.chat_example(writes.conversation(row, rng)))
        assert answer.split("<")[0] == "a pear"


@pytest.mark.slow
def test_texts_with_images_are_learned_whole(tokens, tmp_path):
    ids = [[1, 2], [3, 4]]
    rows = [{"text": "left <|image|> right <|image|>", "images": [ids, ids]}, {"text": "a text"}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    processor = load_extended("qwen")[1]
    made = examples(None, read_texts([str(tmp_path / "texts.jsonl")], processor, 512), text_fraction=1.0)
    image = processor.image_text(torch.tensor(ids))
    known = [f"left {image} right {image}<|im_end|>", "a text<|im_end|>"]
    both = [made[index] for index in range(2)]
    assert sorted(processor.decode(example["input_ids"]) for example in both) == sorted(known)
    for example in both:
        assert example["labels"] == [IGNORED, *example["input_ids"][1:]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", ""),
        ("hello", ""),
        ('["a"]', ""),
        ('{"txt": "a"}', ""),
        ('{"text": 3}', ""),
        ('{"text": "<|image|>"}', "it has 1 <|image|> for 0 images"),
        ('{"text": "<|image|>", "images": [[[1, 64], [3, 4]]]}', "ids must be in [0, 64)"),
        ('{"text": "<|image|>", "images": [[[1, 2.5], [3, 4]]]}', "an id of its images is not a whole number"),
        ('{"text": "<|image|>", "images": [[[1, true], [3, 4]]]}', "an id of its images is not a whole number"),
    ],
)
def test_wrong_texts_are_refused_by_their_line(line, reason, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text(line and f'{{"text": "a \u2028 b"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=f"^line {3 if line else 1} of `{file}` must be a JSON object with") as error:
        read_texts([str(file)], load_extended("qwen")[1], 512)
    assert reason in str(error.value)


def test_texts_of_another_encoding_are_refused_by_their_file(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_bytes('{"text": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=f"`{file}` must be UTF-8 text, but is not: .* Save it as UTF-8"):
        read_texts([str(file)], load_extended("qwen")[1], 512)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_do_not_see_each_other(tokens, family):
    model, _ = load_extended(family)
    made = [examples(tokens, caption_fraction=0.5)[index] for index in range(3)]
    batch = DataCollatorWithFlattening()(made)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        alone = torch.cat([model(torch.tensor([each["input_ids"]])).logits[0] for each in made])
    assert torch.allclose(packed, alone, atol=1e-5)


def test_loss_by_modality():
    codes = range(300, 364)
    loss = ModalityLoss(codes)
    labels = torch.tensor([[IGNORED, 5, 300, 301, IGNORED]])
    logits = torch.zeros(1, 5, 400, requires_grad=True)
    with torch.no_grad():
        logits[0, 0, 5] = 100.0  # the text is known, the codes are not
    total = loss(SimpleNamespace(logits=logits), labels)
    assert loss.training_sums[:, 1:].tolist() == [[1, 1], [2, 0]]
    assert loss.training_sums[0, 0] == pytest.approx(0, abs=1e-6)
    assert loss.training_sums[1, 0] == pytest.approx(2 * math.log(400), rel=1e-5)
    assert total.item() == pytest.approx(2 * math.log(400) / 3, rel=1e-5)
    assert not loss.validation_sums.any()


def test_some_ids_are_replaced_by_ids_of_the_batch_and_nothing_else():
    first, begin = 300, 364
    rows = []
    for row in range(8):
        ids = range(first + row, first + row + 50)
        rows.append([1, 2, begin, begin + 3, *ids, begin + 1, 3])
    tokens = torch.tensor(rows)
    before = tokens.clone()
    for fraction, expected in ((1.0, 0.5), (0.5, 0.25), (0.0, 0.0)):
        trainer = SimpleNamespace(loss=ModalityLoss(range(first, begin)), replaced_fraction=fraction)
        replaced = LanguageModelTrainer.replace_some_ids(trainer, tokens)
        changed = replaced != tokens
        assert torch.equal(tokens, before)
        assert set(replaced[changed].tolist()) <= set(tokens[:, 4:-2].flatten().tolist())
        assert not changed[:, [0, 1, 2, 3, -2, -1]].any()
        assert changed[:, 4:-2].float().mean().item() == pytest.approx(expected, abs=0.2)


def test_a_batch_of_texts_has_no_ids_to_replace():
    tokens = torch.tensor([[1, 2, 3]])
    trainer = SimpleNamespace(loss=ModalityLoss(range(300, 364)), replaced_fraction=1.0)
    assert torch.equal(LanguageModelTrainer.replace_some_ids(trainer, tokens), tokens)


@pytest.mark.slow
def test_pairs_are_learned_by_heart_in_both_directions(train, tokens):
    folder = train("learned", logging_steps=10)
    model, processor = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    images = [Image.open(tokens.parent / "images" / f"{index}.png") for index in range(4)]
    grids = processor.encode_images(images)
    for caption, ids, image in zip(CAPTIONS, grids, images, strict=True):
        for content, answer in [(caption, ids), ([{"type": "image", "image": image}], caption)]:
            asked = {"return_dict": True, "return_tensors": "pt", "add_generation_prompt": True, "tokenize": True}
            inputs = processor.apply_chat_template([{"role": "user", "content": content}], **asked)
            grammar = ImageGrammar(model.config)
            made = model.generate(**inputs, max_new_tokens=25, do_sample=False, logits_processor=[grammar])
            made = processor.vocabulary.split(made[0, inputs["input_ids"].shape[1] :])
            if isinstance(answer, str):
                assert processor.decode(made[0], skip_special_tokens=True).strip() == answer
            else:
                assert torch.equal(made[1], answer)


def train_until_killed(*command):
    """Runs the script until the second checkpoint is half written."""

    def die_at_the_second_checkpoint(trainer, folder):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        save(trainer, folder)

    save, Trainer._save_rng_state = Trainer._save_rng_state, die_at_the_second_checkpoint
    sys.argv = [*command]
    runpy.run_path(command[0], run_name="__main__")


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_unbroken_one(train, tokens, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "replaced_fraction": 0.5}
    whole = train("whole", **options)
    killed = tmp_path / "killed"
    own = {"model_name_or_path": extended("qwen"), "token_set": tokens, "condition_dropout": 0, "output_dir": killed}
    changes = LEARN | options | own | {"use_cpu": True, "report_to": "none"}
    flags = []
    for name, value in changes.items():
        flags += [f"--{name}", str(value)]
    process = start(train_until_killed, str(ROOT / "training" / "train_language_model.py"), *flags)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert {path.name for path in killed.iterdir()} >= {"checkpoint-2", "checkpoint-4"}  # the second is half written
    resumed = train("killed", resume="latest", **options)
    weights = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    resumed_weights = AutoModelForCausalLM.from_pretrained(resumed).state_dict()
    for name, weight in weights.items():
        assert torch.equal(resumed_weights[name], weight), name


def test_a_signal_leaves_a_checkpoint_and_no_result(train, tmp_path, monkeypatch, capsys):
    step = LanguageModelTrainer.training_step

    def send_signal(trainer, *args):
        if trainer.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args)

    options = {"max_steps": 6, "replaced_fraction": 0.5, "logging_steps": 1}
    whole = train("whole", **options)
    monkeypatch.setattr(LanguageModelTrainer, "training_step", send_signal)
    with pytest.raises(SystemExit) as stop:
        train("stopped", **options)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "at step 4. Resume: the same command with --resume_from_checkpoint latest." in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"checkpoint-4", "train_config.yaml"}
    monkeypatch.setattr(LanguageModelTrainer, "training_step", step)
    (tmp_path / "texts.jsonl").write_text('{"text": "a cat"}')
    other = {"text_files": [str(tmp_path / "texts.jsonl")], "text_fraction": 0.5}
    with pytest.raises(ValueError, match="`--text_files` must name what `.*checkpoint-4` was made from, but names"):
        train("stopped", resume="latest", **options, **other)
    capsys.readouterr()
    resumed = train("stopped", resume="latest", **options, disable_tqdm=False)
    captured = capsys.readouterr()
    assert "Resumed from checkpoint-4\n" in captured.err
    assert re.search(r"^step 5 of 6 \(0:00:\d\d elapsed, 0:00:\d\d left\): .*loss \d", captured.out, re.MULTILINE)
    assert "it/s" not in captured.err
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_resumed_run_has_its_own_hyperparameters():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay": decay} for decay in (0.1, 0.0)]
    optimizer = torch.optim.AdamW(groups, lr=0.5, betas=(0.8, 0.7), eps=1e-3)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 10)
    on_resume = OptionsOnResume()
    on_resume.remember(schedule)
    for group in optimizer.param_groups:  # as a checkpoint does
        group |= {"initial_lr": 1.0, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 7.0, "step": 4}
    on_resume.on_train_begin(
        None, SimpleNamespace(global_step=4, is_world_process_zero=True), None, lr_scheduler=schedule
    )
    decayed, not_decayed = optimizer.param_groups
    for group in (decayed, not_decayed):
        assert group["lr"] == pytest.approx(0.3)
        assert (group["betas"], group["eps"], group["step"]) == ((0.8, 0.7), 1e-3, 4)
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.1, 0.0)


def test_another_epsilon_counts_on_resume(train, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    train("run", **options)
    embeddings = []
    for name, epsilon in (("same", 1e-8), ("other", 0.1)):
        shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / name / "checkpoint-2")
        folder = train(name, resume="latest", adam_epsilon=epsilon, **options)
        model = AutoModelForCausalLM.from_pretrained(folder)
        embeddings.append(model.get_input_embeddings().weight)
    same, other = embeddings
    assert not torch.allclose(same, other, atol=1e-4)


def test_a_finished_run_is_not_rewritten(train, tmp_path):
    def files():
        return {path: path.read_bytes() for path in (tmp_path / "done").iterdir() if path.is_file()}

    train("done", max_steps=2)
    before = files()
    with pytest.raises(ValueError, match=r"holds the result of a finished run.* has other options \(--seed"):
        train("done", resume="latest", max_steps=2, seed=7)
    with pytest.raises(SystemExit) as stop:
        train("done", resume="latest", max_steps=2)
    assert stop.value.code == 0
    assert files() == before


def test_a_finished_run_knows_its_texts_by_their_content(train, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a cat"}')
    options = {"max_steps": 1, "token_set": None, "text_fraction": 1.0}
    train("done", text_files=[str(texts)], **options)
    moved = texts.rename(tmp_path / "moved.jsonl")
    with pytest.raises(SystemExit) as stop:
        train("done", text_files=[str(moved)], **options)
    assert stop.value.code == 0
    moved.write_text('{"text": "a pear"}')
    with pytest.raises(ValueError, match="`--text_files` must name what `.*done` was made from, but names something"):
        train("done", text_files=[str(moved)], **options)


@pytest.mark.parametrize(("content", "is_whole"), [("{}", True), ('{"global_step": 2, "epo', False), (None, False)])
def test_checkpoints_that_a_killed_run_left_torn_are_set_aside(tmp_path, content, is_whole):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    if content is not None:
        (checkpoint / "trainer_state.json").write_text(content)
    set_aside_partial_checkpoints(tmp_path)
    assert checkpoint.exists() == is_whole
    delete_partial_checkpoints(tmp_path)
    assert len(list(tmp_path.iterdir())) == is_whole


def test_two_runs_do_not_write_to_one_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    half_written = tmp_path / "run" / "checkpoint-2"  # of the other run
    half_written.mkdir()
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(ValueError, match="must not be the folder of another run, but one is writing to it"):
        train("run", resume="latest", max_steps=1)
    assert half_written.is_dir()
    lock.release()
    train("run", resume="latest", max_steps=1)


def test_a_run_is_not_resumed_from_a_renamed_checkpoint_or_with_another_model(train, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(extended("qwen"), model)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "model_name_or_path": str(model)}
    train("run", **options)
    renamed = (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(ValueError, match=f"`{renamed}` must be called checkpoint-2"):
        train("run", resume="latest", **(options | {"max_steps": 3}))
    renamed.rename(tmp_path / "run" / "checkpoint-2")
    shutil.copyfile(tmp_path / "run" / "model.safetensors", model / "model.safetensors")
    with pytest.raises(ValueError, match="`--model_name_or_path` must name what `.*checkpoint-2` was made from"):
        train("run", resume="latest", **(options | {"max_steps": 3}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "The seed must be 42 as when the checkpoint was written, but is 7"),
        ({"gradient_accumulation_steps": 2}, "`--gradient_accumulation_steps` and process count must be 8 as when"),
        ({"optimizer": "soap"}, "`--optimizer` must be adamw as in `.*checkpoint-2`, got soap"),
        ({"optim": "sgd"}, "`--optim` must be adamw_torch.* as in `.*checkpoint-2`, got sgd"),
        ({"lora_rank": 2}, "`--lora_rank` must be 0 as in `.*checkpoint-2`, got 2"),
    ],
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_a_run_is_not_resumed_with_other_rows_or_weights(train, changes, message):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train("run", **options)
    with pytest.raises(ValueError, match=message):
        train("run", resume="latest", **(options | {"max_steps": 3} | changes))


def test_changes_on_resume_are_told(train, capsys):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train("run", **options)
    capsys.readouterr()
    train("run", resume="latest", **(options | {"max_steps": 3, "learning_rate": 1e-3}))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Changed on resume")]
    assert told == [
        "Changed on resume: --learning_rate from 0.004 to 0.001",
        "Changed on resume: --max_steps from 2 to 3",
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_validation_does_not_depend_on_its_batches(side, tmp_path, monkeypatch):
    monkeypatch.setattr(load_extended("qwen")[1].tokenizer, "padding_side", side)
    texts = [{"text": "a cat"}, {"text": "a pear above a red key"}, {"text": "a"}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    losses = []
    for batch in (1, 2, 3):
        model, processor = load_extended("qwen")
        made = examples(None, read_texts([str(tmp_path / "texts.jsonl")], processor, 512), text_fraction=1.0)
        rows = [made.text_example(row) for row in made.texts]
        arguments = TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=batch, use_cpu=True, report_to="none", disable_tqdm=True
        )
        trainer = LanguageModelTrainer(
            model,
            arguments,
            eval_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(processor.tokenizer),
            loss=ModalityLoss(range(300, 364)),
            replaced_fraction=0.0,
        )
        losses.append(trainer.evaluate()["eval_loss"])
        assert made.rows_per_epoch is None
        assert "epoch" not in trainer.state.log_history[-1]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "`--label_smoothing_factor` has no effect, because the loss is the cross-"),
        ({"data_seed": 3}, "`--data_seed` has no effect, because `--seed` decides the order of the examples"),
        ({"train_sampling_strategy": "group_by_length"}, "`--train_sampling_strategy` has no effect"),
        ({"num_train_epochs": 2}, "`--num_train_epochs` has no effect, because `--max_steps` decides the length"),
        ({"optimizer": "soap", "adam_epsilon": 1e-6}, "`--adam_epsilon` has no effect with `--optimizer soap`"),
        ({"eval_delay": 3}, "`--eval_delay` has no effect without `--validation_token_set`"),
        ({"eval_strategy": "steps"}, "`--eval_strategy` needs `--validation_token_set`"),
    ],
)
def test_arguments_without_effect_are_refused(train, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train("wrong", **changes)
    assert not (tmp_path / "wrong").exists()


def test_arguments_without_effect_are_arguments():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {*WITHOUT_EFFECT, *ADAMW_ARGUMENTS, *VALIDATION_ARGUMENTS} <= names


def test_captions_and_texts_longer_than_the_context_are_named_before_the_run(train, tokens, tmp_path):
    long = tmp_path / "long"
    shutil.copytree(tokens, long)
    replace_column(long, "caption", ["a pear", "a cat", "a red key " * 200, "a sailboat"])
    with pytest.raises(ValueError, match=r"row 2 \(`2.png`\), caption 'a red key.* must fit in 512 tokens, but takes"):
        train("wrong", model="neox", token_set=str(long))
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "a cat"}) + "\n" + json.dumps({"text": "a red key " * 200}))
    with pytest.raises(ValueError, match=f"line 2 of `{texts}` must fit the context of 512 tokens with its images"):
        train("wrong", model="neox", token_set=None, text_files=[str(texts)], text_fraction=1.0)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("rows_at_a_time", [1, 100])
def test_a_grid_that_the_model_does_not_know_is_named_before_the_run(rows_at_a_time, tmp_path, monkeypatch):
    monkeypatch.setattr("svqvae_hf.trainer.examples.SIZES_AT_A_TIME", rows_at_a_time)
    (tmp_path / "images").mkdir()
    for name, side in (("0", 16), ("1", 20), ("2", 20)):
        Image.new("RGB", (side, side)).save(tmp_path / "images" / f"{name}.png")
    rows = [json.dumps({"file_name": f"{name}.png", "caption": "a cat"}) for name in range(3)]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows))
    vqvae = extended("qwen") / "vqvae"
    assert svqvae("tokenize", tmp_path / "images", "--output", tmp_path / "tokens", "--model", vqvae) == 0
    with pytest.raises(ValueError, match=r"tokens`, row 1 \(`1.png`\): `grid` must be one of .*, got 5 x 5\."):
        examples(tmp_path / "tokens")


def test_images_of_the_training_are_not_validated(train, tokens):
    with pytest.raises(ValueError, match="must hold images that are not trained on, but `0.png` of"):
        train("wrong", validation_token_set=str(tokens), eval_strategy="steps")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_new_rows_and_leaves_a_model_of_texts(train, family, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a cat left of a pear"}))
    texts = {"text_files": [str(tmp_path / "texts.jsonl")], "text_fraction": 1.0, "token_set": None}
    trained = train("texts", model=family, max_steps=2, **texts)
    folder = train("adapter", model_name_or_path=str(trained), max_steps=4, lora_rank=2)
    base, processor = AutoModelForCausalLM.from_pretrained(trained).eval(), load_extended(family)[1]
    assert not torch.equal(base.get_input_embeddings().weight, load_extended(family)[0].get_input_embeddings().weight)
    tokens = torch.tensor([processor.vocabulary.begin_image((2, 2)), [5, 6]])
    with torch.no_grad():
        before = base(tokens).logits
        adapter = PeftModel.from_pretrained(base, folder).eval()
        changed = adapter(tokens).logits
        with adapter.disable_adapter():
            off = adapter(tokens).logits
    assert torch.equal(before, off)
    assert not torch.allclose(before, changed)
    new = slice(processor.vocabulary.first_token, processor.vocabulary.stop)
    merged = adapter.merge_and_unload()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old = getattr(AutoModelForCausalLM.from_pretrained(trained), get)().weight
        rows = getattr(merged, get)().weight
        assert torch.equal(old[: new.start], rows[: new.start])
        assert not torch.equal(old[new], rows[new])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_fraction": 0.5}, "`--text_files` must be given with `--text_fraction` 0.5"),
        ({"model_name_or_path": None}, "`--model_name_or_path` must be given. To train a LlamaGen, use"),
        ({"caption_column": "text"}, "there is no column 'text'. Pass `--caption_column caption`. The columns are"),
        ({"caption_column": "height"}, "`--caption_column` must hold texts or lists of texts, but 'height' holds"),
        (
            {"model_name_or_path": "nowhere"},
            "`--model_name_or_path` must be a file, folder or Hub id, org/name, but there",
        ),
        ({"model_name_or_path": "foreign"}, "the ids must be of the model's codebook"),
        ({"model_name_or_path": "small"}, "`grid` must be one of the rows x columns of codes that the model knows"),
    ],
)
def test_wrong_options_are_explained(train, changes, message, tmp_path):
    source = changes.get("model_name_or_path")
    if source in ("foreign", "small"):
        original, vqvae = extended("qwen").parent / "original", extended("qwen").parent / "vqvae"
        if source == "foreign":
            vqvae = tmp_path / "vqvae"
            model = make_tiny()
            torch.nn.init.ones_(model.quantize.embedding.weight)
            model.save_pretrained(vqvae)
        extend_language_model(original, tmp_path / source, vqvae, GRIDS if source == "foreign" else [(2, 2)])
        changes = {"model_name_or_path": str(tmp_path / source)}
    with pytest.raises(ValueError, match=message):
        train("wrong", **changes)


def test_different_licences_are_named_before_anything_is_loaded(train, tokens, tmp_path, monkeypatch):
    sources = {"model_name_or_path": (extended("qwen"), "mit"), "token_set": (tokens, "gpl-3.0")}
    changes = {}
    for option, (source, license) in sources.items():
        folder = shutil.copytree(source, tmp_path / option)
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n")
        changes[option] = str(folder)
    monkeypatch.setattr("train_language_model.load_language_model", None)
    with pytest.raises(ValueError, match="different licences: `model_name_or_path` mit, `token_set` gpl-3.0"):
        train("out", **changes)


def test_rewriting_chats_ask_for_first_captions_and_images_follow_them(tokens):
    chats = examples(tokens, rewrite_fraction=0.5, first_caption_fraction=0.0)
    chats.caption_rows = [{"caption": ["a pear", "one pear"]}, {"caption": ["a cat", "my cat"]}]
    processor = load_extended("qwen")[1]
    end = processor.tokenizer.eos_token_id
    num_rewriting = 0
    for index in range(60):
        example = chats[index]
        text = processor.decode(example["input_ids"])
        answers = processor.decode([label for label in example["labels"] if label != IGNORED])
        is_rewriting = "<|image_begin|>" not in text
        num_rewriting += is_rewriting
        if is_rewriting:
            turns = text.count("<|im_start|>assistant")
            assert turns > 1
            assert answers.count("a pear") + answers.count("a cat") == turns
            assert "one" not in answers
            assert "my" not in answers
            assert end not in example["labels"]
            assert 16 <= len(example["input_ids"]) <= 512
        else:
            caption = answers.partition("<|image_begin|>")[0]
            assert caption in CAPTIONS
            assert example["labels"][-2] == end
    assert num_rewriting == pytest.approx(30, abs=12)


def test_a_trained_model_says_that_it_rewrites(train):
    out = train("rewrites", rewrite_fraction=0.5, max_steps=1)
    assert ImageLanguageModel.from_pretrained(out).rewrites
    source = str(out)
    with pytest.raises(ValueError, match="`--rewrite_fraction` must be above 0 for an adapter, as for its base"):
        train("adapter", model_name_or_path=source, lora_rank=2, max_steps=1)
    assert not ImageLanguageModel.from_pretrained(train("draws", model_name_or_path=source, max_steps=1)).rewrites
