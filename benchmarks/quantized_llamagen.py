"""Size and speed of LlamaGen-B in several precisions: `python benchmarks/quantized_llamagen.py`.

Its weights are random. Rows are sequences of one forward pass: an image with guidance has two. Run `pip install
bitsandbytes torchao` first, or leave them out with `--precisions`.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from measuring import MIB, Row, make_parser, parse_options, report, take_turns
from transformers import BitsAndBytesConfig, TorchAoConfig

from svqvae_hf import LlamaGenConfig, LlamaGenForCausalLM
from svqvae_hf.pipelines.id_sampler import IdSampler
from svqvae_hf.pipelines.sampling import sample

PRECISIONS = ("float32", "bfloat16", "torchao int8", "bitsandbytes int8", "bitsandbytes nf4")
CODES = 16384
HEAD_CHANNELS = 64  # as in all of LlamaGen's models
CONTEXT = (16, 16)  # rows and columns of ids


def load(folder: str, precision: str, device: str) -> LlamaGenForCausalLM:
    """Loads a saved model in a precision."""
    if precision in ("float32", "bfloat16"):
        model = LlamaGenForCausalLM.from_pretrained(folder, dtype=getattr(torch, precision))
        return model.to(device).eval()
    if precision == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        quantization = TorchAoConfig(Int8WeightOnlyConfig())
    elif precision == "bitsandbytes int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = LlamaGenForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map=device
    )
    return model.eval()


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of a quantised one, the bytes of its parts."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def weights_mib(model: LlamaGenForCausalLM) -> float:
    """MiB of all weights, without the scales that bitsandbytes keeps beside them."""
    return sum(stored_bytes(parameter) for parameter in model.parameters()) / MIB


def row_sampler(model: LlamaGenForCausalLM, rows: int) -> Callable[[], torch.Tensor]:
    """Returns a function that samples the first row of ids, 16 per sequence."""
    labels = torch.arange(rows, device=model.device)
    prompts = CODES + labels[:, None]  # (rows, 1)
    choose = partial(sample, temperature=0)

    def sample_row() -> torch.Tensor:
        sampler = IdSampler(model, {"input_ids": prompts}, CONTEXT, range(CODES), choose)
        return sampler.next_row()

    return sample_row


@torch.inference_mode()
def compare(options: argparse.Namespace) -> list[Row]:
    """Times all precisions in turns, with a row of the table per precision."""
    config = LlamaGenConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.hidden_size // HEAD_CHANNELS,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaGenForCausalLM(config).save_pretrained(folder)
        models = {precision: load(folder, precision, options.device) for precision in options.precisions}
    table = {
        precision: {"precision": precision, "weights, MiB": weights_mib(models[precision])} for precision in models
    }
    for rows in options.rows:
        samplers = {precision: row_sampler(model, rows) for precision, model in models.items()}
        for sample_row in samplers.values():
            sample_row()  # warms up
        _, medians = take_turns(samplers, options.rounds, options.device)
        for precision, seconds in medians.items():
            table[precision][f"ms per id, {rows} rows"] = 1e3 * seconds / CONTEXT[1]
    return list(table.values())


def whole_heads(text: str) -> int:
    """Reads a number of channels that makes whole heads."""
    channels = int(text)
    if channels < HEAD_CHANNELS or channels % HEAD_CHANNELS:
        raise argparse.ArgumentTypeError(f"must be a multiple of {HEAD_CHANNELS}, got {text}.")
    return channels


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 16], help="rows of a batch (default: 2 16)")
    parser.add_argument("--hidden-size", type=whole_heads, default=768, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    options, machine = parse_options(parser)
    report(options, machine, {"Precisions": compare(options)})


if __name__ == "__main__":
    main()
