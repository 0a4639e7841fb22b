import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


class RunCheckpoint(ModelCheckpoint):
    """One file that is overwritten in place, in a folder of runs that may have been moved since.

    Args:
        name: of the file.
        monitor: the logged metric that chooses; ``None`` keeps the latest.
        mode: ``"min"`` or ``"max"``.
        margin: share of the untrained model's score by which a trained one must be better to replace it.
    """

    def __init__(self, name: str, monitor: str | None = None, mode: str = "min", margin: float = 0.0) -> None:
        super().__init__(
            filename=name,
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )
        self.margin = margin
        self.untrained_score: float | None = None

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Say whether to save: better than the best so far, and than the untrained model by the margin."""
        if current is not None and trainer.global_step == 0:
            self.untrained_score = float(current)
        elif current is not None and self.untrained_score is not None and self.margin > 0:
            gain = self.untrained_score - float(current)
            if (gain if self.mode == "min" else -gain) <= self.margin * abs(self.untrained_score):
                return False
        return super().check_monitor_top_k(trainer, current)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: also the score of the untrained model."""
        return {**super().state_dict(), "untrained_score": self.untrained_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score of a run, also from another place than where it was written."""
        before, now = str(state_dict["dirpath"]), str(self.dirpath)
        moved = {
            key: value.replace(before, now, 1) if isinstance(value, str) else value
            for key, value in state_dict.items()
        }
        moved["best_k_models"] = {
            path.replace(before, now, 1): score for path, score in state_dict["best_k_models"].items()
        }
        self.untrained_score = state_dict["untrained_score"]
        super().load_state_dict(moved)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load the tensors and plain values of a checkpoint, and nothing that could run code.

    Raises:
        ValueError: the file is missing or truncated, or is not such a checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (
            "holds more than tensors and plain values" if zipfile.is_zipfile(path) else "is not a checkpoint"
        )
        raise ValueError(f"checkpoint {path} {reason}") from error
    except Exception as error:  # a broken file may fail anywhere in the reader
        raise ValueError(f"checkpoint {path} is truncated or is not a checkpoint") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"checkpoint {path} holds no model: it has no state_dict")
    return content
