"""Language models with image tokens that load from, and are saved to, one folder with their processor."""

import json
import os
from pathlib import Path
from typing import Any, Self

from transformers import AutoModelForCausalLM, PreTrainedConfig

from svqvae_hf.hub.code import write_code
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.loaders.pretrained_models import SVQVAEProcessor
from svqvae_hf.models.image_vocabulary import CONFIG_KEY, ImageVocabulary
from svqvae_hf.models.loading import check_merged, check_weights, copy_code
from svqvae_hf.pipelines import drawing
from svqvae_hf.pipelines.any_to_any import ImageLanguagePipeline
from svqvae_hf.pipelines.repository_index import hub_options, write_json


class ImageLanguageModel(drawing.ImageLanguageModel):
    """[`~svqvae_hf.pipelines.drawing.ImageLanguageModel`] of a folder or Hub id.

    Example:
        >>> pipe = ImageLanguageModel.from_pretrained("lm-with-images")
        >>> images = pipe.draw(["a pear above a sailboat"], guidance_scale=3.0)
        >>> captions = pipe.caption(images)
    """

    @staticmethod
    def is_at(source: str | os.PathLike) -> bool:
        """Whether a folder or Hub id holds a language model with image tokens."""
        try:
            config, _ = from_hub(PreTrainedConfig.get_config_dict, source)
        except OSError:
            return False
        return CONFIG_KEY in config

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> Self:
        """Loads both from a folder or Hub id, with options of transformers' method for the language model."""
        hub = hub_options(options)
        ImageVocabulary.from_config(from_hub(PreTrainedConfig.get_config_dict, source, **hub)[0])
        options["output_loading_info"] = True
        language_model, info = from_hub(AutoModelForCausalLM.from_pretrained, source, **options)
        check_weights(str(source), info)
        return cls(language_model, SVQVAEProcessor.from_pretrained(source, **hub))

    def save_pretrained(self, folder: str | os.PathLike, *, standalone: bool = False) -> None:
        """Saves both.

        Args:
            folder (`str` or `os.PathLike`): Folder to write to.
            standalone (`bool`, defaults to `False`): Also write the code, so that transformers' `AutoProcessor` and
                `pipeline("any-to-any")` work with `trust_remote_code=True` where this package is not installed.

        Raises:
            ValueError: The language model has an adapter of peft that is not merged.
        """
        check_merged("language_model", self.language_model)
        self.language_model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        path = Path(folder, "config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("custom_pipelines", None)  # of the repository that the model came from
        if standalone:
            write_code(Path(folder))
            impl = f"{copy_code(ImageLanguagePipeline, folder)}.{ImageLanguagePipeline.__name__}"
            pipeline = {"impl": impl, "pt": ["AutoModelForCausalLM"], "type": "multimodal"}
            config["custom_pipelines"] = {"any-to-any": pipeline}
        write_json(path, config)
