"""Runs of `training/train.py` on a tiny model and a few photographs."""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import tarfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
import train
import training_runs
from accelerate import Accelerator
from conftest import ROOT, make_tiny
from context_models import make_context_model
from hub_server import serve_hub, use_hub
from huggingface_hub import ModelCard
from PIL import Image
from processes import start
from safetensors.torch import load_file
from svqvae_validation import closing_line
from training_runs import assert_no_private_path, cpu, logged

from svqvae_hf import SVQVAE
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.tokens.context_model import find_context_model
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.losses import objective as objective_module
from svqvae_hf.trainer.losses.objective import Objective
from svqvae_hf.trainer.options import read_options
from svqvae_hf.trainer.publishing import FINISHED_FILE
from svqvae_hf.trainer.run import run_training
from svqvae_hf.trainer.scripts import one_line_errors
from svqvae_hf.trainer.tracking import LABEL_HEIGHT, label_image
from svqvae_hf.trainer.train_options import TrainOptions
from svqvae_hf.trainer.validations import Validations
from svqvae_hf.trainer.weights import Weights

# All losses and everything that has a state, on crops so small that LPIPS skips the smaller scales.
EVERYTHING = {
    **{"resolution": 48, "crop_sizes": [24], "resize_range": [0.5, 1.0]},
    **{"per_device_train_batch_size": 2, "num_scales": 2},
    **{"lpips_weight": 0.1, "lpips_net": "squeeze", "causal_weight": 1e-3},
    **{"adversarial_weight": 0.5, "adversarial_start": 3},
    **{"kmeans_steps": [2], "kmeans_batches": 2, "dead_code_reset_steps": 2, "use_ema": True, "warmup_steps": 2},
    **{"gradient_accumulation_steps": 2, "dataloader_num_workers": 1, "logging_steps": 1, "learning_rate": 1e-3},
}
SMALL = {"resolution": 32, "per_device_train_batch_size": 2, "num_scales": 2}
SMALL |= {"dataloader_num_workers": 0, "warmup_steps": 0}

run = partial(training_runs.run, train.train, TrainOptions)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model, photographs of unlike sizes and kinds (one smaller than a crop), PNG shards and LPIPS weights."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny(dropout_p=0.1, entropy_loss_ratio=0.01).save_pretrained(folder / "model")
    for name in ("images", "held_out"):
        (folder / name).mkdir()
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as image:
        photo = image.convert("RGB").crop((100, 0, 300, 200))
    photo.save(folder / "images" / "colour.png")
    photo.crop((40, 20, 170, 180)).save(folder / "held_out" / "photo.png")
    photo.convert("L").resize((90, 70)).save(folder / "images" / "grey.jpg")
    photo.crop((0, 0, 20, 200)).save(folder / "images" / "narrow.png")
    photo.convert("RGBA").resize((64, 64)).save(folder / "images" / "alpha.png")
    for shard, name in enumerate(["colour.png", "alpha.png"]):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for index in range(3):
                tar.add(folder / "images" / name, f"{index}.png")
    torch.manual_seed(0)
    weights = {f"features.{key.partition('.')[2]}": value for key, value in LPIPS("squeeze").net.state_dict().items()}
    torch.save(weights, folder / "squeeze.pth")
    return folder


@pytest.fixture
def options(inputs, tmp_path):
    """Options of a new tiny model on the photographs."""
    data = {"train_data_dir": f"{inputs}/images", "output_dir": f"{tmp_path}/out"}
    return data | {"model_config_name_or_path": f"{inputs}/model/config.json"}


def train_in_a_session(config, log):
    """Trains as the command does, in a session of its own."""
    os.setsid()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    try:
        with cpu(), one_line_errors():
            run_training(train.train, TrainOptions(**config))
    except SystemExit as stop:
        code = stop.code
    sys.exit(code)  # without the frames of `stop`, which keep the loader's process


def wait_for_step(process, log, step):
    """Waits until the log has a step."""
    while not re.search(rf"step {step} of .*train/", log.read_text() if log.exists() else ""):
        process.join(timeout=0.1)
        assert process.is_alive(), log.read_text()


def weights(output_dir):
    return load_file(f"{output_dir}/diffusion_pytorch_model.safetensors")


def assert_equal_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# The whole


