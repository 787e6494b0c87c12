from pathlib import Path

# A stand-in for the original's checkout: the same names, but it runs this library's model, changed or not.
CHECKOUT = """
from types import SimpleNamespace
from svqvae_hf import SVQVAE
Encoder = Decoder = ModelArgs = dict
class ScalableVQVAE:
    @staticmethod
    def load(path, args):
        model = SVQVAE.from_single_file(path)
        {change}
        return SimpleNamespace(
            encoder=model.encoder,
            quant_conv=model.quant_conv,
            quantize=model.quantize,
            decode=lambda quantized: model.decode(quantized, force_not_quantize=True).sample,
        )
"""


def checkout(folder: Path, change: str) -> Path:
    (folder / "svqvae.py").write_text(CHECKOUT.format(change=change))
    return folder
