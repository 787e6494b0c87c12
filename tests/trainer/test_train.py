import itertools
import json
import logging
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tarfile
from functools import partial

import psutil
import pytest
import torch
import training_runs
import yaml
from accelerate import Accelerator, DistributedType
from conftest import ROOT, make_tiny
from diffusers.training_utils import EMAModel
from hub_server import serve_hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch._utils import ExceptionWrapper
from train import Trainer
from training_runs import assert_says_nothing_of, cpu, logged

from svqvae_hf import SVQVAE
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.trainer.data.crops import load_images
from svqvae_hf.trainer.losses.adversarial import PatchDiscriminator
from svqvae_hf.trainer.losses.objective import MultiScaleForward, Objective
from svqvae_hf.trainer.run import make_accelerator, run_script
from svqvae_hf.trainer.train_options import TrainConfig

# Every part of the objective and of the engine, on crops so small that LPIPS leaves the smaller scales out.
EVERYTHING = {
    **{"resolution": 48, "crop_sizes": [24], "train_batch_size": 2, "num_scales": 2, "resize_range": [0.5, 1.0]},
    **{"l1_weight": 0.5, "lpips_weight": 0.1, "lpips_net": "squeeze", "spread_weight": 0.01, "entropy_weight": 0.01},
    **{"adversarial_weight": 0.5, "adversarial_start": 5, "adversarial_adaptive": True, "lecam_weight": 0.01},
    **{"kmeans_steps": [3], "kmeans_batches": 2, "revival_steps": 2, "use_ema": True, "lr_warmup_steps": 2},
    **{"gradient_accumulation_steps": 2, "dataloader_num_workers": 1, "logging_steps": 1, "learning_rate": 1e-3},
}


@pytest.fixture
def image_folder(tmp_path, photo):
    """Photographs of unlike sizes and kinds; one smaller than a crop."""
    folder = tmp_path / "images"
    folder.mkdir()
    photo.save(folder / "colour.png")
    photo.convert("L").resize((90, 70)).save(folder / "grey.jpg")
    photo.crop((0, 0, 20, 300)).save(folder / "narrow.png")
    photo.convert("RGBA").resize((64, 64)).save(folder / "alpha.png")
    return folder


@pytest.fixture
def shards(tmp_path, image_folder):
    """PNG files as a webdataset of two shards."""
    for shard, name in enumerate(["colour.png", "alpha.png"]):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for index in range(3):
                tar.add(image_folder / name, f"{index}.png")
    return str(tmp_path / "shard-*.tar")


