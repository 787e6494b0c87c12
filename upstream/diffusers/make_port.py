"""Puts the tokenizer into a checkout of diffusers, in diffusers' own form: model, tests, page and conversion script.

    python upstream/diffusers/make_port.py CHECKOUT

The model is made from the package's source, so there is no second implementation to keep.
"""

import inspect
import re
import shutil
import sys
from pathlib import Path

from svqvae_hf import SVQVAE
from svqvae_hf.hub import standalone

HERE = Path(__file__).parent
MODEL = "src/diffusers/models/autoencoders/autoencoder_svqvae.py"
FILES = {
    "test_models_autoencoder_svqvae.py": "tests/models/autoencoders",
    "autoencoder_svqvae.md": "docs/source/en/api/models",
    "convert_svqvae_to_diffusers.py": "scripts",
}
LICENCE = HERE.parent / "licence.txt"
OF_REPOSITORIES = ("StrictLoadingMixin._auto_class", "StrictLoadingMixin.save_config")  # with code of their own
PACKAGES = {"diffusers.models.autoencoders.": ".", "diffusers.models.": "..", "diffusers.": "..."}
QUERY = "to_positions(self.q(normed), key.shape[0])"
ATTENTION = f"F.scaled_dot_product_attention({QUERY}, key, value)"
DISPATCHED = f"""dispatch_attention_fn(
            {QUERY}.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2)"""


def make_model() -> str:
    """The model with its losses, relative imports, diffusers' attention dispatch and its public docstrings."""
    left_out = frozenset({*standalone.OF_LOADING, *standalone.OF_CHECKS, *OF_REPOSITORIES})
    text = standalone.code("modeling_svqvae.py", left_out, annotations=True).partition('"""\n\n')[2]
    for absolute, relative in PACKAGES.items():
        text = text.replace(f"from {absolute}", f"from {relative}")
    text = text.replace(
        "from ..modeling_utils", "from ..attention_dispatch import dispatch_attention_fn\nfrom ..modeling_utils"
    )
    text = text.replace(ATTENTION, DISPATCHED)
    for documented in (SVQVAE, *(method for name, method in inspect.getmembers(SVQVAE, inspect.isfunction))):
        docstring = documented.__doc__ or ""
        text = text.replace(f'"""{docstring.partition(chr(10))[0]}"""', f'"""{docstring.rstrip(" ")}"""', 1)
    return LICENCE.read_text(encoding="utf-8") + re.sub(r'\n( +)"""$', r'\n\1"""', text, flags=re.MULTILINE)


def main(checkout: Path) -> None:
    """Writes the files, and names the model in the three `__init__.py`."""
    (checkout / MODEL).write_text(make_model(), encoding="utf-8")
    for file, folder in FILES.items():
        shutil.copy(HERE / file, checkout / folder / file)
    for path, line, after in (
        ("models/autoencoders/__init__.py", "from .autoencoder_svqvae import SVQVAE\n", "from .autoencoder_tiny"),
        (
            "models/__init__.py",
            '    _import_structure["autoencoders.autoencoder_svqvae"] = ["SVQVAE"]\n',
            '    _import_structure["autoencoders.autoencoder_tiny"]',
        ),
        ("models/__init__.py", "            SVQVAE,\n", "            VQModel,"),
        ("__init__.py", '            "SVQVAE",\n', '            "T2IAdapter",'),
        ("__init__.py", "            SVQVAE,\n", "            T2IAdapter,"),
    ):
        file = checkout / "src" / "diffusers" / path
        text = file.read_text(encoding="utf-8")
        if line not in text:
            file.write_text(text.replace(after, line + after, 1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
