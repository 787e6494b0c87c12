"""Uploads models and pipelines with their cards."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from svqvae_hf.hub.repositories import prepare_repo, push_folder


class CardMixin:
    """Upload with a card, for models and pipelines of diffusers."""

    save_pretrained: Callable[..., Any]

    def make_card(self, repo_id: str, **options: Any) -> str:
        """Text of `README.md`.

        Args:
            repo_id (`str`): Repository or folder that the card's example loads.
            **options: Further arguments of the card, such as `license`.
        """
        raise NotImplementedError

    def write_missing_card(self, folder: Path, repo_id: str, *, standalone: bool) -> None:
        """Writes the card into a folder that has none.

        Args:
            folder (`Path`): Folder that the model or pipeline is saved in.
            repo_id (`str`): Repository or folder that the card's example loads.
            standalone (`bool`): Whether the folder holds the code.
        """
        card = folder / "README.md"
        if not card.exists():
            card.write_text(self.make_card(repo_id, standalone=standalone), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        standalone: bool = False,
        **card: Any,
    ) -> str:
        """Uploads the weights and configs, with a card.

        Args:
            repo_id (`str`): `org/name`; created if it does not exist.
            commit_message (`str`, *optional*): Title of the commit, by default `Upload` and the name of the class.
            private (`bool`, *optional*): Whether a new repository is private. By default, the setting
                of the organization decides.
            token (`str`, *optional*): Access token, by default the stored one.
            create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
            safe_serialization (`bool`, defaults to `True`): Write safetensors, not pickles.
            variant (`str`, *optional*): Suffix of the weight files, such as `fp16`. No card is written.
            subfolder (`str`, *optional*): Folder of the repository to upload to. No card is written.
            standalone (`bool`, defaults to `False`): Upload the code of the models as well, so that the repository
                loads with `trust_remote_code=True` where this package is not installed.
            **card: Arguments of `make_card`, such as `license`, the Hub's identifier of the licence of the weights.

        Returns:
            `str`: URL of the commit or pull request.

        Raises:
            OSError: If the Hub denies the request or cannot be reached.
            ValueError: If the Hub does not know the licence.
        """
        repo_id = prepare_repo(repo_id, private=private, license=card.get("license"), token=token)
        # A pipeline writes the id of its repository into its code, so it gets the id in place of `True`.
        standalone_option = repo_id if standalone else False
        is_whole_repository = variant is None and subfolder is None
        with TemporaryDirectory() as root:
            folder = Path(root, subfolder) if subfolder else Path(root)
            self.save_pretrained(
                folder,
                safe_serialization=safe_serialization,
                variant=variant,
                standalone=standalone_option,
            )
            readme = folder / "README.md"
            readme.unlink(missing_ok=True)
            if is_whole_repository:
                card_text = self.make_card(repo_id, standalone=standalone, **card)
                readme.write_text(card_text, encoding="utf-8")
            message = commit_message or f"Upload {type(self).__name__}"
            return push_folder(root, repo_id, message, create_pr=create_pr, token=token)
