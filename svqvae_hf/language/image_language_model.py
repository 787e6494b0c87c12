"""Language models with image tokens that load from, and are saved to, one folder with their processor."""

import os
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedConfig

from svqvae_files.json_files import read_json_object
from svqvae_files.outputs import share_weights
from svqvae_hf.hub.code import write_code
from svqvae_hf.hub.model_cards import language_card
from svqvae_hf.hub.origin import STARTED_FROM, find_origin
from svqvae_hf.hub.repositories import from_hub, hub_options
from svqvae_hf.loaders.causal_models import load_causal_model
from svqvae_hf.loaders.folder_checks import check_files
from svqvae_hf.loaders.pretrained_models import SVQVAEProcessor
from svqvae_hf.loaders.saved_parts import record_parts
from svqvae_hf.models.image_vocabulary import CONFIG_KEY, ImageVocabulary
from svqvae_hf.models.loading import check_merged, copy_code
from svqvae_hf.pipelines.any_to_any import ImageLanguagePipeline
from svqvae_hf.pipelines.image_chats import ImageChats
from svqvae_hf.pipelines.known_objects_file import KNOWN_OBJECTS_FILE, read_known_objects, write_known_objects
from svqvae_hf.pipelines.repository_index import write_json

CONFIG = "config.json"


class ImageLanguageModel(ImageChats):
    """A language model with image tokens and its processor, of one folder or Hub id.

    Its base class, [`~svqvae_hf.pipelines.image_chats.ImageChats`], draws, edits and captions images.

    Example:
        >>> pipe = ImageLanguageModel.from_pretrained("lm-with-images")
        >>> images = pipe.draw(["a pear above a sailboat"], guidance_scale=3.0)
        >>> captions = pipe.caption(images)
    """

    @staticmethod
    def is_at(source: str | os.PathLike) -> bool:
        """Whether a folder or Hub id holds a language model with image tokens. False if its config cannot be loaded.

        Raises:
            OSError: The config in a folder cannot be read.
            ValueError: The config is damaged.
        """
        path = Path(source, CONFIG)
        if path.is_file():
            return CONFIG_KEY in read_json_object(path)
        if Path(source).is_dir():
            return False
        try:
            config, _ = from_hub(PreTrainedConfig.get_config_dict, source)
        except OSError:  # there is no such repository, or the Hub does not answer
            return False
        return CONFIG_KEY in config

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> Self:
        """Loads a language model and its processor from a folder or Hub id.

        Args:
            source (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
            **options: Options of transformers' method for the language model. The options of the Hub among them, such
                as `revision`, are also used for the other files.

        Raises:
            OSError: If the files do not exist, or the Hub does not answer and the cache has no complete copy.
            ValueError: If a file is damaged, the parts were not made for each other, or the weights are not exactly
                what the config asks for.
        """
        check_files(source)
        options_of_hub = hub_options(options)
        config, _ = from_hub(PreTrainedConfig.get_config_dict, source, **options_of_hub)
        ImageVocabulary.from_config(config)  # raises if it has no image tokens
        processor = SVQVAEProcessor.from_pretrained(source, **options_of_hub)
        language_model = load_causal_model(source, **options)
        known_objects = read_known_objects(source, **options_of_hub)
        return cls(language_model, processor, known_objects)

    def save_pretrained(self, folder: str | os.PathLike, *, standalone: bool = False) -> None:
        """Saves the language model and its processor, and the known objects if the model has any.

        Args:
            folder (`str` or `os.PathLike`): Folder to write to.
            standalone (`bool`, defaults to `False`): Also write the code, so that transformers' `AutoProcessor` and
                `pipeline("any-to-any")` work with `trust_remote_code=True`, and a card if the folder has none. Without
                the code, this pipeline does not work.

        Raises:
            ValueError: The language model has an adapter of peft that is not merged.
        """
        check_merged("language_model", self.language_model)
        self.language_model.save_pretrained(folder)
        share_weights(Path(folder))
        self.processor.save_pretrained(folder)
        if self.known_objects is None:
            Path(folder, KNOWN_OBJECTS_FILE).unlink(missing_ok=True)  # of a model that was saved here before
        else:
            write_known_objects(self.known_objects, folder)
        path = Path(folder, CONFIG)
        config = read_json_object(path)
        config.pop("custom_pipelines", None)  # names code in the repository that the model was loaded from
        if standalone:
            write_code(Path(folder))
            module = copy_code(ImageLanguagePipeline, folder)
            pipeline_entry = {
                "impl": f"{module}.{ImageLanguagePipeline.__name__}",
                "pt": ["AutoModelForCausalLM"],
                "type": "multimodal",
            }
            config["custom_pipelines"] = {"any-to-any": pipeline_entry}
        write_json(path, config)
        record_parts(folder)
        if standalone:
            self._write_missing_card(Path(folder))

    def _write_missing_card(self, folder: Path) -> None:
        """Writes a card into a standalone folder that has none, with licence and origin of the loaded model."""
        card = folder / "README.md"
        if card.exists():
            return
        source = self.language_model.name_or_path or None  # empty if it was not loaded
        origin = find_origin({STARTED_FROM: source})
        text = language_card(
            folder.absolute().name,
            summary="A language model that draws and describes images.",
            standalone=True,
            license=origin.license,
            base_model=origin.base_model,
            provenance=origin.rows,
        )
        card.write_text(text, encoding="utf-8")