@pytest.mark.slow
def test_run_with_everything_on_stays_finite_and_saves_a_model_that_loads(options, inputs, caplog):
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "svqvae_hf.trainer.log")
    options |= EVERYTHING | {"lpips_weights": str(inputs / "squeeze.pth"), "gradient_accumulation_steps": 1}
    options |= {"max_steps": 16, "logging_steps": 4, "kmeans_steps": [4], "dead_code_reset_steps": 8}
    options |= {"adversarial_start": 10, "ema_decay": 0.9}
    options |= {"validation_data_dir": [str(inputs / "held_out")], "eval_steps": 4}
    run(**options, report_to="tensorboard", gradient_checkpointing=True)
    for name in ("loss", "l2", "lpips", "vq", "commitment", "entropy", "causal", "adversarial"):
        values = logged(caplog, f"train/{name}")
        assert 16 in values, name
        assert all(map(math.isfinite, values.values())), name
    assert 8 not in logged(caplog, "train/adversarial")
    assert all(norm > 0 for norm in logged(caplog, "train/discriminator_grad_norm").values())
    assert not any(logged(caplog, "train/skipped").values())
    assert caplog.text.count("images are smaller than their crops of") == 1
    validation = logged(caplog, "validation/psnr@1")
    assert validation[16] > validation[4] > 5
    output_dir = options["output_dir"]
    model = SVQVAE.from_pretrained(output_dir)
    assert model(torch.rand(1, 3, 40, 40)).sample.isfinite().all()
    untrained = make_tiny().state_dict()
    kept = {name for name, tensor in weights(output_dir).items() if torch.equal(tensor, untrained[name])}
    assert all(name.endswith(".k.bias") for name in kept), "softmax hides a shift of all keys, and nothing else"
    files = {path.name for path in (ROOT / output_dir).iterdir()}
    assert {"README.md", "config.json", "train_config.yaml", "checkpoint-16", "samples"} <= files
    assert len(list((ROOT / output_dir / "samples").iterdir())) == 5


# Interruptions


@pytest.mark.slow
def test_stopped_and_killed_run_ends_with_the_weights_of_an_unbroken_one(options, inputs, tmp_path):
    options |= EVERYTHING | {"lpips_weights": str(inputs / "squeeze.pth"), "per_device_train_batch_size": 1}
    options |= {"train_data_dir": str(inputs / "shard-*.tar"), "max_steps": 8, "save_steps": 2}
    options |= {"codebook_decay": 0.9, "dead_code_reset_steps": 4}
    options |= {"streaming": True, "shuffle_buffer": 2, "mix_data_dir": str(inputs / "images"), "mix_fraction": 0.4}
    options |= {"validation_data_dir": [str(inputs / "held_out")], "eval_steps": 2, "load_best_model_at_end": True}
    whole, broken = (options | {"output_dir": str(tmp_path / name)} for name in ("whole", "broken"))
    stopped = start(train_in_a_session, broken, tmp_path / "stopped.txt")
    wait_for_step(stopped, tmp_path / "stopped.txt", 3)  # no loader is about to start, as at k-means
    os.killpg(stopped.pid, signal.SIGTERM)  # the loader's process gets it, too
    stopped.join()
    log = (tmp_path / "stopped.txt").read_text()
    assert stopped.exitcode == 128 + signal.SIGTERM, log
    steps_done = int(re.search(r"Stopped by a signal at step (\d+)", log)[1])
    assert f"step {steps_done} of 8 (" in log
    assert f"step {steps_done + 1} of 8 (" not in log
    assert (tmp_path / "broken" / f"checkpoint-{steps_done}").is_dir()
    broken |= {"resume_from_checkpoint": "latest"}
    killed = start(train_in_a_session, broken, tmp_path / "killed.txt")
    wait_for_step(killed, tmp_path / "killed.txt", steps_done + 2)
    for process in (*psutil.Process(killed.pid).children(recursive=True), killed):  # workers have their own sessions
        process.kill()
    killed.join()
    assert not (tmp_path / "broken" / "config.json").exists()
    for config in (whole, broken):
        run(**config)
    assert_equal_weights(whole["output_dir"], broken["output_dir"])


