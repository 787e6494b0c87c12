"""Saves and uploads pipelines with their cards."""

import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from svqvae_hf.hub.model_cards import pipeline_card
from svqvae_hf.hub.publishing import CardMixin


class PipelineCardMixin(CardMixin, DiffusionPipeline):
    """A card with each saved and each uploaded pipeline."""

    def describe(self) -> tuple[str, str]:
        """Texts of the card: a sentence about the pipeline, and the arguments of an example's call."""
        raise NotImplementedError

    @property
    def task(self) -> str:
        """Task of the Hub."""
        return "unconditional-image-generation" if self.components.get("text_encoder") is None else "text-to-image"

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the pipeline, with a card unless the folder has one.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            safe_serialization (`bool`, defaults to `True`): Write safetensors, not pickles.
            variant (`str`, *optional*): Suffix of the weight files, such as `fp16`.
            max_shard_size (`int` or `str`, *optional*): Largest weight file, such as `"5GB"`.
            push_to_hub (`bool`, defaults to `False`): Upload the folder, with a card of diffusers. `push_to_hub` of
                the pipeline uploads the card of this library.
            use_flashpack (`bool`, defaults to `False`): Write FlashPack files, not safetensors.
            **kwargs: Further arguments of [`~diffusers.DiffusionPipeline.save_pretrained`].
        """
        super().save_pretrained(
            os.fspath(save_directory),
            safe_serialization,
            variant,
            max_shard_size,
            push_to_hub,
            use_flashpack,
            **kwargs,
        )
        card = Path(save_directory, "README.md")
        if not card.exists():
            card.write_text(self.make_card(card.absolute().parent.name), encoding="utf-8")

    def make_card(self, repo_id: str, **options: Any) -> str:
        """Text of the card; see [`~svqvae_hf.hub.model_cards.pipeline_card`]."""
        summary, call = self.describe()
        texts = {"summary": summary, "call": call, "tags": ["svqvae"], "provenance": {}, "pipeline_tag": self.task}
        return pipeline_card(type(self), repo_id=repo_id, **(texts | options))
