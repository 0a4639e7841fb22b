"""What the data modules of all domains share: loaders whose order survives a restart."""

from abc import ABC
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from .checkpoint import read_checkpoint


class EpochSampler(Sampler[int]):
    """A shuffled order that depends on (seed, epoch) and on nothing else.

    `skip(samples, epoch)` leaves out what was used before a restart in the middle of that epoch.
    """

    def __init__(self, length: int, *, seed: int, epoch: int = 0) -> None:
        self.length, self.seed, self.epoch = length, seed, epoch
        self._skipped = (0, -1)

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch

    def skip(self, samples: int, epoch: int) -> None:
        """Leave out the first `samples` of `epoch`."""
        self._skipped = (samples, epoch)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        samples, epoch = self._skipped
        return iter(order[samples if epoch == self.epoch else 0 :].tolist())

    def __len__(self) -> int:
        return self.length


class ResumableLoader(DataLoader[Any]):
    """A loader that may be resumed in the middle of an epoch, because its sampler skips what was used."""

    def state_dict(self) -> dict[str, Any]:
        """What must be the same for the same order of batches to follow."""
        return {
            "batch_size": self.batch_size,
            "samples": len(self.sampler),  # type: ignore[arg-type]
            "seed": getattr(self.sampler, "seed", None),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to resume over other data or another batch size.

        Raises:
            ValueError: one of them changed.
        """
        now = self.state_dict()
        for name, before in state.items():
            if now.get(name) != before:
                raise ValueError(
                    f"cannot resume: the training data has {name}={now.get(name)} but had {name}={before} "
                    f"when the checkpoint was written"
                )


class DomainData(LightningDataModule, ABC):
    """Training batches in an order given by (seed, epoch), evaluation batches in order; no sample is dropped.

    Args:
        batch_size: samples in a batch.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        pin_memory: page-locked batches, for faster copies to a GPU.
        seed: of the training order; None takes the global seed (`seed_everything`) at set-up.
    """

    def __init__(
        self, batch_size: int = 32, num_workers: int = 0, pin_memory: bool = False, seed: int | None = None
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must not be negative")
        self.batch_size, self.num_workers, self.pin_memory = batch_size, num_workers, pin_memory
        self._seed = seed

    @property
    def seed(self) -> int:
        """Seed of the training order, fixed at its first use."""
        if self._seed is None:
            self._seed = torch.initial_seed() % 2**32
        return self._seed

    def training_loader(
        self, dataset: Dataset[Any], collate: Callable[[Any], Any] | None = None
    ) -> ResumableLoader:
        """Shuffled batches; after a restart they go on where the checkpoint was written."""
        samples = len(dataset)  # type: ignore[arg-type]
        sampler = EpochSampler(samples, seed=self.seed)
        self._resume(sampler, batches=-(-samples // self.batch_size))
        return ResumableLoader(dataset, sampler=sampler, **self._loader_options(collate))

    def evaluation_loader(
        self, dataset: Dataset[Any], collate: Callable[[Any], Any] | None = None
    ) -> DataLoader[Any]:
        """Batches in order, the last one shorter where need be."""
        return DataLoader(dataset, shuffle=False, **self._loader_options(collate))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data module."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the seed of the interrupted run."""
        self._seed = state_dict["seed"]

    def take_up_checkpoint(self) -> None:
        """Load this data module's state from the checkpoint that the trainer is about to load, if any.

        Lightning loads it after set-up, but set-up is when the data of a new file must be laid out as the
        training data was.
        """
        path = None if self.trainer is None else self.trainer.ckpt_path
        if path is not None:
            state = read_checkpoint(Path(path)).get(type(self).__qualname__)
            if state is not None:
                self.load_state_dict(state)

    def _resume(self, sampler: EpochSampler, batches: int) -> None:
        if self.trainer is None or self.trainer.world_size > 1:
            # Lightning wraps the sampler for several processes; the epoch then starts anew.
            return
        loop = self.trainer.fit_loop
        epoch: Any = loop.epoch_progress.current
        progress: Any = loop.epoch_loop.batch_progress.current
        used = progress.processed
        if used >= batches:
            sampler.set_epoch(epoch.ready)
            return
        sampler.set_epoch(epoch.processed)
        sampler.skip(used * self.batch_size, epoch.processed)

    def _loader_options(self, collate: Callable[[Any], Any] | None) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.pin_memory,
            "collate_fn": collate,
            # Its own generator: otherwise every pass over a loader would draw from the global one.
            "generator": torch.Generator().manual_seed(self.seed),
        }
