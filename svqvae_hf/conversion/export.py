"""A model as two graphs, image to ids and ids to image, for programs without this package or without Python."""

import copy
import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram

from svqvae_hf.atomic_io import check_new_folder
from svqvae_hf.models.modeling_svqvae import SVQVAE, map_range

if TYPE_CHECKING:
    import onnx

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
PACKAGES: dict[str, tuple[str, ...]] = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "torch": ()}
DTYPES = {"float32": torch.float32, "float16": torch.float16}
FACTS_FILE = "svqvae.json"  # inside a .pt2 file
TRACED_GRID = (2, 3, 5)  # batch, rows and columns of ids
# None is the traced one: a single id, row or column, sides that differ, more ids than the model searches for at once.
CHECKED_GRIDS = (
    *((1, 1, 1), (2, 1, 3), (3, 5, 1), (1, 4, 4), (3, 2, 5), (2, 8, 8), (1, 7, 13), (1, 16, 16), (1, 11, 24)),
    (1, 20, 32),
)
PIXEL_TOLERANCE = 2 / 255  # 1 is from black to white
# Another library adds the same products in another order, so that its latents differ in their last digits: in float32
# by up to 4e-6 of their length from float64, measured with the layout of the original's release. Of two codes that
# are as near up to this, either is right.
TIE = 1e-5
ADVICE = "Nothing was written. Try other versions of torch, onnx and onnxruntime."

Graph = Callable[[torch.Tensor], torch.Tensor]


class EncoderGraph(nn.Module):
    """Image to ids, without tiles, and with a search of the codebook in one piece, which holds for any number of ids.

    Args:
        model ([`SVQVAE`]): Model in float32, which is not changed.
        dtype (`torch.dtype`): Type of images and weights; the codebook is searched in float32.
    """

    def __init__(self, model: SVQVAE, dtype: torch.dtype):
        super().__init__()
        self.encoder = copy.deepcopy(model.encoder).to(dtype)
        self.quant_conv = copy.deepcopy(model.quant_conv).to(dtype)
        self.f = model.f
        self.ranges = model.config["pixel_range"], model.config["network_range"]
        self.l2_norm = model.config["codebook_l2_norm"]
        self.codes: torch.Tensor
        self.offset: torch.Tensor | None
        codes = _codes(model)
        self.register_buffer("codes", codes.T.contiguous())  # (codebook_embed_dim, codebook_size)
        self.register_buffer("offset", None if self.l2_norm else codes.square().sum(-1) / 2)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Maps `(batch, in_channels, height, width)` to ids `(batch, ceil(height / f), ceil(width / f))` in int64."""
        rows, columns = ((side + self.f - 1) // self.f for side in sample.shape[-2:])
        # Padded by as much as any size needs, then cut: how much one size needs is not known to the graph.
        sample = F.pad(sample, (0, self.f - 1, 0, self.f - 1), mode="replicate")
        sample = sample[..., : rows * self.f, : columns * self.f]
        latents = self.quant_conv(self.encoder(map_range(sample, *self.ranges)))
        latents = latents.permute(0, 2, 3, 1).float()  # (batch, h, w, codebook_embed_dim)
        if self.l2_norm:
            latents = F.normalize(latents, dim=-1)
        scores = latents @ self.codes
        return (scores if self.offset is None else scores - self.offset).argmax(-1)


class DecoderGraph(nn.Module):
    """Ids to image, clamped to `pixel_range`, without tiles.

    Args:
        model ([`SVQVAE`]): Model in float32, which is not changed.
        dtype (`torch.dtype`): Type of images and weights.
    """

    def __init__(self, model: SVQVAE, dtype: torch.dtype):
        super().__init__()
        self.post_quant_conv = copy.deepcopy(model.post_quant_conv).to(dtype)
        self.decoder = copy.deepcopy(model.decoder).to(dtype)
        self.ranges = model.config["network_range"], model.config["pixel_range"]
        self.codes: torch.Tensor
        self.register_buffer("codes", _codes(model).to(dtype))  # (codebook_size, codebook_embed_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ids `(batch, h, w)` to `(batch, out_channels, h * f, w * f)`."""
        latents = F.embedding(ids, self.codes).permute(0, 3, 1, 2)
        return map_range(self.decoder(self.post_quant_conv(latents)), *self.ranges).clamp(*self.ranges[1])


@dataclass(frozen=True)
class ExportReport:
    """What [`export_graphs`] wrote and found; `str` gives it in lines.

    Args:
        out (`Path`): Folder of the two graphs.
        sizes (`dict[str, int]`): Bytes of each file in it.
        dtype (`str`): Type of images and weights.
        ids (`int`): Ids that were compared.
        changed (`int`): Ids that are not those of the model in float32; in float32, each of them a tie.
        pixels (`float`): Largest difference of a pixel, 1 from black to white.
    """

    out: Path
    sizes: dict[str, int]
    dtype: str
    ids: int
    changed: int
    pixels: float

    def __str__(self) -> str:
        files = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in self.sizes.items())
        ties = " (all ties)" if self.dtype == "float32" and self.changed else ""
        return (
            f"checked  {len(CHECKED_GRIDS)} sizes against the model in float32: {self.changed} of {self.ids} ids "
            f"differ{ties}, {self.changed / self.ids:.2%}; pixels differ by {self.pixels * 255:.2g}/255 at most\n"
            f"written  {self.out}: {files}"
        )