@pytest.fixture
def options(tmp_path, image_folder):
    """Options of a tiny run."""
    model = tmp_path / "model.json"
    tiny = {key: value for key, value in make_tiny(dropout_p=0.1).config.items() if not key.startswith("_")}
    model.write_text(json.dumps({**tiny, "_class_name": "SVQVAE"}))
    return {
        "model_config_name_or_path": str(model),
        "train_data_dir": str(image_folder),
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def lpips_weights(tmp_path):
    """Random weights of LPIPS's network, as torchvision names them."""
    torch.manual_seed(0)
    state_dict = LPIPS("squeeze").net.state_dict()
    path = tmp_path / "squeeze.pth"
    torch.save({f"features.{name.partition('.')[2]}": value for name, value in state_dict.items()}, path)
    return str(path)


pytestmark = pytest.mark.usefixtures("one_accelerator")
run = partial(training_runs.run, Trainer, TrainConfig)


def start(config, processes=1, **environment):
    """The same run as a command, in a session of its own."""
    path = f"{config['output_dir']}.yaml"
    with open(path, "w") as file:
        yaml.safe_dump(config, file)
    command = [sys.executable, str(ROOT / "training" / "train.py"), path]
    if processes > 1:
        # `accelerate launch --cpu` starts one process only where there is no MPI.
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for_step(process, step):
    """Reads the log until a step; gives what was read."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if f"step {step}: train" in line:
            return lines
    raise AssertionError("".join(lines))


def weights(output_dir):
    return load_file(f"{output_dir}/diffusion_pytorch_model.safetensors")


def assert_equal_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# The whole


def test_run_with_everything_on_stays_finite_and_leaves_a_model_that_loads(options, lpips_weights, caplog):
    caplog.set_level(logging.INFO)
    options |= EVERYTHING | {"lpips_weights": lpips_weights, "gradient_accumulation_steps": 1}
    options |= {"max_train_steps": 200, "logging_steps": 20, "kmeans_steps": [10], "revival_steps": 25}
    options |= {"adversarial_start": 50, "entropy_start": 20, "lpips_start": 30, "l1_start": 40}
    options |= {"validation_data_dir": options["train_data_dir"], "validation_steps": 25}
    run(**options, report_to="tensorboard", gradient_checkpointing=True)
    for name in ("loss", "l2", "l1", "lpips", "vq", "commitment", "entropy", "spread", "adversarial", "lecam"):
        values = logged(caplog, f"train/{name}")
        assert 200 in values, name
        assert all(map(math.isfinite, values.values())), name
    assert 40 not in logged(caplog, "train/adversarial")
    assert all(norm > 0 for norm in logged(caplog, "train/discriminator_grad_norm").values())
    assert not any(logged(caplog, "train/skipped").values())
    validation = logged(caplog, "validation/psnr@1")
    assert validation[25] > 5
    assert validation[200] > validation[25] + 1  # later ones go up and down with the discriminator
    for name in ("usage@1", "perplexity@1", "encoder_grad_norm", "images_per_second", "mean_cosine", "lr", "revived"):
        assert 200 in logged(caplog, f"train/{name}"), name
    output_dir = options["output_dir"]
    model = SVQVAE.from_pretrained(output_dir)
    assert model.config["sample_size"] == 48
    assert model(torch.rand(1, 3, 40, 40)).sample.isfinite().all()
    untrained = make_tiny().state_dict()
    kept = {name for name, tensor in weights(output_dir).items() if torch.equal(tensor, untrained[name])}
    assert all(name.endswith(".k.bias") for name in kept), "softmax hides a shift of all keys, and nothing else"
    files = {path.name for path in (ROOT / output_dir).iterdir()}
    assert {"README.md", "config.json", "train_config.yaml", "checkpoint-200", "samples"} <= files
    assert len(list((ROOT / output_dir / "samples").iterdir())) == 8
    with open(f"{output_dir}/train_config.yaml") as file:
        assert TrainConfig(**yaml.safe_load(file)).max_train_steps == 200


# Breaks


@pytest.mark.parametrize(
    ("kind", "processes"), [("folder", 1), ("stream", 1), ("folder", 2)], ids=["folder", "stream", "two-processes"]
)
def test_killed_and_resumed_run_equals_an_unbroken_one(options, lpips_weights, shards, tmp_path, kind, processes):
    options |= EVERYTHING | {"lpips_weights": lpips_weights, "max_train_steps": 10, "checkpointing_steps": 2}
    if kind == "stream":
        options |= {"train_data_dir": None, "dataset_name": "webdataset", "data_files": [shards], "streaming": True}
        options |= {"image_column": "png", "shuffle_buffer": 2}
    whole, broken = (options | {"output_dir": str(tmp_path / name)} for name in ("whole", "broken"))
    killed = start(broken, processes)
    wait_for_step(killed, random.randint(3, 9))
    for each in (*psutil.Process(killed.pid).children(recursive=True), killed):  # workers have sessions of their own
        each.kill()
    killed.communicate()
    assert not os.path.exists(f"{broken['output_dir']}/config.json")
    for config in (whole, broken | {"resume_from_checkpoint": "latest"}):
        if processes == 1:
            run(**config)
        else:
            finished = start(config, processes)
            log = finished.communicate()[1]
            assert finished.returncode == 0, log
    assert_equal_weights(whole["output_dir"], broken["output_dir"])


def test_signal_saves_first_and_nothing_is_lost(options, tmp_path):
    options |= {"resolution": 32, "train_batch_size": 2, "dataloader_num_workers": 1, "logging_steps": 1}
    options |= {"max_train_steps": 40, "checkpointing_steps": 1000, "lr_warmup_steps": 2}
    stopped = start(options)
    log = "".join(wait_for_step(stopped, 3))
    os.killpg(stopped.pid, signal.SIGTERM)  # the loader's process gets it, too
    log += stopped.communicate()[1]
    assert stopped.returncode == 128 + signal.SIGTERM, log
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    done = int(checkpoint.name.split("-")[1])
    assert f"Stopped by a signal at step {done}" in log
    assert f"step {done}: train" in log
    assert f"step {done + 1}: train" not in log
    run(**(options | {"resume_from_checkpoint": "latest"}))
    run(**(options | {"output_dir": str(tmp_path / "whole")}))
    assert_equal_weights(tmp_path / "out", tmp_path / "whole")


def test_gradients_that_are_not_finite_are_skipped_counted_and_stop_the_run(options, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    options |= {"resolution": 32, "train_batch_size": 2, "dataloader_num_workers": 0, "logging_steps": 1}
    options |= {"max_train_steps": 6, "max_skipped_steps": 1, "lr_warmup_steps": 0}
    call, seen = Objective.__call__, []

    def poisoned(self, pairs, output, step):
        loss, parts = call(self, pairs, output, step)
        seen.append(self.last_weight.detach().clone())
        return loss * (float("nan") if step in poison else 1.0), parts

    monkeypatch.setattr(Objective, "__call__", poisoned)
    poison = (1, 3)
    averages = []
    step_average = EMAModel.step
    monkeypatch.setattr(EMAModel, "step", lambda *args: averages.append(len(seen)) or step_average(*args))
    run(**options, use_ema=True)
    assert averages == [1, 3, 5, 6]
    skipped = logged(caplog, "train/skipped")
    assert {step for step, share in skipped.items() if share} == {2, 4}
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])
    poison = (3, 4)
    with pytest.raises(ValueError, match="not for 2 steps in a row. Lower `--learning_rate`"):
        run(**(options | {"output_dir": options["output_dir"] + "2"}))


def test_scaled_gradients_train_as_plain_ones(options, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    options |= {"resolution": 24, "train_batch_size": 1, "num_scales": 2, "max_train_steps": 4, "logging_steps": 1}
    options |= {"adversarial_weight": 0.5, "adversarial_start": 0, "lecam_weight": 0.01, "lr_warmup_steps": 0}
    options |= {"gradient_accumulation_steps": 2, "dataloader_num_workers": 0}
    names = ("encoder_grad_norm", "decoder_grad_norm", "train/grad_norm", "discriminator_grad_norm")
    run(**options)
    expected = [logged(caplog, name) for name in names]
    caplog.clear()

    def scaled_accelerator(config):
        """In float32, since float16 needs a GPU; by powers of 2, so that nothing is rounded."""
        accelerator = make_accelerator(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)

        def unscale_gradients(optimizer):
            accelerator.scaler.unscale_(optimizer.optimizer)

        monkeypatch.setattr(accelerator, "unscale_gradients", unscale_gradients)
        return accelerator

    monkeypatch.setattr("svqvae_hf.trainer.run.make_accelerator", scaled_accelerator)
    run(**(options | {"output_dir": str(tmp_path / "scaled")}))
    assert [logged(caplog, name) for name in names] == expected
    assert_equal_weights(options["output_dir"], tmp_path / "scaled")


# Two processes


def spawn(worker, *args):
    """Runs `worker(rank, *args)` in two processes that know each other."""
    port = free_port()
    torch.multiprocessing.spawn(partial(_rank, worker, port), args=args, nprocs=2)


def _rank(worker, port, rank, *args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    worker(rank, *args)


def gradients(sample):
    """Gradients of all parts of the objective, and of the discriminator, for the part of `sample` of this process."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    options = EVERYTHING | {"adversarial_start": 0}
    config = TrainConfig(output_dir="out", train_data_dir="x", model_config_name_or_path="y", **options)
    vqvae = make_tiny(entropy_loss_ratio=1.0).train()
    judge = PatchDiscriminator()
    model, discriminator = accelerator.prepare(MultiScaleForward(vqvae), judge)
    objective = Objective(config, vqvae, LPIPS("squeeze"), judge, partial(accelerator.reduce, reduction="mean"))
    sample = sample.tensor_split(accelerator.num_processes)[accelerator.process_index]
    output = model(sample, [0.5, 1.0], True)
    pairs = objective.pairs(sample, output)
    judge.requires_grad_(False)
    objective(pairs, output, step=0)[0].backward()
    judge.requires_grad_(True)
    objective.discriminator_loss(pairs, discriminator)[0].backward()
    parameters = itertools.chain(vqvae.named_parameters(), judge.named_parameters())
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def save_gradients(rank, sample, folder):
    torch.save(gradients(sample), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_with_the_joined_batch(tmp_path):
    torch.manual_seed(3)
    sample = torch.rand(4, 3, 48, 48)
    spawn(save_gradients, sample, tmp_path)
    expected = gradients(sample)
    assert any(name.startswith("layers") for name in expected)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)


def save_codebook(rank, config, folder):
    trainer = Trainer(config)
    trainer.run()
    torch.save(trainer.vqvae.state_dict(), f"{folder}/{rank}.pt")


def test_codebook_is_equal_on_both_processes(options, tmp_path):
    config = TrainConfig(
        **options,
        **{"resolution": 32, "train_batch_size": 2, "max_train_steps": 100, "kmeans_steps": [5], "revival_steps": 5},
        **{"kmeans_batches": 2, "dataloader_num_workers": 0, "logging_steps": 5, "learning_rate": 1e-3},
    )
    spawn(save_codebook, config, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def save_projection(rank, config, folder):
    # In place of the engine, some of which bring the weights of all processes together themselves.
    Trainer.prepare = lambda self, network, *_: torch.save(network.quant_conv.state_dict(), f"{folder}/{rank}.pt")
    Trainer(config)
    torch.distributed.destroy_process_group()


def test_both_processes_start_from_one_projection(options, tmp_path):
    config = TrainConfig(**options, resolution=32, train_batch_size=2, dataloader_num_workers=0)
    spawn(save_projection, config, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_kmeans_sees_latents_without_dropout(options, monkeypatch):
    options |= {"resolution": 32, "train_batch_size": 4, "dataloader_num_workers": 0, "kmeans_batches": 1}
    with cpu():
        trainer = Trainer(TrainConfig(**options, kmeans_steps=[1]))
    seen = []
    monkeypatch.setattr("train.initialise_codebook", lambda quantizer, latents, seed: seen.append(latents))
    trainer._start_codebook()
    trainer._start_codebook()
    assert torch.equal(*seen)
    assert trainer.vqvae.training


# Data, decoder, mistakes


def test_unreadable_files_are_left_out_and_named(options, photo, tmp_path, caplog):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(57):
        photo.crop((index, index, index + 40, index + 40)).save(folder / f"{index:02}.jpg")
    whole = (folder / "00.jpg").read_bytes()
    broken = {"truncated.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.jpg": b"no image"}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    options |= {"train_data_dir": str(folder), "resolution": 32, "train_batch_size": 10, "dataloader_num_workers": 1}
    options |= {"lr_warmup_steps": 0}
    run(**options, max_train_steps=30)
    named = {name for name in broken if f"cannot be read as an image: {folder / name}" in caplog.text}
    assert named == set(broken)
    assert caplog.text.count("cannot be read as an image") == len(broken)
    options |= {"output_dir": options["output_dir"] + "2", "max_unreadable_share": 0.01}
    with pytest.raises(ValueError, match=r"At most 1.0% of the images may be unreadable, but [4-9]\.\d% of the"):
        run(**options, max_train_steps=30)


def test_decoder_training_keeps_all_ids(options, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    before = make_tiny(dropout_p=0.1)
    before.save_pretrained(tmp_path / "pretrained")
    options |= {"model_config_name_or_path": None, "pretrained_model_name_or_path": str(tmp_path / "pretrained")}
    options |= {"resolution": 32, "train_batch_size": 2, "max_train_steps": 5, "dataloader_num_workers": 0}
    run(**options, train="decoder", validation_data_dir=options["train_data_dir"], lr_warmup_steps=0)
    assert "All ids of the validation images are as before" in caplog.text
    after = SVQVAE.from_pretrained(options["output_dir"])
    changed = {
        name.split(".")[0]
        for name, value in after.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    sample = torch.rand(3, 3, 52, 40)
    assert torch.equal(after.encode_tokens(sample), before.encode_tokens(sample))


def test_model_is_uploaded_with_its_card_numbers_and_options(options, tmp_path):
    options |= {"resolution": 32, "train_batch_size": 2, "max_train_steps": 2, "dataloader_num_workers": 0}
    options |= {"validation_data_dir": options["train_data_dir"], "push_to_hub": True, "hub_model_id": "org/trained"}
    make_tiny().save_pretrained(tmp_path / "start")
    options |= {"model_config_name_or_path": None, "pretrained_model_name_or_path": str(tmp_path / "start")}
    shard = tmp_path / "set.parquet"
    load_images(None, None, [], options["train_data_dir"], "image", "train", False).to_parquet(shard)
    options |= {"train_data_dir": None, "dataset_name": "parquet", "data_files": [str(shard)]}
    with serve_hub(tmp_path) as hub:
        pushed = start(options, **hub, HF_HUB_OFFLINE="0")
        log = pushed.communicate()[1]
    assert pushed.returncode == 0, log
    repository = tmp_path / "hub" / "org" / "trained" / "main"
    assert {path.relative_to(repository).as_posix() for path in repository.rglob("*.*")} == {
        *("README.md", "config.json", "diffusion_pytorch_model.safetensors", "train_config.yaml"),
        "samples/step-0000002.png",
    }
    assert_equal_weights(repository, options["output_dir"])
    card = (repository / "README.md").read_text()
    assert 'from_pretrained("org/trained")' in card
    assert re.search(r"validation \| 4 images, centre crops: psnr@0.25 \d+\.\d+", card)
    assert "started from | `start`" in card
    assert not {"base_model", "datasets"} & ModelCard(card).data.to_dict().keys()
    assert_says_nothing_of(tmp_path, repository)
    uploaded = yaml.safe_load((repository / "train_config.yaml").read_text())
    assert uploaded["data_files"] == ["set.parquet"]
    assert uploaded["validation_data_dir"] == "images"
    assert uploaded["resolution"] == 32


def test_card_names_what_is_on_the_hub(options):
    with cpu():
        trainer = Trainer(TrainConfig(**options, resolution=32, dataloader_num_workers=0))
    trainer.config.pretrained_model_name_or_path, trainer.config.dataset_name = "org/model", "org/photos"
    data = ModelCard(trainer.card("org/trained")).data
    assert (data.base_model, data.datasets) == ("org/model", ["org/photos"])


def test_run_that_goes_on_after_its_last_step_leaves_the_same(options, caplog):
    options |= {"resolution": 32, "train_batch_size": 2, "max_train_steps": 2, "dataloader_num_workers": 0}
    options |= {"validation_data_dir": options["train_data_dir"], "use_ema": True}
    folder = ROOT / options["output_dir"]
    run(**options)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert len(before) == 4
    run(**options, resume_from_checkpoint="latest")
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    del before["train_config.yaml"], after["train_config.yaml"]  # the same but for what was resumed
    assert after == before


def test_what_a_run_cannot_go_on_with_is_refused(options):
    options |= {"resolution": 32, "train_batch_size": 2, "max_train_steps": 1, "dataloader_num_workers": 0}
    run(**options, gradient_accumulation_steps=2)
    written = (ROOT / options["output_dir"] / "train_config.yaml").read_bytes()
    with pytest.raises(ValueError, match="needs an `--output_dir` without checkpoints"):
        run(**options)
    assert (ROOT / options["output_dir"] / "train_config.yaml").read_bytes() == written
    options |= {"resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="`--gradient_accumulation_steps` must be 2 as in the run that wrote"):
        run(**options)


def test_a_run_of_fewer_steps_than_were_done_is_refused(options):
    options |= {"resolution": 32, "train_batch_size": 2, "dataloader_num_workers": 0}
    run(**options, max_train_steps=2)
    with pytest.raises(ValueError, match="`--max_train_steps` must be at least 2, .*checkpoint-2`, but is 1"):
        run(**options, max_train_steps=1, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("part", "needed"),
    [({}, False), ({"vq_weight": 0.0}, True), ({"vq_start": 5}, True), ({"kmeans_steps": [5]}, True)],
)
def test_codes_without_a_gradient_are_looked_for(options, part, needed):
    with cpu():
        handler = make_accelerator(TrainConfig(**options, **part)).ddp_handler
    assert handler.find_unused_parameters == needed


def test_trackers_that_are_not_installed_are_refused(options, monkeypatch):
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [])
    with cpu(), pytest.warns(UserWarning, match="no supported trackers"), pytest.raises(ValueError, match="needs the"):
        make_accelerator(TrainConfig(**options, report_to="wandb"))
    assert not os.path.exists(options["output_dir"])


def test_what_needs_whole_weights_is_refused_where_they_are_shared(options, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    for name, value in {"kmeans_steps": [5], "revival_steps": 5, "use_ema": True, "adversarial_weight": 1.0}.items():
        with cpu(), pytest.raises(ValueError, match=f"`--{name}` needs whole weights on each process, but FSDP"):
            make_accelerator(TrainConfig(**options, **{name: value}))


def test_processes_that_do_not_know_each_other_are_refused(options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started 2 processes, but accelerate would let each of them"):
        make_accelerator(TrainConfig(**options))
    assert not os.path.exists(options["output_dir"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_sizes": [24]}, "`--crop_sizes` must divide `--resolution` = 256, but 24 does not"),
        ({"resume_from_checkpoint": "nowhere"}, "or 'latest', but is 'nowhere'"),
        ({"train_data_dir": "/nowhere"}, "must be a folder of images"),
        ({"model_config_name_or_path": "runs/nowhere.json"}, "but there is no 'runs/nowhere.json'"),
        (
            {"model_config_name_or_path": None, "pretrained_model_name_or_path": "/nowhere"},
            "but there is no '/nowhere'",
        ),
        ({"lpips_weight": 1.0, "lpips_weights": "/nowhere.pth"}, "/nowhere.pth"),
    ],
)
def test_mistakes_are_one_line(options, changes, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options | changes))
    monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
    with cpu(), pytest.raises(SystemExit) as stop:
        run_script(Trainer, TrainConfig)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ")
    assert message in line


def raise_as_worker(error):
    """Raises it as a loader does of which a process met it while it handled another."""
    try:
        try:
            raise KeyError("before")
        except KeyError as cause:
            raise error from cause
    except (ValueError, OSError):
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    wrapper.reraise()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\n  second"), "first second"),
        (OSError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
        (ValueError(), "ValueError()"),
    ],
)
@pytest.mark.parametrize("in_worker", [False, True])
def test_nothing_of_a_message_is_lost(monkeypatch, capsys, error, line, in_worker):
    monkeypatch.setattr("svqvae_hf.trainer.run.read_options", lambda *_: None)

    def fail(_):
        if in_worker:
            raise_as_worker(error)
        raise error

    with pytest.raises(SystemExit):
        run_script(fail, TrainConfig)
    written = capsys.readouterr().err
    name = type(error).__name__
    expected = line if not in_worker else f"{name}: {line}".removesuffix(f": {name}()")
    assert written.endswith(f": error: {expected}\n")
    assert written.count("\n") == 1
