"""Saves and uploads pipelines with their cards."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import DiffusionPipeline

from svqvae_hf.hub.model_cards import pipeline_card
from svqvae_hf.hub.repositories import prepare_repo, push_folder


class PipelineCardMixin(DiffusionPipeline):
    """A card with each saved and each uploaded pipeline."""

    def describe(self) -> tuple[str, str]:
        """Texts of the card: a sentence about the pipeline, and the arguments of an example's call."""
        raise NotImplementedError

    @property
    def task(self) -> str:
        """Task of the Hub."""
        return "unconditional-image-generation" if self.components.get("text_encoder") is None else "text-to-image"

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves the pipeline, with a card unless the folder has one.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            *args: Further arguments of [`~diffusers.DiffusionPipeline.save_pretrained`].
            **kwargs: Further arguments of [`~diffusers.DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: `push_to_hub` is set.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "`save_pretrained` cannot upload. Call the pipeline's `push_to_hub`, which uploads the card as well."
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        card = Path(save_directory, "README.md")
        if not card.exists():
            self._write_card(card, card.absolute().parent.name)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload pipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        license: str | None = None,
    ) -> str:
        """Uploads the pipeline with its card.

        Args:
            repo_id (`str`): `org/name`; created if it does not exist.
            commit_message (`str`, defaults to `"Upload pipeline"`): Title of the commit.
            private (`bool`, *optional*): Visibility of a new repository, by default the organization's.
            token (`str`, *optional*): Access token, by default the stored one.
            create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
            variant (`str`, *optional*): Suffix of the weight files, such as `fp16`. The repository keeps its card.
            license (`str`, *optional*): Licence of the weights, by the Hub's identifier; by default `unknown`.

        Returns:
            `str`: URL of the commit or pull request.

        Raises:
            OSError: If the Hub denies it or cannot be reached.
            ValueError: If the Hub does not know the licence.
        """
        repo_id = prepare_repo(repo_id, private=private, license=license, token=token)
        with TemporaryDirectory() as folder:
            super().save_pretrained(folder, variant=variant)
            if variant is None:
                self._write_card(Path(folder, "README.md"), repo_id, license)
            return push_folder(folder, repo_id, commit_message, create_pr=create_pr, token=token)

    def _write_card(self, file: Path, repo_id: str, license: str | None = None) -> None:
        summary, call = self.describe()
        text = pipeline_card(
            type(self),
            repo_id=repo_id,
            summary=summary,
            call=call,
            tags=["svqvae"],
            provenance={},
            license=license,
            pipeline_tag=self.task,
        )
        file.write_text(text, encoding="utf-8")
