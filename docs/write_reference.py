"""Writes the reference of commands, of training scripts and of Python, which a test compares.

PYTHONPATH=training python docs/write_reference.py
"""

import argparse
import dataclasses
import re
from pathlib import Path

from diffusion_options import DiffusionOptions
from python_reference import python_reference
from train import TrainOptions
from train_language_model import LanguageModelOptions
from train_llamagen import LlamaGenOptions
from train_next_scale import NextScaleOptions

from svqvae_cli.command_line import COMMANDS, build_parser

DOCS = Path(__file__).parent
ALSO = "It takes the options of `transformers.TrainingArguments` as well"
SCRIPTS = {
    "train.py": (TrainOptions, "trains a tokenizer"),
    "train_language_model.py": (LanguageModelOptions, f"trains a language model that draws and describes. {ALSO}"),
    "train_llamagen.py": (LlamaGenOptions, f"trains a LlamaGen on classes or captions. {ALSO}"),
    "train_next_scale.py": (NextScaleOptions, "trains a next-scale transformer"),
    "train_latent_diffusion.py": (DiffusionOptions, "trains a denoiser of latents"),
}
NOTE = "*Written by `docs/write_reference.py`.*\n"


def command_reference() -> str:
    """The page of all commands, from their parsers."""
    lines = ["# Commands and their options\n", NOTE]
    for name in COMMANDS:
        lines += _command_section(name)
    return "\n".join(lines)


def _command_section(name: str) -> list[str]:
    parser = _command_parser(name)
    text = (parser.description or "").strip()
    description = re.sub(r"\n+  (.*)", r"\n\n```bash\n\1\n```", text)  # the example is indented
    lines = [f"## svqvae {name}\n", f"{description}\n", "| argument | meaning |", "|---|---|"]
    for action in parser._actions:
        if action.dest == "help":
            continue
        formatter = parser._get_formatter()
        invocation = formatter._format_action_invocation(action).replace("|", "\\|")
        meaning = formatter._expand_help(action).replace("|", "\\|")
        required = " (required)" if action.option_strings and action.required else ""
        lines.append(f"| `{invocation}`{required} | {meaning} |")
    lines.append("")
    return lines


def _command_parser(name: str) -> argparse.ArgumentParser:
    for action in build_parser(name)._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[name]
    raise ValueError(f"There is no parser of the command {name}.")


def training_reference() -> str:
    """The page of the options of all training scripts, from their dataclasses."""
    lines = ["# Training scripts and their options\n", NOTE]
    lines.append("Options are flags, or entries of a YAML file that is the first argument.\n")
    for script, (options_class, summary) in SCRIPTS.items():
        lines.append(f"## {script}\n")
        lines.append(f"`training/{script}` {summary}.\n")
        lines.append("| option | default | meaning |")
        lines.append("|---|---|---|")
        for field in dataclasses.fields(options_class):
            meaning = field.metadata.get("help", "").replace("|", "\\|")
            lines.append(f"| `--{field.name}` | {_default(field)} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _default(field: dataclasses.Field) -> str:
    """The default of an option as a user would type it."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value == []:
        return ""
    if isinstance(value, list):
        value = " ".join(str(item) for item in value)
    return f"`{value}`"


PAGES = {"commands.md": command_reference, "training.md": training_reference, "python.md": python_reference}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (DOCS / "reference" / name).write_text(write())
