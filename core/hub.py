"""Checkpoints as a folder: ``config.json`` and ``model.safetensors``, the layout of the Hugging Face Hub."""

import json
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_CARD = """---
{{ card_data }}
---

A linear-RNN backbone. Load it with `from mainstem import Backbone; Backbone.from_pretrained(...)`.
"""


class Pretrained(PyTorchModelHubMixin):
    """Adds ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` to a module that can say its
    configuration.

    The folder also records the class, so that a checkpoint of another class is refused by name.
    """

    def hub_config(self) -> dict[str, Any]:
        """Give the keywords of ``__init__``, as JSON can hold them."""
        raise NotImplementedError

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, torch.nn.Module)
        config = {"class": type(self).__name__, **self.hub_config()}
        # Written beside and renamed, so that a crash leaves no half-written checkpoint.
        weights = save_directory / f"{WEIGHTS}.part"
        save_model(self, str(weights))
        weights.replace(save_directory / WEIGHTS)
        (save_directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a checkpoint, in evaluation mode, from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path: the folder, or the repository's name.
            kwargs: of ``PyTorchModelHubMixin.from_pretrained`` (revision, token, cache_dir, …).

        Raises:
            ValueError: there is no such checkpoint, it is of another class, or a file in it is damaged.
        """
        name = str(pretrained_model_name_or_path)
        try:
            return super().from_pretrained(name, **kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(f"checkpoint {name!r}: {CONFIG} is damaged ({error})") from None
        except (OSError, HFValidationError):
            raise ValueError(
                f"checkpoint {name!r} is no folder, and no repository that can be reached"
            ) from None

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        config: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Self:
        if config is None:
            raise ValueError(f"checkpoint {model_id!r} is no folder or repository with a {CONFIG}")
        found = config.get("class", "an unknown class")
        if found != cls.__name__:
            raise ValueError(f"checkpoint {model_id!r} holds {found}, not {cls.__name__}")
        path = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            path = Path(
                hf_hub_download(
                    model_id,
                    WEIGHTS,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        return cls._load(cls(**fields), model_id, path, map_location, strict)

    @classmethod
    def _load(cls, model: Self, model_id: str, path: Path, map_location: str, strict: bool) -> Self:
        assert isinstance(model, torch.nn.Module)
        try:
            weights = load_file(path, device=map_location)
        except FileNotFoundError:
            raise ValueError(f"checkpoint {model_id!r} has no {WEIGHTS}") from None
        except SafetensorError as error:
            raise ValueError(
                f"checkpoint {model_id!r}: {WEIGHTS} is damaged or truncated ({error})"
            ) from None
        try:
            model.load_state_dict(weights, strict=strict)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"checkpoint {model_id!r}: {WEIGHTS} does not fit {CONFIG} ({reason})") from None
        return model.to(map_location).eval()