def test_the_best_validation_is_a_quantised_one():
    validations = Validations(torch.nn.Linear(1, 1), keep_best=True, measured={})
    for step, psnr, ids in ((0, 31.0, []), (5, 25.0, [1]), (9, 24.0, [1])):
        validations.add(step, {"validation": {"psnr@1": psnr}}, {"validation": torch.tensor(ids)})
    assert (validations.step, len(validations.weights)) == (5, 2)


def numbers_of_two_sets(first, watched):
    """Numbers and ids of a validation of two sets at two scales."""
    numbers = {}
    for name, psnr in (("validation", first), ("validation_2", watched)):
        numbers[name] = {"psnr@0.5": psnr - 1.0, "psnr@1": psnr + 1.0, "perplexity@1": 99.0}
    return numbers, {name: torch.tensor([1]) for name in numbers}


def test_the_first_folder_alone_decides_which_validation_is_the_best():
    validations = Validations(torch.nn.Linear(1, 1), keep_best=True, measured={})
    for step, first, watched in ((0, 22.6, 35.3), (50, 23.6, 31.0), (100, 23.5, 36.0)):
        validations.add(step, *numbers_of_two_sets(first, watched))
    assert validations.step == 50


def test_the_last_line_says_what_was_gained_and_what_was_lost(options, inputs):
    options |= {"model_config_name_or_path": None, "pretrained_model_name_or_path": str(inputs / "model")}
    options |= {"validation_data_dir": ["pictures", "photos"], "load_best_model_at_end": True}
    options |= {"validation_scales": [0.5, 1.0]}
    validations = Validations(torch.nn.Linear(1, 1), keep_best=True, measured={})
    for step, first, watched in ((0, 22.57, 35.25), (50, 23.58, 34.17)):
        validations.add(step, *numbers_of_two_sets(first, watched))
    assert closing_line(TrainOptions(**options), validations) == (
        "PSNR, mean over the scales 0.5, 1: validation 22.57 -> 23.58 dB (+1.01); validation_2 35.25 -> 34.17 dB "
        "(-1.08). Saved: the weights after step 50. To lose less on validation_2: "
        '"Lose less on photographs" in docs/your_own_pictures.md.'
    )


def test_a_checkpoint_from_the_time_of_the_mean_over_folders_keeps_its_choice_until_a_better_one():
    old = Validations(torch.nn.Linear(1, 1), keep_best=True, measured={})
    old.add(0, *numbers_of_two_sets(22.6, 35.3))
    resumed = Validations(torch.nn.Linear(1, 1), keep_best=True, measured={})
    resumed.load_state_dict(old.state_dict() | {"score": 115.8})  # which was the sum over folders and scales
    resumed.add(50, *numbers_of_two_sets(22.5, 36.0))
    assert resumed.step == 0
    resumed.add(100, *numbers_of_two_sets(22.7, 30.0))
    assert resumed.step == 100


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"validation_data_dir": []}, "validation_data_dir"),
        ({"validation_scales": [1.0]}, "validation_scales"),
        ({"num_validation_images": 1}, "num_validation_images"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"another_image": True}, "validation_data_dir"),
    ],
)
def test_a_run_is_not_resumed_with_other_validations(options, inputs, tmp_path, changes, name):
    held_out = tmp_path / "held_out"
    shutil.copytree(inputs / "held_out", held_out)
    options |= SMALL | {"validation_data_dir": [str(held_out)], "max_steps": 1}
    run(**options)
    if changes.pop("another_image", False):
        (image, *_) = held_out.glob("*.png")
        shutil.copy(image, held_out / "another.png")
    with pytest.raises(ValueError, match=f"`--{name}` must be as in the checkpoint, and so must the images"):
        run(**options | {"max_steps": 2, "resume_from_checkpoint": "latest"} | changes)


def test_unreadable_images_of_a_validation_are_logged_and_counted(options, inputs, tmp_path, caplog):
    held_out = tmp_path / "held_out"
    shutil.copytree(inputs / "held_out", held_out)
    (held_out / "broken.png").write_bytes(b"no image")
    options |= SMALL | {"validation_data_dir": [str(held_out)], "max_steps": 1}
    run(**options)
    assert re.search(r"Skipped `broken.png` of `.*/held_out`: the image", caplog.text)
    card = Path(options["output_dir"], "README.md").read_text()
    assert re.search(r"images \(1 that cannot be read are skipped\), centre crops: ", card)
    for path in held_out.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(
        ValueError, match="`--validation_data_dir` must hold at least one readable image, but `.*held_"
    ):
        run(**options | {"output_dir": str(tmp_path / "another")})


