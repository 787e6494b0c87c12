"""Puts LlamaGen's language model into a checkout of transformers, as a modular file on Llama.

    python upstream/transformers/make_modular.py CHECKOUT

The file is made from the package's source, so there is no second implementation to keep.
"""

import ast
import sys
from pathlib import Path

from svqvae_hf.hub import standalone

MODEL = "src/transformers/models/llamagen/modular_llamagen.py"
LICENCE = Path(__file__).parents[1] / "licence.txt"
MODULES = {
    "Cache": "...cache_utils",
    "StaticCache": "...cache_utils",
    "GradientCheckpointingLayer": "...modeling_layers",
    "CausalLMOutputWithPast": "...modeling_outputs",
    "ALL_ATTENTION_FUNCTIONS": "...modeling_utils",
    "PreTrainedModel": "...modeling_utils",
    "LlamaConfig": "..llama.configuration_llama",
    "LlamaForCausalLM": "..llama.modeling_llama",
    "LlamaModel": "..llama.modeling_llama",
    "LlamaRMSNorm": "..llama.modeling_llama",
    "eager_attention_forward": "..llama.modeling_llama",
}


def make_modular() -> str:
    """Config and model, with imports from within transformers."""
    text = standalone.code("modeling_llamagen.py", annotations=True).partition('"""\n\n')[2]
    lines: list[str | None] = list(text.splitlines())
    groups: dict[str, list[str]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "transformers":
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
            for alias in node.names:
                groups.setdefault(MODULES[alias.name], []).append(alias.name)
            last = node.lineno
    lines[last - 1] = "\n" + "\n".join(
        f"from {module} import {', '.join(names)}" for module, names in sorted(groups.items())
    )
    return LICENCE.read_text(encoding="utf-8") + "\n".join(line for line in lines if line is not None) + "\n"


if __name__ == "__main__":
    file = Path(sys.argv[1]) / MODEL
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(make_modular(), encoding="utf-8")
