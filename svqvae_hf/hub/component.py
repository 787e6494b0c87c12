"""Loads a component of a pipeline's repository with the code beside its weights.

diffusers' `AutoModel` looks for code in `model_index.json` alone, which names one class for all components: this one.
"""

from typing import Any

import diffusers


class AutoModel(diffusers.AutoModel):
    """Model of a component, loaded with the code that the component's own config names."""

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads the config of the component. Ignores the config of the pipeline."""
        if cls.config_name == "model_index.json":
            raise OSError("the config of the pipeline does not name the code of its components")
        return super().load_config(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str, **kwargs: Any) -> Any:
        """Loads the component of a repository that is trusted already. Its code is saved with it."""
        model = super().from_pretrained(pretrained_model_or_path, trust_remote_code=True, **kwargs)
        model.register_for_auto_class()
        return model