# Two processes


def gradients(sample):
    """Gradients of all losses, the discriminator's among them, for the part of `sample` of this process."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    needed = {"output_dir": "out", "train_data_dir": "x", "model_config_name_or_path": "y"}
    options = TrainOptions(**needed, **(EVERYTHING | {"adversarial_start": 0}))
    vqvae = make_tiny(entropy_loss_ratio=1.0).train()
    with patch.object(objective_module, "load_lpips", lambda net, weights: LPIPS(net)):
        objective = Objective(options, vqvae, mean=partial(accelerator.reduce, reduction="mean"))
    discriminator = objective.discriminator
    model, discriminator_model = accelerator.prepare(vqvae, discriminator)
    sample = sample.tensor_split(accelerator.num_processes)[accelerator.process_index]
    output = model(sample, [0.5, 1.0], scale_from="latents")
    pairs = objective.pairs(sample, output)
    discriminator.requires_grad_(False)
    objective(pairs, output, step=0)[0].backward()
    discriminator.requires_grad_(True)
    objective.discriminator_loss(pairs, discriminator_model)[0].backward()
    parameters = (*vqvae.named_parameters(), *discriminator.named_parameters())
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def be_one_of_two(rank, port):
    """Makes this process one of two, which stay connected from one run to the next."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    Accelerator.end_training = lambda accelerator: accelerator.wait_for_everyone()


def run_two(work, *args):
    """Calls a function in two processes, with their rank and a free port before other arguments."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    processes = [start(work, rank, port, *args) for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def work_of_two_processes(rank, port, options, sample, folder):
    """Saves the gradients of a batch, and trains at once and resumed; `final` saves those of each process."""
    be_one_of_two(rank, port)
    torch.save(gradients(sample), folder / f"gradients-{rank}.pt")

    def record(weights):
        torch.save(weights.network.state_dict(), folder / f"weights-{rank}.pt")
        return final(weights)

    final, Weights.final = Weights.final, record
    run_training(train.train, TrainOptions(**options))
    if rank == 0:
        shutil.copytree(options["output_dir"], folder / "whole")
        shutil.rmtree(f"{options['output_dir']}/checkpoint-4")
        Path(options["output_dir"], "finished_run.json").unlink()
    torch.distributed.barrier()
    run_training(train.train, TrainOptions(**options, resume_from_checkpoint="latest"))
    torch.distributed.destroy_process_group()


def train_and_record(options):
    """Trains, and returns the hashes of the crops of each step."""
    steps, to_device = [], ImageSource.to_device

    def record(images, batch):
        steps.append([hashlib.sha256(crop.numpy().tobytes()).hexdigest() for crop in batch.sample])
        return to_device(images, batch)

    with patch.object(ImageSource, "to_device", record):
        run_training(train.train, TrainOptions(**options))
    return steps


def two_record(rank, port, options, changes, folder):
    """Trains from the start, and then from the checkpoint of one process, and notes the hashes."""
    be_one_of_two(rank, port)
    steps = train_and_record(options), train_and_record(options | changes)
    (folder / f"steps-{rank}.json").write_text(json.dumps(steps))
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_thread():
    """As in the processes under test, because more threads add numbers in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_equal_one_with_the_joined_batch_stay_equal_and_resume_exactly(inputs, tmp_path):
    options = EVERYTHING | {"lpips_weight": 0.0, "adversarial_start": 1, "kmeans_steps": [1]}
    options |= {"max_steps": 4, "save_steps": 2, "output_dir": str(tmp_path / "out")}
    options |= {"model_config_name_or_path": str(inputs / "model" / "config.json"), "dataloader_num_workers": 0}
    options |= {"train_data_dir": str(inputs / "images"), "gradient_accumulation_steps": 1, "codebook_decay": 0.9}
    torch.manual_seed(3)
    sample = torch.rand(4, 3, 48, 48)
    run_two(work_of_two_processes, options, sample, tmp_path)

    expected = gradients(sample)
    assert any(name.startswith("layers") for name in expected)
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients-{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)
    one, other = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one), "k-means and resets see other latents on each"
    assert_equal_weights(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_another_number_of_processes_goes_on_with_the_same_crops_and_ends_alike(inputs, tmp_path):
    options = EVERYTHING | {"lpips_weight": 0.0, "adversarial_start": 1, "kmeans_steps": [1], "codebook_decay": 0.9}
    options |= {"max_steps": 4, "save_steps": 2, "dataloader_num_workers": 0}
    make_tiny(entropy_loss_ratio=0.01).save_pretrained(tmp_path / "model")  # without dropout
    options |= {"model_config_name_or_path": str(tmp_path / "model" / "config.json"), "per_device_train_batch_size": 4}
    options |= {"train_data_dir": str(inputs / "images"), "gradient_accumulation_steps": 1}
    one = {"output_dir": str(tmp_path / "one")}
    two = {"output_dir": str(tmp_path / "two")}
    one_then_two = {"output_dir": str(tmp_path / "one_then_two")}
    one_then_two["resume_from_checkpoint"] = str(tmp_path / "one" / "checkpoint-2")
    two_then_one = {"output_dir": str(tmp_path / "two_then_one")}
    two_then_one["resume_from_checkpoint"] = str(tmp_path / "two" / "checkpoint-2")
    with cpu():
        steps = train_and_record(options | one)
        training_runs.forget_accelerate()
        run_two(two_record, options | two | {"per_device_train_batch_size": 2}, one_then_two, tmp_path)
        assert train_and_record(options | two_then_one) == steps[2:]
        training_runs.forget_accelerate()
    # Crops of the steps of both runs by two processes, the whole one and the resumed one
    whole_0, resumed_0 = json.loads((tmp_path / "steps-0.json").read_text())
    whole_1, resumed_1 = json.loads((tmp_path / "steps-1.json").read_text())
    assert join_processes(whole_0, whole_1) == steps
    assert join_processes(resumed_0, resumed_1) == steps[2:]
    for whole, broken in (("one", "one_then_two"), ("two", "two_then_one")):
        expected = weights(tmp_path / whole)
        for name, value in weights(tmp_path / broken).items():
            # The sum over two processes rounds differently, so a latent between two codes may get the other code. That
            # changes weights by up to 1e-4. Another crop changes them by about the learning rate of 1e-3.
            torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=0, msg=f"{broken}: {name}")


