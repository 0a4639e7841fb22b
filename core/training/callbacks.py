import random

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


class EpochSeed(Callback):
    """Seed every random generator from (seed, epoch, rank) when an epoch starts.

    A resumed run then shuffles and drops out as the uninterrupted one did, without the states of the
    generators in the checkpoint.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed, and see to it that the epoch's iterator is made after that."""
        sequence = np.random.SeedSequence([self.seed, trainer.current_epoch, trainer.global_rank])
        value = int(sequence.generate_state(1)[0])
        random.seed(value)
        np.random.seed(value)  # noqa: NPY002  (the global generator is the one that others may draw from)
        torch.manual_seed(value)
        loop = trainer.fit_loop
        lightning_makes_it = (
            trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting
        )
        if not lightning_makes_it and loop._data_fetcher is not None:
            # The first epoch of a process comes with an iterator that drew its order before this seed.
            iter(loop._data_fetcher)


class UntrainedCandidate(Callback):
    """Validate before the first step, and let the model as it stands compete for the best checkpoint.

    A model whose closed-form part is already good may only get worse by training; early stopping starts from
    that value too.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run one whole validation and hand its metrics to the callbacks that monitor one.

        Raises:
            ValueError: a callback monitors a validation metric that the model does not log.
        """
        if (
            trainer.global_step > 0
            or not trainer.enable_validation
            or getattr(trainer, "fast_dev_run", False)
        ):
            return
        validate(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [call for call in callbacks if isinstance(call, ModelCheckpoint | EarlyStopping)]
        for callback in monitors:
            check_monitor(callback, trainer)
        for callback in monitors:
            if callback.monitor not in trainer.callback_metrics:
                continue
            if isinstance(callback, EarlyStopping):
                callback._run_early_stopping_check(trainer)
            else:
                # The public hooks skip step 0, as if nothing had changed since the last save.
                callback._save_topk_checkpoint(trainer, callback._monitor_candidates(trainer))


def validate(trainer: Trainer) -> None:
    """Run the validation loop from inside training, as the loop itself does between epochs."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def check_monitor(callback: ModelCheckpoint | EarlyStopping, trainer: Trainer) -> None:
    """Raise ``ValueError`` if ``callback`` waits for a validation metric that never comes."""
    monitor, logged = callback.monitor, trainer.callback_metrics
    if monitor is not None and monitor.startswith("val/") and monitor not in logged:
        raise ValueError(
            f"{type(callback).__name__} monitors {monitor!r}, which is not logged: "
            f"choose one of {', '.join(sorted(logged))}"
        )
