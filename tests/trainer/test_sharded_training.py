"""A language model whose weights FSDP2 splits between two processes on the CPU."""

import os
import signal
import socket
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from captioned_tokens import captioned_tokens
from conftest import ROOT
from language_options import LanguageRunOptions
from language_trainer import LanguageModelTrainer, sharding_faults
from processes import start
from tiny_language_models import extended
from train_language_model import LanguageModelOptions, main
from training_runs import forget_accelerate
from transformers import AutoModelForCausalLM, TrainingArguments

BATCH = 8
STEPS = 4
STOPPED_AFTER = 2


@pytest.fixture
def tokens(tmp_path_factory):
    return captioned_tokens(tmp_path_factory.getbasetemp() / "image_text")


def train(tokens, folder, processes=1, **changes):
    """Trains on pairs, with as many examples per step on any number of processes."""
    options = LanguageModelOptions(
        model_name_or_path=str(extended("llama")), token_set=str(tokens), packing=False, condition_dropout=0.0
    )
    arguments = {
        "learning_rate": 4e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // processes,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    main(options, TrainingArguments(str(folder), **(arguments | changes)))


def pose_as_gpus():
    """Lets accelerate take processes on the CPU for GPUs, because it ignores FSDP on CPUs."""

    def initialise(state, *args, **kwargs):
        original(state, *args, **kwargs)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    original, PartialState.__init__ = PartialState.__init__, initialise


def train_sharded(rank, port, tokens, folder, config):
    """Is one of two processes: trains until the other gets a signal, resumes, and trains to the end."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as `accelerate launch` does
    pose_as_gpus()
    sharded = {"processes": 2, "fsdp": True, "fsdp_config": config}

    def step_with_signal(trainer, *args):
        if rank == 1 and trainer.state.global_step == STOPPED_AFTER - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(trainer, *args)

    training_step, LanguageModelTrainer.training_step = LanguageModelTrainer.training_step, step_with_signal
    with pytest.raises(SystemExit):
        train(tokens, folder, **sharded)
    LanguageModelTrainer.training_step = training_step
    forget_accelerate()
    train(tokens, folder, resume_from_checkpoint="latest", **sharded)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "file"),
    [(None, "pytorch_model_fsdp.bin"), (str(ROOT / "training" / "configs" / "fsdp.json"), "pytorch_model_fsdp_0")],
    ids=["whole", "parts"],
)
def test_two_processes_that_split_the_weights_end_with_the_weights_of_one(config, file, tokens, tmp_path):
    train(tokens, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(train_sharded, rank, port, tokens, tmp_path / "two", config) for rank in (0, 1)]
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "two" / f"checkpoint-{STOPPED_AFTER}" / file).exists()
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "is_tied", "message"),
    [
        ({}, True, None),
        ({"lora_rank": 2}, False, None),
        ({"lora_rank": 2}, True, "`--lora_rank` must be 0 with FSDP, because the head"),
        ({"optimizer": "muon"}, True, "`--optimizer` must be adamw with FSDP, but is muon"),
    ],
)
def test_options_that_do_not_work_with_fsdp_are_refused(options, is_tied, message):
    text_config = SimpleNamespace(tie_word_embeddings=is_tied)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text_config))
    trainer = SimpleNamespace(is_fsdp_enabled=True, model=model)
    faults = "".join(sharding_faults(trainer, LanguageRunOptions(**options)))
    assert faults.startswith(message) if message else not faults


def test_fsdp_that_accelerate_ignores_is_refused():
    trainer = SimpleNamespace(is_fsdp_enabled=False, args=SimpleNamespace(fsdp=True))
    (fault,) = sharding_faults(trainer, LanguageRunOptions())
    assert fault.startswith("`--fsdp` has no effect")