def join_processes(first, second):
    """Crops of each step of two processes, in the order that one process would have."""
    steps = []
    for first_crops, second_crops in zip(first, second, strict=True):
        crops = []
        for pair in zip(first_crops, second_crops, strict=True):
            crops += pair
        steps.append(crops)
    return steps


# Codebook, decoder, result, mistakes


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [("adapt", []), ("adapt_keep_codes", ["quantize"]), ("adapt_decoder", ["encoder", "quant_conv", "quantize"])],
)
def test_recipes_adapt_a_model_of_another_family_and_keep_what_they_say(recipe, kept, options, inputs, tmp_path):
    before = make_tiny(network_range=(-1.0, 1.0), norm_num_groups=4, num_res_blocks=2, z_channels=16)
    before.save_pretrained(tmp_path / "model")
    make_context_model(before.codebook_fingerprint()).save_pretrained(tmp_path / "model")
    changes = {"pretrained_model_name_or_path": tmp_path / "model", "mix_data_dir": inputs / "images"}
    changes |= {"train_data_dir": options["train_data_dir"], "output_dir": options["output_dir"], "resolution": 32}
    changes |= {"validation_data_dir": inputs / "held_out", "warmup_steps": 0, "eval_steps": 2, "max_steps": 3}
    changes |= {"load_best_model_at_end": False, "mixed_precision": "no", "dataloader_num_workers": 0}
    words = [str(ROOT / "training" / "configs" / f"{recipe}.yaml")]
    for name, value in changes.items():
        words += [f"--{name}", str(value)]
    (recipe_options,) = read_options([TrainOptions], words)
    run(**vars(recipe_options))
    after = SVQVAE.from_pretrained(options["output_dir"])
    weights_before = before.state_dict()
    changed_parts = set()
    for name, value in after.state_dict().items():
        if not torch.equal(value, weights_before[name]):
            changed_parts.add(name.split(".")[0])
    all_parts = {name for name, _ in before.named_children()}
    assert changed_parts == all_parts - set(kept)
    context_model = find_context_model(options["output_dir"], after.codebook_fingerprint())
    assert (context_model is None) == ("quantize" not in kept)
    sample = torch.rand(3, 3, 52, 40)
    if "encoder" in kept:
        assert torch.equal(after.encode_tokens(sample), before.encode_tokens(sample))


