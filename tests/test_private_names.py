"""Names of other libraries that they may remove without notice, and what to do when they are gone.

A name is private if it starts with an underscore or lies in a module of diffusers, transformers or gradio that is not
documented. These libraries change faster than we release.
"""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest
from conftest import ROOT

import svqvae_hf

LIBRARIES = ("diffusers", "transformers", "gradio")
# Modules whose names the libraries document.
DOCUMENTED = {
    *("diffusers", "diffusers.configuration_utils", "diffusers.image_processor", "diffusers.models.modeling_utils"),
    *("diffusers.modular_pipelines", "diffusers.optimization", "diffusers.training_utils"),
    *("diffusers.utils", "diffusers.utils.torch_utils", "transformers.trainer_utils", "gradio"),
    *("transformers", "transformers.cache_utils", "transformers.generation", "transformers.modeling_outputs"),
    *("transformers.image_processing_utils", "transformers.image_utils", "transformers.processing_utils"),
    "transformers.utils.logging",
}
IMPORTED = {
    "diffusers.pipelines.pipeline_loading_utils.LOADABLE_CLASSES": (
        "See where `DiffusionPipeline.from_pretrained` finds classes of other libraries, and register ours there."
    ),
    "diffusers.utils.accelerate_utils.apply_forward_hook": (
        "Copy its ten lines. They bring an offloaded model to the device before methods other than `forward`."
    ),
    "diffusers.utils.dynamic_modules_utils.get_relative_import_files": "Find relative imports of a file by `ast`.",
    "diffusers.utils.dynamic_modules_utils.get_relative_imports": "Find relative imports of a file by `ast`.",
    "diffusers.models.attention.AttentionModuleMixin": "Drop it: `set_attention_backend` finds attentions by it.",
    "diffusers.models.attention_dispatch.AttentionBackendName": "Drop it with `dispatch_attention_fn`.",
    "diffusers.models.attention_dispatch.dispatch_attention_fn": "Call `scaled_dot_product_attention`.",
    "diffusers.models.embeddings.LabelEmbedding": "Copy it to `modeling_next_scale.py`, with its parameters' names.",
    "transformers.trainer_callback.ExportableState": "Write the digest of the rows beside each checkpoint.",
    "gradio.processing_utils.save_pil_to_cache": "See how `gr.Image.postprocess` stores its files.",
    "gradio.utils.get_upload_folder": "Read `GRADIO_TEMP_DIR`, or else `gradio` in the folder of temporary files.",
}
USED = {
    "_execution_device": "Take the device of the transformer, or the device to which its hook brings it.",
}
OVERRIDDEN = {  # attributes and methods of a library's class
    "_auto_class": "See how `save_pretrained` learns that a model's code must be saved with it.",
    "_dict_from_json_file": "See how `DiffusionPipeline.download` tells a component from another list.",
    "_get_resized_lm_head": "Override `resize_token_embeddings`, so that LlamaGen's head keeps its rows.",
    "_tp_plan": "See how transformers learns which layers tensor parallelism cuts: not LlamaGen's head.",
    "_tied_weights_keys": "See how transformers learns which weights are shared: LlamaGen shares none.",
    "_process_images": "See how `ProcessorMixin.__call__` puts the tokens of images in place of `image_token`.",
    "_keep_in_fp32_modules": "See how the library keeps modules in float32: the quantizer must never be cast.",
    "_keys_to_ignore_on_load_unexpected": "Drop these keys before loading.",
    "_no_split_modules": "See how `device_map` learns what must stay on one device.",
    "_optional_components": "See how `DiffusionPipeline` learns which components may be None.",
    "_repeated_blocks": "See how `compile_repeated_blocks` learns the classes of the blocks.",
    "_skip_layerwise_casting_patterns": "Pass `skip_modules_pattern` to `enable_layerwise_casting`.",
    "_supports_gradient_checkpointing": "See how `enable_gradient_checkpointing` learns that a model supports it.",
}
CACHED = {"_can_set_experts_implementation_cached_value"}  # transformers writes it to the class when it loads a model
# Names with an underscore that Python and torch have kept for years.
STABLE = {"_abc_impl", "_actions", "_asdict", "_dynamo", "_exit", "_get_values", "_replace"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Path and syntax tree of each file of the packages and of `training/`."""
    for folder in ("svqvae_hf", "svqvae_cli", "training"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def imported_names() -> set[str]:
    """Names imported from undocumented modules of the libraries."""
    names = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            is_of_library = node.module.partition(".")[0] in LIBRARIES
            for name in node.names:
                is_documented = node.module in DOCUMENTED and not name.name.startswith("_")
                if is_of_library and not is_documented:
                    names.add(f"{node.module}.{name.name}")
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def used_names() -> set[str]:
    """Private attributes that are read and that no file of ours defines."""
    read, defined = set(), set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                (read if isinstance(node.ctx, ast.Load) else defined).add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
    return read - defined - STABLE


def overridden_names() -> set[str]:
    """Private attributes of classes of the libraries that classes of ours override."""
    names = set()
    for module in pkgutil.walk_packages(svqvae_hf.__path__, "svqvae_hf."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            is_imported = cls.__module__ != module.name
            if not is_imported:
                names |= private_names(cls) & names_of_libraries(cls)
    return names - STABLE - CACHED


def private_names(cls: type) -> set[str]:
    """Private attributes that a class defines itself."""
    return {name for name in vars(cls) if is_private(name)}


def names_of_libraries(cls: type) -> set[str]:
    """Attributes that the base classes of a class define in the libraries."""
    names = set()
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in LIBRARIES:
            names.update(vars(base))
    return names


@pytest.mark.slow  # imports every module
def test_lists_are_complete():
    assert imported_names() == IMPORTED.keys()
    assert used_names() == USED.keys()
    assert overridden_names() == OVERRIDDEN.keys()