def export_graphs(model: SVQVAE, out: str | Path, *, format: str = "onnx", dtype: str = "float32") -> ExportReport:
    """Writes `encoder.onnx` and `decoder.onnx`, or `.pt2` for `torch.export.load`, and checks them.

    Batch, height and width are free. The encoder takes images in `pixel_range` of any size, and pads them as
    [`SVQVAE.encode`] does. An image is read as a whole, never by tiles. Each file holds the facts that its callers
    need, as JSON: `f`, `pixel_range`, `codebook_size`, `codebook_fingerprint`.

    The files are written beside `out`, loaded again, and compared with the model on ten sizes; only then the folder is
    named `out`. In float32 all ids must be the model's, up to ties, and pixels within 2/255. In float16, where ids do
    change, the report says how many.

    Args:
        model ([`SVQVAE`]): Model, which is not changed; what is exported is the model in evaluation.
        out (`str` or `Path`): Folder to make; an empty one may be there.
        format (`str`, defaults to `"onnx"`): `"onnx"`, which needs the extra `export`, or `"torch"`.
        dtype (`str`, defaults to `"float32"`): `"float32"` or `"float16"`: type of weights and images. The codebook is
            searched in float32 in both.

    Returns:
        [`ExportReport`]: What was written, and how close it is.

    Raises:
        ModuleNotFoundError: If a package of the extra `export` is missing.
        OSError: If `out` cannot be written.
        ValueError: If an argument does not fit, weights are out of the range of float16, or a graph does not do what
            the model does.
    """
    for name, value, choices in (("format", format, SUFFIXES), ("dtype", dtype, DTYPES)):
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}.")
    for package in PACKAGES[format]:
        import_module(package)  # a missing one is told of before the work
    out = check_new_folder(Path(out))
    save, load = {"onnx": (_save_onnx, _load_onnx), "torch": (_save_torch, _load_torch)}[format]
    whole = SVQVAE.from_config(model.config).eval()  # in float32 on the CPU, without tiles or hooks
    whole.load_state_dict(model.state_dict())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside, torch.no_grad():
            folder = Path(beside, out.name)
            folder.mkdir()
            paths = [folder / f"{name}{SUFFIXES[format]}" for name in ("encoder", "decoder")]
            for path, program in zip(paths, _trace(whole, DTYPES[dtype]), strict=True):
                save(program, path, _facts(whole))
            changed, pixels = _compare(whole, load(paths[0]), load(paths[1]), dtype)
            folder.replace(out)
    except OSError as error:
        raise OSError(f"`{out}` cannot be written: {error}") from error
    return ExportReport(
        out=out,
        sizes={path.name: (out / path.name).stat().st_size for path in paths},
        dtype=dtype,
        ids=sum(batch * rows * columns for batch, rows, columns in CHECKED_GRIDS),
        changed=changed,
        pixels=pixels,
    )


def _codes(model: SVQVAE) -> torch.Tensor:
    """The codes as they are searched, `(codebook_size, codebook_embed_dim)`."""
    return model.quantize.get_codebook_entry(torch.arange(model.config["codebook_size"])).detach()


def _facts(model: SVQVAE) -> dict[str, str]:
    facts = {
        "f": model.f,
        "pixel_range": list(model.config["pixel_range"]),
        "codebook_size": model.config["codebook_size"],
        "codebook_fingerprint": model.codebook_fingerprint(),
    }
    return {key: json.dumps(value) for key, value in facts.items()}


def _trace(model: SVQVAE, dtype: torch.dtype) -> tuple[ExportedProgram, ExportedProgram]:
    """Encoder and decoder with free batch, height and width."""
    encoder, decoder = EncoderGraph(model, dtype), DecoderGraph(model, dtype)
    weights = {**encoder.state_dict(), **decoder.state_dict()}
    overflown = sorted(key for key, tensor in weights.items() if not tensor.isfinite().all())
    if overflown:
        raise ValueError(f"weights must lie in the range of float16, but {', '.join(overflown)} do not. Use float32.")
    return (
        _export(encoder, _sample(model, TRACED_GRID).to(dtype), (0, 2, 3)),
        _export(decoder, torch.zeros(TRACED_GRID, dtype=torch.int64), (0, 1, 2)),
    )