def test_ids_that_are_kept_are_counted_alike_for_any_batch(options, inputs, caplog):
    caplog.set_level(logging.INFO)
    options |= SMALL | {"model_config_name_or_path": None, "pretrained_model_name_or_path": str(inputs / "model")}
    options |= {"train": "decoder", "train_data_dir": str(inputs / "shard-*.tar"), "max_steps": 1}
    options |= {"validation_data_dir": [str(inputs / "images")], "resume_from_checkpoint": "latest"}
    run(**options)
    run(**options | {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})
    assert logged(caplog, "validation/ids_kept") == {0: 1, 1: 1, 2: 1}


def test_log_and_card_say_that_nothing_was_learned(options, inputs, caplog):
    caplog.set_level(logging.INFO)
    options |= SMALL | {"model_config_name_or_path": None, "pretrained_model_name_or_path": str(inputs / "model")}
    options |= {"validation_data_dir": [str(inputs / "held_out")], "load_best_model_at_end": True}
    run(**options, max_steps=1, learning_rate=1e-12)
    assert re.search(
        r"scales 0.25, 0.5, 1: validation (\S+) -> \1 dB \(\+0.00\)[.] Saved: the weights that the",
        caplog.messages[-1],
    )
    card = Path(options["output_dir"], "README.md").read_text()
    assert "| steps | 0: no validation after a step was better" in card
    assert re.search(r"\| validation \| 1 images, centre crops: .* before the first step \|", card)
    assert_equal_weights(options["output_dir"], inputs / "model")


