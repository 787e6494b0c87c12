"""Uploads models and pipelines with their cards."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from svqvae_hf.hub.repositories import prepare_repo, push_folder

CARD = "README.md"
# Arguments of `make_card` that `save_pretrained` takes as well.
CARD_OPTIONS = ("license", "provenance", "base_model", "datasets", "tags", "pipeline_tag", "variants")


def pop_card_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Removes the arguments of `make_card` from those of `save_pretrained`, and returns them."""
    options = {}
    for name in CARD_OPTIONS:
        if name in arguments:
            options[name] = arguments.pop(name)
    return options


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

    def card_for(self, folder: Path, repo_id: str, options: Mapping[str, Any], *, standalone: bool) -> str | None:
        """Text of the card that is to be written into a folder; `None` if the folder keeps the card that it has.

        Args:
            folder (`Path`): Folder that the model or pipeline is saved in.
            repo_id (`str`): Repository or folder that the card's example loads.
            options (`Mapping[str, Any]`): Arguments of `make_card`. If there are any, the card is written anew.
            standalone (`bool`): Whether the folder holds the code.
        """
        has_card = (folder / CARD).exists()
        if has_card and not options:
            return None
        return self.make_card(repo_id, standalone=standalone, **options)

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
            readme = folder / CARD
            readme.unlink(missing_ok=True)
            if is_whole_repository:
                card_text = self.make_card(repo_id, standalone=standalone, **card)
                readme.write_text(card_text, encoding="utf-8")
            message = commit_message or f"Upload {type(self).__name__}"
            return push_folder(root, repo_id, message, create_pr=create_pr, token=token)