def _export(graph: nn.Module, example: torch.Tensor, free: Sequence[int]) -> ExportedProgram:
    dims = dict.fromkeys(free, Dim.DYNAMIC)
    program = torch.export.export(graph, (example,), dynamic_shapes=(dims,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    # The tracer asks for two images, rows and columns of ids at least, though nothing in the graph does: the check
    # runs it on less.
    program._guards_code = []
    for symbol, sides in program.range_constraints.items():
        program.range_constraints[symbol] = type(sides)(1, sides.upper)
    return program


def _sample(model: SVQVAE, grid: tuple[int, int, int]) -> torch.Tensor:
    """Images for a grid of ids, always the same: noise on a coarse pattern."""
    batch, rows, columns = grid
    generator = torch.Generator().manual_seed(0)
    channels, size = model.config["in_channels"], (rows * model.f, columns * model.f)
    coarse = F.interpolate(torch.rand((batch, channels, rows, columns), generator=generator), size, mode="bilinear")
    low, high = model.config["pixel_range"]
    return low + (high - low) * torch.lerp(coarse, torch.rand((batch, channels, *size), generator=generator), 0.25)


def _save_onnx(program: ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    import onnx

    names = ["sample", "ids"] if path.stem == "encoder" else ["ids", "sample"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)  # torch's, about itself
        exported = torch.onnx.export(
            program, dynamo=True, input_names=names[:1], output_names=names[1:], verbose=False
        )
    proto = cast(torch.onnx.ONNXProgram, exported).model_proto
    _name_dims(proto, names)
    onnx.helper.set_model_props(proto, facts)
    onnx.save(proto, path)


def _load_onnx(path: Path) -> Graph:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda value: torch.from_numpy(session.run(None, {name: value.numpy()})[0])


def _save_torch(program: ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    content = io.BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(program, content, extra_files={FACTS_FILE: json.dumps(facts)})
    path.write_bytes(content.getbuffer())


def _load_torch(path: Path) -> Graph:
    return torch.export.load(path).module()


def _name_dims(proto: "onnx.ModelProto", names: list[str]) -> None:
    """Names the free sides, which the exporter numbers."""
    dims = {"sample": ("batch", "channels", "height", "width"), "ids": ("batch", "rows", "columns")}
    for value, name in zip((*proto.graph.input, *proto.graph.output), names, strict=True):
        for dim, label in zip(value.type.tensor_type.shape.dim, dims[name], strict=True):
            if dim.dim_param:
                dim.dim_param = label
    proto.graph.ClearField("value_info")  # by the numbers


def _compare(model: SVQVAE, encode: Graph, decode: Graph, dtype: str) -> tuple[int, float]:
    """How many ids the encoder changes, and the largest difference of a pixel, if they are within what is allowed."""
    changed, largest = 0, 0.0
    exact = dtype == "float32"
    low, high = model.config["pixel_range"]
    for number, grid in enumerate(CHECKED_GRIDS):
        sample = _sample(model, grid)[..., number % model.f :, 3 * number % model.f :]  # many no multiples of f
        size = _size(sample)
        expected = model.encode_tokens(sample)
        ids = _run(encode, sample.to(DTYPES[dtype]), expected, f"encoder at {size}")
        changed += int((ids != expected).sum())
        wrong = (ids != expected) & ~(_excess(model, sample, ids, expected) <= TIE)
        if exact and wrong.any():
            raise ValueError(
                f"the encoder at {size}: ids must be those of the model, but {int(wrong.sum())} of {ids.numel()} are "
                f"others and no ties. {ADVICE}"
            )
        image = model.decode_tokens(expected)
        size = _size(image)
        pixels = _run(decode, expected, image, f"decoder at {size}")
        difference = float((pixels.float() - image).abs().max() / (high - low))
        if not difference <= (PIXEL_TOLERANCE if exact else math.inf):  # also when it is NaN
            raise ValueError(
                f"the decoder at {size}: pixels must be within {PIXEL_TOLERANCE * 255:g}/255 of the model's, but "
                f"differ by {difference * 255:.3g}/255. {ADVICE}"
            )
        largest = max(largest, difference)
    return changed, largest


def _size(sample: torch.Tensor) -> str:
    batch, _, height, width = sample.shape
    return f"{width} x {height} pixels (width x height), batch {batch}"


def _run(graph: Graph, value: torch.Tensor, expected: torch.Tensor, name: str) -> torch.Tensor:
    try:
        result = graph(value)
    except Exception as error:  # each runtime raises its own
        raise ValueError(f"the {name} must run, but does not: {error} {ADVICE}") from error
    if result.shape != expected.shape:
        shapes = tuple(expected.shape), tuple(result.shape)
        raise ValueError(f"the {name} must give the shape {shapes[0]}, but gives {shapes[1]}. {ADVICE}")
    return result


def _excess(model: SVQVAE, sample: torch.Tensor, ids: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """How much less similar the latents are to the codes `ids` than to the nearest: in cosine, if they are normalised.

    Similarity is the half of the negative squared distance, over the mean of both squared lengths.
    """
    latents = model.encode(sample).latents.permute(0, 2, 3, 1).double()  # (batch, h, w, codebook_embed_dim)
    if model.config["codebook_l2_norm"]:
        latents = F.normalize(latents, dim=-1)
    chosen, best = (model.quantize.get_codebook_entry(each).double() for each in (ids, nearest))
    lengths = (latents.square().sum(-1) + best.square().sum(-1)) / 2
    return ((latents - chosen).square().sum(-1) - (latents - best).square().sum(-1)) / 2 / lengths