def test_a_longer_run_keeps_the_best_weights_of_the_shorter_one(options, inputs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    options |= SMALL | {"model_config_name_or_path": None, "pretrained_model_name_or_path": str(inputs / "model")}
    options |= {"validation_data_dir": [str(inputs / "held_out")], "load_best_model_at_end": True}
    run(**options, max_steps=2, learning_rate=1e-4)
    card = Path(options["output_dir"], "README.md")
    assert "after step 2; " in card.read_text()
    assert re.search(
        r"scales 0.25, 0.5, 1: validation .* dB .*[.] Saved: the weights after step 2[.]$", caplog.messages[-1]
    )
    shutil.copytree(options["output_dir"], tmp_path / "shorter")
    run(**options, max_steps=3, learning_rate=10.0, resume_from_checkpoint="latest")
    assert "after step 2; " in card.read_text()
    assert_equal_weights(options["output_dir"], tmp_path / "shorter")


def test_a_checkpoint_becomes_a_model_in_a_run_without_steps(options, inputs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    options |= SMALL | {"use_ema": True, "lr_scheduler_type": "constant", "kmeans_batches": 8}
    options |= {"validation_data_dir": [str(inputs / "held_out")], "save_steps": 2}
    run(**options | {"output_dir": str(tmp_path / "short"), "kmeans_steps": [1]}, max_steps=2)
    run(**options, kmeans_steps=[1, 3], max_steps=4)
    options |= {
        "resume_from_checkpoint": f"{options['output_dir']}/checkpoint-2",
        "output_dir": str(tmp_path / "model"),
    }
    run(**options, kmeans_steps=[1], max_steps=2)
    assert caplog.messages[-1].endswith("Saved: the weights after step 2.")
    assert_equal_weights(tmp_path / "model", tmp_path / "short")


def test_a_validation_that_is_added_when_no_step_is_left_is_measured(options, inputs, caplog):
    caplog.set_level(logging.INFO)
    options |= SMALL | {"model_config_name_or_path": None, "pretrained_model_name_or_path": str(inputs / "model")}
    run(**options, max_steps=1)
    Path(options["output_dir"], FINISHED_FILE).unlink()  # as if the run had been killed after its last step
    options |= {"validation_data_dir": [str(inputs / "held_out")], "resume_from_checkpoint": "latest"}
    run(**options, max_steps=1)
    assert list(logged(caplog, "validation/psnr@1")) == [1]


def test_splits_of_further_sets_can_be_chosen(options, inputs, tmp_path):
    for split, name in (("train", "alpha.png"), ("test", "grey.jpg")):
        (tmp_path / "split" / split).mkdir(parents=True)
        shutil.copy(inputs / "images" / name, tmp_path / "split" / split)
    options |= SMALL | {"max_steps": 1, "train_data_dir": str(inputs / "held_out")}
    further = {"mix_data_dir": str(tmp_path / "split"), "validation_data_dir": [str(tmp_path / "split")]}
    for name, chosen in (("mix_split", {}), ("validation_split", {"mix_split": "train"})):
        with cpu(), pytest.raises(ValueError, match=rf"splits .*test.* Choose one with --{name}"):
            run_training(train.train, TrainOptions(**(options | further | chosen)))
    run(**options, **further, mix_split="train", validation_split="test")
    with Image.open(Path(options["output_dir"], "samples", "step-0000000.png")) as picture:
        assert picture.width == 4 * (32 + 4) + 4, "the image and three scales"
        height_of_one_set = picture.height
        strip = picture.convert("L").crop((4, 4, 36, 4 + LABEL_HEIGHT))
    assert strip.getextrema()[0] < 100, "a label stands above it"
    two_sets = {"validation_data_dir": [str(tmp_path / "split"), str(tmp_path / "split")]}
    in_other_folder = options | {"output_dir": f"{options['output_dir']}-2"}
    run(**in_other_folder, **(further | two_sets), mix_split="train", validation_split="test")
    with Image.open(Path(in_other_folder["output_dir"], "samples", "step-0000000.png")) as picture:
        assert picture.height == 2 * height_of_one_set - 4, "rows of both sets"


def test_samples_show_images_from_the_whole_of_each_set(options, tmp_path):
    for folder, greys in (("one", [9]), ("six", [0, 40, 80, 120, 160, 200])):
        (tmp_path / folder).mkdir()
        for number, grey in enumerate(greys):
            Image.new("RGB", (32, 32), (grey, grey, grey)).save(tmp_path / folder / f"{number}.png")
    options |= SMALL | {"validation_data_dir": [str(tmp_path / "one"), str(tmp_path / "six")]}
    with patch("svqvae_hf.trainer.tracking.label_image", wraps=label_image) as labels:
        run(**options, max_steps=1, validation_scales=[1.0])
    first, second = "original, validation", "original, validation_2"
    shown_labels = [call.args[0] for call in labels.call_args_list[:10]]
    assert shown_labels[::2] == [first, second, second, second, second]
    assert set(shown_labels[1::2]) == {"reconstruction, scale 1"}
    with Image.open(Path(options["output_dir"], "samples", "step-0000000.png")) as picture:
        originals = picture.convert("L").crop((4, 0, 4 + 32, picture.height))
    row_height = LABEL_HEIGHT + 32 + 4
    greys = [originals.getpixel((16, 4 + LABEL_HEIGHT + 16 + row * row_height)) for row in range(5)]
    assert greys == [9, 0, 40, 120, 160]


def test_a_run_is_not_resumed_with_other_images_or_another_model_of_the_same_name(options, inputs, tmp_path):
    for work in ("w1", "w2"):
        shutil.copytree(inputs / "images", tmp_path / work / "photos")
        make_tiny(dropout_p=0.1 if work == "w1" else 0.2).save_pretrained(tmp_path / work / "model")
    (tmp_path / "w2" / "photos" / "narrow.png").unlink()
    options |= SMALL | {"max_steps": 1, "resume_from_checkpoint": "latest", "model_config_name_or_path": None}
    options |= {"train_data_dir": f"{tmp_path}/w1/photos", "pretrained_model_name_or_path": f"{tmp_path}/w1/model"}
    run(**options)
    for name, source in (("train_data_dir", "photos"), ("pretrained_model_name_or_path", "model")):
        for steps in (1, 2):
            changes = {name: f"{tmp_path}/w2/{source}", "max_steps": steps}
            with cpu(), pytest.raises(ValueError, match=f"`--{name}` must name what .* was made from"):
                run_training(train.train, TrainOptions(**(options | changes)))
            training_runs.forget_accelerate()
    with cpu(), pytest.raises(SystemExit) as finished:
        run_training(train.train, TrainOptions(**options))
    assert finished.value.code == 0


def test_model_is_uploaded_with_its_card_numbers_and_options(options, inputs, tmp_path, monkeypatch):
    options |= SMALL | {"max_steps": 2, "validation_data_dir": [str(inputs / "held_out")]}
    options |= {"push_to_hub": True, "hub_model_id": "org/trained", "model_config_name_or_path": None}
    started_from = shutil.copytree(inputs / "model", tmp_path / "started_from")
    head = "---\nlicense: mit\nbase_model: org/first\ntags: [svqvae]\n---\n\n"
    (started_from / "README.md").write_text(f"{head}| | |\n|---|---|\n| steps | 7 of 8 crops |\n")
    options |= {"pretrained_model_name_or_path": str(started_from)}
    with serve_hub(tmp_path) as hub:
        use_hub(monkeypatch, hub)
        run(**options, hub_private_repo=True)
    repository = tmp_path / "hub" / "org" / "trained" / "main"
    assert {path.relative_to(repository).as_posix() for path in repository.rglob("*.*")} == {
        *("README.md", "config.json", "diffusion_pytorch_model.safetensors", "preprocessor_config.json"),
        "train_config.yaml",
        *("samples/step-0000000.png", "samples/step-0000002.png"),
    }
    assert_equal_weights(repository, options["output_dir"])
    card = (repository / "README.md").read_text()
    assert (ModelCard(card).data.license, ModelCard(card).data.base_model) == ("mit", "org/first")
    assert "| before: steps | 7 of 8 crops |" in card
    assert json.loads((repository.parent / "settings.json").read_text())["visibility"] == "private"
    assert re.search(r"\| 1 images, centre crops: psnr@0.25 \d+.* after step 2; psnr@0.25 \d+.* in the first", card)
    for folder in (tmp_path, inputs):
        assert_no_private_path(folder, repository)


@pytest.mark.parametrize(
    ("hub", "license", "error", "message"),
    [
        ({}, "my own", ValueError, "`license` must be an identifier that the Hub knows.*got 'my own'"),
        ({"HF_TOKEN": ""}, "mit", OSError, "Could not create `org/trained` on the Hub: you are not logged in"),
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, None, OSError, "`org/trained` on the Hub: the Hub cannot be reached"),
    ],
)
def test_what_would_fail_the_upload_ends_the_run_before_its_first_step(
    hub, license, error, message, options, tmp_path, monkeypatch
):
    options |= SMALL | {"max_steps": 2, "push_to_hub": True, "hub_model_id": "org/trained"}
    with serve_hub(tmp_path) as env, cpu():
        use_hub(monkeypatch, env | hub)
        with pytest.raises(error, match=message):
            run_training(train.train, TrainOptions(**options, license=license))
    assert not list((tmp_path / "hub").iterdir())
    assert not list(Path(options["output_dir"]).glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume_from_checkpoint": "nowhere"}, "or 'latest', got 'nowhere'"),
        ({"train_data_dir": "/nowhere"}, "no file or folder matches: `/nowhere`"),
        ({"validation_data_dir": ["copies"]}, "`--validation_data_dir` must hold images that are not trained on, but"),
        (
            {"validation_data_dir": ["copies"], "output_dir": "copies/out"},
            "`copies/out` must not be in `copies`",
        ),
        ({"model_config_name_or_path": "nowhere.json"}, "but there is no 'nowhere.json'"),
        ({"model_config_name_or_path": "list.json"}, "`list.json` must hold a JSON object, but holds a list"),
        ({"model_config_name_or_path": "typo.json"}, "must have only keys of its class, but has base_chanels"),
        ({"lpips_weight": 1.0, "lpips_weights": "/nowhere.pth"}, "/nowhere.pth"),
    ],
)
def test_mistakes_are_one_line(options, inputs, changes, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copies").mkdir()
    shutil.copy(inputs / "images" / "alpha.png", tmp_path / "copies" / "renamed.png")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "typo.json").write_text('{"base_chanels": 16}')
    with cpu(), pytest.raises(SystemExit) as stop, one_line_errors():
        run_training(train.train, TrainOptions(**(options | changes)))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ")
    assert message in line
